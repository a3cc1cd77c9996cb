"""A pass that rewrites nodes: it edits a copy of the graph, and because it promises to be exact, the runner checks it.

An installed package makes it known to `regauge passes` and `regauge optimize` by a line in its pyproject.toml:

    [project.entry-points."regauge.passes"]
    drop-dropout = "your_package:DropDropout"
"""

from dataclasses import dataclass

import torch
from torch import nn

import regauge
from regauge.ir.edit import remove_node, replace_uses


@dataclass(frozen=True)
class DropDropout(regauge.Pass):
    """Remove dropout, which does nothing when a model is used.

    before   y = dropout(x)   z = linear(y, w)
    after    z = linear(x, w)
    """

    contract = "exact"

    def call(self, graph: regauge.Graph, context: regauge.Context) -> regauge.Graph:
        if not any(node.op == "dropout" for _, node in graph.walk()):
            return graph  # nothing to do: the same object
        result = graph.copy()
        for owner, node in list(result.walk()):  # owner: the graph, or the region of a loop or a branch
            if node.op == "dropout" and not node.attributes["training"]:
                replace_uses(owner, node.output, node.inputs[0])
                remove_node(owner, node)
                context.note(f"removed {node.label}")
        return result


model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.1), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)).eval()
graph = regauge.capture(model, (torch.randn(4, 8),))
lean = regauge.optimize(graph, [DropDropout()])
print(lean.report)
print(lean.to_torch())
