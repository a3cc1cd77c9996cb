"""Laws that every operator record must obey, checked on its samples: a wrong rule, symmetry or cost fails here.

    shape      the rule gives the shapes that the operator computes
    permute    permuting the indices of a free Dim in the operands permutes the results
    within     so does permuting them in each index of another Dim by itself, where regauge.ir.dims.majors allows that
    cut        where the operator maps over a Dim, cutting commutes with it; where it contracts the Dim, indices that
               hold zeros may be dropped; and always the rule gives the shape after the cut
    symmetry   maps of the gauge class that the symmetry claims commute with the operator (regauge.ir.gauge.classes)
    scales     scaled operands give scaled results, as regauge.ir.scales.variables says of them and of their segments
    commute    where the record says so, the two operands may be exchanged
    zeros      what regauge.ir.dims.masking claims of zeros in one operand, and in all of them, holds
    element    the expression for one index is what the operator computes (regauge.ir.scalars)
    gradient   the derivatives of that expression are those that torch finds of the operator (regauge.ir.derivatives)
    cost       the cost function gives the same for a node as for the bare sizes of its axes
    aten       the ATen operators that the record stands for without an adapter compute the same

Whatever whole graphs pin (positions of tables, zeros that would be felt) is left aside: a law asks about one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.cost import cost, figures
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.kept import KeptWithin, size_after
from regauge.ir.dims.masking import gives_zero
from regauge.ir.errors import LawError, RegaugeError, blamed_on
from regauge.ir.gauge.classes import node_gauges
from regauge.ir.gauge.maps import assignments, draw_map, mapped, strongest
from regauge.ir.graph import edge
from regauge.ir.laws.aten import check_aten_names
from regauge.ir.laws.cases import Case, draw_case, sample_count
from regauge.ir.laws.elements import check_element
from regauge.ir.laws.gradients import check_gradient
from regauge.ir.laws.scales import check_scales
from regauge.ir.operator import Cost, Operator, get_operator
from regauge.ir.record_checks import check_registered, is_built_in

ADVICE_ROLE = (
    "state its role in the rule ('; whole n'), or bind the axes that hold it by one name (ir/axis_rules/notation.py)"
)
ADVICE_SYMMETRY = "claim a weaker symmetry; POINTWISE is always right (ir/operator.py)"
OVER_ALL = {"normalise", "reduce"}


def check_operator(name: str) -> None:
    """Check an operator's record against its own samples: does the operator do what its rule and symmetry say?

    Samples are taken in double precision; where the record says how it is written in ONNX, onnxruntime runs them as
    they are. Raises LawError for the first law that is broken, naming the law, the operator and the Dim and saying what
    to do; also where the record has no samples, or samples that cannot tell axes apart. Raises OperatorError for an
    unknown name, also one of an operator that torch does not have, and for a function of the record that fails.
    """
    record = get_operator(name)
    if not is_built_in(record):  # those name what may not be installed
        check_registered(record)
    count = sample_count(name)
    if not count:
        raise LawError(f"operator {name!r} has no samples to check its record on: give samples=lambda: [sample(...)]")
    for index in range(count):
        for law in laws_of(record):
            with blamed_on(f"operator {name}, sample {index}, {law}: a function of its record fails"):
                check_law(name, index, law)
        if not is_built_in(record):
            _check_sizes(draw_case(name, index))
    if record.in_onnx and not is_built_in(record):
        edge("regauge.spelling").check_spelling(name)


def _check_sizes(case: Case) -> None:
    """A Dim that may be cut has another size than the others: else a rule that mixes them up may pass."""
    values = [*case.graph.parameters.values(), *case.node.outputs]
    every = dict.fromkeys(dim for value in values for extent in case.analysis.of[value] for dim in leaves(extent))
    for dim, size in case.free_dims():
        for other in every:
            if other is not dim and other.size == size:
                message = f"{dim} and {other} have the same size"
                raise case.broken("sizes", message, "give the sample different sizes on different axes")


def laws_of(record: Operator) -> list[str]:
    """The laws that can be checked of a record: the shape law first, since without it no other says anything."""
    skipped = {"permute", "within", "zeros", "symmetry", "scales"} if record.random else set()
    skipped |= (set() if record.macs else {"cost"}) | (set() if record.commutative else {"commute"})
    skipped |= set() if None in record.aten.values() else {"aten"}
    skipped |= {"element", "gradient"} if record.element is None else set()
    return [law for law in LAWS if law not in skipped]


def check_law(name: str, index: int, law: str) -> None:
    """Check one law on one sample of an operator; raises LawError."""
    LAWS[law](draw_case(name, index))


# -- shapes ------------------------------------------------------------------------------------------------------------


def _shape(case: Case) -> None:
    try:
        analysis = case.analysis
    except RegaugeError as error:
        raise case.broken("shape", str(error), "correct the rule or the sample (ir/axis_rules/notation.py)") from error
    for value, result in zip(case.node.outputs, case.results, strict=True):
        _expect_shape(case, "shape", value, [size_after(extent, {}) for extent in analysis.of[value]], result)


def _expect_shape(case: Case, what: str, value: Any, expected: Sequence[Any], result: torch.Tensor) -> None:
    if list(expected) != list(result.shape):
        message = f"the rule gives {value.name} the shape {list(expected)}, the operator {list(result.shape)}"
        raise case.broken(what, message, "correct the rule, or derive the attribute that holds the size")


# -- indices -----------------------------------------------------------------------------------------------------------


def _permute(case: Case) -> None:
    for dim, size in case.free_dims():
        # A swap and a rotation generate all permutations; either alone is obeyed by some wrong rules.
        for order in ([1, 0, *range(2, size)], np.roll(np.arange(size), 1)):
            keep = {dim: np.asarray(order)}
            actual = case.evaluate(*case.selected(keep), f"permute {dim}")
            case.expect_same(actual, case.cut_results(case.results, keep), f"permute {dim}", ADVICE_ROLE)


def _within(case: Case) -> None:
    for dim, size in case.free_dims():
        for major in case.majors(dim):
            shifts = np.arange(int(major.size))[:, None]
            keep = {dim: KeptWithin((major,), (np.arange(size) + shifts) % size)}
            what = f"permute {dim} within {major}"
            actual = case.evaluate(*case.selected(keep), what)
            case.expect_same(actual, case.cut_results(case.results, keep), what, ADVICE_ROLE)


def _without_middle(dim: Dim, size: int) -> dict[Dim, np.ndarray]:
    return {dim: np.delete(np.arange(size), size // 2)}


def _cut(case: Case) -> None:
    for dim, size in case.free_dims():
        keep = _without_middle(dim, size)
        actual = case.evaluate(*case.selected(keep), f"cut {dim}")
        for value, result in zip(case.node.outputs, actual, strict=True):
            shape = [size_after(extent, keep) for extent in case.analysis.of[value]]
            _expect_shape(case, f"cut {dim}", value, shape, result)
        roles = case.roles(dim)
        if case.node.operator.random or roles & OVER_ALL:
            continue  # fewer entries give other values; only the shape is promised
        full = case.results
        if "contract" in roles:
            full = case.evaluate(case.silenced(keep), case.node.attributes, f"cut {dim}")
        verb = "contracts" if "contract" in roles else "maps over"
        law = f"cut {dim} (the rule {verb} it)"
        case.expect_same(actual, case.cut_results(full, keep), law, ADVICE_ROLE)


def _zeros(case: Case) -> None:
    for dim, size in case.free_dims():
        if case.roles(dim) & {*OVER_ALL, "contract"}:
            continue
        keep = _without_middle(dim, size)
        silenced, holders = case.silenced(keep), case.holders(dim)
        for silent in [holders, *([slot] for slot in holders)]:
            operands = [silenced[slot] if slot in silent else t for slot, t in enumerate(case.operands)]
            loud = frozenset(holders).difference(silent)
            claimed = [v for v in case.values_with(dim) if gives_zero(case.node, v, frozenset(silent), loud)]
            what = f"zeros at an index of {dim} in operand {' and '.join(map(str, silent))}"
            results = case.evaluate(operands, case.node.attributes, what) if claimed else []
            for value in claimed:
                result = results[value.index].nan_to_num()  # the direction of a vector that is all gone
                case.expect_same([result], [case.zeroed(value, result, keep)], what, "state zeroed_by")


def _commute(case: Case) -> None:
    first, second = case.operands
    actual = case.evaluate([second, first], case.node.attributes, "commute")
    case.expect_same(actual, case.results, "commute", "it is not commutative")


# -- maps --------------------------------------------------------------------------------------------------------------


def _symmetry(case: Case) -> None:
    """With all operands computed, and with each of them computed and the others weights, as gauges tell these apart."""
    for arranged in case.arrangements():
        claims = node_gauges(arranged.node, arranged.analysis)
        for dim, size in arranged.free_dims():
            kind = strongest(claims[dim])
            if kind is not None and arranged.movable(dim):
                _expect_symmetry(arranged, dim, kind, draw_map(kind, size))


def _expect_symmetry(case: Case, dim: Dim, kind: str, change: torch.Tensor) -> None:
    in_result = bool(case.values_with(dim))
    of = case.analysis.of
    expected = [mapped(r, of[v], dim, change) for v, r in zip(case.node.outputs, case.results, strict=True)]
    what = f"a {kind} map of {dim}"
    first: LawError | None = None
    for assignment in assignments(case, dim, change, in_result=in_result):
        operands = list(case.operands)
        for slot, value in case.node.operands():
            if slot in assignment:
                operands[slot] = mapped(operands[slot], of[value], dim, assignment[slot])
        try:
            case.expect_same(case.evaluate(operands, case.node.attributes, what), expected, what, ADVICE_SYMMETRY)
            return
        except LawError as error:
            first = first or error
    assert first is not None
    raise first


# -- cost --------------------------------------------------------------------------------------------------------------


def _cost(case: Case) -> None:
    count = case.node.operator.macs
    assert count is not None
    with blamed_on(f"operator {case.name}, its macs"):
        own = count(Cost(case.node))
    found = (own, figures(case.graph).macs, cost(case.graph).figures().macs)
    if len(set(found)) > 1:
        message = f"macs are {found[0]} for the node, but {found[1]} and {found[2]} for the sizes of its axes"
        raise case.broken("cost", message, "let macs read sizes of the call alone")


LAWS: dict[str, Callable[[Case], None]] = {
    "shape": _shape, "permute": _permute, "within": _within, "cut": _cut, "symmetry": _symmetry, "zeros": _zeros,
    "scales": check_scales, "element": check_element, "gradient": check_gradient,
    "commute": _commute, "cost": _cost, "aten": check_aten_names,
}  # fmt: skip
