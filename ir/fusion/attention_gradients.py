"""The gradients of attention: of its queries, keys and values, where a region is a softmax between two products.

    weights = exp(logits - log of the sum of exp(logits))       again, from what the region reads
    g_weights = sum over n of gradient * values
    delta   = sum over s of weights * g_weights                 once for each row
    g_logits = weights * (g_weights - delta)
    g_values = sum over m of weights * gradient,  g_queries, g_keys = sums of the derivative of logits * keys, queries
    g_bias   = the derivative of logits, summed over the loops that the bias lacks

(Dao et al. 2022, FlashAttention, appendix B; Dao 2023, FlashAttention-2, algorithm 2.) These have delta as the sum of
gradient * result, which is the same but for rounding: what a result in half precision was rounded by would be in the
gradients of all logits of a row alike, and add up in that of a bias, or where keys have a mean (Qiu and Yao 2025, Why
Low-Precision Transformer Training Fails). Here the gradients of the logits of a row add up to zero. A bias is whatever
else logits are made of: what is added to scores (Raffel et al. 2020, T5, section 2.1; Liu et al. 2021, Swin, equation
4), the slope that distances are multiplied by (Press et al. 2022, ALiBi), a learned scale. Its gradient stands apart
from the other ones, as a mask of floats is seldom trained.

Queries, keys and values are read. Where a region computes them, of latents say, it has no gradient of its own: the
backward pass computes them once, calls the gradients of the attention inside (:func:`core_of`), and torch goes on. For
n places, a rank of r and heads of d numbers that is n r d products and n d numbers kept, beside 9 n n d products of the
gradients; keys that are computed again for each tile of 64 queries would take (n / 64) n r d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from regauge.ir import scalars
from regauge.ir.derivatives import gradients
from regauge.ir.dims.extents import Dim
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention import Attention
from regauge.ir.fusion.gradient_frames import is_float, primitive
from regauge.ir.fusion.region import Layout, Region, Term, below_results, terms_below
from regauge.ir.fusion.terms import PLACES
from regauge.ir.fusion.wide_gradients import loss_of
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.scalars import PRIMITIVES, Scalar
from regauge.ir.sizes.expressions import product


@dataclass(frozen=True)
class AttentionGradient:
    """Gradients of the factors of a region that is attention and nothing else, or that of a ``bias``.

    ``graph`` reads what the region ``reads`` and the gradient of its result, and returns the gradients ``of`` queries,
    keys and values, or of the bias. ``slope`` is the gradient of the scores, or of the bias before sums over the loops
    that it lacks, of the gradient ``seed`` of the logits; with ``guarded`` rows of which all is masked give zero.
    """

    region: Region
    reads: tuple[Value, ...]
    graph: Graph
    seed: Term
    slope: Term
    guarded: bool
    bias: Term | None = None

    @property
    def parts(self) -> Attention:
        assert self.region.attention is not None
        return self.region.attention

    @property
    def of(self) -> tuple[Term, ...]:
        """The loads whose gradients these are: of queries, keys and values, or of the bias."""
        parts = self.parts
        return (self.bias,) if self.bias else tuple(map(below_results, (parts.queries, parts.keys, parts.values)))


def core_of(region: Region) -> list[Node]:
    """The nodes of a region with attention from its first product to its second one."""
    parts = region.attention
    assert parts is not None
    first, last = (_computes(region, term) for term in (parts.scores, parts.mixed))
    behind: set[Node] = {first}
    for node in region.nodes:
        if any(value.producer in behind for _, value in node.operands()):
            behind.add(node)
    before: set[Node] = {last}
    for node in reversed(region.nodes):
        if any(user in before for user, _ in node.output.uses):
            before.add(node)
    return [node for node in region.nodes if node in behind and node in before]


def _computes(region: Region, term: Term) -> Node:
    """The node that computes a term itself."""
    for node in region.nodes:
        stack = list(region.results[node.output].args)
        while stack:
            one = stack.pop()
            if one is term:
                return node
            stack += () if one.op == "result" else one.args
    raise FusionError("no node computes it")


def attention_gradient(body: Graph, region: Region) -> AttentionGradient:
    """The gradient of a region; raises FusionError with the reason where it is more than attention of what it reads."""
    parts = region.attention
    if parts is None:
        raise FusionError(f"{body.name}: the gradients of products are products of their own")
    _check(body, region, parts)
    guarded = _is_guarded(region, parts)
    seed = Term("gradient", axes=parts.logits.axes)
    slope = _slope(parts, parts.scores, seed)
    graph = _Written(body, region, parts, guarded).gradient(seed, slope)
    return AttentionGradient(region, tuple(body.inputs), graph, seed, slope, guarded)


def biases_of(region: Region) -> list[Term]:
    """The loads of floats that logits are made of beside scores."""
    parts = region.attention
    assert parts is not None
    inside = {*terms_below(parts.logits), parts.logits} - {parts.scores, *terms_below(parts.scores)}
    return [load for load in region.loads if load in inside and is_float(load.value.value)]


def bias_gradient(body: Graph, found: AttentionGradient, bias: Term) -> AttentionGradient:
    """The gradient of one of ``biases_of``, beside the ones ``found``; raises FusionError where none can be stated."""
    places = found.parts.source
    if places & bias.axes not in (places, frozenset()):
        raise FusionError("it goes along a part of the places only")
    slope = _slope(found.parts, bias, found.seed)
    graph = _Written(body, found.region, found.parts, found.guarded).gradient(found.seed, slope, bias)
    return replace(found, graph=graph, slope=slope, bias=bias)


def _check(body: Graph, region: Region, parts: Attention) -> None:
    wanted = {
        "queries": (parts.queries, parts.batch | parts.rows | parts.head),
        "keys": (parts.keys, parts.batch | parts.source | parts.head),
        "values": (parts.values, parts.batch | parts.source | parts.columns),
    }
    for name, (factor, axes) in wanted.items():
        below = below_results(factor)
        if below.op != "load" or not is_float(below.value.value) or below.value.value not in body.inputs:
            raise FusionError(f"{body.name}: its {name} are computed in it")
        if below.axes != axes:
            raise FusionError(
                f"{body.name}: its {name} are shared in a way whose gradients are sums of several programs"
            )
    if any(load.args or load.value.moved or load.value.picked for load in region.loads):
        raise FusionError(f"{body.name}: it reads at other places")
    if len(region.outputs) != 1:
        raise FusionError(f"{body.name}: it has several results")
    if parts.wide_head or parts.wide_columns:
        reason = loss_of(parts, region.outputs[0].dtype)
        if reason:
            raise FusionError(f"{body.name}: {reason}")


def _is_guarded(region: Region, parts: Attention) -> bool:
    """Whether rows of which all is masked give zero; raises where the result is more than the mixture."""
    (result,) = region.outputs
    term = below_results(region.results[result])
    guarded = term.op == "where" and below_results(term.args[1]).value == 0
    if guarded:
        condition, _, term = map(below_results, term.args)
        if condition.op != "eq" or below_results(condition.args[0]) is not parts.peak:
            raise FusionError("more stands behind its second product")
    divided = term.op == "div" and below_results(term.args[0]) is parts.mixed and term.args[1] is parts.total
    inside = term is parts.mixed and [(below_results(one), by) for one, by in parts.factors] == [(parts.total, True)]
    if not (inside or divided and not parts.factors):
        raise FusionError("more stands behind its second product")
    return guarded


# -- the derivative of the logits --------------------------------------------------------------------------------------


def _slope(parts: Attention, of: Term, seed: Term) -> Term:
    """The gradient of the scores, or of another part of the logits, of ``seed``, that of the logits."""
    leaves: list[Term] = [of]
    known: dict[Term, Scalar] = {of: scalars.operand(0)}

    def scalar(term: Term) -> Scalar:
        term = below_results(term)
        if term not in known:
            if term.op in PRIMITIVES and of in terms_below(term):
                known[term] = Scalar(term.op, tuple(map(scalar, term.args)))
            elif term.op == "number":
                known[term] = scalars.number(term.value)
            else:
                known[term] = scalars.operand(len(leaves))
                leaves.append(term)
        return known[term]

    expression = scalar(parts.logits)
    last = scalars.operand(len(leaves))
    found = gradients(expression, last, [0], lambda one: frozenset(), frozenset())
    made = {one: term for term, one in known.items()} | {last: seed}

    def term_of(one: Scalar) -> Term:
        if one not in made:
            args = tuple(map(term_of, one.args))
            axes = frozenset(dim for arg in args for dim in arg.axes)
            made[one] = Term(one.op, args, axes, one.value if one.op == "number" else None)
        return made[one]

    if 0 not in found:
        raise FusionError("its logits do not depend on its scores" if of is parts.scores else "no logit depends on it")
    return term_of(found[0])


# -- the graph ---------------------------------------------------------------------------------------------------------


class _Written:
    """Writes the gradients as products of matrices, one for each index of the batch."""

    def __init__(self, body: Graph, region: Region, parts: Attention, guarded: bool) -> None:
        self.region, self.parts, self.guarded = region, parts, guarded
        self.graph = Graph(f"{body.name}_gradient")
        self.build = Builder(self.graph)
        self.given = {value: self.build.input(value.name, value.shape, value.dtype) for value in body.inputs}
        (result,) = region.outputs
        self.gradient_of_result = self.build.input(f"g_{result.name}", result.shape, result.dtype)
        self.wide = torch.float64 if result.dtype == torch.float64 else torch.float32
        order = [*region.layouts[result], *(axis for load in region.loads for axis in load.value.layout)]
        dims = list(dict.fromkeys(dim for axis in order for dim in axis))
        kinds = (parts.batch, parts.rows, parts.source, parts.head, parts.columns)
        self.batch, self.rows, self.source, self.head, self.columns = ([d for d in dims if d in kind] for kind in kinds)
        self.known: dict[Term, Any] = {}

    def gradient(self, seed: Term, slope: Term, bias: Term | None = None) -> Graph:
        build, parts = self.build, self.parts
        queries, keys, values = (
            self._matrix(self.given[below_results(one).value.value], below_results(one).value.layout, rows, columns)
            for one, rows, columns in (
                (parts.queries, self.rows, self.head),
                (parts.keys, self.source, self.head),
                (parts.values, self.source, self.columns),
            )
        )
        layout = self.region.layouts[self.region.outputs[0]]
        given = self._matrix(self.gradient_of_result, layout, self.rows, self.columns)
        scores = build.matmul(queries, self._turned(keys))
        self.known[parts.scores] = self._laid_matrix(scores)
        weights = self._weights(self._as_matrix(self._value(parts.logits)))
        g_weights = build.matmul(given, self._turned(values))
        delta = build.sum(build.mul(weights, g_weights), dims=(2,), keepdim=True)
        g_logits = build.mul(weights, build.sub(g_weights, delta))
        self.known[seed] = self._laid_matrix(g_logits)
        if bias is not None:
            self.graph.outputs = [self._summed(self._value(slope), bias)]
            return self.graph
        g_scores = self._as_matrix(self._value(slope))
        found = (
            (parts.queries, build.matmul(g_scores, keys), self.rows, self.head),
            (parts.keys, build.matmul(self._turned(g_scores), queries), self.source, self.head),
            (parts.values, build.matmul(self._turned(weights), given), self.source, self.columns),
        )
        self.graph.outputs = [
            self._placed(matrix, below_results(factor).value, [*self.batch, *rows, *columns])
            for factor, matrix, rows, columns in found
        ]
        return self.graph

    def _summed(self, slope: Value, bias: Term) -> Value:
        """What a bias has of a value along the axes of the logits: sums over the axes that it lacks."""
        dims = [*self.batch, *self.rows, *self.source]
        lacking = tuple(place for place, dim in enumerate(dims) if dim not in bias.axes)
        found = self.build.sum(slope, dims=lacking, keepdim=True) if lacking else slope
        return self._placed(found, bias.value, [dim for dim in dims if dim in bias.axes])

    def _weights(self, logits: Value) -> Value:
        build = self.build
        peak = build.amax(logits, dims=(2,), keepdim=True)
        none = build.eq(peak, -math.inf)
        shift = build.where(none, 0.0, peak) if self.guarded else peak
        powers = build.exp(build.sub(logits, shift))
        weights = build.div(powers, build.sum(powers, dims=(2,), keepdim=True))
        found: Value = build.where(none, 0.0, weights) if self.guarded else weights
        return found

    # -- matrices ----------------------------------------------------------------------------------------------------

    def _matrix(self, value: Value, layout: Layout, rows: Sequence[Dim], columns: Sequence[Dim]) -> Value:
        """A value as a matrix for each index of the batch."""
        laid = self._laid(self._typed(value, self.wide), layout, [*self.batch, *rows, *columns])
        return self._reshaped(laid, [product(dim.size for dim in dims) for dims in (self.batch, rows, columns)])

    def _turned(self, matrix: Value) -> Value:
        found: Value = self.build.permute(matrix, dims=(0, 2, 1))
        return found

    def _laid_matrix(self, matrix: Value) -> Value:
        return self._reshaped(matrix, [dim.size for dim in (*self.batch, *self.rows, *self.source)])

    def _as_matrix(self, value: Value) -> Value:
        return self._reshaped(
            value, [product(dim.size for dim in dims) for dims in (self.batch, self.rows, self.source)]
        )

    def _laid(self, value: Value, layout: Layout, dims: Sequence[Dim]) -> Value:
        """A value with an axis for each of ``dims``, of size 1 where it has none."""
        own = [dim for axis in layout for dim in axis]
        value = self._reshaped(value, [dim.size for dim in own])
        order = sorted(range(len(own)), key=lambda place: dims.index(own[place]))
        value = self.build.permute(value, dims=tuple(order)) if order != sorted(order) else value
        return self._reshaped(value, [dim.size if dim in own else 1 for dim in dims])

    def _placed(self, matrix: Value, load: Any, dims: Sequence[Dim]) -> Value:
        """A value with these axes as what a factor, or a bias, is laid out as."""
        own = [dim for axis in load.layout for dim in axis]
        value = self._reshaped(matrix, [dim.size for dim in dims])
        order = [list(dims).index(dim) for dim in own]
        value = self.build.permute(value, dims=tuple(order)) if order != sorted(order) else value
        value = self._reshaped(value, [product(dim.size for dim in axis) for axis in load.layout])
        return self._typed(value, load.value.dtype)

    def _reshaped(self, value: Value, shape: Sequence[Any]) -> Value:
        found: Value = self.build.reshape(value, shape=tuple(shape))
        return found

    def _typed(self, value: Value, dtype: Any) -> Value:
        found: Value = value if value.dtype == dtype else self.build.cast(value, dtype=dtype)
        return found

    # -- terms -------------------------------------------------------------------------------------------------------

    def _value(self, term: Term) -> Any:
        """A term as a value with the axes of the logits, or as a number."""
        term = below_results(term)
        if term not in self.known:
            self.known[term] = self._made(term)
        return self.known[term]

    def _made(self, term: Term) -> Any:
        dims = [*self.batch, *self.rows, *self.source]
        if term.op == "number":
            return term.value
        if term.op == "load":
            value = self.given[term.value.value]
            return self._laid(self._typed(value, self.wide) if is_float(value) else value, term.value.layout, dims)
        if term.op in PLACES:
            size = product(dim.size for dim in term.value)
            first = -size if term.op == "from_end" else 0
            places = self.build.arange(start=first, end=first + size)
            return self._laid(places, (tuple(term.value),), dims)
        if term.op not in PRIMITIVES:
            raise FusionError(f"the derivative of {term.op} in logits is not stated")
        args = [self._value(arg) for arg in term.args]
        return primitive(self.build, partial(self._typed, dtype=self.wide), term.op, args)
