"""``vocabulary``: keep some token ids of a language model, and give them new numbers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, Extent, leaves, resolve
from regauge.ir.dims.local_axes import local_axes, unrelated
from regauge.ir.dims.resize import taken
from regauge.ir.edit import record
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.interpret import Interpreter
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.name_patterns import matches
from regauge.passes.options import option
from regauge.passes.pruning.preserve import note_recomputed

_MOVES = {
    "cast", "concat", "expand", "flip", "identity", "permute", "repeat", "reshape", "roll", "select", "slice", "split",
    "squeeze", "stack", "unbind", "unsqueeze",
}  # fmt: skip
"""Operators that leave ids what they are."""
_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Pass):
    """Keep some token ids: the others lose their rows of the embedding and their columns of the logits.

    before  h = embedding(table: f32[50000,64], ids)    logits = linear(h, head: f32[50000,64])   f32[...,50000]
    after   h = embedding(table: f32[8000,64], ids)     logits = linear(h, head: f32[8000,64])    f32[...,8000]

    This changes what goes in and what comes out. Ids are new ones, the places of the old ones in their sorted list:
    of the kept ids 3, 7 and 9 the new ones are 0, 1 and 2. Logits are those of the new ids. What the network computes
    of kept ids stays the same, but where something normalises over all ids, which the report says. The report has the
    new ids, ``regauge.passes.pruning.vocabulary.new_ids(graph, small)`` gives them in Python, and ``mapping`` a file.
    Passes behind this one need data with new ids, so let it be the last.

    The tables are those that a graph input is looked up in; every one that the same input is looked up in is cut. The
    head is a weight of as many rows as the tables that an output comes from, tied to them or not. A graph that does
    anything else with ids, such as comparing them with that of a padding token, is refused.
    """

    name: ClassVar[str] = "vocabulary"
    contract: ClassVar[Contract] = "approximate"

    keep: str | None | tuple[int, ...] = option(None, "ids that stay: a list, or a text or JSON file of them")
    count: int | None = option(None, "ids that stay in all: beside ``keep`` those most frequent in data", at_least=1)
    table: str | None = option(None, "glob on the names of tables, where inputs are looked up in several")
    mapping: str | None = option(None, "JSON file that the new id of each old one is written to")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and self.count is None:
            raise PassError("vocabulary takes ids or how many: vocabulary{keep=ids.txt} or vocabulary{count=8000}")

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.count is not None and context.data is None:
            raise PassError("vocabulary{count=...} needs data, to count ids in: give batches, or name ids with keep=")
        found = self._found(graph)
        kept = self._kept(graph, found, context)
        result = graph if len(kept) == found.size else self._cut(graph, found, kept, context)
        if self.mapping is not None:
            _write_mapping(Path(self.mapping), kept)
        return result

    def _cut(self, graph: Graph, found: Found, kept: np.ndarray, context: Context) -> Graph:
        dims = _dims(graph, found)
        keep = dict.fromkeys(dims, kept)
        context.cuts += [Cut(dim.name, found.size, len(kept)) for dim in dims]
        outputs = _outputs_with(graph, dims)
        _tell(found, outputs, kept, context)
        note_recomputed(graph, dims, False, context)
        result = taken(graph, keep)
        result.metadata["changed_outputs"] = (*graph.metadata.get("changed_outputs", ()), *outputs)
        for dim in dims:
            record(result, self.name, f"{dim.name}: kept ids", (dim.name, found.size, len(kept)), tuple(kept.tolist()))
        _move_padding(result, {table.name for table in found.tables}, kept)
        return result

    def _found(self, graph: Graph) -> Found:
        every = list(_vocabularies(graph))
        if self.table is not None:
            every = [found for found in every if any(matches(table.names, (self.table,)) for table in found.tables)]
        if len(every) == 1:
            return every[0]
        names = ", ".join(found.tables[0].name for found in every)
        if every:
            raise PassError(f"inputs are looked up in {names}: name one, table=")
        called = "" if self.table is None else f" that is called {self.table}"
        raise PassError(f"no graph input is looked up in a table{called}")

    def _kept(self, graph: Graph, found: Found, context: Context) -> np.ndarray:
        named = np.unique(np.asarray(_ids(self.keep), dtype=np.int64))
        wrong = named[(named < 0) | (named >= found.size)]
        if len(wrong):
            raise PassError(f"there is no id {wrong[0]}: {found.tables[0].name} has 0..{found.size - 1}")
        if self.count is None and not len(named):
            raise PassError("keep names no id: at least one stays")
        if self.count is None:
            return named
        if len(named) > self.count:
            raise PassError(f"keep names {len(named)} ids, more than count={self.count}")
        times = _times(graph, found, calibration_batches(graph, context))
        times[named] = times.max() + 1
        return np.sort(np.argsort(-times, kind="stable")[: self.count])


def new_ids(graph: Graph, small: Graph) -> dict[int, int]:
    """The new id of each id that ``vocabulary`` kept on the way from ``graph`` to ``small``."""
    for edit in small.history[len(graph.history) :]:
        if edit.by == Vocabulary.name and edit.kept is not None:
            return {old: new for new, old in enumerate(edit.kept)}
    raise PassError(f"graph {small.name!r} was not made from {graph.name!r} by vocabulary")


# -- which tables, inputs and heads ------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Tables of one size, and the graph inputs that are looked up in them."""

    tables: list[Parameter]
    inputs: list[Value]

    @property
    def size(self) -> int:
        return int(self.tables[0].shape[0])


