"""Schemes of quantization: how weights are stored, and whether layers multiply quantized numbers.

A scheme is a line here: a function from what is wanted of it to a format, and the options that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from regauge.passes.quantization.codebooks import Tables
from regauge.passes.quantization.float_grids import Float8, Powers
from regauge.passes.quantization.formats import Format
from regauge.passes.quantization.grid import Form, Grid, Ternary
from regauge.passes.quantization.signs import OneBit
from regauge.passes.quantization.targets import Target

SchemeName: TypeAlias = Literal[
    "w8a8", "w8", "w4", "w3", "w2", "mixed", "ternary", "fp8", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "pow2", "bfp",
    "codebook", "onebit", "bitstack",
]  # fmt: skip
Statistic: TypeAlias = Literal["least", "mean", "median"]
Per: TypeAlias = Literal["tensor", "row", "group"]


@dataclass(frozen=True)
class Wanted:
    """What is asked for a weight: columns that share a scale, or ``shared``: one scale for all; what options say.

    ``rows`` share a codebook, None: all.
    """

    bits: int
    group: int
    shared: bool
    symmetric: bool | None = None
    statistic: Statistic | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Scheme:
    """``bits`` of weights where nothing else is said; ``activations``: whether what layers read is quantized, too.

    ``make`` gives the format of a weight, None where weights are stored together. ``takes`` are the options of the pass
    that say how weights are stored. ``kind`` is what a runtime must have kernels for, ``integers`` or something else
    (:class:`regauge.passes.quantization.targets.Target`). ``grouped``: whether neighbouring inputs share a scale where
    nothing is said, and not whole rows. ``numbers``: the grid of weights and activations in place of the target's
    integers. ``mixed``: whether each layer's bits are chosen. ``whole``: scales are those of the whole range.
    """

    bits: int
    make: Callable[[Wanted], Format] | None
    takes: tuple[str, ...] = ()
    activations: bool = False
    kind: str = "integers"
    grouped: bool = True
    numbers: Grid | None = None
    mixed: bool = False
    whole: bool = False

    def with_exponents(self, margin: int | None, bias: int | None) -> Scheme:
        """A scheme of floats of 8 bits with exponents by these rules (:class:`.float_grids.Float8`)."""
        if self.make is None or margin is None and bias is None:
            return self
        make = self.make

        def ruled(grid: Grid) -> Grid:
            assert isinstance(grid, Float8)
            return replace(grid, margin=margin or 0, bias=bias)

        def form(wanted: Wanted) -> Format:
            found = make(wanted)
            assert isinstance(found, Form)
            return replace(found, grid=ruled(found.grid), scales="whole")

        return replace(self, make=form, numbers=None if self.numbers is None else ruled(self.numbers), whole=True)

    def form(self, grid: Grid, group: int) -> Form:
        """How a weight is stored on the grid of a target."""
        return Form(grid, group, "whole" if self.whole else "searched")

    @property
    def alone(self) -> bool:
        """Whether weights are plain integers, all of as many bits, and nothing else is quantized."""
        return self.make is integers and not self.activations and not self.mixed

    def on(self, target: Target) -> Target:
        """A target as it is for this scheme."""
        if self.numbers is None:
            return target
        return replace(target, activations=self.numbers, weights=self.numbers, flat=False, chains=False, zeros=False)


def integers(wanted: Wanted) -> Form:
    symmetric = wanted.bits == 8 if wanted.symmetric is None else wanted.symmetric
    return Form(Grid(wanted.bits, symmetric), wanted.group, shared=wanted.shared)


def _ternary(wanted: Wanted) -> Format:
    return Form(Ternary(), wanted.group, wanted.statistic or "least", wanted.shared)


def _floats(kind: torch.dtype) -> Callable[[Wanted], Format]:
    return lambda wanted: Form(Float8(kind=kind), wanted.group, shared=wanted.shared)


def _powers(wanted: Wanted) -> Format:
    return Form(Powers(wanted.bits), wanted.group, shared=wanted.shared)


def _blocks(wanted: Wanted) -> Format:
    return Form(Grid(wanted.bits), wanted.group, "powers", wanted.shared)


def _tables(wanted: Wanted) -> Format:
    return Tables(wanted.bits, wanted.rows)


def _signs(wanted: Wanted) -> Format:
    return OneBit()


_OF_FLOATS = ("rule", "margin", "bias")
_OF_INTEGERS = ("per", "group", "symmetric", "packed")

SCHEMES: Mapping[SchemeName, Scheme] = {
    "w8a8": Scheme(8, integers, activations=True),
    "w8": Scheme(8, integers, _OF_INTEGERS),
    "w4": Scheme(4, integers, _OF_INTEGERS),
    "w3": Scheme(3, integers, _OF_INTEGERS),
    "w2": Scheme(2, integers, _OF_INTEGERS),
    "mixed": Scheme(
        4, integers, ("group", "symmetric", "bits", "bytes", "accuracy", "latency", "sensitivity"), mixed=True
    ),
    "ternary": Scheme(2, _ternary, ("per", "group", "packed", "statistic")),
    "fp8": Scheme(8, _floats(torch.float8_e4m3fn), _OF_FLOATS, activations=True, kind="float8", numbers=Float8()),
    "e4m3": Scheme(8, _floats(torch.float8_e4m3fn), ("per", *_OF_FLOATS), kind="float8", grouped=False),
    "e5m2": Scheme(8, _floats(torch.float8_e5m2), ("per", *_OF_FLOATS), kind="float8", grouped=False),
    "e4m3fnuz": Scheme(8, _floats(torch.float8_e4m3fnuz), ("per", *_OF_FLOATS), kind="float8", grouped=False),
    "e5m2fnuz": Scheme(8, _floats(torch.float8_e5m2fnuz), ("per", *_OF_FLOATS), kind="float8", grouped=False),
    "pow2": Scheme(4, _powers, ("per", "group", "bits"), kind="powers of two", grouped=False),
    "codebook": Scheme(4, _tables, ("per", "group", "bits", "permute"), kind="codebooks", grouped=False),
    "onebit": Scheme(1, _signs, kind="signs", grouped=False),
    "bitstack": Scheme(8, None, ("bytes", "stack", "rank"), kind="stacks", grouped=False),
    "bfp": Scheme(4, _blocks, ("per", "group", "bits", "packed")),
}
