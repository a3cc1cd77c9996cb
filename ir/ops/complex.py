"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.operator import Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number

# -- views -------------------------------------------------------------------------------------------------------------


@operator(
    rule=lambda call: call.apply("a... -> a... p ; whole p", p=2),
    aten={"view_as_real": None},
    samples=lambda: [sample(randn(2, 3, dtype=torch.complex64)), sample(randn((), dtype=torch.complex128))],
    symmetry=Symmetry.LINEAR,
)
def view_as_real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x)


@operator(
    rule="a... p -> a... ; whole p",
    aten={"view_as_complex": None},
    samples=lambda: [sample(randn(2, 3, 2)), sample(randn(2))],
    symmetry=Symmetry.LINEAR,
)
def view_as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.contiguous())


# -- parts -------------------------------------------------------------------------------------------------------------


def _pointwise(call: Call) -> Axes:
    return call.pointwise()


@operator(
    name="complex",
    rule=_pointwise,
    aten={"complex": None},
    samples=lambda: [sample(randn(2, 3), randn(2, 3)), sample(randn(2, 3), randn(3))],
    symmetry=Symmetry.LINEAR,
)
def _complex(real: torch.Tensor, imag: torch.Tensor) -> torch.Tensor:
    return torch.complex(real, imag)


@operator(rule=_pointwise, aten={"polar": None}, samples=lambda: [sample(randn(2, 3).abs(), randn(2, 3))])
def polar(abs: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:  # noqa: A002
    return torch.polar(abs, angle)


def _real(build: Builder, x: Value) -> Any:
    return build.real(x) if _is_complex(x) else x


def _conj(build: Builder, x: Value) -> Any:
    return build.conj(x) if _is_complex(x) else x


def _is_complex(x: Value) -> bool:
    return isinstance(x.dtype, torch.dtype) and x.dtype.is_complex


@operator(
    rule=_pointwise,
    aten={"real": _real},
    samples=lambda: [sample(randn(2, 3, dtype=torch.complex64))],
    symmetry=Symmetry.LINEAR,
)
def real(x: torch.Tensor) -> torch.Tensor:
    return torch.real(x)


@operator(
    rule=_pointwise,
    aten={"imag": None},
    samples=lambda: [sample(randn(2, 3, dtype=torch.complex64))],
    symmetry=Symmetry.LINEAR,
)
def imag(x: torch.Tensor) -> torch.Tensor:
    return torch.imag(x)


@operator(
    rule=_pointwise,
    aten={"conj": _conj, "_conj": _conj, "conj_physical": _conj, "resolve_conj": lambda build, x: x},
    samples=lambda: [sample(randn(2, 3, dtype=torch.complex64))],
    symmetry=Symmetry.LINEAR,
)
def conj(x: torch.Tensor) -> torch.Tensor:
    return torch.conj(x).resolve_conj()


@operator(
    rule=_pointwise,
    aten={"angle": None},
    samples=lambda: [sample(randn(2, 3, dtype=torch.complex64)), sample(randn(3))],
)
def angle(x: torch.Tensor) -> torch.Tensor:
    return torch.angle(x)


# -- Fourier transforms ------------------------------------------------------------------------------------------------


def _fourier_rule(call: Call) -> Axes:
    """Every frequency is a sum over all entries: both sides keep all of them."""
    axes = list(call.operand(0))
    for d in {call.normal(d, len(axes)) for d in call["dims"]}:
        frequencies = call.fresh(call.node.outputs[0].shape[d])
        call.role("whole", axes[d])
        call.role("whole", frequencies)
        axes[d] = frequencies
    return axes


def _fourier(transform: str, default: int | None) -> Any:
    """``default`` is how many trailing axes are transformed when none are named; None stands for all."""

    def adapt(build: Builder, x: Value, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
        count = x.rank if default is None else default
        if dim is None:
            dim = range(-(len(s) if isinstance(s, Sequence) else count), 0)
        dims = (dim,) if isinstance(dim, int) else tuple(dim)
        sizes = None if s is None else tuple(s) if isinstance(s, Sequence) else (s,)
        dims = tuple(axis_number(d, x.rank) for d in dims)
        return build.fourier(x, transform=transform, sizes=sizes, dims=dims, norm=norm or "backward")

    return adapt


def _fourier_1d(transform: str) -> Any:
    adapt = _fourier(transform, 1)
    return lambda build, x, n=None, dim=-1, norm=None: adapt(build, x, n, dim, norm)


@operator(
    rule=_fourier_rule,
    aten={
        **{f"fft_{name}": _fourier_1d(f"{name}n") for name in ("fft", "ifft", "rfft", "irfft")},
        **{f"fft_{name}2": _fourier(f"{name}n", 2) for name in ("fft", "ifft", "rfft", "irfft")},
        **{f"fft_{name}n": _fourier(f"{name}n", None) for name in ("fft", "ifft", "rfft", "irfft")},
    },
    samples=lambda: [
        sample(randn(2, 4, 6), transform="fftn", dims=(1, 2)),
        sample(randn(2, 4, 6), transform="rfftn", dims=(2,)),
        sample(randn(2, 4, 4, dtype=torch.complex64), transform="irfftn", dims=(2,), sizes=(6,), norm="ortho"),
    ],
    symmetry=Symmetry.LINEAR,
)
def fourier(
    x: torch.Tensor,
    *,
    transform: str,
    dims: tuple[int, ...],
    sizes: tuple[int, ...] | None = None,
    norm: str = "backward",
) -> torch.Tensor:
    result: torch.Tensor = getattr(torch.fft, transform)(x, sizes, dims, norm)
    return result
