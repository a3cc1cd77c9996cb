"""Recurrent layers as torch lays them out: LSTM, GRU and the plain one, and their single steps.

Per layer and direction   weight_ih (gates h) i, weight_hh (gates h) h, biases (gates h)
state                     (layers dirs) b h: one tensor, so all layers and directions share one hidden Dim
result                    s b h, or s b (h + h) with both directions, which is what the next layer reads

The gates are told apart by position and stay; the hidden Dim is cut in all gates at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Concat, Extent, resolve, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import AxisError, OperatorError
from regauge.ir.graph import Value
from regauge.ir.operator import Adapter, Cost, Sample, operator, sample
from regauge.ir.sizes.expressions import Size, same, total

# -- the rule ----------------------------------------------------------------------------------------------------------


def _rule(gates: int, states: int) -> Any:
    """The rule of a stack of layers whose cell has so many gates and so many state tensors."""

    def rule(call: Call) -> list[Axes]:
        x, state = call.operand(0), call.operand(1)
        for other in range(2, 1 + states):
            for a, b in zip(state, call.operand(other), strict=True):
                call.unify(a, b)
        batch, steps = (x[0], x[1]) if call["batch_first"] else (x[1], x[0])
        hidden = state[2]
        call.unify(batch, state[1])
        width = _stack(call, gates, x[2], hidden, [axes for axes in call.axes[1 + states :] if axes is not None])
        _state_roles(call, steps, batch, state[0], hidden)
        call.linear(x[2])
        result = [batch, steps, width] if call["batch_first"] else [steps, batch, width]
        return [result, *([state[0], batch, hidden] for _ in range(states))]

    return rule


def _stack(call: Call, gates: int, features: Extent, hidden: Extent, weights: Sequence[Axes]) -> Extent:
    """Unify the weights of every layer with what it reads; returns the features of the last layer's result."""
    directions, each = 2 if call["bidirectional"] else 1, 4 if call["has_biases"] else 2
    if len(weights) != call["num_layers"] * directions * each:
        raise AxisError(
            f"{call.where}: {call['num_layers']} layers need {each} weights per direction, got {len(weights)}"
        )
    for layer in range(call["num_layers"]):
        call.role("contract", features)
        for direction in range(directions):
            at = (layer * directions + direction) * each
            read_input, read_hidden, *biases = weights[at : at + each]
            call.unify(read_input[1], features)
            call.unify(read_hidden[1], hidden)
            for axes in (read_input, read_hidden, *biases):
                _gate_axis(call, axes[0], gates, hidden)
        features = resolve(Concat([hidden] * directions))
    return features


def _gate_axis(call: Call, axis: Extent, gates: int, hidden: Extent) -> None:
    """``(gates h)``, in which the gates keep their places."""
    which, inside = call.reshape([axis], [gates, size_of(hidden)])
    call.role("whole", which)
    call.unify(inside, hidden)


def _state_roles(call: Call, steps: Extent, batch: Extent, layers: Extent, hidden: Extent) -> None:
    call.role("scan", steps)
    call.role("map", batch)
    call.role("whole", layers)
    call.role("map", hidden)
    call.role("contract", hidden)


def _macs(cost: Cost) -> Size:
    """Every matrix is applied once per step and batch entry."""
    matrices = total(cost.count(slot) for slot in cost.operands if cost.rank(slot) == 2)
    return cost.size(0, 0) * cost.size(0, 1) * matrices


# -- ATen forms --------------------------------------------------------------------------------------------------------


def _options(
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool
) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "has_biases": has_biases,
        "dropout": dropout,
        "training": train,
    }


def _emit(build: Builder, op: str, x: Value, states: Sequence[Value], weights: Sequence[Value], **options: Any) -> Any:
    """The node, with its shapes stated: torch would find them by unrolling the layer over the sequence."""
    width = states[0].shape[2] * (2 if options["bidirectional"] else 1)
    shapes = [(*x.shape[:2], width), *(state.shape for state in states)]
    return build(op, x, *states, *weights, results=[(shape, x.dtype) for shape in shapes], **options)


def _lstm(build: Builder, x: Value, hx: Sequence[Value], params: Sequence[Value], *options: Any) -> Any:
    h0, c0 = hx
    if not same(h0.shape[2], c0.shape[2]):
        raise OperatorError("an LSTM whose state is projected (proj_size) has no rule")
    return _emit(build, "lstm", x, hx, params, **_options(*options))


def _plain(op: str, **attributes: Any) -> Adapter:
    def adapter(build: Builder, x: Value, hx: Value, params: Sequence[Value], *options: Any) -> Any:
        return _emit(build, op, x, [hx], params, **_options(*options), **attributes)

    return adapter


def _weights(gates: int, features: int, hidden: int, layers: int, directions: int, biases: bool) -> list[torch.Tensor]:
    found = []
    for layer in range(layers):
        width = features if layer == 0 else hidden * directions
        for _ in range(directions):
            found += [randn(gates * hidden, width) / 2, randn(gates * hidden, hidden) / 2]
            found += [randn(gates * hidden), randn(gates * hidden)] if biases else []
    return found


