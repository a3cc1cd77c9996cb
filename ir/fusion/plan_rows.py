"""A plan of fusion as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from regauge.ir.fusion.plan import Plan, Refusal
from regauge.ir.fusion.region import Region
from regauge.ir.printing.tables import short
from regauge.ir.sizes.expressions import format_size


def plan_rows(plan: Plan) -> list[list[str]]:
    """A row for each kernel, in an order in which they can run; ``other`` is what fusion leaves to the runtime.

    Where it is known what kernels take of a device, there are columns for registers of a thread, and for the programs
    that a processor holds.
    """
    figures = ["registers", "programs"] if plan.footprints else []
    rows = [["kernel", "loops", *figures, "nodes", "results"]]
    for step in plan.kernels:
        results = ", ".join(value.name for value in step.outputs)
        if isinstance(step, Region):
            nodes = " ".join(node.op for node in step.nodes)
            rows.append([step.kind, _loops(step), *_figures(plan, step, len(figures)), nodes, results])
        else:
            rows.append(["other", "", *[""] * len(figures), step.op, results])
    return rows


def _figures(plan: Plan, region: Region, count: int) -> list[str]:
    found = plan.footprints.get(region)
    known = [str(found.registers), str(found.resident)] if found is not None and found.registers else ["", ""]
    return known[:count]


def _loops(region: Region) -> str:
    return " ".join(f"{name}={format_size(dim.size)}" for dim, name in region.names.items())


def refusal_rows(refusals: Sequence[Refusal]) -> list[list[str]]:
    """What stays apart, the most bytes first."""
    rows = [["bytes", "value", "read by", "why it is no kernel with what gives it"]]
    return rows + [
        [f"{short(refusal.bytes)}B", refusal.value.name, refusal.reader.label, refusal.reason] for refusal in refusals
    ]


def plan_summary(plan: Plan) -> str:
    return (
        f"{len(plan.kernels)} kernels instead of {plan.kernels_before}, "
        f"{short(plan.bytes)}B moved instead of {short(plan.bytes_before)}B"
    )
