"""Running statistics of a graph captured in training mode.

Where the graph writes them as states, that is left to ``nn.BatchNorm2d`` and ``F.batch_norm``: these update them by
themselves in training mode and only there, so that ``eval()`` of the emitted module works.
"""

from __future__ import annotations

from collections.abc import Sequence

from regauge.ir.graph import Graph, Node, Parameter, State

COUNTER = "num_batches_tracked"


def updating_norms(graph: Graph) -> dict[Node, list[State]]:
    """Batch norms in training mode whose new statistics go into their own buffers, or nowhere, with these states."""
    after = {state.after: state for state in graph.states}
    found: dict[Node, list[State]] = {}
    for node in graph.nodes:
        if node.op != "batch_norm" or not node.attributes["training"] or len(node.outputs) != 3:
            continue
        states = [after.get(value) for value in node.outputs[1:]]
        private = not any(value.uses or value in graph.outputs for value in node.outputs[1:])
        own = all(s is None or s.before is buffer for s, buffer in zip(states, node.inputs[3:5], strict=True))
        if private and own:
            found[node] = [state for state in states if state is not None]
    return found


def counter_state(items: Sequence[object], states: Sequence[State], path: str) -> tuple[State, Node] | None:
    """The state, and the node, that count the batches of the norm at ``path``."""
    for state in states:
        if isinstance(state.before, Parameter) and f"{path}.{COUNTER}" in state.before.names:
            node = state.after.producer
            if node is not None and node in items and not state.after.uses:
                return state, node
    return None
