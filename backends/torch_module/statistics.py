"""Running statistics of a graph captured in training mode.

Where the graph writes them as states, that is left to ``nn.BatchNorm2d`` and ``F.batch_norm``: these update them by
themselves in training mode and only there, so that ``eval()`` of the emitted module works.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from regauge.ir.graph import Graph, Node, Operand, Parameter, State, Value

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


def counters(states: Sequence[State], norms: Collection[Node]) -> dict[Node, tuple[str, State]]:
    """The nodes that count batches as every one of these norms does, with its module's path and the state they make.

    A norm that runs several times in one pass counts as often, each time from where it was.
    """
    found: dict[Node, tuple[str, State]] = {}
    for state in states:
        path, _, name = state.before.name.rpartition(".")
        chain = _chain(state) if name == COUNTER else []
        buffer = f"{path}.running_mean" if path else "running_mean"
        own = [n for n in norms if isinstance(n.inputs[3], Parameter) and buffer in n.inputs[3].names]
        if chain and len(chain) == len(own) and len({n.inputs[0].rank for n in own}) == 1:  # type: ignore[union-attr]
            found.update({node: (path, state) for node in chain})
    return found


def _chain(state: State) -> list[Node]:
    """The additions of one that lead from a counter to what it becomes; none where anything else reads them."""
    chain: list[Node] = []
    value: Operand = state.after
    while value is not state.before:
        node = value.producer if isinstance(value, Value) else None
        if node is None or node.op != "add" or node.inputs[1] != 1 or len(node.output.uses) != bool(chain):
            return []
        chain.append(node)
        value = node.inputs[0]
    return chain
