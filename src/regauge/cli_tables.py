"""Tables that commands print of a graph and of its Dims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge.ir.dims.groups import Group
    from regauge.ir.graph import Graph


def summary_rows(graph: Graph) -> list[list[str]]:
    from regauge.ir.cost import figures
    from regauge.ir.memory.activations import activation_bytes
    from regauge.ir.printing.tables import short

    cost, (_, peak) = figures(graph), activation_bytes(graph)
    nodes = Counter(node.op for _, node in graph.walk())
    groups = graph.groups()
    free = sum(group.free for group in groups)
    least = ", ".join(f"{symbol}={max(1, low)}" for symbol, (low, _) in graph.symbols.items())
    opaque = nodes["torch_call"] + nodes["onnx_call"] + len(graph.axes.problems)
    return [
        *(["input", repr(value)] for value in graph.inputs),
        *(["output", repr(value)] for value in graph.outputs),
        ["nodes", f"{sum(nodes.values())}: " + ", ".join(f"{n} {op}" for op, n in nodes.most_common(8))],
        [
            "parameters",
            f"{short(cost.parameters)} in {len(list(graph.all_parameters()))} tensors, {short(cost.bytes)}B",
        ],
        ["MACs", short(cost.macs) + (f" with {least}" if least else "")],
        ["activations", f"{short(peak)}B at the peak"],
        ["Dims", f"{len(groups)} in parameters, {free} of them free"],
        ["without a rule", str(opaque)],
    ]


def group_state(group: Group) -> str:
    return "free" if group.free else str(group.pins[0]) if group.pins else "nothing to cut"


def member_rows(found: Sequence[Group]) -> list[list[str]]:
    """Each Dim with its members one below the other."""
    rows = [["Dim", "size", "member", "state"]]
    for group in found:
        first, *others = map(str, group.members)
        rows.append([group.name, str(group.size), first, group_state(group)])
        rows += [["", "", member, ""] for member in others]
    return rows
