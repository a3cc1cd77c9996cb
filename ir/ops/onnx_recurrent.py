"""Recurrent layers as ONNX lays them out: one layer, weights with an axis for the direction, other gate orders.

    W  dirs (gates h) i     R  dirs (gates h) h     B  dirs (2 gates h)     initial states  dirs b h
    Y  s dirs b h           Y_h, Y_c  dirs b h

Gates come as i o f c (LSTM) and z r h (GRU), where torch has i f c o and r z h. ``lengths`` says where each entry of
the batch ends: its state stays from there on, and its results are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import Cost, OnnxForm, Sample, operator, sample
from regauge.ir.sizes.expressions import Size

# -- the rule ----------------------------------------------------------------------------------------------------------

_OPERANDS = "s b i, p (g h) i, p (g h) h, p (t g h)?, b?, p b h?"
_NOTES = "; whole p g t ; scan s ; hidden_size = h"


def _rule(gates: int, states: int) -> Any:
    operands, results = _OPERANDS + ", p b h?" * (states - 1), "s p b h" + ", p b h" * states

    def rule(call: Call) -> list[Axes]:
        notes = _NOTES if call.has(3) else _NOTES.replace(" t ", " ")
        given = operands if call.has(3) else operands.replace("p (t g h)?", "?")
        found = call.apply(f"{given} -> {results} {notes}", g=gates, t=2)
        call.role("map", found[0][3])
        call.role("contract", found[0][3])
        call.linear(call.operand(0)[2])
        return found

    return rule


def _macs(cost: Cost) -> Size:
    return cost.size(0, 0) * cost.size(0, 1) * (cost.count(1) + cost.count(2))


# -- readers -----------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def _lengths(call: Any, steps: Size) -> Value | None:
    """Where the entries of the batch end, unless all of them are known to be as long as the tensor."""
    if not call.has(4):
        return None
    known = call.constant(4)
    if known is not None and isinstance(steps, int) and bool((known == steps).all()):
        return None
    return call.operand(4)  # type: ignore[no-any-return]


def _initial_state(call: Any, slot: int) -> Value | None:
    """An initial state; one of zeros is what an absent one stands for.

    Exporters give one tensor of zeros to all layers, which would tie their hidden Dims for no reason.
    """
    if not call.has(slot):
        return None
    known = call.constant(slot)
    if known is not None:
        return call.operand(slot) if bool(known.any()) else None
    state: Value = call.operand(slot)
    return None if _holds_zeros(state) else state


def _holds_zeros(value: Any) -> bool:
    """Whether a value is zero for certain: filled, or made of one constant by layout alone."""
    while isinstance(value, Value) and value.producer is not None and value.producer.op in _LAYOUT:
        value = value.producer.inputs[0]
    if isinstance(value, Parameter):
        return all(size == 1 for size in value.shape) and not bool(value.tensor.any())
    node = value.producer if isinstance(value, Value) else None
    return node is not None and node.op == "full" and node.attributes["value"] == 0


_LAYOUT = ("expand", "reshape", "unsqueeze", "squeeze", "permute", "identity", "cast", "slice")


def _check(call: Any, activations: tuple[str, ...]) -> None:
    directions = 2 if call.attribute("direction", "forward") == "bidirectional" else 1
    default = _ACTIVATIONS[call.op_type] * directions
    if tuple(name.lower() for name in activations) != tuple(name.lower() for name in default):
        raise OperatorError(f"{call.op_type} with the activations {activations} has no rule")
    for name in ("clip", "input_forget", "activation_alpha", "activation_beta"):
        if call.attribute(name):
            raise OperatorError(f"{call.op_type} with {name} has no rule")
    if call.has(7):
        raise OperatorError(f"{call.op_type} with peepholes has no rule")


def _swapped(build: Builder, x: Value, dims: tuple[int, ...], batch_first: bool) -> Value:
    return build.permute(x, dims=dims) if batch_first else x


def _read(build: Builder, call: Any, op: str, states: int, **attributes: Any) -> tuple[Value, ...]:
    """Emit the record with the time axis first; ``layout`` 1 has the batch first everywhere."""
    batch_first = bool(call.attribute("layout", 0))
    x = _swapped(build, call.operand(0), (1, 0, 2), batch_first)
    w, r = call.operand(1), call.operand(2)
    bias = call.operand(3) if call.has(3) else None
    initial = [_initial_state(call, slot) for slot in range(5, 5 + states)]
    initial = [None if state is None else _swapped(build, state, (1, 0, 2), batch_first) for state in initial]
    hidden = r.shape[2]
    call.check_restated("hidden_size", hidden)
    shapes = [(x.shape[0], w.shape[0], x.shape[1], hidden)] + [(w.shape[0], x.shape[1], hidden)] * states
    direction = call.attribute("direction", "forward")
    found = build(
        op, x, w, r, bias, _lengths(call, x.shape[0]), *initial, results=[(shape, x.dtype) for shape in shapes],
        hidden_size=hidden, direction=direction, **attributes,
    )  # fmt: skip
    dims = [(2, 0, 1, 3)] + [(1, 0, 2)] * states
    return tuple(_swapped(build, value, order, batch_first) for value, order in zip(found, dims, strict=True))


def _read_lstm(build: Builder, call: Any) -> tuple[Value, ...]:
    default = _ACTIVATIONS["LSTM"] * (2 if call.attribute("direction", "forward") == "bidirectional" else 1)
    _check(call, call.attribute("activations", default))
    return _read(build, call, "onnx_lstm", 2)


def _read_gru(build: Builder, call: Any) -> tuple[Value, ...]:
    default = _ACTIVATIONS["GRU"] * (2 if call.attribute("direction", "forward") == "bidirectional" else 1)
    _check(call, call.attribute("activations", default))
    return _read(build, call, "onnx_gru", 1, linear_before_reset=bool(call.attribute("linear_before_reset", 0)))


def _read_rnn(build: Builder, call: Any) -> tuple[Value, ...]:
    names = {name.lower() for name in call.attribute("activations", ("Tanh",))}
    if len(names) != 1 or not names <= {"tanh", "relu"}:
        raise OperatorError(f"RNN with the activations {sorted(names)} has no rule")
    _check(call, _ACTIVATIONS["RNN"] * (2 if call.attribute("direction", "forward") == "bidirectional" else 1))
    return _read(build, call, "onnx_rnn", 1, nonlinearity=names.pop())


def _write(nodes: Sequence[Node], patch: Any) -> None:
    """The hidden size; initial states of zeros, which were not read, are left out where their size was the old one."""
    node = next(node for node in nodes if node.op.startswith("onnx_"))
    patch.attribute("hidden_size", node.attributes["hidden_size"])
    for slot, operand in zip((5, 6), (*node.inputs[5:7], None, None), strict=False):
        if operand is None:
            patch.remove_input(slot)


# -- semantics ---------------------------------------------------------------------------------------------------------


def _reordered(weight: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The gates of (gates h) ... in another order."""
    parts = weight.chunk(len(order))
    return torch.cat([parts[i] for i in order])


