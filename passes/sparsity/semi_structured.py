"""Weights 2:4 as sparse tensor cores take them: the two values of every four, and where they stood.

    weight [rows, columns]   ->   values [rows, columns / 2]
                                  places [rows, columns / 16] in int16: two numbers of two bits for each four columns

This is the layout of the PTX instruction mma.sp. Kernels read the places in an order of their own:
:func:`kernel_operands` gives torch's for CUTLASS. On a CUDA machine :func:`use_sparse_kernels` lets the linear layers
of a module run on them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.passes.sparsity.patterns import NofM

# Multiples that both of torch's backends, cuSPARSELt and CUTLASS, take (SparseSemiStructuredTensor*, torch.sparse).
_ROWS, _COLUMNS = 32, 64
_TYPES = (torch.float16, torch.bfloat16)


class Packed(NamedTuple):
    """A weight 2:4: ``values`` [rows, columns / 2] and ``places`` int16 [rows, columns / 16]."""

    values: torch.Tensor
    places: torch.Tensor


def pack(weight: torch.Tensor) -> Packed:
    """A matrix with at most two of every four neighbours in a row; raises PassError for any other.

    The columns are a multiple of 16.
    """
    _check(weight)
    if weight.shape[1] % 16:
        raise PassError(f"a weight of {weight.shape[1]} columns cannot be packed: 16 columns share one number")
    fours = weight.reshape(len(weight), -1, 4)
    # the two that are not zero; where there are fewer, zeros fill up; in rising order
    chosen = (fours != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)[:, :, :2].sort(2).values
    values = fours.gather(2, chosen).reshape(len(weight), -1)
    nibbles = (chosen[:, :, 0] | chosen[:, :, 1] << 2).reshape(len(weight), -1, 4)
    shifts = torch.tensor([0, 4, 8, 12], device=weight.device)
    numbers = (nibbles << shifts).sum(2)
    return Packed(values, torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16))


def unpack(packed: Packed) -> torch.Tensor:
    """The matrix [rows, columns] that was packed."""
    values, places = packed
    numbers = places.to(torch.int64) & 0xFFFF
    shifts = torch.tensor([0, 4, 8, 12], device=values.device)
    nibbles = (numbers[:, :, None] >> shifts).reshape(len(values), -1) & 15
    chosen = torch.stack([nibbles & 3, nibbles >> 2], 2)
    fours = values.new_zeros(*chosen.shape[:2], 4)
    return fours.scatter(2, chosen, values.reshape(chosen.shape)).reshape(len(values), -1)


def kernel_operands(weight: torch.Tensor) -> Packed:
    """Values and places as torch's CUTLASS kernels read them; raises PassError for what they do not take."""
    from torch.sparse import _semi_structured_conversions as conversions

    reason = kernel_misfit(weight)
    if reason is not None:
        raise PassError(f"a weight {list(weight.shape)} cannot run on sparse tensor cores: {reason}")
    return Packed(*conversions.sparse_semi_structured_from_dense_cutlass(weight))  # type: ignore[no-untyped-call]


def kernel_misfit(weight: torch.Tensor) -> str | None:
    """Why a weight [outputs, inputs] cannot run on torch's sparse kernels; None where it can."""
    if weight.dim() != 2:
        return "it is no matrix"
    if weight.dtype not in _TYPES:
        return "it is neither float16 nor bfloat16"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"its sizes are no multiples of {_ROWS} and {_COLUMNS}"
    return None if _is_sparse(weight) else "it is not 2:4"


def use_sparse_kernels(module: nn.Module) -> dict[str, str]:
    """Let the linear layers of a module on a CUDA device run on sparse kernels, in place, for inference.

    Returns the layers that stay dense, with the reason of each.
    """
    left = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        reason = kernel_misfit(layer.weight)
        if reason is None:
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
        else:
            left[name] = reason
    return left


def _is_sparse(weight: torch.Tensor) -> bool:
    return NofM(2, 4).holds(weight != 0)


def _check(weight: torch.Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] % 4 or not _is_sparse(weight):
        raise PassError(f"a weight {list(weight.shape)} is not 2:4: make it so by sparsify{{pattern=2:4}}")
