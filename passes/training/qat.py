"""Training with fake quantization: what ``quantize`` would put into integers is rounded while the network trains.

qat = regauge.training.Qat(graph, "w4a8", data=batches)
module = qat.module.train()
for images, labels in loader:
    criterion(module(images), labels).backward()
    optimizer.step()
    qat.step()
    optimizer.zero_grad()
small = qat.finish()        # a graph in integers that computes what the module computes
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.quantized_layers import PLANNED_FOR
from regauge.passes.base import Context, reasons
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.quantization.activations import ends_of_values, smooth_values
from regauge.passes.quantization.grid import Coded, Form, Grid
from regauge.passes.quantization.placement import place
from regauge.passes.quantization.preparation import prepared
from regauge.passes.quantization.qdq import Writer
from regauge.passes.quantization.quantize import Quantize
from regauge.passes.quantization.ranges import Calibration
from regauge.passes.quantization.targets import TARGETS
from regauge.passes.quantization.weights import group_of
from regauge.passes.report import reported
from regauge.passes.training.bound_model import BoundModel
from regauge.passes.training.fake_quantized import FakeQuantizer, Scales, TrainedGrids
from regauge.passes.training.salient import Salient


class Qat:
    """``module`` is trained in place of the model: the one that the graph is emitted as, with weights and activations
    rounded where ``quantize`` with the same options puts integers, straight-through in the backward pass.

    It is a plain module: its parameters are those of the simplified graph, under their names, and scales beside them,
    so that optimizers, state_dicts, checkpoints and torch.compile see nothing special. As ``quantize`` does, Qat folds
    batch norms into layers first.

    ``scheme`` is ``w8``, ``w4``, ``w3`` or ``w2`` (weights alone), or ``w8a8`` to ``w2a8`` (activations of 8 bits, too,
    whose ranges are observed on ``data``; kernels multiply bytes, so weights of fewer bits lie in bytes then). The
    other options are those of ``quantize``. ``scales``:

    - ``learned``: they begin as ``quantize`` would have them, with codes and biases chosen on ``data`` where it is
      given, and those of weights and activations are trained with the gradient of LSQ (Esser et al. 2020). Deviation:
      what is trained is their logarithm (Jain et al. 2020, Trained Quantization Thresholds, section 3.2), with which
      Adam moves all of them at one pace, and which keeps them positive; LSQ's factor on the gradient, which does the
      same for plain gradient descent, is left out.
    - ``fixed``: they stay where those begin.
    - ``statistics``: of weights 4 mean|w| / 2^bits, drawn anew in each pass, with levels half way between integers, as
      in StatsQ (Liu et al. 2023, Oscillation-free Quantization for Low-bit Vision Transformers, and its authors' code);
      those of activations are learned. Deviation: weights beyond the last level get no gradient, there they do.

    ``keep_zeros`` keeps the weights that are zero at the start so, and begins with the nearest codes: train what
    ``sparsify`` or ``NMSparsity`` gave (2:4 first, then integers, both under distillation: Yu et al. 2023, Boost Vision
    Transformer with GPU-Friendly Sparsity and Quantization, with activations of 8 bits where theirs may have 4).
    ``partial`` is for training in rounds, see :meth:`freeze`; scales stay where they begin then.
    Zero points stay as they begin. Raises PassError where there is no layer to quantize.
    """

    name = "qat"

    def __init__(
        self,
        graph: Graph,
        scheme: str = "w8a8",
        *,
        data: Any = None,
        scales: Scales = "learned",
        keep_zeros: bool = False,
        partial: bool = False,
        group: int | None = None,
        symmetric: bool | None = None,
        target: Literal["ort-x86", "reference"] = "ort-x86",
        calibration: Calibration | None = None,
        smoothing: float | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        self.graph, self.target = graph, TARGETS[target]
        bits, self.activations = _parts(scheme)
        if scales == "statistics":
            _check_statistics(bits, symmetric, keep_zeros)
        if partial and scales != "fixed":
            raise PassError("Qat: weights are frozen beside scales that stay: partial=True goes with scales='fixed'")
        self._placing = Quantize(
            scheme="w8a8" if self.activations else scheme,  # type: ignore[arg-type]
            group=group, symmetric=symmetric, target=target, calibration=calibration, smoothing=smoothing,
            embeddings=False, include=include, exclude=exclude,
        )  # fmt: skip
        self.left: Counter[str] = Counter()  # layers that stay in float, by reason
        self.steps = 0  # how often step() was called
        self._float = prepared(graph).copy()
        layers = self._placing.layers_of(self._float, self.left)
        if not layers:
            raise PassError(f"Qat finds no layer to quantize: {', '.join(reasons(self.left)) or 'there is none'}")
        batches = calibration_batches(self._float, Context(data=data)) if self.activations else []
        if self.activations and smoothing != 0:
            smooth_values(self._float, layers, self.target, smoothing, batches, by=self.name)
        signed = self.activations or bits == 8 or scales == "statistics"
        grid = Grid(bits, signed if symmetric is None else symmetric)
        chosen_on = batches if self.activations else data  # which a generator gives once
        plain_start = keep_zeros or scales == "statistics"  # codes chosen on data fill zeros
        quantizer = self._fake(scales, grid, batches, None if plain_start else chosen_on)
        self.module: nn.Module = quantizer.graph.to_torch()
        self._bound = BoundModel(self.module, self._float)
        self._grids = TrainedGrids(quantizer, BoundModel(self.module, quantizer.graph))
        self._weights = [layer.weight for layer in layers]
        self._zeros = {weight: weight.tensor == 0 for weight in self._weights} if keep_zeros else {}
        self._boundary: float | None = None
        self._salient = Salient(self._weights, self._bound, self._grids) if partial else None
        self._frozen: dict[Parameter, tuple[torch.Tensor, torch.Tensor]] = {}

    def _fake(self, scales: Scales, grid: Grid, batches: Sequence[Any], chosen_on: Any) -> FakeQuantizer:
        graph = self._float.copy()
        layers = self._placing.layers_of(graph, Counter())
        quantizer = FakeQuantizer(graph, self.target, scales, by=self.name)
        placement = place(graph, layers, self.target)
        way = self._placing.calibration
        ends = ends_of_values(graph, placement, self.target, way, batches) if self.activations else {}
        block = None if self.activations else self._placing.block
        forms = {layer.weight.name: Form(grid, group_of(layer, block)) for layer in layers}
        floats = {layer.weight: layer.weight.weight for layer in layers}
        stored = self._placing.stored(self._float, graph, layers, forms, Context(data=chosen_on))
        for weight, own in floats.items() if chosen_on is None else ():
            weight.weight = own  # training goes on from the floats: on their codes no scale has a gradient
        if self.activations:
            quantizer.activations(placement, ends)
        for layer in layers:
            coded = stored[layer.weight.name]
            assert isinstance(coded, Coded)
            quantizer.weight(layer, coded)
        return quantizer

    def anneal(self, boundary: float = 0.005) -> None:
        """From now on train only weights that lie within ``boundary`` steps of where they would be rounded otherwise.

        Confidence-guided annealing (Liu et al. 2023, section 4.2): the last part of training, in which weights no
        longer oscillate between two levels. Which ones those are is seen anew after each step. Deviation: the others
        keep their values whatever the optimizer does, momentum and weight decay included.
        """
        if not 0 < boundary < 0.5:
            raise PassError(f"boundary={boundary:g} is out of range: write a share of a step above 0 and below 0.5")
        self._boundary = boundary
        self._hold()

    def freeze(self, share: float) -> None:
        """From now on hold the most salient ``share`` of each weight at its codes; what is left makes up for that.

        Saliency-aware partial retraining: call it with growing shares, 0.5, 0.75, 0.875 and so on, with some training
        in front of each and behind the last. See :mod:`regauge.passes.training.salient`. Weights that were frozen stay
        so. Needs ``partial=True``, and that gradients are still there when :meth:`step` is called.
        """
        if self._salient is None:
            raise PassError("Qat: freeze needs the saliency of weights: write Qat(..., partial=True)")
        self._salient.freeze(share)

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each ``optimizer.step()``: what is to stay as it was is put back."""
        self.steps += 1
        for weight, zeros in self._zeros.items():
            tensor = self._bound.tensor(weight)
            tensor.mul_(~zeros.to(tensor.device))
        for weight, (mask, values) in self._frozen.items():
            tensor = self._bound.tensor(weight)
            tensor.copy_(torch.where(mask, values, tensor))
        if self._salient is not None:
            self._salient.step()
        self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        """Note the weights that are far from any boundary between two codes, or beyond the last one."""
        if self._boundary is None:
            return
        for weight in self._weights:
            ratio, (low, high) = self._grids.in_steps(weight.name), self._grids.limits(weight.name)
            below = ratio.floor()
            near = ((ratio - below - 0.5).abs() <= self._boundary) & (below >= low) & (below < high)
            self._frozen[weight] = ~near, self._bound.tensor(weight).detach().clone()

    @torch.no_grad()
    def finish(self) -> Graph:
        """The graph in integers, with the trained weights and exactly the scales that the module rounds with.

        It computes what the module computes, up to the rounding of biases to 32 bits where activations are quantized.
        The module stays as it is.
        """
        since = time.perf_counter()
        result = self._bound.trained_graph(self.name)
        layers = self._placing.layers_of(result, Counter())
        writer = Writer(result, self.target, by=self.name)
        if self.activations:
            placement = place(result, layers, self.target)
            writer.activations(placement, {value: self._grids.ends(value.name) for value in placement.measured})
        for layer in layers:
            if self.activations:
                writer.layer(layer, self._grids.coded(layer, self.target.weights.bits))
            else:
                writer.weight_alone(layer, self._grids.coded(layer))
        remove_dead(result)
        result.metadata[PLANNED_FOR] = self.target.name
        return reported(self.graph, result, self.name, since, (), self.left)

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside those of the module and the optimizer."""
        salient = None if self._salient is None else self._salient.state_dict()
        return {"steps": self.steps, "boundary": self._boundary, "salient": salient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one, made with the same arguments, was: after its module's state was loaded."""
        self.steps, self._boundary = int(state["steps"]), state["boundary"]
        if self._salient is not None:
            self._salient.load_state_dict(state["salient"])
        self._hold()


def _parts(scheme: str) -> tuple[int, bool]:
    """Bits of weights, and whether activations are quantized."""
    found = re.fullmatch("w([8432])(a8)?", scheme)
    if found is None:
        raise PassError(f"scheme={scheme!r} is unknown: write w8, w4, w3 or w2, with a8 behind for activations")
    return int(found[1]), found[2] is not None


def _check_statistics(bits: int, symmetric: bool | None, keep_zeros: bool) -> None:
    if symmetric is False or keep_zeros or bits == 8:
        what = "8 bits" if bits == 8 else "keep_zeros" if keep_zeros else "symmetric=False"
        raise PassError(f"Qat: scales='statistics' has levels on both sides of zero, which {what} does not go with")
