"""``fuse``: nodes that one kernel computes become one node. ``unfuse``: and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.fusion.causal import mark_causal
from regauge.ir.fusion.fuse import fuse_graph
from regauge.ir.fusion.fused import Rounding, fused_nodes, unfuse
from regauge.ir.fusion.plan_rows import plan_summary
from regauge.ir.graph import Graph
from regauge.ir.printing.tables import short
from regauge.ir.roofline import DEVICES
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Fuse(Pass):
    """Make nodes that one kernel computes one node, where that moves fewer bytes: exact, and for the end of a pipeline.

    before  a = silu(x)   y = mul(a, z)      after  y = fused(x, z) with region silu_mul

    Regions are read off the axis rules (``regauge fusion`` shows the plan), products are left to the runtime's library.
    A region is a function in torch source, a Triton kernel with ``to_torch(kernels="triton")``, and with
    ``to_onnx(functions=True)`` a local function. Other passes want the nodes: ``unfuse`` gives them back. Regions
    compute what the network in use does, also while it is trained: dropout rests, batch norms keep their statistics.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = "exact"
    takes_fused: ClassVar[bool] = True

    target: Literal["gpu", "cpu"] = option("gpu", "what it is for: the kind of device whose time decides what gains")
    rounding: Rounding = option(
        "fused", "what kernels round: their results (fused), or what each node gives, as torch does (eager)"
    )

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        if self.target == "gpu":  # a kernel that knows the order of positions skips what it hides
            mark_causal(result)
        takes = context.footprints if self.target == "gpu" else None
        found = fuse_graph(result, DEVICES[self.target], rounding=self.rounding, by=self.name, footprints=takes)
        refusals = found.plan.refusals
        context.left.update([*(refusal.reason for refusal in refusals), *found.left])
        if not found.nodes:
            return graph
        context.note(f"{len(found.nodes)} regions: {plan_summary(found.plan)}")
        if refusals:
            worst = refusals[0]
            context.note(f"most bytes stay at {worst.value.name}, {short(worst.bytes)}B: {worst.reason}")
        return result


@dataclass(frozen=True, kw_only=True)
class Unfuse(Pass):
    """Put the nodes of regions in their place again, as they were before ``fuse``.

    before  y = fused(x, z) with region silu_mul      after  a = silu(x)   y = mul(a, z)
    """

    name: ClassVar[str] = "unfuse"
    contract: ClassVar[Contract] = "exact"
    takes_fused: ClassVar[bool] = True

    def call(self, graph: Graph, context: Context) -> Graph:
        if not fused_nodes(graph):
            return graph
        result = graph.copy()
        context.note(f"{unfuse(result)} regions are nodes again")
        return result
