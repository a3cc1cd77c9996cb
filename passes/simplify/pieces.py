"""Pieces of tensors: what is cut out of a concatenation is cut out of its operands, and adjacent pieces grow together.

slice(concat(x, y))              x, or a slice of x            concat(slice(x), slice(x))     x, or a slice of x
split(concat(x, y))              x, y                          concat(concat(x, y), z)        concat(x, y, z)
select(stack(x, y), index=1)     y                             split(x), one part of it read  slice(x)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.ops.slice_bounds import bound, spelled
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.pattern_instances import Constant
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import Size, at_least, same, simplify

Sample = dict[str, Any]


def axis_of(node: Node) -> int:
    """The axis an operator works along, counted from the front."""
    x = node.inputs[0]
    assert isinstance(x, Value)
    return int(node.attributes["dim"]) % max(x.rank, 1)


def offsets(sizes: Iterable[Size]) -> list[Size]:
    """Where segments of these sizes begin, and where the last one ends."""
    places: list[Size] = [0]
    for size in sizes:
        places.append(simplify(places[-1] + size))
    return places


def place(places: Sequence[Size], wanted: Size) -> int | None:
    """The first of these places that is the wanted one."""
    return next((index for index, one in enumerate(places) if same(one, wanted)), None)


@dataclass(frozen=True)
class Piece:
    """The entries from ``start`` to ``end`` along one axis of a value."""

    base: Value
    start: Size
    end: Size


def piece(value: Value, axis: int) -> Piece:
    """What a value is a piece of, along an axis: a slice or a part of a split, else all of itself."""
    node = value.producer
    size = value.shape[axis]
    if node is not None and node.op in ("slice", "split") and axis_of(node) == axis:
        base = node.inputs[0]
        assert isinstance(base, Value)
        start = None
        if node.op == "split":
            start = offsets(node.attributes["sizes"])[value.index]
        elif node.attributes["step"] == 1:
            start = bound(node.attributes["start"], base.shape[axis])
        if start is not None:
            return Piece(base, start, simplify(start + size))
    return Piece(value, 0, size)


def _is_whole(found: Piece, axis: int) -> bool:
    return same(found.start, 0) and same(found.end, found.base.shape[axis])


def taken(build: Builder, found: Piece, axis: int) -> Value:
    """A piece as a value: its base where it is all of it, else a slice."""
    if _is_whole(found, axis):
        return found.base
    return build.slice(found.base, dim=axis, start=found.start, end=found.end, step=1)  # type: ignore[no-any-return]


def segments(concat: Node, start: Size, end: Size) -> list[Piece]:
    """The operands of a concatenation, or the part of one, between two places; refuses where they cannot be told."""
    axis = axis_of(concat)
    operands = [value for _, value in concat.operands()]
    places = offsets(value.shape[axis] for value in operands)
    first, last = place(places, start), place(places[::-1], end)
    if first is not None and last is not None and first <= len(operands) - last:
        return [Piece(value, 0, value.shape[axis]) for value in operands[first : len(operands) - last]]
    for value, low, high in zip(operands, places, places[1:], strict=False):
        after, before = simplify(start - low), simplify(high - end)
        if all(n >= 0 if isinstance(n, int) else bool(n.is_nonnegative) for n in (after, before)):
            return [Piece(value, after, simplify(end - low))]
    return refuse("it is cut where no operand of the concatenation ends")


# -- slices ------------------------------------------------------------------------------------------------------------


def _slice_samples() -> Iterable[Sample]:
    def sample(outer: tuple[int, ...], inner: tuple[int, ...], dims: tuple[int, int] = (1, 1)) -> Sample:
        given: Sample = {"x": randn(3, 12).double()}
        for name, (start, end, step), dim in zip(("outer", "inner"), (outer, inner), dims, strict=True):
            given |= {f"{name}.dim": dim, f"{name}.start": start, f"{name}.end": end, f"{name}.step": step}
        return given

    yield sample((1, 4, 1), (2, 9, 1))
    yield sample((0, 20, 1), (2, 9, 1), (1, -1))
    yield sample((1, 4, 1), (1, 12, 3))
    yield sample((1, 5, 2), (0, 12, 2))
    yield sample((3, 9, 4), (2, 12, 1))
    yield sample((5, 9, 1), (2, 4, 1))


@rule(
    lambda op, x: op.slice(
        op.slice(x, dim=..., start=..., end=..., step=..., name="inner"),
        dim=..., start=..., end=..., step=..., name="outer",
    ),
    samples=_slice_samples,
    shared=True,
)  # fmt: skip
def slice_of_slice(build: Builder, x: Value, inner: Node, outer: Node) -> Value:
    """A slice of a slice along the same axis is one slice."""
    axis = axis_of(inner)
    if axis_of(outer) != axis:
        return differs("they cut different axes")
    between, step = inner.output.shape[axis], inner.attributes["step"]
    first = bound(inner.attributes["start"], x.shape[axis])
    start, end = (bound(outer.attributes[name], between) for name in ("start", "end"))
    if not all(isinstance(b, int) or b.is_nonnegative for b in (first, start, end)):
        return refuse("its bounds may count from the end")
    size, every = outer.output.shape[axis], outer.attributes["step"]
    if not (step == every == 1 or same(size, 0) or at_least(size, 1)):
        return refuse("it may be empty, and its steps would lead before its beginning")
    start = simplify(first + start * step)
    length = size if step == every == 1 else simplify((size - 1) * step * every + 1)
    end = simplify(start + (0 if same(size, 0) else length))
    if _is_computed(start, end, x.shape[axis]) and not _is_computed(first, inner.attributes["end"], x.shape[axis]):
        return refuse("its bounds would take nodes to compute")
    return build.slice(x, dim=axis, start=start, end=end, step=step * every)  # type: ignore[no-any-return]


def _is_computed(start: Size, end: Size, size: Size) -> bool:
    """Whether a slice has a bound that is no number."""
    return not all(isinstance(number, int) for number in spelled(start, end, size))


def _concat_samples() -> Iterable[Sample]:
    def others(build: Builder, x: Value, y: Value) -> list[Value]:
        return [y, build.tanh(x)]

    for start, end in ((0, 2), (2, 5), (3, 5), (5, 7), (2, 7)):
        yield {"x": randn(4, 2).double(), "y": randn(4, 3).double(), "concat.dim": -1, "concat.operands": others,
               "cut.dim": 1, "cut.start": start, "cut.end": end}  # fmt: skip


@rule(
    lambda op, x: op.slice(
        op.concat(x, ..., dim=..., name="concat"), dim=..., start=..., end=..., name="cut"
    ),
    samples=_concat_samples,
    shared=True,
)  # fmt: skip
def slice_of_concat(build: Builder, concat: Node, cut: Node, match: Match) -> Value:
    """A slice that falls into one operand of a concatenation is cut out of that; several whole ones are joined."""
    axis = axis_of(concat)
    if axis_of(cut) != axis:
        return differs("it cuts another axis")
    start = bound(cut.attributes["start"], concat.output.shape[axis])
    found = segments(concat, start, simplify(start + cut.output.shape[axis]))
    return _joined(build, found, axis, match.read_once(concat.output))


def _joined(build: Builder, found: Sequence[Piece], axis: int, alone: bool) -> Value:
    if len(found) > 1 and not alone:
        return refuse("the concatenation has other readers")
    if not found:
        return refuse("it is empty")
    values = [taken(build, one, axis) for one in found]
    return values[0] if len(values) == 1 else build.concat(*values, dim=axis)


def _select_samples() -> Iterable[Sample]:
    for index in (0, 3):
        yield {"x": randn(4, 2).double(), "y": randn(4, 3).double(), "concat.dim": 1, "one.dim": 1, "one.index": index,
               "concat.operands": lambda build, y: [y]}  # fmt: skip


@rule(
    lambda op, x: op.select(op.concat(x, ..., dim=..., name="concat"), dim=..., index=..., name="one"),
    samples=_select_samples,
    shared=True,
)
def select_of_concat(build: Builder, concat: Node, one: Node) -> Value:
    """One entry of a concatenation is one of an operand."""
    axis, index = axis_of(concat), one.attributes["index"]
    if axis_of(one) != axis:
        return differs("it selects along another axis")
    index = bound(index, concat.output.shape[axis])
    whole = [part for part in segments(concat, index, simplify(index + 1)) if not same(part.start, part.end)]
    if len(whole) != 1:  # operands without entries lie beside the one that is read
        return refuse("its operands have sizes that cannot be told from none")
    found = whole[0]
    return build.select(found.base, dim=axis, index=found.start)  # type: ignore[no-any-return]


@rule(
    lambda op, x: op.select(op.stack(x, ..., dim=..., name="stack"), dim=..., index=..., name="one"),
    samples=lambda: [
        {"x": randn(4, 2).double(), "y": randn(4, 2).double(), "stack.dim": -1, "one.dim": 2, "one.index": index,
         "stack.operands": lambda build, y: [y]}
        for index in (0, 1, -1)
    ],
    shared=True,
)  # fmt: skip
def select_of_stack(build: Builder, stack: Node, one: Node) -> Value:
    """One entry of what was stacked is an operand."""
    rank = stack.output.rank
    if stack.attributes["dim"] % rank != one.attributes["dim"] % rank:
        return differs("it selects along another axis")
    found = stack.inputs[one.attributes["index"]]
    return found if isinstance(found, Value) else refuse("it stacks numbers")


# -- splits ------------------------------------------------------------------------------------------------------------


def _split_samples() -> Iterable[Sample]:
    def others(build: Builder, y: Value) -> list[Value]:
        return [y]

    for sizes in ((2, 3), (1, 1, 3), (5,)):
        yield {"x": randn(4, 2).double(), "y": randn(4, 3).double(), "concat.dim": 1, "concat.operands": others,
               "parts.dim": -1, "parts.sizes": sizes}  # fmt: skip


@rule(
    lambda op, x: op.split(
        op.concat(x, ..., dim=..., name="concat"), dim=..., sizes=..., name="parts"
    ).every_result(),
    samples=_split_samples,
    shared=True,
)  # fmt: skip
def split_of_concat(build: Builder, concat: Node, parts: Node, match: Match) -> list[Value | None]:
    """The parts of a concatenation are its operands, joined or cut."""
    axis = axis_of(concat)
    if axis_of(parts) != axis:
        return differs("it splits another axis")
    alone = match.read_once(concat.output)
    results: list[Value | None] = []
    places = offsets(parts.attributes["sizes"])
    for value, start, end in zip(parts.outputs, places, places[1:], strict=False):
        found = None if match.unread(value) else segments(concat, start, end)
        results.append(None if found is None else _joined(build, found, axis, alone))
    if len(build.added) > 1 + alone:
        return refuse("its parts would take more nodes")
    return results


def _part_samples() -> Iterable[Sample]:
    yield {"x": randn(4, 5).double(), "parts.dim": -1, "parts.sizes": (5,)}


@rule(
    lambda op, x: op.split(x, dim=..., sizes=..., name="parts").every_result(),
    samples=_part_samples,
)
def split_for_one_part(build: Builder, x: Value, parts: Node, match: Match) -> list[Value | None]:
    """A split of which one part is read is a slice."""
    read = [value for value in parts.outputs if not match.unread(value)]
    if len(read) != 1:
        return differs(f"{len(read)} of its parts are read")
    axis = axis_of(parts)
    return [taken(build, piece(value, axis), axis) if value is read[0] else None for value in parts.outputs]


# -- concatenations ----------------------------------------------------------------------------------------------------


def _adjacent_samples() -> Iterable[Sample]:
    def slices(build: Builder, a: Value) -> list[Value]:
        return [build.slice(a, dim=1, start=2, end=4), build.slice(a, dim=-1, start=4, end=6)]

    def parts(build: Builder, a: Value) -> list[Value]:
        return list(build.split(a, dim=1, sizes=(2, 1, 3)))[1:]

    for others in (slices, parts):
        first = lambda build, a: build.slice(a, dim=1, start=0, end=2)  # noqa: E731
        yield {"a": randn(3, 6).double(), "x": first, "concat.dim": 1, "concat.operands": others}
        yield {"x": randn(3, 2).double(), "a": randn(3, 6).double(), "concat.dim": 1, "concat.operands": others}
    yield {
        "x": randn(3, 0).double(),
        "a": randn(3, 6).double(),
        "concat.dim": 1,
        "concat.operands": lambda build, a: [a],
    }
    inner = lambda build, a: build.concat(a, build.tanh(a), dim=1)  # noqa: E731
    yield {"a": randn(3, 6).double(), "x": inner, "concat.dim": 1, "concat.operands": lambda build, a: [a]}


def _flattened(concat: Node, axis: int, match: Match) -> list[Value]:
    """The operands, in the place of a concatenation along the same axis that nothing else reads its own ones."""
    found: list[Value] = []
    for _, value in concat.operands():
        inner = value.producer
        if inner is not None and inner.op == "concat" and axis_of(inner) == axis and match.read_once(value):
            found += [operand for _, operand in inner.operands()]
        elif not same(value.shape[axis], 0):
            found.append(value)
    return found


def _goes(value: Value, read: Sequence[Value], match: Match) -> bool:
    """Whether nothing is left of what gives a value once a concatenation no longer reads these."""
    outputs = value.producer.outputs if value.producer is not None else ()
    return all(match.unread(one) or (one in read and match.read_once(one)) for one in outputs)


@rule(lambda op, x: op.concat(x, ..., dim=..., name="concat"), samples=_adjacent_samples)
def pieces_grow_together(build: Builder, concat: Node, match: Match) -> Value:
    """Adjacent pieces of one value are one piece, concatenations in a concatenation part of it, empty operands gone."""
    axis = axis_of(concat)
    values = _flattened(concat, axis, match)
    if not values:
        return refuse("all its operands are empty")
    found: list[tuple[Piece, list[Value]]] = []
    for value in values:
        own = piece(value, axis)
        last = found[-1][0] if found else None
        if last is not None and last.base is own.base and same(last.end, own.start):
            found[-1] = (Piece(own.base, last.start, own.end), [*found[-1][1], value])
        else:
            found.append((own, [value]))
    if len(found) == len(concat.inputs):
        return differs("its operands are no adjacent pieces of one value")
    merged = [(one, parts) for one, parts in found if len(parts) > 1]
    fewer = len({v.producer for _, parts in merged for v in parts if _goes(v, values, match)}) + (len(found) == 1)
    if sum(not _is_whole(one, axis) for one, _ in merged) > fewer:
        return refuse("its pieces have other readers, so that one more would be cut out")
    results = [parts[0] if len(parts) == 1 else taken(build, one, axis) for one, parts in found]
    return results[0] if len(results) == 1 else build.concat(*results, dim=axis)


# -- constant indices, copies ------------------------------------------------------------------------------------------


@rule(
    lambda op, x, indices: op.index_select(x, indices, dim=...,  name="node"),
    samples=lambda: [
        {"x": randn(3, 6).double(), "indices": Constant(torch.tensor(table)), "node.dim": -1}
        for table in ([1, 2, 3], [-2, -1], [4], 2, -1, [0, 1, 2, 3, 4, 5])
    ],
)  # fmt: skip
def constant_run_of_indices(build: Builder, x: Value, indices: Value, node: Node) -> Value:
    """Entries looked up at constant, neighbouring places are a slice; at one place, a select."""
    axis = axis_of(node)
    if not isinstance(indices, Parameter) or indices.kind != "constant" or indices.rank > 1:
        return differs("its indices are computed, or a table")
    if indices.dtype not in (torch.int64, torch.int32):
        return differs("its indices are no integers")
    table, size = indices.tensor.to(torch.int64), x.shape[axis]
    if isinstance(size, int):
        table = torch.where(table < 0, table + size, table)
    if not table.numel() or bool((table < 0).any()) or not bool((table.reshape(-1).diff() == 1).all()):
        return differs("its indices are no run")
    start = int(table.reshape(-1)[0])
    if indices.rank == 0:
        return build.select(x, dim=axis, index=start)  # type: ignore[no-any-return]
    if not isinstance(size, int) or start + len(table) > size:
        return refuse("its indices may lie outside")  # where a slice would be cut off
    return taken(build, Piece(x, start, start + len(table)), axis)


@rule(
    lambda op, x, inner, outer: op.expand(op.expand(x, shape=inner), shape=outer),
    samples=lambda: [{"x": randn(3, 1).double(), "inner": (1, 3, 1), "outer": (2, 3, 4)}],
    shared=True,
)
def expand_of_expand(build: Builder, x: Value, outer: tuple[Size, ...]) -> Value:
    """Of two expansions the last shape counts."""
    return build.expand(x, shape=outer)  # type: ignore[no-any-return]


RULES = RuleSet(
    [
        slice_of_slice, slice_of_concat, select_of_concat, select_of_stack, split_of_concat, split_for_one_part,
        pieces_grow_together, constant_run_of_indices, expand_of_expand,
    ]
)  # fmt: skip