def _samples(gates: int, states: int, **attributes: Any) -> Any:
    """One layer; two layers in both directions with the batch first; no biases."""

    def draw() -> list[Sample]:
        calls = []
        for layers, directions, biases, batch_first in ((1, 1, True, False), (2, 2, True, True), (2, 1, False, False)):
            x = randn(3, 2, 5) if not batch_first else randn(2, 3, 5)
            state = [randn(layers * directions, 2, 4) for _ in range(states)]
            options = {
                "num_layers": layers,
                "bidirectional": directions == 2,
                "batch_first": batch_first,
                "has_biases": biases,
            }
            calls.append(sample(x, *state, *_weights(gates, 5, 4, layers, directions, biases), **options, **attributes))
        return calls

    return draw


@operator(rule=_rule(4, 2), aten={"lstm.input": _lstm}, macs=_macs, samples=_samples(4, 2), zeroed_by=())
def lstm(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    *weights: torch.Tensor,
    num_layers: int,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.lstm(x, (h0, c0), list(weights), has_biases, num_layers, dropout, training, bidirectional, batch_first)


@operator(rule=_rule(3, 1), aten={"gru.input": _plain("gru")}, macs=_macs, samples=_samples(3, 1), zeroed_by=())
def gru(
    x: torch.Tensor,
    h0: torch.Tensor,
    *weights: torch.Tensor,
    num_layers: int,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.gru(x, h0, list(weights), has_biases, num_layers, dropout, training, bidirectional, batch_first)


def _plain_cell(activation: str) -> Adapter:
    """One step of the plain layer is two linear layers and an activation."""

    def adapter(
        build: Builder,
        x: Value,
        h: Value,
        w_ih: Value,
        w_hh: Value,
        b_ih: Value | None = None,
        b_hh: Value | None = None,
    ) -> Any:
        return build(activation, build.add(build.linear(x, w_ih, b_ih), build.linear(h, w_hh, b_hh)))

    return adapter


@operator(
    rule=_rule(1, 1),
    aten={
        "rnn_tanh.input": _plain("rnn", nonlinearity="tanh"),
        "rnn_relu.input": _plain("rnn", nonlinearity="relu"),
        "rnn_tanh_cell": _plain_cell("tanh"),
        "rnn_relu_cell": _plain_cell("relu"),
    },
    macs=_macs,
    samples=lambda: [*_samples(1, 1)(), *_samples(1, 1, nonlinearity="relu")()],
    zeroed_by=(),
)
def rnn(
    x: torch.Tensor,
    h0: torch.Tensor,
    *weights: torch.Tensor,
    num_layers: int,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    nonlinearity: str = "tanh",
) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu)(
        x, h0, list(weights), has_biases, num_layers, dropout, training, bidirectional, batch_first
    )


# -- single steps ------------------------------------------------------------------------------------------------------


def _cell_rule(call: Call, rule: str, gates: int) -> list[Axes]:
    results = call.apply(rule, g=gates)
    call.role("map", results[0][1])
    call.role("contract", results[0][1])
    call.linear(call.operand(0)[1])
    return results


def _cell_macs(cost: Cost) -> Size:
    """Both matrices, the last two operands of rank 2, are applied once per batch entry."""
    matrices = [slot for slot in cost.operands if cost.rank(slot) == 2][-2:]
    return cost.size(0, 0) * total(cost.count(slot) for slot in matrices)


def _lstm_cell(build: Builder, x: Value, hx: Sequence[Value], *weights: Value) -> Any:
    return build.lstm_cell(x, *hx, *weights)


@operator(
    rule=lambda call: _cell_rule(call, "b i, b h, b h, (g h) i, (g h) h, (g h)?, (g h)? -> b h, b h ; whole g", 4),
    aten={"lstm_cell": _lstm_cell},
    macs=_cell_macs,
    samples=lambda: [
        sample(randn(2, 5), randn(2, 4), randn(2, 4), *_weights(4, 5, 4, 1, 1, True)),
        sample(randn(2, 5), randn(2, 4), randn(2, 4), *_weights(4, 5, 4, 1, 1, False)),
    ],
    zeroed_by=(),
)
def lstm_cell(
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.lstm_cell(x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh)


@operator(
    rule=lambda call: _cell_rule(call, "b i, b h, (g h) i, (g h) h, (g h)?, (g h)? -> b h ; whole g", 3),
    aten={"gru_cell": None},
    macs=_cell_macs,
    samples=lambda: [
        sample(randn(2, 5), randn(2, 4), *_weights(3, 5, 4, 1, 1, True)),
        sample(randn(2, 5), randn(2, 4), *_weights(3, 5, 4, 1, 1, False)),
    ],
    zeroed_by=(),
)
def gru_cell(
    x: torch.Tensor,
    h: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh)
