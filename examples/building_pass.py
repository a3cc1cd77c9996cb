"""A pass that builds nodes: `Builder(copy)` adds them, and `with build.at(node):` says in whose place."""

from dataclasses import dataclass

import torch
from torch import nn

import regauge
from regauge.ir.edit import Builder, remove_dead, replace_uses


@dataclass(frozen=True)
class UseSilu(regauge.Pass):
    """Write x * sigmoid(x), as many exporters spell it, as one node.

    before   s = sigmoid(x)   y = mul(x, s)
    after    y = silu(x)
    """

    contract = "exact"

    def call(self, graph: regauge.Graph, context: regauge.Context) -> regauge.Graph:
        result = graph.copy()
        build = Builder(result, by=self.name)
        for node in result.nodes:
            for x, gate in (node.inputs[:2], node.inputs[1::-1]) if node.op == "mul" else ():
                gating = getattr(gate, "producer", None)
                if gating is not None and gating.op == "sigmoid" and gating.inputs[0] is x:
                    with build.at(node):  # the new node belongs to the same module, also in a written ONNX file
                        replace_uses(result, node.output, build.silu(x))
                    context.note(f"{node.label} is one silu")
                    break
        if not build.added:
            return graph
        remove_dead(result)  # the products and sigmoids that nobody reads any more
        return result


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


model = nn.Sequential(nn.Linear(8, 64), Swish(), nn.Linear(64, 3)).eval()
graph = regauge.capture(model, (torch.randn(4, 8),))
lean = regauge.optimize(graph, [UseSilu()])
print(lean.report)
print(lean.to_torch())
