"""Is a pruned module its masked original? An oracle that knows nothing of the tool that pruned.

Every weight has unique float64 values, so the kept indices of a parameter are found by value. In a copy of the original
everything that was not kept is set to zero. What normalises over a cut axis sees fewer entries in the pruned module, so
in the masked original every normaliser (layer, group and batch statistics, mean, variance, maximum, softmax) is
computed over the positions that were kept: those whose gain is not zero, or, where there is no gain, those that are not
zero everywhere. This too is read off the values, not off anybody's axis analysis. What is shifted by a mean or by a
maximum over an axis is not zero any more where it was removed, and may be zero where it was kept: it remembers which
positions were kept before (``remembered``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BOUNDLESS = 1e30  # models write -inf as the least number of their type


def kept_entries(original: Tensor, pruned: Tensor) -> Tensor | None:
    """Where the values of ``original`` are that ``pruned`` has; None where it has others, or some more than once.

    A weight that was cut along axes has a box of them; where each head or group kept indices of its own it has not.
    """
    found = torch.isin(original, pruned)
    if original.shape == pruned.shape and torch.equal(original, pruned):
        return torch.ones_like(found)
    same = original.dim() == pruned.dim() and int(found.sum()) == pruned.numel()
    return found if same and torch.equal(original[found].sort().values, pruned.flatten().sort().values) else None


def mask_parameters(model: nn.Module, pruned: nn.Module) -> list[str]:
    """Zero in ``model`` whatever ``pruned`` does not hold; returns the parameters that are no part of the original."""
    small = dict(pruned.named_parameters(remove_duplicate=False))
    strange = []
    masks: dict[int, tuple[Tensor, Tensor]] = {}
    for name, original in model.named_parameters(remove_duplicate=False):
        kept = kept_entries(original.data, small[name].data) if name in small else None
        if kept is None:
            strange.append(name)
            continue
        mask = kept.to(original.dtype)
        previous = masks.get(id(original))
        masks[id(original)] = (original.data, mask if previous is None else mask * previous[1])
    for data, mask in masks.values():
        data.mul_(mask)
    return strange


def _present(x: Tensor, axes: Iterable[int]) -> Tensor:
    """1 where a position on ``axes`` is not zero for every index of the other axes, else 0; broadcast against ``x``."""
    remembered = getattr(x, "remembered", None)
    keep = {axis % x.dim() for axis in axes}
    if remembered is not None and [a for a in range(x.dim()) if remembered.shape[a] > 1] == sorted(keep):
        return remembered
    others = [axis for axis in range(x.dim()) if axis not in keep]
    found = x != 0
    return (found.any(dim=others, keepdim=True) if others else found).to(x.dtype)


def _gained(x: Tensor, axes: list[int], weight: Tensor | None) -> Tensor:
    """Like :func:`_present`, from a gain over ``axes`` where one was cut: biases may fill what was removed."""
    if weight is None or weight.all():  # a gain of 1 + weight is nowhere zero
        present = _present(x, axes)
        return present if present.any() else torch.ones_like(present)
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.dim())]
    return (weight != 0).to(x.dtype).reshape(shape)


class KeptStatistics(TorchFunctionMode):
    """Within this mode normalisers see only the positions that were kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        handler = _HANDLERS.get(name)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _normalised(x: Tensor, axes: list[int], eps: float, present: Tensor) -> Tensor:
    x = x.contiguous()  # as torch's own results are: models call view on them
    count = present.expand_as(x).sum(dim=axes, keepdim=True).clamp_min(1)
    mean = (x * present).sum(dim=axes, keepdim=True) / count
    centred = (x - mean) * present
    variance = centred.square().sum(dim=axes, keepdim=True) / count
    return centred / (variance + eps).sqrt()


