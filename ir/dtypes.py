"""Types of entries: torch's, by short names in text; a type that torch lacks is its name."""

from __future__ import annotations

from typing import TypeAlias

import torch

Dtype: TypeAlias = torch.dtype | str  # a string names a type torch does not have, such as "string"

_DTYPE_NAMES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

OVERFLOWING = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""Floats of 8 bits in which what is too large is infinite in torch, or no number where there is no infinity."""


def is_real(dtype: Dtype) -> bool:
    """Whether a type holds real or complex numbers, not integers, truths or what torch does not have."""
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of at least single precision: small constants, and sums of squares, need more than half has."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def epsilon_of(dtype: Dtype) -> float:
    """The ``eps`` of torch's norms given as None: from 1 to the next number, in the type that they compute in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def dtype_name(dtype: Dtype) -> str:
    """``f32`` for torch.float32; other types keep torch's name."""
    return dtype if isinstance(dtype, str) else _DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> Dtype:
    found = _DTYPES.get(name, getattr(torch, name, None))
    return found if isinstance(found, torch.dtype) else name
