"""``depth``: what it removes, that the rest computes what the network without it does, budgets, repairs, words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regauge
from layered_networks import Decoder, GroupedDecoder, ParallelBlock, ResidualNetwork, encoder, ids, images, redrawn
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph


def decoder(blocks: int = 4) -> tuple[nn.Module, Graph]:
    model = redrawn(Decoder(blocks))
    return model, capture(model, (ids(),), dynamic={0: {0: "batch"}})


def text(batches: int = 4, count: int = 64) -> list[tuple[torch.Tensor]]:
    return [(ids(count, seed),) for seed in range(1, 1 + batches)]


def error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    """The squared error of the outputs, as a share of their squares."""
    (y,), (z,) = graph.run(x), other.run(x)
    return float((y - z).square().sum() / y.square().sum())


def assert_same(small: Graph, reference: nn.Module, x: torch.Tensor) -> None:
    """The graph and the module that comes of it compute what the reference does."""
    with torch.no_grad():
        wanted = reference(x)
        torch.testing.assert_close(small.run(x)[0], wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(small.to_torch().eval()(x), wanted, rtol=1e-6, atol=1e-6)


# -- what is left computes what the network without the part does ------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_decoder_without_a_block(gone: int) -> None:
    model = redrawn(Decoder(3))
    small = regauge.optimize(capture(model, (ids(),)), f"depth{{blocks=1,include=blocks.{gone}}}")
    del model.blocks[gone]
    assert_same(small, model, ids(seed=3))


@pytest.mark.parametrize("gone", [0, 2])
def test_a_decoder_with_rotary_tables_without_a_block(gone: int) -> None:
    model = redrawn(GroupedDecoder(3))
    small = regauge.optimize(capture(model, (ids(),)), f"depth{{blocks=1,include=layers.{gone}}}")
    del model.layers[gone]
    assert_same(small, model, ids(seed=3))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_encoder_without_a_layer(gone: int) -> None:
    """Of the last layer the result is the output of the graph."""
    model, x = redrawn(encoder(3)).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    small = regauge.optimize(capture(model, (x,)), f"depth{{blocks=1,include=layers.{gone}}}")
    del model.layers[gone]
    assert_same(small, model, x)


def test_an_encoder_without_an_attention_keeps_the_norm_behind_it() -> None:
    model, x = redrawn(encoder(2)), torch.randn(2, 5, 16)
    small = regauge.optimize(capture(model, (x,)), "depth{blocks=1,unit=branch,include=layers.0.self_attn}")
    with torch.no_grad():
        first = model.layers[0]
        y = first.norm1(x)
        wanted = model.layers[1](first.norm2(y + first.linear2(torch.relu(first.linear1(y)))))
    torch.testing.assert_close(small.run(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_one_of_two_parallel_branches() -> None:
    model = redrawn(Decoder(2, ParallelBlock))
    small = regauge.optimize(capture(model, (ids(),)), 'depth{blocks=1,unit=branch,include="blocks.0.{ln2,fc1,fc2}"}')
    with torch.no_grad():
        model.blocks[0].fc2.weight.zero_()
        model.blocks[0].fc2.bias.zero_()
    assert_same(small, model, ids(seed=3))
    assert "blocks.0.fc1.weight" not in small.parameters and "blocks.0.qkv.weight" in small.parameters


@pytest.mark.parametrize("gone", [1, 4])
def test_a_residual_network_without_a_block_has_no_activation_twice(gone: int) -> None:
    model = redrawn(ResidualNetwork())
    graph = capture(model, (images(),))
    small = regauge.optimize(graph, f"depth{{blocks=1,include=blocks.{gone}}}")
    del model.blocks[gone]
    assert_same(small, model, images(seed=3))
    relus = [sum(node.op == "relu" for node in g.nodes) for g in (graph, small)]
    assert relus[0] - relus[1] == 2
    assert not [name for name in small.parameters if name.startswith(f"blocks.{gone}.")]


class Masked(nn.Module):
    """A model that gives no numbers where a whole row is masked, as a softmax over nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.table(x)
        for block in self.blocks:
            y = y + torch.tanh(block(y))
        scores = (y @ y.transpose(1, 2)).masked_fill(mask[:, None] == 0, -torch.inf)
        out: torch.Tensor = scores.softmax(-1) @ y
        return out