def _vocabularies(graph: Graph) -> Iterator[Found]:
    """Tables and inputs that belong together."""
    looked_up = [
        (node.inputs[0], source)
        for _, node in graph.walk()
        if node.op == "embedding" and isinstance(node.inputs[0], Parameter)
        for source in _sources(node.inputs[1]) & set(graph.inputs)
    ]
    left = list(dict.fromkeys(looked_up))
    while left:
        tables, inputs = {left[0][0]: None}, {left[0][1]: None}
        while more := [pair for pair in left if pair[0] in tables or pair[1] in inputs]:
            tables.update(dict.fromkeys(table for table, _ in more))
            inputs.update(dict.fromkeys(source for _, source in more))
            left = [pair for pair in left if pair not in more]
        yield Found(list(tables), list(inputs))


def _sources(value: Any) -> set[Value]:
    """Where ids come from that are only moved on their way."""
    if not isinstance(value, Value) or value.producer is None or value.producer.op not in _MOVES:
        return {value} if isinstance(value, Value) else set()
    return set().union(*(_sources(operand) for _, operand in value.producer.operands()))


def _dims(graph: Graph, found: Found) -> list[Dim]:
    """The Dims of the tables' rows and of the heads' columns; raises PassError where they are used otherwise."""
    axes = graph.axes
    axes.name_values()
    dims: dict[Dim, None] = {}
    for table in found.tables:
        rows = resolve(axes.of[table][0])
        if not isinstance(rows, Dim) or rows.size != found.size:
            raise PassError(f"{table.name} has the rows {rows}, not the {found.size} of {found.tables[0].name}")
        dims[rows] = None
    for output in graph.outputs:
        for extent in axes.of[output] if isinstance(output, Value) else ():
            dims.update((dim, None) for dim in leaves(extent) if dim.size == found.size and dim in axes.held)
    _check_ids(found)
    for node in axes.calls:
        _check_node(graph, node, list(dims), found)
    return list(dims)


def _check_ids(found: Found) -> None:
    """Raise PassError where the tables are read with other ids than those of inputs, or these ids otherwise."""
    for table in found.tables:
        for node, slot in table.uses:
            if node.op == "embedding" and slot == 0 and not _sources(node.inputs[1]) <= set(found.inputs):
                raise PassError(f"{node.label} looks up ids that no input gives, which would be other ones")
    waiting, seen = list(found.inputs), set[Value]()
    while waiting:
        for node, slot in waiting.pop().uses:
            if node.op == "embedding" and slot == 1 and node.inputs[0] in found.tables:
                continue
            if node.op not in _MOVES:
                raise PassError(f"{node.label} reads token ids, which would be other ones")
            waiting += [output for output in node.outputs if output not in seen]
            seen.update(node.outputs)


