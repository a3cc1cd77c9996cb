"""The runner: what it checks before and after a pass, and what it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.errors import EquivalenceError, PassError
from regauge.ir.graph import Graph
from regauge.ir.storage.weights import dense
from regauge.optimize import optimize
from regauge.passes import pipeline
from regauge.passes.base import Context, Contract, Cut, Need, Pass
from regauge.passes.catalog import as_passes
from regauge.passes.pipeline import run_passes
from small_graphs import multilayer_perceptron


@dataclass(frozen=True)
class Probe(Pass):
    """A pass that does what a test says."""

    action: Any = None
    needs: ClassVar[frozenset[Need]] = frozenset()
    contract: ClassVar[Contract] = "exact"

    def call(self, graph: Graph, context: Context) -> Graph:
        result: Graph = self.action(graph)
        return result


def scaled(by: float) -> Callable[[Graph], Graph]:
    def action(graph: Graph) -> Graph:
        result = graph.copy()
        weight = result.parameters["layer0.weight"]
        weight.weight = dense(weight.tensor * by)
        return result

    return action


def test_exact_pass_is_checked_by_numbers() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    fine = optimize(graph, Probe(action=scaled(1 + 1e-12)))
    assert 0 < fine.report.passes[0].error < 1e-10
    with pytest.raises(EquivalenceError, match="probe promises to be exact, but outputs differ by 1.0e-03"):
        optimize(graph, Probe(action=scaled(1.001)))


def test_verification_can_be_switched_off() -> None:
    with regauge.settings.using(verify="structure"):
        assert optimize(multilayer_perceptron(4, 8, 3), Probe(action=scaled(2))).report.passes[0].error is None


def test_pass_that_changes_its_input_is_caught() -> None:
    def action(graph: Graph) -> Graph:
        build = Builder(graph)
        replace_uses(graph, graph.inputs[0], build.relu(graph.inputs[0]))
        return graph

    with pytest.raises(PassError, match="probe changed the graph it was given"):
        optimize(multilayer_perceptron(4, 8, 3), Probe(action=action))


def _zeroed(graph: Graph) -> None:
    for parameter in graph.parameters.values():
        parameter.weight.load().mul_(0)


@pytest.mark.parametrize("copied", [False, True])
def test_pass_that_writes_into_a_shared_weight_is_caught(copied: bool) -> None:
    """The tensors of a captured graph are the user's own."""

    def action(graph: Graph) -> Graph:
        result = graph.copy() if copied else graph
        _zeroed(result)
        return result

    graph = regauge.capture(torch.nn.Linear(3, 2), (torch.randn(1, 3),))
    with pytest.raises(PassError, match="probe changed the graph it was given: it wrote into weight"):
        optimize(graph, Probe(action=action))


def test_pass_that_gives_its_input_another_weight_is_caught() -> None:
    def action(graph: Graph) -> Graph:
        graph.parameters["layer1.weight"].weight = dense(torch.zeros(3, 8, dtype=torch.float64))
        return graph

    with pytest.raises(PassError, match="probe changed the graph it was given: it wrote into layer1.weight"):
        optimize(multilayer_perceptron(4, 8, 3), Probe(action=action))


def test_weights_that_a_pass_folded_into_others_go() -> None:
    """The report counts what is left; what nothing read before the pass stays, dead nodes too."""

    def action(graph: Graph) -> Graph:
        result = graph.copy()
        first, second = result.parameters["layer0.weight"], result.parameters["layer1.weight"]
        joined = Builder(result).parameter("joined", second.tensor @ first.tensor)
        replace_uses(result, result.outputs[0], Builder(result).linear(result.inputs[0], joined))  # type: ignore[arg-type]
        return result

    graph = multilayer_perceptron(4, 8, 3)
    for node in [node for node in graph.nodes if node.op == "relu"]:
        replace_uses(graph, node.output, node.inputs[0])
        remove_node(graph, node)
    build = Builder(graph)
    build.parameter("unread", torch.zeros(5))
    build("tanh", graph.inputs[0], name="aside")
    small = optimize(graph, Probe(action=action))
    assert set(small.parameters) == {"joined", "unread"}
    assert [node.op for node in small.nodes] == ["tanh", "linear"]
    entry = small.report.passes[0]
    assert (entry.before.parameters, entry.after.parameters) == (4 * 8 + 8 * 3 + 5, 4 * 3 + 5)