def _torch_weights(
    w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, order: Sequence[int]
) -> list[torch.Tensor]:
    """Weights as ``torch.lstm`` wants them, direction by direction."""
    found = []
    for direction in range(w.shape[0]):
        found += [_reordered(w[direction], order), _reordered(r[direction], order)]
        if b is not None:
            found += [_reordered(half, order) for half in b[direction].chunk(2)]
    return found


def _by_torch(
    function: Any, x: torch.Tensor, initial: Any, weights: list[torch.Tensor], directions: int, direction: str
) -> tuple[torch.Tensor, ...]:
    """torch's own layer of one or two directions; results ``s dirs b h`` and the last states, each ``dirs b h``."""
    backwards = direction == "reverse"
    has_biases = len(weights) == 4 * directions
    y, *states = function(
        x.flip(0) if backwards else x, initial, weights, has_biases, 1, 0.0, False, directions == 2, False
    )
    y = y.flip(0) if backwards else y
    return y.reshape(*y.shape[:2], directions, y.shape[2] // directions).transpose(1, 2), *states


def _stepped(
    cell: Any, x: torch.Tensor, lengths: torch.Tensor | None, states: list[torch.Tensor], backwards: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One direction, step by step: results s b h, and the last states."""
    results: list[torch.Tensor] = []
    for step in reversed(range(x.shape[0])) if backwards else range(x.shape[0]):
        new = cell(x[step], *states)
        if lengths is None:
            states = new
            results.append(new[0])
            continue
        running = (lengths > step)[:, None]
        states = [torch.where(running, a, b) for a, b in zip(new, states, strict=True)]
        results.append(torch.where(running, new[0], torch.zeros_like(new[0])))
    return torch.stack(results[::-1] if backwards else results), states


def _all_directions(
    make_cell: Any, x: torch.Tensor, lengths: torch.Tensor | None, states: list[torch.Tensor], direction: str
) -> tuple[torch.Tensor, ...]:
    """Y and the last states of every direction, by steps."""
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    found = [_stepped(make_cell(i), x, lengths, [s[i] for s in states], way) for i, way in enumerate(ways)]
    last = [torch.stack([states[place] for _, states in found]) for place in range(len(states))]
    return (torch.stack([results for results, _ in found], 1), *last)


def _initial(x: torch.Tensor, r: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    return x.new_zeros(r.shape[0], x.shape[1], r.shape[2]) if state is None else state


def _lstm_cell(
    w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
) -> list[torch.Tensor]:
    gates = x @ w.T + h @ r.T
    gates = gates if b is None else gates + sum(b.chunk(2))
    put, out, forget, new = gates.chunk(4, 1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(put) * torch.tanh(new)
    return [torch.sigmoid(out) * torch.tanh(c), c]


def _gru_cell(
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    linear_before_reset: bool,
    x: torch.Tensor,
    h: torch.Tensor,
) -> list[torch.Tensor]:
    left, right = (0, 0) if b is None else b.chunk(2)
    read = (x @ w.T + left).chunk(3, 1)
    split = [part + bias for part, bias in zip((h @ r.T).chunk(3, 1), _thirds(right), strict=True)]
    keep, reset = torch.sigmoid(read[0] + split[0]), torch.sigmoid(read[1] + split[1])
    if linear_before_reset:
        new = torch.tanh(read[2] + reset * split[2])
    else:
        new = torch.tanh(read[2] + (reset * h) @ r.chunk(3)[2].T + _thirds(right)[2])
    return [(1 - keep) * new + keep * h]


def _thirds(bias: Any) -> Any:
    return bias.chunk(3) if isinstance(bias, torch.Tensor) else (bias, bias, bias)


def _plain_cell(
    w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, nonlinearity: str, x: torch.Tensor, h: torch.Tensor
) -> list[torch.Tensor]:
    total = x @ w.T + h @ r.T
    total = total if b is None else total + sum(b.chunk(2))
    return [torch.tanh(total) if nonlinearity == "tanh" else torch.relu(total)]


# -- records -----------------------------------------------------------------------------------------------------------


def _samples(gates: int, states: int, **attributes: Any) -> list[Sample]:
    """Either direction and both, with and without biases, initial states and lengths."""
    calls = []
    for direction, biases, given, lengths in (
        ("forward", True, True, None), ("bidirectional", True, False, None), ("reverse", False, True, None),
        ("bidirectional", True, True, torch.tensor([2, 4], dtype=torch.int32)),
    ):  # fmt: skip
        p = 2 if direction == "bidirectional" else 1
        w, r = randn(p, gates * 3, 5) / 2, randn(p, gates * 3, 3) / 2
        b = randn(p, 2 * gates * 3) if biases else None
        initial = [randn(p, 2, 3) if given else None for _ in range(states)]
        calls.append(
            sample(randn(4, 2, 5), w, r, b, lengths, *initial, hidden_size=3, direction=direction, **attributes)
        )
    return calls


@operator(
    rule=_rule(4, 2),
    onnx={"LSTM": OnnxForm(read=_read_lstm, write=_write)},
    macs=_macs,
    samples=lambda: _samples(4, 2),
    zeroed_by=(),
)
def onnx_lstm(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    c0: torch.Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
) -> tuple[torch.Tensor, ...]:
    h0, c0 = _initial(x, r, h0), _initial(x, r, c0)
    if lengths is not None:

        def make_cell(i: int) -> Any:
            return lambda *operands: _lstm_cell(w[i], r[i], None if b is None else b[i], *operands)

        return _all_directions(make_cell, x, lengths, [h0, c0], direction)
    return _by_torch(torch.lstm, x, (h0, c0), _torch_weights(w, r, b, (0, 2, 3, 1)), w.shape[0], direction)


@operator(
    rule=_rule(3, 1),
    onnx={"GRU": OnnxForm(read=_read_gru, write=_write)},
    macs=_macs,
    samples=lambda: [*_samples(3, 1), *_samples(3, 1, linear_before_reset=True)],
    zeroed_by=(),
)
def onnx_gru(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    linear_before_reset: bool = False,
) -> tuple[torch.Tensor, ...]:
    """torch's own GRU is the one with ``linear_before_reset``; the other one runs step by step."""
    h0 = _initial(x, r, h0)
    if lengths is not None or not linear_before_reset:

        def make_cell(i: int) -> Any:
            return lambda *operands: _gru_cell(w[i], r[i], None if b is None else b[i], linear_before_reset, *operands)

        return _all_directions(make_cell, x, lengths, [h0], direction)
    return _by_torch(torch.gru, x, h0, _torch_weights(w, r, b, (1, 0, 2)), w.shape[0], direction)


@operator(
    rule=_rule(1, 1),
    onnx={"RNN": OnnxForm(read=_read_rnn, write=_write)},
    macs=_macs,
    samples=lambda: [*_samples(1, 1), *_samples(1, 1, nonlinearity="relu")],
    zeroed_by=(),
)
def onnx_rnn(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    h0: torch.Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    nonlinearity: str = "tanh",
) -> tuple[torch.Tensor, ...]:
    h0 = _initial(x, r, h0)
    if lengths is not None:

        def make_cell(i: int) -> Any:
            return lambda *operands: _plain_cell(w[i], r[i], None if b is None else b[i], nonlinearity, *operands)

        return _all_directions(make_cell, x, lengths, [h0], direction)
    layer = torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu
    return _by_torch(layer, x, h0, _torch_weights(w, r, b, (0,)), w.shape[0], direction)
