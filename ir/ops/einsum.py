"""Einsum: its equation is its axis rule."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Call
from regauge.ir.dims.extents import size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import AxisError, OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Cost, Symmetry, operator, sample
from regauge.ir.sizes.expressions import Size, product, same

DOTS = "."  # an ellipsis as one character


def explicit_equation(equation: str) -> str:
    """The equation with its result written out: without ``->`` that is every letter that occurs once, in order."""
    equation = "".join(equation.split())
    if "->" in equation:
        return equation
    letters = equation.replace("...", "").replace(",", "")
    once = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return f"{equation}->{'...' if '...' in equation else ''}{once}"


def terms_of(equation: str) -> tuple[list[str], str]:
    """Operand and result terms, with ``.`` for the ellipsis."""
    left, _, right = equation.replace("...", DOTS).partition("->")
    return left.split(","), right


def place(term: str, letter_at: int, rank: int) -> int:
    """The axis at which a letter of a term stands, in a tensor of the given rank."""
    dots = term.find(DOTS)
    return letter_at if dots < 0 or letter_at < dots else letter_at + rank - len(term)


def _rule(call: Call) -> str:
    """``bhid,bhjd->bhij`` becomes ``b h i d, b h j d -> b h i j``; an axis of size one that is broadcast becomes 1."""
    operands, result = terms_of(call["equation"])
    if len(operands) != len(call.axes):
        raise AxisError(f"{call.where}: the equation {call['equation']} has {len(operands)} operands")
    wide = {
        letter
        for index, term in enumerate(operands)
        for at, letter in enumerate(term)
        if not same(_size(call, index, term, at), 1)
    }

    def pattern(index: int, term: str) -> str:
        ones = [letter in wide and same(_size(call, index, term, at), 1) for at, letter in enumerate(term)]
        return " ".join("1" if one else letter for one, letter in zip(ones, term, strict=True))

    rule = ", ".join(pattern(index, term) for index, term in enumerate(operands)) + " -> " + " ".join(result)
    # Summed over three factors, an axis allows no more than a sum over one: the order of its entries is free.
    shared = [c for c in sorted(wide) if c != DOTS and c not in result and sum(c in term for term in operands) > 2]
    return (rule + (f" ; reduce {' '.join(shared)}" if shared else "")).replace(DOTS, "...")


def _size(call: Call, index: int, term: str, at: int) -> Size:
    axes = call.operand(index)
    if term[at] == DOTS:
        return 0
    axis = place(term, at, len(axes))
    if not 0 <= axis < len(axes):
        raise AxisError(f"{call.where}: operand {index} has {len(axes)} axes, the equation says {term!r}")
    return size_of(axes[axis])


def _macs(call: Cost) -> Size:
    """One multiplication per combination of all letters; an einsum of one operand only adds and moves."""
    operands, _ = terms_of(call["equation"])
    if len(operands) < 2:
        return 0
    sizes: dict[str, Size] = {}
    dots: list[Size] = []
    for index, term in enumerate(operands):
        rank = call.rank(index)
        for at, letter in enumerate(term):
            if letter == DOTS:
                extra = [call.size(index, axis) for axis in range(at, at + rank - len(term) + 1)]
                dots = extra if len(extra) > len(dots) else dots
            elif same(sizes.get(letter, 1), 1):
                sizes[letter] = call.size(index, place(term, at, rank))
    return product([*sizes.values(), *dots])


def _symmetry(node: Node) -> Symmetry:
    """A diagonal reads one axis at two places."""
    operands, _ = terms_of(node.attributes["equation"])
    diagonal = any(len(set(term)) < len(term) for term in operands)
    return Symmetry.POINTWISE if diagonal else Symmetry.PRODUCT


def _einsum(build: Builder, equation: str, operands: Sequence[Value], *_: Any, **_options: Any) -> Any:
    return build.einsum(*operands, equation=explicit_equation(equation))


def _onnx_einsum(build: Builder, call: Any) -> Any:
    return _einsum(build, call.attribute("equation"), [call.operand(i) for i in range(call.count)])


def _spell(onnx: Any, node: Node) -> Any:
    """Einsum of ONNX does not spread an axis of size one over a letter: it is expanded first."""
    terms, _ = terms_of(node.attributes["equation"])
    values = [value for _, value in node.operands()]
    sizes: dict[str, Size] = {}
    for term, value in zip(terms, values, strict=True):
        for at, letter in enumerate(term):
            size = 1 if letter == DOTS else value.shape[place(term, at, value.rank)]
            if same(sizes.get(letter, 1), 1):
                sizes[letter] = size
    operands = []
    for slot, (term, value) in enumerate(zip(terms, values, strict=True)):
        shape = list(value.shape)
        for at, letter in enumerate(term):
            if letter != DOTS:
                shape[place(term, at, value.rank)] = sizes[letter]
        operand = onnx.operand(slot)
        operands.append(operand if tuple(shape) == value.shape else onnx.Expand(operand, onnx.sizes(shape)))
    return onnx.Einsum(*operands, equation=node.attributes["equation"])


def _inner(build: Builder, x: Value, y: Value) -> Any:
    if not x.rank or not y.rank:
        return build.mul(x, y)
    left, right = string.ascii_lowercase[: x.rank - 1], string.ascii_uppercase[: y.rank - 1]
    return build.einsum(x, y, equation=f"{left}z,{right}z->{left}{right}")


def _outer(build: Builder, x: Value, y: Value) -> Any:
    return build.einsum(x, y, equation="i,j->ij")


def _tensordot(build: Builder, x: Value, y: Value, dims_self: Sequence[int], dims_other: Sequence[int]) -> Any:
    if x.rank > 26 or y.rank > 26:
        raise OperatorError("tensordot of tensors with more than 26 axes has no rule")
    left, right = list(string.ascii_lowercase[: x.rank]), list(string.ascii_uppercase[: y.rank])
    for a, b in zip(dims_self, dims_other, strict=True):
        right[b] = left[a]
    kept = [c for c in left if c not in right] + [c for c in right if c not in left]
    return build.einsum(x, y, equation=f"{''.join(left)},{''.join(right)}->{''.join(kept)}")


@operator(
    rule=_rule,
    aten={"einsum": _einsum, "inner": _inner, "outer": _outer, "ger": _outer, "tensordot": _tensordot},
    onnx={"Einsum": _onnx_einsum},
    spell=_spell,
    macs=_macs,
    symmetry=_symmetry,
    samples=lambda: [
        sample(randn(2, 3, 4, 5), randn(2, 3, 6, 5), equation="bhid,bhjd->bhij"),
        sample(randn(2, 3, 4), randn(4, 5), equation="...d,de->...e"),
        sample(randn(2, 3, 4), randn(2, 5), equation="b...,bd->bd..."),
        sample(randn(3, 3), equation="ii->i"),
        sample(randn(3, 4), equation="ij->ji"),
        sample(randn(3, 4), randn(4), randn(3), equation="ij,j,i->"),
        sample(randn(2, 1, 4), randn(2, 3, 4), equation="bij,bij->bi"),
    ],
)
def einsum(*operands: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *operands)
