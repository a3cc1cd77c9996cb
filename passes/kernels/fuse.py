"""``fuse``: nodes that one kernel computes become one node. ``unfuse``: and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.edit import Builder
from regauge.ir.fusion.fused import Rounding, fuse, fused_nodes, hidden_size, unfuse
from regauge.ir.fusion.plan import moves_nothing, plan_fusion
from regauge.ir.fusion.plan_rows import plan_summary
from regauge.ir.fusion.region import Region
from regauge.ir.graph import Graph
from regauge.ir.roofline import DEVICES
from regauge.ir.tables import short
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Fuse(Pass):
    """Make nodes that one kernel computes one node, where that moves fewer bytes: exact, and for the end of a pipeline.

    before  a = silu(x)   y = mul(a, z)      after  y = fused(x, z) with region silu_mul

    Regions are read off the axis rules (``regauge fusion`` shows the plan), products are left to the runtime's library.
    A region is a function in torch source, a Triton kernel with ``to_torch(kernels="triton")``, and with
    ``to_onnx(functions=True)`` a local function. Other passes want the nodes themselves: ``unfuse`` gives them back.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = "exact"
    takes_fused: ClassVar[bool] = True

    target: Literal["gpu", "cpu"] = option("gpu", "the device whose time decides what gains")
    rounding: Rounding = option(
        "fused", "what kernels round: their results (fused), or what each node gives, as torch does (eager)"
    )

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        plan = plan_fusion(result, DEVICES[self.target], contractions=False)
        regions = [region for region in plan.regions if self._is_taken(region, context)]
        for refusal in plan.refusals:
            context.left[refusal.reason] += 1
        if not regions:
            return graph
        context.note(f"{len(regions)} regions: {plan_summary(plan)}")
        build = Builder(result, by=self.name)
        for region in regions:
            fuse(build, region, self.rounding)
        worst = plan.refusals[0] if plan.refusals else None
        if worst is not None:
            context.note(f"most bytes stay at {worst.value.name}, {short(worst.bytes)}B: {worst.reason}")
        return result

    def _is_taken(self, region: Region, context: Context) -> bool:
        """Whether a region becomes a node: of one node it would be what the runtime has a kernel for."""
        if sum(not moves_nothing(node) for node in region.nodes) < 2:
            return False
        size = hidden_size(region.nodes)
        if size is not None:
            context.left[f"it reads the dynamic size {size}, which no operand of it has"] += 1
        return size is None


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