def test_masks_that_are_made_up_leave_something_to_look_at() -> None:
    model, x = redrawn(Masked()), torch.randint(0, 9, (16, 2))
    graph = capture(model, (x, torch.ones(16, 2, dtype=torch.int64)))
    assert len(regauge.optimize(graph, "depth{blocks=1}").report.passes[0].cuts) == 1
    with pytest.raises(PassError, match="outputs are not finite on the data"):
        regauge.optimize(graph, "depth{blocks=1}", data=[(x, torch.zeros(16, 2, dtype=torch.int64))])


def test_parallel_branches_are_told_apart_by_similarity() -> None:
    model = redrawn(Decoder(2, ParallelBlock))
    with torch.no_grad():
        model.blocks[1].fc2.weight.zero_()
        model.blocks[1].fc2.bias.zero_()
    graph = capture(model, (ids(),))
    small = regauge.optimize(graph, "depth{blocks=1,unit=branch,score=similarity,compensate=false}", data=[(ids(),)])
    assert small.report.passes[0].cuts[0].dim == "blocks.1.{ln2,fc1,fc2}"
    assert error(graph, small, ids()) == 0


class Shuffling(nn.Module):
    """Units that split the channels, change one half and shuffle, as in ShuffleNet v2: nothing is added to anything."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.units = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(units))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for unit in self.units:
            same, changed = x.chunk(2, 1)
            x = torch.cat([same, torch.relu(unit(changed))], 1)
            x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def test_units_that_split_their_input_are_blocks() -> None:
    model, x = redrawn(Shuffling(3)), torch.randn(2, 3, 6, 6)
    small = regauge.optimize(capture(model, (x,)), "depth{blocks=1,compensate=false}", data=[x])
    gone = int(small.report.passes[0].cuts[0].dim.partition("units.")[2])
    del model.units[gone]
    assert_same(small, model, x)
    with pytest.raises(PassError, match="take unit=block"):
        regauge.optimize(capture(model, (x,)), "depth{params=0.9}", data=[x])


class Shared(nn.Module):
    """One layer, gone through several times, as in ALBERT."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.norm, self.hidden, self.back = times, nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x + self.back(torch.tanh(self.hidden(self.norm(x))))
        out: torch.Tensor = self.head(x)
        return out


def test_layers_that_share_their_weights_are_blocks() -> None:
    model, x = redrawn(Shared(3)), torch.randn(5, 16)
    graph = capture(model, (x,))
    small = regauge.optimize(graph, "depth{blocks=1,compensate=false}", data=[x])
    assert figures(small).parameters == figures(graph).parameters
    model.times = 2
    assert_same(small, model, x)


def test_weights_that_parts_share_are_saved_once_all_of_these_are_gone() -> None:
    model, x = redrawn(Shared(2)), torch.randn(5, 16)
    graph = capture(model, (x,))
    small = regauge.optimize(graph, "depth{params=0.1}", data=[x])
    assert set(small.parameters) == {"head.weight", "head.bias"}
    with pytest.raises(PassError, match="by what each saves alone"):
        regauge.optimize(graph, "depth{params=0.1,iterative=false}", data=[x])


def test_several_blocks_in_a_row() -> None:
    model, graph = decoder(4)
    small = regauge.optimize(graph, "depth{blocks=3,include=[blocks.0,blocks.1,blocks.2]}")
    del model.blocks[:3]
    assert_same(small, model, ids(seed=3))
    weights = [name for name, parameter in small.parameters.items() if parameter.kind == "parameter"]
    assert len(weights) == len(dict(model.named_parameters()))


