"""Recurrent layers: a frame that is one ``lstm`` or ``gru`` node over its own weights is ``nn.LSTM`` or ``nn.GRU``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regauge.backends.torch_module.layers import layer_tensors
from regauge.backends.torch_module.places import Places
from regauge.ir.graph import Node, Parameter, Value

_STATES = {"lstm": 2, "gru": 1}


@dataclass(frozen=True)
class RecurrentLayer:
    """The node, the layer's text, and what it is called with: the sequence, and states unless they are zeros."""

    node: Node
    text: str
    arguments: list[Value]


def recurrent_layer(items: Sequence[object], path: str, places: Places) -> RecurrentLayer | None:
    """The standard layer that the items of one frame are, None where they are something else."""
    nodes = [item for item in items if isinstance(item, Node)]
    cells = [node for node in nodes if node.op in _STATES]
    if len(nodes) != len(items) or len(cells) != 1:
        return None
    node, count = cells[0], _STATES[cells[0].op]
    sequence, *states = node.inputs[: 1 + count]
    others = [other for other in nodes if other is not node]
    zero = bool(others) and all(_is_zero_state(other, node) for other in others)
    if (others and not zero) or not isinstance(sequence, Value) or not all(isinstance(s, Value) for s in states):
        return None
    if zero and any(getattr(state, "producer", None) not in others for state in states):
        return None
    text = _text(node, path, places, list(node.inputs[1 + count :]))
    given = [] if zero else [state for state in states if isinstance(state, Value)]
    return None if text is None else RecurrentLayer(node, text, [sequence, *given])


def _is_zero_state(other: Node, cell: Node) -> bool:
    return other.op == "full" and other.attributes["value"] == 0 and other.output.consumers() == [cell]


def _text(node: Node, path: str, places: Places, weights: Sequence[object]) -> str | None:
    attributes = node.attributes
    if [places.name_under(w, path) if isinstance(w, Parameter) else None for w in weights] != [
        f"{path}.{name}" for name in _names(node)
    ]:
        return None
    first, second = weights[0], weights[1]
    assert isinstance(first, Parameter) and isinstance(second, Parameter)
    parts = [str(first.shape[1]), str(second.shape[1])]
    parts += [f"num_layers={attributes['num_layers']}"] * (attributes["num_layers"] > 1)
    parts += ["bias=False"] * (not attributes["has_biases"])
    parts += ["batch_first=True"] * bool(attributes["batch_first"])
    parts += [f"dropout={attributes['dropout']}"] * bool(attributes["dropout"])
    parts += ["bidirectional=True"] * bool(attributes["bidirectional"])
    text = f"nn.{node.op.upper()}({', '.join(parts)})"
    present = {name: (tuple(p.shape), places.is_trained(p)) for name, p in places.below(path).items()}
    return text if layer_tensors(text) == present else None


def _names(node: Node) -> list[str]:
    """The names torch gives the weights of a recurrent layer, in the order of the operator's operands."""
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if node.attributes["has_biases"] else [])]
    directions = ["", "_reverse"] if node.attributes["bidirectional"] else [""]
    layers = range(node.attributes["num_layers"])
    return [f"{kind}_l{layer}{direction}" for layer in layers for direction in directions for kind in kinds]
