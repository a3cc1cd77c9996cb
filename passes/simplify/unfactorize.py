"""``unfactorize``: factors multiplied back where one dense map is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node
from regauge.ir.rewriting.rewrite import RuleSet, refuse, rewrite_graph
from regauge.ir.roofline import Device, local_seconds
from regauge.passes.allocation.latency import device_of
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option
from regauge.passes.rewriting import tell
from regauge.passes.simplify.map_chains import chain_rule


@dataclass(frozen=True, kw_only=True)
class Unfactorize(Pass):
    """Multiply factors back into one map where that is faster: the reverse of ``factorize``, and exact.

    before  y = linear(linear(x, down), up, b)     down: f32[24,96], up: f32[96,24]
    after   y = linear(x, w, b)                    w: f32[96,96]

    A chain of small maps waits for each to start, so at batch 1 the dense map often takes less time though it has more
    parameters (pre-merging of StructuredFFN, Wei et al. 2024). What is faster is predicted by a roofline of the device,
    with every dynamic size at its least. ``simplify`` merges what costs no more parameters and MACs.
    """

    name: ClassVar[str] = "unfactorize"
    contract: ClassVar[Contract] = "exact"

    when: Literal["faster", "always"] = option("faster", "which chains are merged: by predicted time, or all")
    device: str | Mapping[str, int | float] | None = option(
        None, "whose time is predicted: cpu, gpu or {flops=5e10,bandwidth=1e10,overhead=2e-6,multiple=8}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when == "always" and self.device is not None:
            raise PassError("unfactorize: no time is predicted for when=always: leave device out")

    def call(self, graph: Graph, context: Context) -> Graph:
        device = device_of(self.device)

        def check(build: Builder, before: Sequence[Node]) -> None:
            if self.when == "faster":
                _must_be_faster(build, before, device)

        result = graph.copy()
        log = rewrite_graph(result, RuleSet([chain_rule("unfactorized", check)]))
        tell(log, context)
        return result if log.total else graph


def _must_be_faster(build: Builder, before: Sequence[Node], device: Device) -> None:
    old, new = (local_seconds(nodes, build.graph, device) * 1e6 for nodes in (before, build.added))
    if new >= old:
        refuse(f"one map would take {new:.1f} us, not {old:.1f}")