def test_an_onnx_file_loses_a_block(tmp_path: Path) -> None:
    decoder(3)[1].to_onnx(tmp_path / "decoder.onnx")
    graph = regauge.load(tmp_path / "decoder.onnx")
    small = regauge.optimize(graph, "depth{blocks=1,include=blocks.1}", data=text(2))
    file = small.to_onnx(tmp_path / "small.onnx", inputs=[ids(seed=3)])  # checked in onnxruntime
    written = regauge.load(file)
    assert not [node for node in written.nodes if node.op == "identity"]
    assert [value.name for value in written.outputs] == [value.name for value in graph.outputs]
    torch.testing.assert_close(written.run(ids(seed=3))[0], small.run(ids(seed=3))[0])
    assert figures(small).parameters < 0.75 * figures(graph).parameters


# -- how much goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pipeline", ["depth{params=0.6}", "depth{params=0.6,unit=block}", "depth{params=0.6,iterative=false}"]
)
def test_a_budget_of_parameters_is_met_and_not_by_more_parts_than_needed(pipeline: str) -> None:
    _, graph = decoder()
    small = regauge.optimize(graph, pipeline, data=text(2, 16))
    kept, whole = figures(small).parameters, figures(graph).parameters
    assert kept <= 0.6 * whole
    assert kept + (whole - kept) / len(small.report.passes[0].cuts) > 0.6 * whole


def test_budgets_may_be_numbers_and_of_macs() -> None:
    _, graph = decoder()
    whole = figures(graph)
    assert figures(regauge.optimize(graph, "depth{macs=0.7}", data=text(2, 16))).macs <= 0.7 * whole.macs
    small = regauge.optimize(graph, f"depth{{params={whole.parameters - 1}}}", data=text(2, 16))
    assert len(small.report.passes[0].cuts) == 1


def test_a_ratio_is_a_share_of_the_blocks() -> None:
    _, graph = decoder()
    small = regauge.optimize(graph, "depth{ratio=0.5}", data=text(2, 16))
    assert len(small.report.passes[0].cuts) == 2
    assert regauge.optimize(graph, "depth{ratio=0}").report.passes[0].changed is False


def test_limit_removes_the_first_of_what_was_chosen() -> None:
    _, graph = decoder()
    both = regauge.optimize(graph, "depth{blocks=2}", data=text(2, 16)).report.passes[0].cuts
    one = regauge.optimize(graph, "depth{blocks=2,limit=1}", data=text(2, 16)).report.passes[0].cuts
    assert [cut.dim for cut in one] == [cut.dim for cut in both[:1]]


@pytest.mark.parametrize("score", ["distortion", "macro", "similarity"])
def test_a_block_that_does_nothing_goes_first(score: str) -> None:
    model, _ = decoder()
    with torch.no_grad():
        for layer in (model.blocks[2].proj, model.blocks[2].fc2):
            layer.weight.mul_(1e-3)
            layer.bias.mul_(1e-3)
    graph = capture(model, (ids(),))
    for data in (None, text(2, 4)):
        small = regauge.optimize(graph, f"depth{{blocks=1,score={score}}}", data=data)
        assert [cut.dim for cut in small.report.passes[0].cuts] == ["blocks.2"]


# -- repairs -----------------------------------------------------------------------------------------------------------


def test_refitted_layers_make_up_for_a_block_on_text_that_was_not_seen() -> None:
    _, graph = decoder()
    cut = regauge.optimize(graph, "depth{blocks=1,include=blocks.1}")
    healed = regauge.optimize(graph, "depth{blocks=1,include=blocks.1}", data=text())
    unseen = ids(200, 99)
    assert error(graph, healed, unseen) < 0.25 * error(graph, cut, unseen)


@pytest.mark.parametrize("gone", [1, 2])
def test_refitted_convolutions_make_up_for_a_block(gone: int) -> None:
    graph = capture(redrawn(ResidualNetwork()), (images(),), dynamic={0: {0: "batch"}})
    data, unseen = [(images(64, seed),) for seed in (1, 2)], images(200, 99)
    pipeline = f"depth{{blocks=1,include=blocks.{gone}}}"
    cut, healed = regauge.optimize(graph, pipeline), regauge.optimize(graph, pipeline, data=data)
    assert error(graph, healed, unseen) < 0.2 * error(graph, cut, unseen)