def test_pass_must_return_a_graph() -> None:
    with pytest.raises(PassError, match="probe returned NoneType"):
        optimize(multilayer_perceptron(4, 8, 3), Probe(action=lambda graph: None))


def test_malformed_result_is_caught() -> None:
    def action(graph: Graph) -> Graph:
        result = graph.copy()
        result.nodes[1].outputs[0].name = result.nodes[0].outputs[0].name
        return result

    with pytest.raises(PassError, match="probe left a graph that does not verify"):
        optimize(multilayer_perceptron(4, 8, 3), Probe(action=action))


def test_missing_data_is_told() -> None:
    class Hungry(Probe):
        needs = frozenset({"data"})

    with pytest.raises(PassError, match="hungry needs data: give batches"):
        optimize(multilayer_perceptron(4, 8, 3), Hungry(action=lambda graph: graph))


@pytest.mark.parametrize("by", [float("nan"), float("inf")])
def test_exact_pass_that_breaks_the_numbers_is_no_exact_pass(by: float) -> None:
    with pytest.raises(EquivalenceError, match="promises to be exact"):
        optimize(multilayer_perceptron(4, 8, 3), Probe(action=scaled(by)))


def test_exact_pass_is_checked_on_the_given_data() -> None:
    seen = []

    def batches() -> Any:
        seen.append(1)
        yield torch.ones(4, 4, dtype=torch.float64)

    optimize(multilayer_perceptron(4, 8, 3), Probe(action=scaled(1)), data=batches)
    assert seen


def test_exact_passes_leave_out_the_labels_of_the_data() -> None:
    graph = multilayer_perceptron(8, 12, 3)
    batch = [torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 2, 1, 1])]  # as a DataLoader gives it
    report = regauge.optimize(graph, "sort,prune{ratio=0.5},simplify", data=[batch]).report
    assert report.passes[0].error is not None and report.passes[0].error < 1e-12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.zeros(4, 8)}, "data is a dict: give a list of batches"),
        ("x.npz", "data is a str: give a list of batches"),
        (["x.npz"], "got 'x.npz': give a tensor for each input"),
        ([None], "linear failed on operands None"),
    ],
)
def test_data_that_is_no_batches_is_told_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(regauge.RegaugeError, match=message) as caught:
        regauge.optimize(multilayer_perceptron(8, 12, 3), "prune{ratio=0.5}", data=data)
    assert len(str(caught.value).splitlines()) == 1


