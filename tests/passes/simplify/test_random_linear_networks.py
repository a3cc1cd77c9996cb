"""Random networks of nothing but linear maps, scales, shifts, norms, sums and changes of layout keep their function."""

import random
from collections import Counter

import torch

from regauge import optimize
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify
from regauge.passes.simplify.catalog import ALL_RULE_SETS

WIDTH = 4


class Network:
    """An image ``(2, 4, 7, 7)`` through random steps; weights are small, and some are read twice."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)
        self.draw = torch.Generator().manual_seed(seed)
        self.graph = Graph("linear")
        self.build = Builder(self.graph)
        self.tied: list[Value] = []
        value = self.build.input("x", (2, WIDTH, 7, 7), torch.float64)
        for _ in range(self.choice.randint(2, 6)):
            value = self.step(value)
        self.graph.outputs = [value]

    def weight(self, *shape: int) -> Value:
        for tied in self.tied:
            if tied.shape == shape and self.choice.random() < 0.05:
                return tied
        tensor = torch.rand(shape, generator=self.draw, dtype=torch.float64) + 0.2
        self.tied.append(self.build.parameter(f"p{len(self.graph.parameters)}", tensor))
        return self.tied[-1]

    def step(self, x: Value, depth: int = 0) -> Value:
        kinds = [self.convolution, self.scale, self.norm, self.linear, self.relu]
        if depth < 2:
            kinds += [self.total] * 3
        return self.choice.choice(kinds)(x, depth)

    def convolution(self, x: Value, depth: int) -> Value:
        kernel, dilation, groups = self.choice.choice([(1, 1), (3, 1), (3, 2), (5, 1)]) + (
            self.choice.choice([1, 2, 4]),
        )
        padding = dilation * (kernel - 1) // 2
        bias = self.weight(WIDTH) if self.choice.random() < 0.5 else None
        w = self.weight(WIDTH, WIDTH // groups, kernel, kernel)
        return self.build.conv(x, w, bias, padding=padding, dilation=dilation, groups=groups)

    def scale(self, x: Value, depth: int) -> Value:
        op = self.choice.choice(["mul", "div", "add", "sub"])
        other = self.choice.choice([1.5, self.weight(WIDTH, 1, 1), self.weight(1), self.weight(7)])
        if self.choice.random() < 0.3 and op != "div":
            return self.build(op, other, x)
        return self.build.neg(x) if self.choice.random() < 0.2 else self.build(op, x, other)

    def norm(self, x: Value, depth: int) -> Value:
        gain, shift = (self.weight(WIDTH) if self.choice.random() < 0.7 else None for _ in range(2))
        return self.build.batch_norm(x, gain, shift, self.weight(WIDTH), self.weight(WIDTH))

    def linear(self, x: Value, depth: int) -> Value:
        x = self.build.permute(x, dims=(0, 2, 3, 1))
        w = self.weight(WIDTH, WIDTH)
        x = self.build.linear(x, w, self.weight(WIDTH)) if self.choice.random() < 0.5 else self.build.matmul(x, w)
        return self.build.permute(x, dims=(0, 3, 1, 2))

    def relu(self, x: Value, depth: int) -> Value:
        return self.build.relu(x)

    def total(self, x: Value, depth: int) -> Value:
        terms = [
            self.step(x, depth + 1) if self.choice.random() < 0.85 else x for _ in range(self.choice.randint(2, 3))
        ]
        result = terms[0]
        for term in terms[1:]:
            result = self.build.add(result, term)
        return result


def test_random_linear_networks_keep_their_function() -> None:
    used: Counter[str] = Counter()
    for seed in range(120):
        graph = Network(seed).graph
        x = torch.randn(2, WIDTH, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (expected,) = run(graph, [x])
        simple = graph.copy()
        for rules in ALL_RULE_SETS.values():
            used.update(rewrite_graph(simple, rules).counts)
        used.update({"whole": len(optimize(graph, "simplify")) < len(graph)})
        verify(simple)
        scale = float(expected.abs().max()) or 1.0
        for after in (simple, optimize(graph, "simplify{also=[merges,separable]}")):
            torch.testing.assert_close(run(after, [x])[0] / scale, expected / scale, rtol=1e-9, atol=1e-9)
    assert len(used) >= 20, used
