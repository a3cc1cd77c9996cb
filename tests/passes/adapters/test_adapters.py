"""Adapters: the function stays when they are put in, only they train, and merging gives what was trained."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.rewriting.equivalence import prove_rule
from regauge.passes.adapters.channel_rule import CHANNELS
from regauge.passes.adapters.forms import FORMS


class Mixed(nn.Module):
    """One layer of every kind that an adapter can stand at."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.grouped = nn.Conv1d(8, 6, 3, padding=2, stride=2, dilation=2, groups=2)
        self.transposed = nn.ConvTranspose1d(6, 8, 3, stride=2)
        self.last = nn.Conv1d(8, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        a = self.second(torch.relu(self.first(h))).mean(1)
        b = self.last(self.transposed(self.grouped(h.transpose(1, 2)).relu()).relu()).mean(2)
        return (a + b) @ self.weight


@cache
def mixed() -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randint(0, 10, (3, 12))
    return regauge.capture(Mixed().double().eval(), (x,), dynamic={0: {0: "batch"}}), x


def trained(graph: Graph, x: torch.Tensor) -> nn.Module:
    module = graph.to_torch().train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        (module(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


def learned_graph(graph: Graph, module: nn.Module) -> Graph:
    result = graph.copy()
    for name, parameter in module.named_parameters():
        set_weight(result, result.parameters[name], parameter.detach().clone())
    return result


STARTS = [(name, init) for name, form in FORMS.items() for init in ("zero", "principal") if getattr(form, init)]


@pytest.mark.parametrize(("form", "init"), [*STARTS, ("lora", "eva")])
def test_insert_train_capture_merge(form: str, init: str) -> None:
    graph, x = mixed()
    (wanted,) = graph.run(x)
    options = f"form={form},init={init},rank=3,alpha={3 if form == 'svfit' else 4.5},include=[*weight]"
    adapted = regauge.optimize(graph, f"adapt{{{options}}}", data=[(x,)])
    assert (adapted.run(x)[0] - wanted).abs().max() < 1e-12
    before = {name: p.tensor.clone() for name, p in adapted.parameters.items()}
    module = trained(adapted, x)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in adapted.parameters.items() if p.trainable}
    assert not moved & graph.parameters.keys()
    learned = module(x).detach()
    assert (learned - wanted).abs().max() > 1e-4
    again = form in ("lora", "kronecker")  # two layers beside a weight, and what is added to it, captured once more
    found = regauge.capture(module, (x,), dynamic={0: {0: "batch"}}) if again else learned_graph(adapted, module)
    merged = regauge.optimize(found, "merge-adapters")
    assert (merged.run(x)[0] - learned).abs().max() < 1e-10
    assert {n: p.shape for n, p in merged.parameters.items()} == {n: p.shape for n, p in graph.parameters.items()}
    assert len(merged) == len(graph) and all(p.trainable for p in merged.parameters.values())


@pytest.mark.parametrize(
    ("form", "shared", "own"),
    [
        # of layers of 16 to 16: left [16, 4], right [4, 16] and for each a core [4, 4]
        ("lotr", {"adapters.left_16x4", "adapters.right_4x16"}, 4 * 4),
        # four matrices [4, 4], and for each layer four times 4 + 4 numbers of rank one
        ("compacter", {"adapters.rule_4x4x4"}, 4 * (4 + 4)),
    ],
)
def test_what_layers_share_is_one_parameter_that_all_of_them_train(form: str, shared: set[str], own: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16, dtype=torch.float64)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).double().eval()
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    adapted = regauge.optimize(graph, f"adapt{{form={form},rank=4}}")
    new = {n: p for n, p in adapted.parameters.items() if n not in graph.parameters}
    assert shared <= new.keys()
    assert sum(p.tensor.numel() for p in new.values()) == sum(new[n].tensor.numel() for n in shared) + 3 * own
    module = trained(adapted, x)
    assert shared <= {name for name, _ in module.named_parameters()}
    merged = regauge.optimize(regauge.capture(module, (x,), dynamic={0: {0: "batch"}}), "merge-adapters")
    assert merged.parameters.keys() == graph.parameters.keys()
    torch.testing.assert_close(merged.run(x)[0], module(x).detach(), rtol=0, atol=1e-10)
    assert all(
        not torch.equal(merged.parameters[n].tensor, p.tensor) for n, p in graph.parameters.items() if p.rank > 1
    )


class Feed(nn.Module):
    """Attention and a hidden layer on a stream, convolutions in front."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.patches = nn.Conv1d(3, 12, 3), nn.Conv1d(12, 16, 3, stride=2)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(self.conv(x).relu()).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def test_channels_and_heads_that_train_themselves() -> None:
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    graph = regauge.capture(Feed().double().eval(), (x,), dynamic={0: {0: "batch"}})
    (wanted,) = graph.run(x)
    adapted = regauge.optimize(graph, "adapt{form=s2ft,rank=7}")
    assert (adapted.run(x)[0] - wanted).abs().max() < 1e-12
    shapes = {name: tuple(p.shape) for name, p in adapted.parameters.items() if p.trainable}
    assert shapes == {
        "patches.selected.weight": (16, 7, 3),  # channels
        "proj.selected.weight": (16, 8),  # two heads of four: heads are as many as come nearest
        "down.selected.weight": (16, 7),
    }
    module = trained(adapted, x)
    learned = module(x).detach()
    assert (learned - wanted).abs().max() > 1e-4
    merged = regauge.optimize(regauge.capture(module, (x,), dynamic={0: {0: "batch"}}), "merge-adapters")
    assert (merged.run(x)[0] - learned).abs().max() < 1e-10
    assert {n: p.shape for n, p in merged.parameters.items()} == {n: p.shape for n, p in graph.parameters.items()}
    assert len(merged) == len(graph)
    with pytest.raises(PassError, match="form=s2ft trains columns as they are"):
        regauge.optimize(graph, "adapt{form=s2ft,init=principal}")


def test_the_rule_that_joins_channels_is_proved() -> None:
    assert prove_rule(CHANNELS)


def test_principal_takes_the_best_part_out_of_the_weight() -> None:
    graph, _ = mixed()
    adapted = regauge.optimize(graph, "adapt{init=principal,rank=2,alpha=6,include=first.weight}")
    values = torch.linalg.svdvals(graph.parameters["first.weight"].tensor)
    left = torch.linalg.svdvals(adapted.parameters["first.weight"].tensor)
    torch.testing.assert_close(left[:6], values[2:])
    factors = [adapted.parameters[f"first.{name}.weight"].tensor for name in ("up", "down")]
    torch.testing.assert_close(3 * torch.linalg.svdvals(factors[0] @ factors[1])[:2], values[:2])


def test_eva_gives_ranks_where_inputs_vary() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double().eval()
    basis = torch.randn(1, 12, dtype=torch.float64)
    x = torch.randn(256, 1, dtype=torch.float64) @ basis  # one direction explains all that the first layer gets
    graph = regauge.capture(model, (x[:2],), dynamic={0: {0: "batch"}})
    adapted = regauge.optimize(graph, "adapt{init=eva,rank=2}", data=[x])
    down = adapted.parameters["0.down.weight"].tensor
    assert abs(float(torch.cosine_similarity(down[:1], basis))) > 1 - 1e-9
    torch.testing.assert_close(down @ down.t(), torch.eye(len(down), dtype=torch.float64))
    assert sum(len(adapted.parameters[f"{n}.down.weight"].tensor) for n in (0, 2)) == 4


def test_eva_looks_for_what_varies_not_for_what_is_large() -> None:
    torch.manual_seed(0)
    basis, mean = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64))[0].t()
    x = 100 * mean + torch.randn(256, 1, dtype=torch.float64) * basis
    graph = regauge.capture(nn.Sequential(nn.Linear(12, 12)).double().eval(), (x[:2],), dynamic={0: {0: "batch"}})
    down = regauge.optimize(graph, "adapt{init=eva,rank=1}", data=[x]).find("0.down.weight").tensor
    assert abs(float(down @ basis)) > 1 - 1e-6


def test_the_module_is_readable() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)).eval()
    graph = regauge.capture(model, (torch.randn(2, 6),), dynamic={0: {0: "batch"}})
    module = regauge.optimize(graph, "adapt{rank=2,include=0.weight}").to_torch()
    assert isinstance(module.get_submodule("0.down"), nn.Linear)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["0.down.weight", "0.up.weight"]


def test_what_is_left_alone_is_told() -> None:
    graph, x = mixed()
    report = str(regauge.optimize(graph, "adapt{form=kronecker,rank=2}").report)
    assert "1 x a layer of several blocks: kronecker is for single matrices, lora is not" in report
    empty = graph.copy()
    set_weight(empty, empty.parameters["first.weight"], torch.zeros(16, 8, dtype=torch.float64))
    report = str(regauge.optimize(empty, "adapt{form=dora,include=[first.weight,second.weight]}").report)
    assert "1 x an output that is all zeros has no direction" in report
    with pytest.raises(PassError, match="form=bone has no init=principal: it starts as auto, zero"):
        regauge.optimize(graph, "adapt{form=bone,init=principal}")
    with pytest.raises(PassError, match="adapt needs data for init=eva"):
        regauge.optimize(graph, "adapt{init=eva}")
    merged = regauge.optimize(graph, "merge-adapters")
    assert merged.parameters.keys() == graph.parameters.keys()
    assert "1 x no trainable parameters stand beside a frozen weight" in str(merged.report)


class Looked(nn.Module):
    """A weight whose rows an index reorders, and a table of biases that one looks up, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.delta, self.table = (nn.Parameter(torch.randn(*s)) for s in ((6, 4), (6, 4), (3, 2)))
        self.rows, self.places = (
            nn.Buffer(torch.tensor([5, 4, 1, 0, 2, 3])),
            nn.Buffer(torch.tensor([0, 2, 1])),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.places].reshape(-1)
        return nn.functional.linear(x, (self.weight + self.delta)[self.rows], bias)


def test_what_indices_take_from_weights_is_merged() -> None:
    model, x = Looked().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    model.weight.requires_grad_(False)
    graph = regauge.capture(model, (x,))
    merged = regauge.optimize(graph, "merge-adapters")
    assert (merged.run(x)[0] - graph.run(x)[0]).abs().max() < 1e-12
    assert merged.parameters["weight"].dtype == torch.float64 and len(merged) == 1


class Placed(nn.Module):
    """A class token for each image and one place for each position, as vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 9, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.layer(x + self.places[:, : x.shape[1]] + self.places[:, x.shape[1] - 2 : x.shape[1] - 1])


def test_what_depends_on_dynamic_sizes_stays() -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    graph = regauge.capture(Placed().double().eval(), (x,), dynamic={0: {0: "batch", 1: "length"}})
    adapted = regauge.optimize(graph, "adapt{rank=2}")
    for name in ("token", "places"):
        adapted.parameters[name].trainable = True
    merged = regauge.optimize(adapted, "merge-adapters")
    other = torch.randn(3, 6, 4, dtype=torch.float64)
    assert (merged.run(other)[0] - graph.run(other)[0]).abs().max() < 1e-12
    assert merged.parameters.keys() == graph.parameters.keys()


def test_weights_computed_of_frozen_parameters_stay() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)).eval()
    graph = regauge.capture(nn.Sequential(model, nn.Linear(4, 3)), (torch.randn(2, 6),))
    adapted = regauge.optimize(graph, "adapt{rank=2,include=1.weight}")
    merged = regauge.optimize(adapted, "merge-adapters")
    assert merged.parameters.keys() == graph.parameters.keys()
