"""Laws that every operator record must obey, generated from its samples: a wrong axis rule fails here.

For every free Dim of a sampled call: permuting its indices in the operands permutes the results; where the operator
only maps over the Dim, cutting commutes with it; where it contracts the Dim, indices that hold zeros may be dropped;
and always the rule's shape, before and after a cut, is the shape the operator computes. A cost function gives the same
for a node as for the bare sizes of its axes.
"""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from regauge.ir.axes import Analysis, analyse
from regauge.ir.cost import cost, figures
from regauge.ir.edit import Builder
from regauge.ir.extents import Dim, Keep, flat_indices, leaves, size_after
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.masking import gives_zero
from regauge.ir.operator import Cost, Sample, all_operators, get_operator
from regauge.ir.resize import sizes_after

# Operators that need regions, an outside runtime or a library's operator: each has direct tests of its own.
WITHOUT_SAMPLES = {"cond", "while_loop", "loop", "scan", "torch_call", "onnx_call"}

# Their results are as large as the operands' values say: they have to be stated.
SIZED_BY_DATA = {"nonzero", "split_computed"}

CASES = [
    pytest.param(name, index, id=f"{name}-{index}")
    for name, record in sorted(all_operators().items())
    for index, _ in enumerate(record.samples() if record.samples else ())
]


def draw(name: str, index: int) -> Sample:
    torch.manual_seed(index)
    samples = get_operator(name).samples
    assert samples is not None
    return list(samples())[index]


def one_node_graph(name: str, call: Sample) -> tuple[Graph, Node]:
    """A graph whose operands are parameters (constants where they are integers) and whose results are left open."""
    graph = Graph(name)
    build = Builder(graph)
    operands = []
    for slot, operand in enumerate(call.operands):
        if isinstance(operand, torch.Tensor):
            tensor = operand.double() if operand.dtype == torch.float32 else operand
            kind = "parameter" if tensor.is_floating_point() or tensor.is_complex() else "constant"
            operand = build.parameter(f"operand{slot}", tensor, kind)
        operands.append(operand)
    results = get_operator(name).evaluate(*call.operands, **call.attributes) if name in SIZED_BY_DATA else ()
    several = results if isinstance(results, tuple) else [results]
    stated = [(tuple(r.shape), operands[0].dtype if name == "split_computed" else r.dtype) for r in several]
    build(name, *operands, results=stated or None, **call.attributes)
    return graph, graph.nodes[0]


def evaluate(node: Node, operands: list[object], attributes: Mapping[str, object]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    raw = node.operator.evaluate(*operands, **attributes)
    results = list(raw) if isinstance(raw, tuple | list) else [raw]
    return results[: len(node.outputs)]


def tensors(node: Node) -> list[object]:
    return [operand.tensor if isinstance(operand, Parameter) else operand for operand in node.inputs]


def taken(value: Value, tensor: torch.Tensor, analysis: Analysis, keep: Keep) -> torch.Tensor:
    for axis, extent in enumerate(analysis.of[value]):
        tensor = tensor.index_select(axis, torch.from_numpy(flat_indices(extent, keep)))
    return tensor


def zeroed(value: Value, tensor: torch.Tensor, analysis: Analysis, keep: Keep) -> torch.Tensor:
    for axis, extent in enumerate(analysis.of[value]):
        gone = np.setdiff1d(np.arange(tensor.shape[axis]), flat_indices(extent, keep))
        tensor = tensor.index_fill(axis, torch.from_numpy(gone), 0)
    return tensor


def roles_of(node: Node, analysis: Analysis, dim: Dim) -> set[str]:
    return {role for role, extent in analysis.calls[node].roles if dim in set(leaves(extent))}


def free_dims(graph: Graph, analysis: Analysis) -> list[Dim]:
    found = dict.fromkeys(dim for value in graph.values() for extent in analysis.of[value] for dim in leaves(extent))
    return [dim for dim in found if not dim.pins and isinstance(dim.size, int) and dim.size > 1]


def selected(
    node: Node, analysis: Analysis, keep: Keep, select: object = taken
) -> tuple[list[object], Mapping[str, object]]:
    """Operands and attributes of the call when each Dim keeps the given indices."""
    operands = [
        select(operand, operand.tensor, analysis, keep) if isinstance(operand, Parameter) else operand  # type: ignore[operator]
        for operand in node.inputs
    ]
    derived = {name: sizes_after(value, keep) for name, value in analysis.calls[node].derived.items()}
    return operands, {**node.attributes, **derived}


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], law: str) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, equal_nan=True, msg=lambda m: f"{law}: {m}")