def test_every_pass_reads_all_batches_of_a_generator() -> None:
    """Also what the check of an exact pass has looked at."""
    graph = multilayer_perceptron(8, 12, 3)
    batches = list(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    result = regauge.optimize(graph, "sort,sparsify{pattern=unstructured},prune{ratio=0.5}", data=iter(batches))
    wanted = regauge.optimize(graph, "sort,sparsify{pattern=unstructured},prune{ratio=0.5}", data=batches)
    assert [entry.notes for entry in result.report.passes] == [entry.notes for entry in wanted.report.passes]
    assert "chosen on 12 examples" in result.report.passes[1].notes


def test_no_passes_give_a_copy_with_an_empty_report() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    result = optimize(graph, [])
    assert result is not graph and str(result) == str(graph) and str(result.report) == "no passes"


def test_report_has_a_row_per_pass_and_history_tells_who() -> None:
    result = optimize(multilayer_perceptron(4, 8, 3), "prune{ratio=0.5},prune{ratio=0.25}")
    assert [entry.text for entry in result.report.passes] == ["prune{ratio=0.5}", "prune{ratio=0.25}"]
    assert result.report.before.parameters == 4 * 8 + 8 * 3
    assert result.report.after.parameters == 4 * 3 + 3 * 3
    assert {edit.by for edit in result.history} == {"prune"}
    table = str(result.report)
    assert "pass" in table and "prune{ratio=0.25}" in table and "28 -> 21 (75.0%)" in table


def test_print_after_shows_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    with regauge.settings.using(print_after=True, trace=True):
        optimize(multilayer_perceptron(4, 8, 3), "prune{ratio=0.5}")
    shown = capsys.readouterr().err
    assert "after prune{ratio=0.5}:" in shown and "linear" in shown and "prune{ratio=0.5}: ends after" in shown


def test_a_module_is_refused_with_what_to_do() -> None:
    with pytest.raises(PassError, match=r"not a Linear: make one by regauge\.capture"):
        optimize(torch.nn.Linear(2, 2), "prune{ratio=0.5}")  # type: ignore[arg-type]


def test_cuts_of_a_pass_that_tells_none_are_reported() -> None:
    class Halve(regauge.Pass):
        """Keep the first half of every free Dim."""

        name = "halve"
        contract = "approximate"

        def call(self, graph: Graph, context: regauge.Context) -> Graph:
            return regauge.resize(graph, {g.dim: range(g.size // 2) for g in graph.groups() if g.free}, by=self.name)

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    report = regauge.optimize(regauge.capture(model, (torch.randn(2, 4),)), Halve()).report
    assert report.passes[0].cuts == (Cut("0.weight:0", 8, 4),) and "0.weight:0: 8 -> 4" in str(report)


class _Point:
    """An entry point as a plug-in declares it."""

    value = "mine:THING"

    def __init__(self, name: str, thing: object) -> None:
        self.name, self.load = name, lambda: thing


def test_an_entry_point_may_be_a_rewrite_and_has_the_name_of_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = regauge.rewrite(lambda op, x: op.mul(x, op.sigmoid(x)), lambda build, x: build.silu(x), name="my-silu")
    points = [_Point("my-silu", silu), _Point("other", silu), _Point("number", 3)]
    monkeypatch.setattr(
        "regauge.passes.catalog.entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
    )
    assert as_passes("my-silu")[0].name == "my-silu"
    with pytest.raises(PassError, match="'other' of mine:THING calls itself 'my-silu': let both names agree"):
        as_passes("other")
    with pytest.raises(PassError, match="neither a subclass of regauge.Pass nor a rewrite"):
        as_passes("number")


def test_weights_that_no_pass_changed_come_back_from_the_cpu_as_they_were() -> None:
    """What a graph on a GPU goes through; here the device that it comes back to is the CPU as well."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = capture(model, (torch.randn(2, 4),))
    passes = as_passes("prune{ratio=0.5,include=[2.weight:0]}")
    found = pipeline._run_from(torch.device("cpu"), graph, passes, None, None, None, footprints=None)
    expected = run_passes(graph, passes)
    assert found.report.passes[0].cuts == expected.report.passes[0].cuts
    x = torch.randn(2, 4)
    torch.testing.assert_close(found.run(x), expected.run(x))
    assert found.parameters["0.weight"].weight is graph.parameters["0.weight"].weight
    assert found.parameters["4.weight"].shape == (3, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_that_learn_do_so_whatever_the_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.randn(8, 1, 8, 8)
    graph = capture(module, (images[:2],), dynamic={0: {0: "batch"}})
    wanted = optimize(graph, "quantize", data=[(images,)])
    with mode():
        found = optimize(graph, "quantize", data=[(images,)])
    torch.testing.assert_close(found.run(images), wanted.run(images), rtol=0, atol=0)
