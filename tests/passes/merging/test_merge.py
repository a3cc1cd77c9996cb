"""Weight matching undoes any order of channels, heads and groups; merges are what their formulas say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.ir.dims.kept import KeptWithin
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.reorder import may_be_reordered
from regauge.ir.dims.resize import taken
from regauge.ir.edit import set_weight
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.passes.merging.matching import align
from regauge.passes.merging.merge import merge
from small_graphs import residual_network


class Encoder(nn.Module):
    """A transformer block between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)
        self.ln1, self.ln2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return self.last(x + self.down(nn.functional.gelu(self.up(self.ln2(x)))))


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def captured(model: nn.Module, x: torch.Tensor) -> Graph:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 1.3 / max(1, parameter[0].numel()) ** 0.5
    return regauge.capture(model.double().eval(), (x.double(),))


def scrambled(graph: Graph) -> Graph:
    """The same function with every order changed that may be, in each head and group another one."""
    generator = np.random.default_rng(0)
    dims = may_be_reordered(graph, [group.dim for group in graph.groups() if group.free])
    orders: dict[object, object] = {}
    for dim, majors in majors_of(graph, dims).items():
        sizes = [int(major.size) for major in majors]
        rows = np.stack([generator.permutation(int(dim.size)) for _ in range(int(np.prod(sizes, dtype=int)))])
        orders[dim] = KeptWithin(majors, rows.reshape(*sizes, -1)) if sizes else rows[0]
    return taken(graph, orders)  # type: ignore[arg-type]


def noisy(graph: Graph, amount: float) -> Graph:
    result = graph.copy()
    for parameter in result.parameters.values():
        if parameter.kind == "parameter":
            set_weight(result, parameter, parameter.tensor + amount * torch.randn_like(parameter.tensor))
    return result


def farthest(a: Graph, b: Graph) -> float:
    pairs = [(p.tensor.double(), b.parameters[name].tensor.double()) for name, p in a.parameters.items()]
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize(("model", "shape"), [(Encoder(), (2, 6, 5)), (grouped(), (2, 3, 8, 8))])
def test_matching_finds_every_order_again(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    graph = captured(model, x)
    other = scrambled(graph)
    assert (other.run(x)[0] - graph.run(x)[0]).abs().max() < 1e-12
    assert farthest(other, graph) > 0.1
    assert farthest(align(other, graph), graph) == 0
    near = noisy(other, 0.05)
    matched = align(near, graph)
    assert (matched.run(x)[0] - near.run(x)[0]).abs().max() < 1e-12
    assert farthest(matched, graph) < 0.4
    assert farthest(merge([graph, other]), graph) < 1e-15
    assert farthest(merge([graph, other], align=False), graph) > 0.1


def test_matching_goes_through_deep_streams() -> None:
    graph = residual_network(32, 6)
    assert farthest(align(scrambled(graph), graph), graph) == 0


def test_task_vectors_by_block_and_depth() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    base = captured(Encoder(), x)
    tuned = [noisy(base, 0.1), noisy(base, 0.1)]
    theta = {name: p.tensor for name, p in base.parameters.items()}
    change = {name: sum(t.parameters[name].tensor - theta[name] for t in tuned) for name in theta}
    plain = merge(tuned, base=base, scale={"qkv.*": 0.25, "up.*": 0.0})
    for name, factor in {"qkv.weight": 0.25, "up.bias": 0.0, "proj.weight": 1.0}.items():
        torch.testing.assert_close(plain.parameters[name].tensor, theta[name] + factor * change[name])
    lines = merge(tuned, base=base, weights=[2.0, 0.0], scale=0.2, deeper=0.6)
    first = {name: tuned[0].parameters[name].tensor - theta[name] for name in theta}
    for name, factor in {"first.weight": 0.2, "last.weight": 0.8, "proj.weight": 0.2 + 0.6 * 2 / 5}.items():
        torch.testing.assert_close(lines.parameters[name].tensor, theta[name] + 2 * factor * first[name])


def test_ties_keeps_the_largest_of_the_elected_sign() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    base = regauge.capture(nn.Linear(4, 1, bias=False).double().eval(), (x,))
    start = base.parameters["weight"].tensor

    def tuned(*change: float) -> Graph:
        result = base.copy()
        set_weight(result, result.parameters["weight"], start + torch.tensor([change], dtype=torch.float64))
        return result

    merged = merge([tuned(4, 1, -3, 0.1), tuned(2, -5, 0.2, 3)], base=base, keep=0.5)
    expected = torch.tensor([[4.0, -5.0, -3.0, 3.0]], dtype=torch.float64)  # 2 and 1 are trimmed away
    torch.testing.assert_close(merged.parameters["weight"].tensor - start, expected)
    whole = merge([tuned(4, 1, -3, 0.1), tuned(2, -5, 0.2, 3)], base=base, keep=1.0)
    expected = torch.tensor([[3.0, -5.0, -3.0, 1.55]], dtype=torch.float64)
    torch.testing.assert_close(whole.parameters["weight"].tensor - start, expected)


def test_what_does_not_go_together_is_told() -> None:
    x = torch.randn(2, 4)
    one, other = (regauge.capture(nn.Linear(4, n).eval(), (x,)) for n in (3, 2))
    with pytest.raises(GraphError, match=r"weight is \[3, 4\] in one, \[2, 4\] in the other"):
        merge([one, other])
    with pytest.raises(GraphError, match="give the base that the graphs were trained from"):
        merge([one, one], scale=0.5)
    with pytest.raises(GraphError, match="sum up to 1, not to 1.5"):
        merge([one, one], weights=[1.0, 0.5])


def test_the_report_says_what_was_matched_and_how_near_it_came() -> None:
    torch.manual_seed(0)
    graph = captured(Encoder(), torch.randn(2, 4, 5))
    found = merge([graph, scrambled(graph)])
    entry = found.report.passes[0]
    (agreement,) = [note for note in entry.notes if "cosine" in note]
    before, after = (float(part) for part in agreement.split("base ")[1].split(" -> "))
    assert before < 0.5 and after == 1.0
    assert all(str(cut).startswith("network 2: ") and "in another place" in str(cut) for cut in entry.cuts)
    moved = {cut.dim: cut.before for cut in entry.cuts}
    assert 40 in moved.values() and 24 in moved.values()  # the hidden layer and the stream
    assert entry.left and "left alone" in str(found.report)


def test_the_report_of_an_average_without_matching_has_the_agreement_as_it_is() -> None:
    torch.manual_seed(0)
    graph = captured(Encoder(), torch.randn(2, 4, 5))
    entry = merge([graph, scrambled(graph)], align=False).report.passes[0]
    assert any(note.endswith("not matched") for note in entry.notes) and not entry.cuts
    assert any("least alike" in note for note in entry.notes)