@pytest.mark.parametrize(("name", "index"), CASES)
def test_rule_gives_the_evaluated_shape(name: str, index: int) -> None:
    graph, node = one_node_graph(name, draw(name, index))
    analysis = analyse(graph, strict=True)
    results = evaluate(node, tensors(node), node.attributes)
    for value, result in zip(node.outputs, results, strict=True):
        assert [size_after(extent, {}) for extent in analysis.of[value]] == list(result.shape)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_permuting_a_free_dim_commutes(name: str, index: int) -> None:
    graph, node = one_node_graph(name, draw(name, index))
    if node.operator.random:
        pytest.skip("the results are random")
    analysis = analyse(graph, strict=True)
    expected = evaluate(node, tensors(node), node.attributes)
    for dim in free_dims(graph, analysis):
        keep = {dim: np.roll(np.arange(dim.size), 1)}
        operands, attributes = selected(node, analysis, keep)
        actual = evaluate(node, operands, attributes)
        assert_same(
            actual, [taken(v, t, analysis, keep) for v, t in zip(node.outputs, expected, strict=True)], f"permute {dim}"
        )


@pytest.mark.parametrize(("name", "index"), CASES)
def test_cutting_a_free_dim_commutes(name: str, index: int) -> None:
    graph, node = one_node_graph(name, draw(name, index))
    analysis = analyse(graph, strict=True)
    full = evaluate(node, tensors(node), node.attributes)
    for dim in free_dims(graph, analysis):
        assert isinstance(dim.size, int)
        keep = {dim: np.array([i for i in range(dim.size) if i != dim.size // 2])}
        operands, attributes = selected(node, analysis, keep)
        actual = evaluate(node, operands, attributes)
        for value, result in zip(node.outputs, actual, strict=True):
            assert [size_after(extent, keep) for extent in analysis.of[value]] == list(result.shape), f"cut {dim}"
        roles = roles_of(node, analysis, dim)
        if node.operator.random or roles & {"normalise", "reduce"}:
            continue  # fewer entries give other values; only the shape is promised
        if "contract" in roles:
            masked, _ = selected(node, analysis, keep, zeroed)
            full_masked = evaluate(node, masked, node.attributes)
            expected = [taken(v, t, analysis, keep) for v, t in zip(node.outputs, full_masked, strict=True)]
        else:
            expected = [taken(v, t, analysis, keep) for v, t in zip(node.outputs, full, strict=True)]
        verb = "contracts" if "contract" in roles else "maps over"
        law = f"the rule of {name} {verb} {dim}, but a cut gives other values: state its role (ir/notation.py)"
        assert_same(actual, expected, law)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_where_zeros_are_said_to_give_zeros_they_do(name: str, index: int) -> None:
    """What regauge.ir.masking claims of an operator, for zeros in each operand alone and in all of them."""
    graph, node = one_node_graph(name, draw(name, index))
    analysis = analyse(graph, strict=True)
    for dim in free_dims(graph, analysis):
        if roles_of(node, analysis, dim) & {"normalise", "reduce", "contract"}:
            continue
        keep = {dim: np.array([i for i in range(dim.size) if i != dim.size // 2])}  # type: ignore[operator]
        masked, _ = selected(node, analysis, keep, zeroed)
        holders = [s for s, v in node.operands() if any(dim in leaves(extent) for extent in analysis.of[v])]
        for silent in [holders, *([slot] for slot in holders)]:
            operands = [masked[slot] if slot in silent else t for slot, t in enumerate(tensors(node))]
            for value, result in zip(node.outputs, evaluate(node, operands, node.attributes), strict=True):
                has_it = any(dim in leaves(extent) for extent in analysis.of[value])
                if has_it and gives_zero(node, value, frozenset(silent), frozenset(holders).difference(silent)):
                    result = result.nan_to_num()  # the direction of a vector that is all gone
                    assert_same([result], [zeroed(value, result, analysis, keep)], f"zeros of {dim} in {silent}")


@pytest.mark.parametrize(("name", "index"), [case for case in CASES if get_operator(str(case.values[0])).macs])
def test_cost_is_counted_alike_for_a_node_and_for_its_sizes(name: str, index: int) -> None:
    graph, node = one_node_graph(name, draw(name, index))
    count = node.operator.macs
    assert count is not None
    assert count(Cost(node)) == figures(graph).macs == cost(graph).figures().macs


@pytest.mark.parametrize("name", [name for name, record in sorted(all_operators().items()) if record.commutative])
def test_operands_of_commutative_operators_may_be_exchanged(name: str) -> None:
    for index, _ in enumerate(get_operator(name).samples()):  # type: ignore[misc]
        _, node = one_node_graph(name, draw(name, index))
        results = [evaluate(node, order, node.attributes) for order in (tensors(node), tensors(node)[::-1])]
        assert_same(*results, f"{name} is said to be commutative")


def test_every_operator_has_samples() -> None:
    bare = {name for name, record in all_operators().items() if record.samples is None}
    assert not bare - WITHOUT_SAMPLES, "without samples no law is tested"
