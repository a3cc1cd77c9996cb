"""One sampled call of an operator, made ready for its laws: as a graph of one node, analysed, evaluated, cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from regauge.ir.dims.axes import Analysis, infer_axes
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.kept import Keep, flat_indices, part_kept
from regauge.ir.dims.majors import keeps_apart, majors_beside
from regauge.ir.dims.resize import sizes_after
from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder
from regauge.ir.errors import LawError, OperatorError, blamed_on, first_line
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.operator import Operator, Sample, get_operator

# What one operator may lose to rounding: in double precision, and in what a sample holds in less.
TOLERANCE = {torch.float64: (1e-6, 1e-8), torch.complex128: (1e-6, 1e-8)}
COARSE = (2e-2, 1e-2)
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}

Select = Callable[[torch.Tensor, Sequence[np.ndarray]], torch.Tensor]


@dataclass(eq=False)
class Case:
    """A sampled call; ``computed`` are the operand slots whose values are computed, not parameters of the graph.

    ``joined`` is an operand slot and an axis of it: there it is a concatenation of two parameters.
    """

    name: str
    index: int
    operands: list[Any]
    attributes: Mapping[str, Any]
    computed: frozenset[int] = frozenset()
    joined: tuple[int, int] | None = None

    def broken(self, what: str, message: str, advice: str) -> LawError:
        return LawError(f"operator {self.name}, sample {self.index}, {what}: {message}: {advice}")

    @cached_property
    def graph(self) -> Graph:
        """A graph of the call: real operands are parameters, others constants, and results are left open."""
        graph = Graph(self.name)
        build = Builder(graph)
        slots = get_operator(self.name).slots
        given: list[Any] = []
        for slot, operand in enumerate(self.operands):
            if isinstance(operand, torch.Tensor):
                kind: Any = "parameter" if is_real(operand.dtype) else "constant"
                name = _operand_name(slots, slot)
                if self.joined is not None and self.joined[0] == slot:
                    axis = self.joined[1]
                    halves = operand.tensor_split(2, axis)
                    parts = [build.parameter(f"{name}.{number}", half, kind) for number, half in enumerate(halves)]
                    operand = build.concat(*parts, dim=axis)
                else:
                    operand = build.parameter(name, operand, kind)
                operand = build.identity(operand) if slot in self.computed else operand
            given.append(operand)
        build(self.name, *given, results=self._stated_results(), **self.attributes)
        return graph

    def _stated_results(self) -> list[tuple[tuple[int, ...], torch.dtype]] | None:
        """Shapes and types of the results where values of the operands decide them; None where they are inferred."""
        record = get_operator(self.name)
        if not record.sized_by_data:
            return None
        raw = record.evaluate(*self.operands, **self.attributes)
        return [(tuple(r.shape), r.dtype) for r in (raw if isinstance(raw, tuple | list) else [raw])]

    @cached_property
    def node(self) -> Node:
        return self.graph.nodes[-1]

    @cached_property
    def analysis(self) -> Analysis:
        analysis = infer_axes(self.graph, strict=True)
        analysis.axes(self.node.outputs[0])  # names the Dims that only results have
        return analysis

    @cached_property
    def results(self) -> list[torch.Tensor]:
        return self.evaluate(self.operands, self.node.attributes)

    def evaluate(self, operands: Sequence[Any], attributes: Mapping[str, Any], what: str = "") -> list[torch.Tensor]:
        """The results of the operator; raises LawError where it fails on operands changed by a law."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                raw = self.node.operator.evaluate(*operands, **attributes)
            except Exception as error:
                line = first_line(error)
                advice = "correct the rule, or derive the attributes that hold sizes"
                raise self.broken(what or "evaluation", f"the operator fails: {line}", advice) from error
        results = list(raw) if isinstance(raw, tuple | list) else [raw]
        return results[: len(self.node.outputs)]

    def free_dims(self) -> list[tuple[Dim, int]]:
        """Dims of the call that the rule leaves free, with their sizes."""
        values = [*self.graph.parameters.values(), *self.node.outputs]
        found = dict.fromkeys(dim for value in values for extent in self.analysis.of[value] for dim in leaves(extent))
        return [(dim, dim.size) for dim in found if not dim.pins and isinstance(dim.size, int) and dim.size > 1]

    def roles(self, dim: Dim) -> set[str]:
        return {role for role, extent in self.analysis.calls[self.node].roles if dim in leaves(extent)}

    def holders(self, dim: Dim) -> list[int]:
        """The operand slots whose tensors have the Dim."""
        axes = self.analysis.of
        return [slot for slot, value in self.node.operands() if any(dim in leaves(extent) for extent in axes[value])]

    def values_with(self, dim: Dim) -> list[Value]:
        """The results that have the Dim."""
        axes = self.analysis.of
        return [value for value in self.node.outputs if any(dim in leaves(extent) for extent in axes[value])]

    def majors(self, dim: Dim) -> list[Dim]:
        """Dims within which this one may be permuted, as far as this node goes."""
        values = [value for value in (*self.node.inputs, *self.node.outputs) if isinstance(value, Value)]
        axes = [self.analysis.of[value] for value in values]
        having = [own for own in axes if any(dim in leaves(extent) for extent in own)]
        beside = [majors_beside(own, dim) for own in having]
        common = [major for major in beside[0] if all(major in others for others in beside)]
        apart = [major for major in common if keeps_apart(self.node, self.analysis, dim, major)]
        return [major for major in apart if isinstance(major.size, int)]

    # -- cuts --------------------------------------------------------------------------------------------------------

    def selected(self, keep: Keep) -> tuple[list[Any], Mapping[str, Any]]:
        """Operands and attributes of the call when each Dim keeps the given indices, in the given order."""
        derived = self.analysis.calls[self.node].derived
        sizes = {name: sizes_after(value, keep) for name, value in derived.items()}
        return self._each(keep, self.cut), {**self.node.attributes, **sizes}

    def silenced(self, keep: Keep) -> list[Any]:
        """Operands with zeros at the indices that are not kept."""
        return self._each(keep, self.zeroed)

    def _each(self, keep: Keep, change: Callable[[Value, torch.Tensor, Keep], torch.Tensor]) -> list[Any]:
        pairs = zip(self.node.inputs, self.operands, strict=False)  # absent operands at the end are in neither
        return [change(value, o, keep) if isinstance(value, Value) else o for value, o in pairs]

    def cut(self, value: Value, tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
        return part_kept(tensor, self.analysis.of[value], keep)

    def zeroed(self, value: Value, tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
        for axis, extent in enumerate(self.analysis.of[value]):
            gone = np.setdiff1d(np.arange(tensor.shape[axis]), flat_indices(extent, keep))
            tensor = _plain(tensor).index_fill(axis, torch.from_numpy(gone), 0).to(tensor.dtype)
        return tensor

    def cut_results(self, results: Sequence[torch.Tensor], keep: Keep) -> list[torch.Tensor]:
        return [self.cut(value, result, keep) for value, result in zip(self.node.outputs, results, strict=True)]

    # -- maps --------------------------------------------------------------------------------------------------------

    def movable(self, dim: Dim) -> list[int]:
        """The operand slots that have the Dim and hold numbers to which a linear map can be applied."""
        return [slot for slot in self.holders(dim) if is_real(self.operands[slot].dtype)]

    def arrangements(self) -> Iterator[Case]:
        """The call with every real operand computed, and with each of them computed while the others are weights."""
        real = [
            slot
            for slot, operand in enumerate(self.operands)
            if isinstance(operand, torch.Tensor) and is_real(operand.dtype)
        ]
        for computed in dict.fromkeys([frozenset(real), *(frozenset([slot]) for slot in real)]):
            yield Case(self.name, self.index, self.operands, self.attributes, computed)

    # -- comparison --------------------------------------------------------------------------------------------------

    def expect_same(
        self, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: str, advice: str
    ) -> None:
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            relative, absolute = TOLERANCE.get(a.dtype, COARSE if is_real(a.dtype) else (0.0, 0.0))
            a, b = _plain(a), _plain(b)
            if a.shape != b.shape or not torch.allclose(a, b, relative, absolute, equal_nan=True):
                raise self.broken(what, f"result {number} {_difference(a, b)}", advice)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits as such that torch computes with."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    if actual.shape != expected.shape:
        return f"has the shape {list(actual.shape)} instead of {list(expected.shape)}"
    wide = torch.complex128 if actual.is_complex() else torch.float64
    worst = (actual.to(wide) - expected.to(wide)).abs().nan_to_num(torch.inf).max()
    return f"differs by {float(worst):.3g}"


def _operand_name(slots: Sequence[str], slot: int) -> str:
    """The name of the slot; members of a variadic one are counted."""
    name = slots[min(slot, len(slots) - 1)]
    return f"{name[1:]}{slot - len(slots) + 1}" if name.startswith("*") else name


def sample_count(name: str) -> int:
    with torch.random.fork_rng(devices=[]):
        return len(samples_of(get_operator(name)))


def samples_of(record: Operator) -> list[Sample]:
    """The samples of a record, none where it has none; raises OperatorError where they are no samples."""
    with blamed_on(f"operator {record.name}, its samples"):
        found = list(record.samples()) if record.samples else []
    for one in found:
        if not isinstance(one, Sample):
            kind = type(one).__name__
            raise OperatorError(f"operator {record.name}, its samples: one is a {kind}: write sample(operands, ...)")
    return found


def draw_case(name: str, index: int) -> Case:
    """A sample of an operator in double precision; the same numbers each time."""
    return _drawn(get_operator(name), index)


@lru_cache(maxsize=4)  # the laws of a sample follow one another
def _drawn(record: Operator, index: int) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        call = samples_of(record)[index]
    operands = [o.to(_DOUBLE.get(o.dtype, o.dtype)) if isinstance(o, torch.Tensor) else o for o in call.operands]
    return Case(record.name, index, operands, call.attributes)