def _check_node(graph: Graph, node: Node, dims: Sequence[Dim], found: Found) -> None:
    """Raise PassError where a node would notice that ids have other numbers."""
    of = graph.axes.of
    copies: dict[int, dict[Dim, Dim]] = {slot: {} for slot, _ in node.operands()}
    own = {slot: unrelated(of[operand], copies[slot]) for slot, operand in node.operands()}
    read = [slot for slot, made in copies.items() if any(dim in made for dim in dims)]
    made = [value for value in node.outputs if _has(of[value], dims)]
    looks_up = node.op == "embedding" and node.inputs[0] in found.tables and read == [0]
    if looks_up or not (read or made):
        return
    local = None if node.regions else local_axes(node, own)
    if local is None:
        raise PassError(f"{node.label} may tell ids apart: nothing is known of it")
    here = [copies[slot][dim] for slot in read for dim in dims if dim in copies[slot]]
    here += [
        leaf
        for value in made
        for extent, is_here in zip(of[value], local.results[value.index], strict=True)
        if _has([extent], dims)
        for leaf in leaves(is_here)
    ]
    pins = [pin for extent in here for dim in leaves(extent) for pin in dim.pins]
    if pins:
        raise PassError(f"{node.label} tells ids apart: {pins[0].reason}")


def _outputs_with(graph: Graph, dims: Sequence[Dim]) -> list[str]:
    """Names of the outputs that have one of the Dims."""
    having = [value for value in graph.outputs if isinstance(value, Value) and _has(graph.axes.of[value], dims)]
    return [value.name for value in having]


def _has(axes: Sequence[Extent], dims: Sequence[Dim]) -> bool:
    return any(dim in leaves(extent) for extent in axes for dim in dims)


def _write_mapping(path: Path, kept: np.ndarray) -> None:
    """Old ids with their new ones, {"3": 0, "7": 1}; the file is there whole or as it was."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(json.dumps({str(old): new for new, old in enumerate(kept.tolist())}), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise PassError(f"mapping={path} cannot be written: {error.strerror}") from error


def _tell(found: Found, outputs: Sequence[str], kept: np.ndarray, context: Context) -> None:
    pairs = [f"{old} -> {new}" for new, old in enumerate(kept[:_SHOWN].tolist())] + ["..."] * (len(kept) > _SHOWN)
    names = " and ".join(value.name for value in found.inputs)
    takes = "takes" if len(found.inputs) == 1 else "take"
    context.note(f"{names} {takes} new ids, 0 to {len(kept) - 1} for {found.size}: {', '.join(pairs)}")
    if outputs:
        context.note(f"columns of the new ids alone: {' and '.join(outputs)}")


# -- ids ---------------------------------------------------------------------------------------------------------------


def _ids(given: str | Sequence[int] | None) -> Sequence[int]:
    """Ids as they are given, or from a file of numbers with anything between them."""
    if not isinstance(given, str):
        return given or ()
    try:
        words = re.split(r"[\s,;\[\]]+", Path(given).read_text(encoding="utf-8").strip())
        return [int(word) for word in words if word]
    except (OSError, ValueError) as reason:
        raise PassError(f"{given} is no file of token ids: {reason}") from reason


def _times(graph: Graph, found: Found, batches: Sequence[Any]) -> np.ndarray:
    """How often each id is in the inputs."""
    times = np.zeros(found.size, dtype=np.int64)
    for batch in batches:
        given, _ = Interpreter(graph).bound(batch)
        for value in found.inputs:
            ids = np.asarray(torch.as_tensor(given[value]).cpu()).reshape(-1)
            times += np.bincount(ids, minlength=found.size)[: found.size]
    return times


def _move_padding(graph: Graph, tables: set[str], kept: np.ndarray) -> None:
    """The padding id of a table, whose row gets no gradient, is the new one; none where it went."""
    new = {old: place for place, old in enumerate(kept.tolist())}
    for _, node in graph.walk():
        if node.op == "embedding" and isinstance(node.inputs[0], Parameter) and node.inputs[0].name in tables:
            padding = node.attributes["padding_idx"]
            node.attributes["padding_idx"] = None if padding is None else new.get(padding)
