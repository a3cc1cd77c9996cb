"""Codes learned by gradients: those of a block of layers together, by what the block gives on data.

The inputs of a block are what the coded blocks before it give, its targets what it gave. The error is taken as a share
of that of the nearest codes, and where these are nearer at the end they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.blocks import Block, ends_of_blocks
from regauge.passes.quantization.grid import Coded, Form
from regauge.passes.quantization.learned_codes import Divided, Learned, LearnedCodes, UpOrDown

STEPS = 500
_WARM = 0.2  # share of the steps without a drive to whole codes
_SHARPNESS = (20.0, 2.0)  # b at the end of that, and at last
_DRIVE = 1.0  # lambda times the number of weights, beside an error that starts at about 1
_RATES: Mapping[Learned, float] = {"adaround": 2e-2, "flexround": 2e-3}
_BIAS_RATE = 1e-3


def learned(
    original: Graph,
    changed: Graph,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    forms: Mapping[str, Form],
    method: Learned,
    steps: int = STEPS,
    *,
    by: str,
) -> dict[str, Coded]:
    """The codes of ``layers``, which are those of ``changed``, a copy of ``original``, by the names of their weights.

    What they stand for is written into it, and biases that were learned. Memory: what blocks read and give on all
    batches, and what autograd keeps of the largest block on one batch.
    """
    before, now = Lockstep(original, batches), Lockstep(changed, batches)
    old, new = before.steps(), now.steps()
    found: dict[str, Coded] = {}
    first = 0
    for last in ends_of_blocks(changed, layers):
        nodes = changed.nodes[first : last + 1]
        inside = set(nodes)
        own = [layer for layer in layers if layer.node in inside]
        for _ in range(first, last + 1):
            before.execute(next(old))
        if own:
            next(new)
            block = Block(changed, nodes, own, [Interpreter(changed).bound(batch)[1] for batch in batches])
            given = [now.values(value) for value in block.read]
            wanted = [before.values(original.nodes[first + place].outputs[slot]) for place, slot in block.gives]
            roundings = [_WAYS[method](layer, _nearest(layer, forms[layer.weight.name])) for layer in own]
            found |= _fitted(block, roundings, given, wanted, method, steps, by)
        for _ in nodes[1 if own else 0 :]:
            next(new)
        first = last + 1
    return found


_WAYS: Mapping[Learned, type[LearnedCodes]] = {"adaround": UpOrDown, "flexround": Divided}


def _fitted(
    block: Block,
    roundings: Sequence[LearnedCodes],
    given: Sequence[Sequence[torch.Tensor]],
    wanted: Sequence[Sequence[torch.Tensor]],
    method: Learned,
    steps: int,
    by: str,
) -> dict[str, Coded]:
    """Learn the codes of a block's layers and write them into its graph; values are by value, then by batch."""
    batches = list(zip(zip(*given, strict=True), zip(*wanted, strict=True), strict=True))

    def error(weights: Mapping[str, torch.Tensor], place: int) -> torch.Tensor:
        reads, targets = batches[place]
        found = block.run(reads, place, weights)
        pairs = zip(found, targets, strict=True)
        return torch.stack([(y - x).square().sum() for y, x in pairs if x.is_floating_point()]).sum()

    def of_all(weights: Mapping[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return sum(float(error(weights, place)) for place in range(len(batches)))

    start = _joined(rounding.data(rounding.start.values.float()) for rounding in roundings)
    first = of_all(start)
    if first > 0:
        _learn(
            roundings,
            lambda weights, place: error(weights, place) * (len(batches) / first),
            len(batches),
            method,
            steps,
        )
    end = {rounding.layer.weight.name: rounding.coded() for rounding in roundings}
    data = _joined(rounding.data(end[rounding.layer.weight.name].values.float()) for rounding in roundings)
    if of_all(data) >= first:
        end, data = {rounding.layer.weight.name: rounding.start for rounding in roundings}, start
    parameters = {parameter.name: parameter for parameter in block.graph.all_parameters()}
    for name, tensor in data.items():
        set_weight(block.graph, parameters[name], tensor.detach(), by=by)
    return end


def _learn(
    every: Sequence[LearnedCodes],
    error: Callable[[Mapping[str, torch.Tensor], int], torch.Tensor],
    batches: int,
    method: Learned,
    steps: int,
) -> None:
    """Descend the error of one batch after the other."""
    optimiser = torch.optim.Adam(
        [
            {"params": [tensor for one in every for tensor in one.learns], "lr": _RATES[method]},
            {"params": [one.shift for one in every if one.shift.requires_grad], "lr": _BIAS_RATE},
        ]
    )
    for step in range(steps):
        behind = (step / steps - _WARM) / (1 - _WARM)
        with torch.enable_grad():
            loss = error(_joined(one.data(one.values()) for one in every), step % batches)
            if behind > 0:
                sharpness = _SHARPNESS[1] + (_SHARPNESS[0] - _SHARPNESS[1]) * (1 - behind)
                for penalty in (one.penalty(sharpness) for one in every):
                    loss = loss if penalty is None else loss + _DRIVE * penalty
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _nearest(layer: Layer, form: Form) -> Coded:
    return form.rounded(layer.matrices(layer.weight.tensor.detach()).double().flatten(0, 1))


def _joined(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}
