"""Attention put together again from two products and a softmax.

    softmax(q @ k' * scale + mask) @ v                 attention(q, k, v, mask, scale=scale)
    softmax(where(keep, q @ k' / c, -inf)) @ v         attention(q, k, v, keep, scale=1 / c)

The scale may stand before or behind the first product, on either side or split over both; it is frozen as a number.
Key and value heads that are repeated for several query heads are shared instead. A mask must mean the same in both
forms in rows that it masks as a whole (regauge.ir.dims.mask_values), or the match is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import randn

from regauge.ir.dims.mask_values import is_finite, keeps_a_key
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Value
from regauge.ir.rewriting.matcher import Match, number_of
from regauge.ir.rewriting.pattern_instances import Constant
from regauge.ir.rewriting.rewrite import RuleSet, refuse, rule
from regauge.ir.sizes.expressions import Size, divide, same

LOWEST = -1e30  # a number so low that scores do not show beside it, in types with the exponents of float32


# -- the pattern -------------------------------------------------------------------------------------------------------


def _scores(op: Any, q: Any, kt: Any, scale: Any) -> Any:
    products = op.matmul(q, kt)
    return op.either(op.any_of(("mul", "div"), products, scale, name="scaling"), products)


def _pattern(
    op: Any, q: Any, kt: Any, v: Any, axis: Any, scale: Any = None, bias: Any = None, more: Any = None,
    condition: Any = None, low: Any = None,
) -> Any:  # fmt: skip
    scores = _scores(op, q, kt, scale)
    biased = op.either(op.add(scores, bias), scores)
    masked = op.either(
        op.where(condition, biased, low, name="keeping"), op.where(condition, low, biased, name="dropping"),
        op.add(biased, more), biased,
    )  # fmt: skip
    weights = op.softmax(masked, dim=axis)
    without_nan = op.either(
        op.where(op.isnan(weights), 0, weights, name="guard"), op.thresholded_relu(weights, alpha=0.0, name="threshold")
    )
    kept = op.either(op.dropout(op.either(without_nan, weights), p=...), without_nan, weights)
    return op.matmul(kept, v)


def _samples() -> Iterable[dict[str, Any]]:
    def heads(count: int, length: int, width: int) -> torch.Tensor:
        return randn(2, count, length, width).double()

    common = {"scale": 0.3, "axis": -1, "scaling.op": "mul", "more": Constant(randn(3, 5).double())}
    mask = {"bias": Constant(randn(4, 3, 5).double()), "low": -math.inf}
    causal = {"condition": Constant(torch.ones(3, 5).tril(1) > 0)}
    yield {"q": heads(4, 3, 6), "kt": heads(4, 6, 5), "v": heads(4, 5, 2), **common, **mask, **causal}


# -- scales and layouts ------------------------------------------------------------------------------------------------


def _factor(node: Node) -> tuple[Value, float] | None:
    """What a node scales, and by which number."""
    for value, other in (node.inputs, node.inputs[::-1]) if node.op == "mul" else (node.inputs,):
        number = number_of(other)
        if node.op == "div" and number == 0:
            return None
        if isinstance(value, Value) and number is not None and value.shape == node.output.shape:
            return value, float(number) if node.op == "mul" else 1 / float(number)
    return None


def unscaled(value: Value) -> tuple[Value, float]:
    """A value without the numbers that it was multiplied with last, and their product."""
    total = 1.0
    while value.producer is not None and value.producer.op in ("mul", "div"):
        found = _factor(value.producer)
        if found is None or value.dtype != found[0].dtype:
            break
        value, total = found[0], total * found[1]
    return value, total


class View(NamedTuple):
    """A value that may have to be made yet, by a reshape of ``base``."""

    value: Value | None
    base: Value
    shape: tuple[Size, ...]

    def made(self, build: Builder) -> Value:
        if self.value is not None:
            return self.value
        alike = len(self.shape) == self.base.rank and all(map(same, self.shape, self.base.shape))
        return self.base if alike else build.reshape(self.base, shape=self.shape)


def _before_reshapes(value: Value) -> Value:
    while value.producer is not None and value.producer.op == "reshape":
        value = value.producer.inputs[0]  # type: ignore[assignment]
    return value


def as_it_is(value: Value) -> View:
    return View(value, _before_reshapes(value), value.shape)


def transposed(build: Builder, kt: Value) -> View:
    """Keys from their transpose, without a permutation where one is only undone."""
    swapped = (*range(kt.rank - 2), kt.rank - 1, kt.rank - 2)
    node = kt.producer
    if node is not None and node.op == "permute":
        source = node.inputs[0]
        assert isinstance(source, Value)
        dims = tuple(node.attributes["dims"][axis] % kt.rank for axis in swapped)
        if dims == tuple(range(kt.rank)):
            return as_it_is(source)
        return as_it_is(build.permute(source, dims=dims))
    shape = tuple(kt.shape[axis] for axis in swapped)
    rows = _transposed_rows(kt)
    return as_it_is(build.permute(kt, dims=swapped)) if rows is None else View(None, _before_reshapes(rows), shape)


def _transposed_rows(kt: Value) -> Value | None:
    """The source where exporters write ``reshape(permute(reshape(k), (0, 2, 1)))``, which joins the axes of heads."""
    inner = kt.producer.inputs[0] if kt.producer is not None and kt.producer.op == "reshape" else None
    if not isinstance(inner, Value) or inner.producer is None or inner.producer.op != "permute" or inner.rank != 3:
        return None
    if inner.producer.attributes["dims"] != (0, 2, 1) or not all(map(same, inner.shape[-2:], kt.shape[-2:])):
        return None
    source = inner.producer.inputs[0]
    return source if isinstance(source, Value) else None


def shared_heads(view: View) -> tuple[Value, Size] | None:
    """Keys or values of few heads ``b h s d`` that were repeated to ``b (h r) s d``, and r."""
    node = view.base.producer
    if len(view.shape) != 4 or node is None:
        return None
    if node.op == "repeat_interleave" and node.attributes["dim"] in (1, -3) and view.base.rank == 4:
        if not all(map(same, view.shape, view.base.shape)):
            return None
        repeats = node.attributes["repeats"]
        few = node.inputs[0]
        return (few, repeats) if isinstance(few, Value) and isinstance(repeats, int) else None
    if node.op != "expand" or view.base.rank != 5:
        return None
    batch, heads, repeats, *rest = view.base.shape
    before = node.inputs[0]
    few = before.producer.inputs[0] if isinstance(before, Value) and before.producer is not None else None
    if not isinstance(few, Value) or before.producer.op not in ("unsqueeze", "reshape") or few.rank != 4:  # type: ignore[union-attr]
        return None
    alike = all(map(same, before.shape, (batch, heads, 1, *rest))) and before.rank == 5  # type: ignore[union-attr]
    whole = all(map(same, few.shape, (batch, heads, *rest))) and all(map(same, view.shape[2:], rest))
    return (few, repeats) if alike and whole and same(divide(view.shape[1], heads) or 0, repeats) else None


# -- masks -------------------------------------------------------------------------------------------------------------


def _kept(build: Builder, match: Match, guarded: bool) -> Value | None:
    """The mask that a choice between scores and a very low number stands for; None where there is none."""
    where = match["keeping"] or match["dropping"]
    if where is None:
        return None
    condition, low, scores = match["condition"], number_of(match["low"]), where.output
    if not isinstance(condition, Value) or low is None:
        return refuse("what takes the place of masked scores is computed")
    if low > LOWEST or (scores.dtype == torch.float16 and low != -math.inf):
        return refuse(f"{low:g} in the place of masked scores is not so low that they vanish")
    keep = condition if match["keeping"] is not None else build.logical_not(condition)
    if guarded or keeps_a_key(keep):
        return keep
    if low == -math.inf:
        return refuse("a row may be masked as a whole: its softmax is NaN, attention gives zero")
    chosen = (0.0, low) if match["keeping"] is not None else (low, 0.0)
    if not torch.finfo(torch.float32).min <= low:
        return refuse(f"{low:g} in the place of masked scores is out of the range of numbers in a choice")
    added = build.where(condition, *chosen)
    return added if added.dtype == scores.dtype else build.cast(added, dtype=scores.dtype)  # type: ignore[no-any-return]


def _mask(build: Builder, match: Match) -> Value | None:
    """All masks as one."""
    guarded = any(match[name] is not None for name in ("guard", "threshold"))
    keep, summands = _kept(build, match, guarded), [match[name] for name in ("bias", "more") if match[name] is not None]
    for summand in summands:
        if not isinstance(summand, Value) or summand.dtype != match.root.output.dtype:
            return refuse(f"{summand}, added to its scores, is no tensor of their type")
    loose = [summand for summand in summands if not is_finite(summand)]
    boolean = keep is not None and keep.dtype == torch.bool
    if not guarded and loose and (len(loose) > 1 or boolean or not keeps_a_key(loose[0])):
        return refuse(f"{loose[0].name} may mask a row as a whole: its softmax is NaN, attention gives zero")
    if boolean and summands:
        total = summands[0] if len(summands) == 1 else build.add(*summands)
        return build.where(keep, total, -math.inf)  # type: ignore[no-any-return]
    total = keep if keep is not None and not boolean else None
    for summand in summands:
        total = summand if total is None else build.add(total, summand)
    return keep if boolean else total


# -- the rule ----------------------------------------------------------------------------------------------------------


@rule(_pattern, samples=_samples)
def attention_assembled(
    build: Builder, q: Value, kt: Value, v: Value, scale: Operand, axis: int, match: Match
) -> Value:
    """Softmax of scaled products, weighing values, is attention."""
    scores = match["scaling"].output if match["scaling"] is not None else _products(match)
    _check(q, kt, v, axis, scores, match)
    total = 1.0
    if match["scaling"] is not None:
        number = number_of(scale)
        if number is None or (number == 0 and match["scaling"].op == "div"):
            return refuse("its scale is computed, or a division by zero")
        total = float(number) if match["scaling"].op == "mul" else 1 / float(number)
    mask = _mask(build, match)
    while mask is not None and mask.rank < 2:
        mask = build.unsqueeze(mask, dim=0)
    q, first = unscaled(q)
    kt, second = unscaled(kt)
    keys, values, third = transposed(build, kt), as_it_is(v), 1.0
    if keys.value is not None:
        key, third = unscaled(keys.value)
        keys = as_it_is(key)
    few_keys, few_values = shared_heads(keys), shared_heads(values)
    options: dict[str, Any] = {"scale": total * first * second * third}
    if (
        few_keys is not None
        and few_values is not None
        and same(few_keys[1], few_values[1])
        and q.rank == 4
        and same(q.shape[1], keys.shape[1])
    ):
        options["enable_gqa"] = not same(few_keys[1], 1)
        return build.attention(q, few_keys[0], few_values[0], mask, **options)  # type: ignore[no-any-return]
    return build.attention(q, keys.made(build), values.made(build), mask, **options)  # type: ignore[no-any-return]


def _products(match: Match) -> Value:
    """The result of the first product."""
    return next(node.output for node in match.nodes.values() if node.op == "matmul" and node is not match.root)


def _check(q: Value, kt: Value, v: Value, axis: int, scores: Value, match: Match) -> None:
    if min(q.rank, kt.rank, v.rank) < 2 or not q.rank == kt.rank == v.rank:
        refuse("its operands have different numbers of axes")
    weights = next(node for node in match.nodes.values() if node.op == "softmax")
    if axis % weights.output.rank != weights.output.rank - 1:
        refuse("its softmax is not over the keys")
    if weights.output.rank != scores.rank or not all(map(same, weights.output.shape, scores.shape)):
        refuse("its mask has more axes than its scores")
    if any(value.dtype != q.dtype for value in (kt, v, scores, weights.output)):
        refuse("its operands have different types")


RULES = RuleSet([attention_assembled])