def _layer_norm(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor | None:
    axes = list(range(x.dim() - len(shape), x.dim()))
    present = _gained(x, axes, weight)
    if present.all():
        return None
    y = _normalised(x, axes, eps, present)
    y = y * weight if weight is not None else y
    return (y + bias) * present if bias is not None else y


def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    axes = list(range(x.dim() - len(shape), x.dim()))
    present = _gained(x, axes, weight)
    count = present.expand_as(x).sum(dim=axes, keepdim=True).clamp_min(1)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x.contiguous() * present
    y = x * (x.square().sum(dim=axes, keepdim=True) / count + eps).rsqrt()
    return y * weight if weight is not None else y


def _group_norm(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor | None:
    present = _gained(x, [1], weight)
    if present.all():
        return None
    parts = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    here = present.expand(1, *x.shape[1:]).reshape(1, groups, -1, *x.shape[2:])
    y = _normalised(parts, list(range(2, parts.dim())), eps, here).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y * weight.reshape(shape) if weight is not None else y
    return (y + bias.reshape(shape)) * present if bias is not None else y


def _batch_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *_: Any,
) -> Tensor | None:  # fmt: skip
    if not training:
        return None
    axes = [axis for axis in range(x.dim()) if axis != 1]
    present = (x != 0).to(x.dtype) if x.shape[0] == 1 else _present(x, axes)  # a weight's own statistics: no batch
    if present.all():
        return None
    y = _normalised(x, axes, eps, present)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y * weight.reshape(shape) if weight is not None else y
    return (y + bias.reshape(shape)) * present if bias is not None else y


def _axes(x: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == ():
        return list(range(x.dim()))
    return [d % x.dim() for d in (dim if isinstance(dim, list | tuple) else [dim])]


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, axis: Any = None, **_: Any) -> Tensor | None:
    axes = _axes(x, dim if axis is None else axis)
    present = _present(x, axes)
    if present.all():
        return None
    count = present.sum(dim=[a for a in axes], keepdim=True).clamp_min(1)
    y = x.sum(dim=axes, keepdim=True) / count
    y = y if keepdim else y.squeeze(axes)
    y.mean_over = present  # type: ignore[attr-defined]
    return y


def _shifted(x: Tensor, y: Any, **_: Any) -> Tensor | None:
    """``x - x.mean(...)`` and ``x - x.amax(...)``, written out: what was removed is not there, and not minus those."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.dim() != x.dim():
        return None
    mean, maximum = getattr(y, "mean_over", None), getattr(y, "maximum_over", None)
    present = mean if mean is not None else maximum
    if present is None:
        return None
    result: Any = (x - y) * present if mean is not None else x - y
    result.remembered = present
    return result


def _var(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: Any = None
) -> Any:
    axes = _axes(x, dim)
    present = _present(x, axes)
    if present.all():
        return None
    count = present.sum(dim=axes, keepdim=True)
    mean = x.sum(dim=axes, keepdim=True) / count.clamp_min(1)
    offset = correction if correction is not None else 0 if unbiased is False else 1
    y = ((x - mean) * present).square().sum(dim=axes, keepdim=True) / (count - offset).clamp_min(1)
    return y if keepdim else y.squeeze(axes)


def _std(*args: Any, **kwargs: Any) -> Any:
    variance = _var(*args, **kwargs)
    return None if variance is None else variance.sqrt()


def _var_mean(
    x: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *, correction: Any = None
) -> Any:
    variance = _var(x, dim, unbiased, keepdim, correction=correction)
    return None if variance is None else (variance, _mean(x, dim, keepdim))


def _amax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    axes = _axes(x, dim)
    present = _present(x, axes)
    if not present.any() or not x.is_floating_point():
        return None
    y: Any = x.masked_fill(present == 0, -math.inf).amax(dim=axes, keepdim=keepdim)
    y.maximum_over = present
    return y


def _max(x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    present = _present(x, [dim]) if isinstance(dim, int) else None
    if present is None or not present.any() or not x.is_floating_point():
        return None
    values: Any
    values, indices = x.masked_fill(present == 0, -math.inf).max(dim, keepdim)
    values.maximum_over = present
    return torch.return_types.max((values, indices))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g * v / |v|``: what was removed is zero, and not 0 / 0."""
    return torch._weight_norm(v, g, dim).masked_fill(v == 0, 0)


def _softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor | None:
    present = _present_within(x, dim % x.dim())
    if present.all():
        return None
    return torch.exp(torch.log_softmax(x.masked_fill(present == 0, -math.inf), dim))


def _present_within(x: Tensor, axis: int) -> Tensor:
    """Like :func:`_present`; where each index of another axis, a head, kept as many positions of its own, in it.

    A head that was removed has none: what it gives reaches nothing, but must not be NaN.
    """
    found = _present(x, [axis])
    for other in range(x.dim()):
        if other == axis:
            continue
        within = _present(x, [other, axis])
        counts = within.sum(axis).flatten()
        here = counts > 0
        if bool(here.any()) and bool((counts[here] == counts[here][0]).all()) and int(counts.max()) < int(found.sum()):
            return torch.where(within.any(axis, keepdim=True), within, torch.ones_like(within))
    return found


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor | None = None, **_: Any) -> Tensor | None:
    """torch has it in single precision only."""
    if offs is None or x.dtype != torch.float64:
        return None
    result, start = x.new_zeros(x.shape[0], weight.shape[2]), 0
    for expert, end in enumerate(offs.tolist()):
        result[start:end] = x[start:end] @ weight[expert]
        start = end
    return result


_HANDLERS: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "batch_norm": _batch_norm,
    "mean": _mean, "var": _var, "std": _std, "amax": _amax, "max": _max, "softmax": _softmax, "sub": _shifted,
    "__sub__": _shifted, "_weight_norm": _weight_norm,
    "var_mean": _var_mean, "grouped_mm": _grouped_mm, "_grouped_mm": _grouped_mm,
}  # fmt: skip


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error over outputs; inf when a shape differs or a value is not finite in one of them only.

    What is infinite, or stands for it as in an attention mask, and equal is left out: all else would vanish beside it.
    """
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return math.inf
        if not b.is_complex():
            a, b = a.double(), b.double()
        boundless = (a == b) & (b.abs() > BOUNDLESS)
        a, b = a.masked_fill(boundless, 0), b.masked_fill(boundless, 0)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return math.inf  # max() below would pass over a NaN
        worst = max(worst, float((a - b).norm() / (b.norm() + 1e-300)))
    return worst


def masked_error(
    original: nn.Module, pruned: nn.Module, call: Callable[[nn.Module], list[Tensor]]
) -> tuple[float, list[str]]:
    """Relative error of ``pruned`` against the masked ``original`` (overwritten), and parameters that are no part.

    The masked original is taken as it is, or with normalisers that see only what was kept, whichever is nearer: what is
    kept may be zero at a whole place of an image, which then counts as removed.
    """
    strange = mask_parameters(original, pruned)
    with torch.no_grad():
        actual, plain = call(pruned), call(original)
        with KeptStatistics():
            expected = call(original)
    return min(relative_error(actual, expected), relative_error(actual, plain)), strange
