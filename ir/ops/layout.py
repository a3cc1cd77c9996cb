"""Layout: operators that move, split and join axes without computing. Their rules are the primitives of the algebra."""

from __future__ import annotations

import torch
from torch import randn

from regauge.ir.extents import Concat, resolve
from regauge.ir.operator import Symmetry, operator, sample


def _reshape_rule(call):  # type: ignore[no-untyped-def]
    axes = call.reshape(call.operand(0), call.node.outputs[0].shape)
    call.derive(shape=tuple(axes))
    return axes


def _view(build, x, size):  # type: ignore[no-untyped-def]
    return build.reshape(x, shape=explicit_shape(x.shape, size))


def explicit_shape(shape, target):  # type: ignore[no-untyped-def]
    """A reshape target with its -1 replaced by the size it stands for."""
    from regauge.ir.sizes import divide, product

    target = list(target)
    if -1 in [t for t in target if isinstance(t, int)]:
        hole = target.index(-1)
        rest = product(t for i, t in enumerate(target) if i != hole)
        target[hole] = divide(product(shape), rest)
    return tuple(target)


@operator(
    rule=_reshape_rule,
    aten={"view": _view, "reshape": _view, "_unsafe_view": _view},
    samples=lambda: [
        sample(randn(2, 3, 8), shape=(2, 3, 2, 4)),
        sample(randn(2, 3, 4), shape=(2, 12)),
        sample(randn(6, 4), shape=(2, 3, 4)),
    ],
    symmetry=Symmetry.LINEAR,
)
def reshape(x, *, shape):
    return x.reshape(shape)


def _permute_rule(call):  # type: ignore[no-untyped-def]
    axes = call.operand(0)
    return [axes[d] for d in call["dims"]]


def _transpose(build, x, dim0, dim1):  # type: ignore[no-untyped-def]
    dims = list(range(x.rank))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return build.permute(x, dims=dims)


@operator(
    rule=_permute_rule,
    aten={
        "permute": lambda build, x, dims: build.permute(x, dims=[d % x.rank for d in dims]),
        "transpose.int": _transpose,
        "t": lambda build, x: build.permute(x, dims=list(range(x.rank))[::-1]),
    },
    samples=lambda: [sample(randn(2, 3, 4), dims=(2, 0, 1))],
    symmetry=Symmetry.LINEAR,
)
def permute(x, *, dims):
    return x.permute(dims)


def _concat_rule(call):  # type: ignore[no-untyped-def]
    operands = [axes for axes in call.axes if axes is not None]
    rank = len(operands[0])
    axis = call.normal(call["dim"], rank)
    result = []
    for position in range(rank):
        if position == axis:
            result.append(resolve(Concat([axes[position] for axes in operands])))
            continue
        for axes in operands[1:]:
            call.unify(operands[0][position], axes[position])
        result.append(operands[0][position])
    return result


def _cat(build, tensors, dim=0):  # type: ignore[no-untyped-def]
    # torch skips legacy empty tensors of shape (0,)
    full = [t for t in tensors if t.shape != (0,)]
    return build.concat(*full, dim=dim)


@operator(
    rule=_concat_rule,
    aten={"cat": _cat, "concat": _cat, "concatenate": _cat},
    samples=lambda: [sample(randn(2, 3, 4), randn(2, 5, 4), dim=1), sample(randn(2, 3), randn(2, 3), dim=-1)],
    symmetry=Symmetry.LINEAR,
)
def concat(*tensors, dim):
    return torch.cat(tensors, dim)