def test_the_norm_in_front_of_a_removed_layer_takes_the_weights_of_the_one_behind() -> None:
    """x = norm(s) stands for the output of the last layer, so that the layer before can be solved for s."""
    model, x = redrawn(encoder(3)), torch.randn(2, 5, 16)
    graph = capture(model, (x,), dynamic={0: {0: "batch"}})
    data, unseen = [(torch.randn(64, 5, 16),) for _ in range(3)], torch.randn(100, 5, 16)
    pipeline = "depth{blocks=1,include=layers.2}"
    cut, healed = regauge.optimize(graph, pipeline), regauge.optimize(graph, pipeline, data=data)
    assert torch.equal(healed.parameters["layers.1.norm2.weight"].tensor, model.layers[2].norm2.weight)
    assert error(graph, healed, unseen) < 0.6 * error(graph, cut, unseen)


def test_what_runs_before_the_removed_part_is_left_as_it_was() -> None:
    _, graph = decoder()
    small = regauge.optimize(graph, "depth{blocks=1,include=blocks.2}", data=text(2))
    changed = {name for name, p in small.parameters.items() if not torch.equal(p.tensor, graph.parameters[name].tensor)}
    assert {name.rsplit(".", 1)[0] for name in changed} == {
        "blocks.1.fc2", *(f"blocks.3.{layer}" for layer in ("qkv", "proj", "fc1", "fc2")), "head"
    }  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_went_and_what_it_cost() -> None:
    _, graph = decoder()
    report = str(regauge.optimize(graph, "depth{blocks=1,exclude=blocks.0}", data=text(2, 16)).report)
    assert "removed, error 0.0" in report and "left alone: 1 x excluded" in report
    assert "layers refitted on 32 examples" in report


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("blocks=5", r"depth\{blocks=5\} asks for 5 blocks, but there are 4 that can be removed"),
        ("blocks=9,unit=branch", "asks for 9 branches, but there are 8 that can be removed"),
        ("params=0.01", r"cannot be met: without all 8 parts that can be removed, .* are left"),
        ("blocks=1,params=0.5", "takes exactly one of blocks, ratio, params and macs, but blocks and params are given"),
        ("unit=block", "but none is given"),
        ("blocks=1,include=block.1", "matches no part that can be removed: did you mean blocks.1"),
        ("blocks=1,compensate=true", "depth needs data for compensate"),
    ],
)
def test_what_cannot_be_done_is_said(options: str, words: str) -> None:
    _, graph = decoder()
    with pytest.raises(PassError, match=words):
        regauge.optimize(graph, f"depth{{{options}}}")


def test_a_network_without_blocks_says_so() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(3, 4),))
    with pytest.raises(PassError, match="asks for 1 block.*, but none can be removed"):
        regauge.optimize(graph, "depth{blocks=1}")


def test_what_stays_is_told_where_nothing_can_be_removed() -> None:
    """There is no report to look into where the pass raises."""
    _, graph = decoder()
    for options in ("blocks=1", "params=0.5"):
        with pytest.raises(PassError, match=r"\(left alone: 2 x excluded, 2 x not included\)"):
            regauge.optimize(
                graph, f"depth{{{options},unit=block,include=[blocks.0,blocks.1],exclude=[blocks.0,blocks.1]}}"
            )


class KeepsHidden(Decoder):
    """Its outputs are the logits and what every block gives."""

    def forward(self, ids: torch.Tensor) -> Any:
        mask = torch.triu(torch.full((6, 6), -1e4), diagonal=1)
        x, hidden = self.tok(ids), []
        for block in self.blocks:
            x = block(x, mask)
            hidden.append(x)
        return self.head(self.ln(x)), *hidden


def test_blocks_between_two_outputs_stay() -> None:
    graph = capture(redrawn(KeepsHidden(3)), (ids(),))
    small = regauge.optimize(graph, "depth{blocks=1}")  # in front of the first block no output stands
    assert [cut.dim for cut in small.report.passes[0].cuts] == ["blocks.0"]
    assert sum(small.report.passes[0].left.values()) == 2
    for y, z in zip(small.run(ids()), [*small.run(ids())], strict=True):
        assert y.shape == z.shape
