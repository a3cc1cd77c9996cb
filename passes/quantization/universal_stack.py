"""One stack for a model: the terms of all its weights in the order of what each is worth, of which a prefix is loaded.

What a term is worth is how much more the outputs change where its weight has only the terms in front of it, all other
weights as they were, for each byte of it. BitStack measures perplexity where this is the squared change of the outputs;
its terms are of one size. The first term of each weight comes before all others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.calibration.batches import calibration_batches, examples_in, part_of
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.bitstack import Terms, stacked
from regauge.passes.quantization.weights import rows_of

TERMS = 8  # of each weight: so many bits
MEASURED = 16  # examples on which terms are measured


@dataclass
class UniversalStack:
    """``weights`` by name, and the ``order`` of their terms: names, each as often as its weight has terms."""

    weights: Mapping[str, Terms]
    order: Sequence[str]

    def within(self, most: int) -> dict[str, Terms]:
        """The terms of the longest prefix of at most so many bytes; raises PassError where not every weight has one."""
        counts = dict.fromkeys(self.weights, 0)
        total = sum(2 * len(terms.norms) for terms in self.weights.values())
        for name in self.order:
            total += self.weights[name].bytes_of_a_term
            if total > most:
                break
            counts[name] += 1
        if not all(counts.values()):
            raise PassError(f"{most} bytes hold no term for each of {len(counts)} weights: allow more")
        return {name: self.weights[name].first(count) for name, count in counts.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all terms to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        parts = {
            f"{name}/{part}": tensor.contiguous()
            for name, terms in self.weights.items()
            for part, tensor in terms.tensors().items()
        }
        target = Path(path)
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file(parts, staged, metadata={"order": json.dumps(list(self.order))})
            staged.replace(target)
        except OSError as error:
            raise PassError(f"quantize: the stack cannot be written to {target}: {error}") from error
        finally:
            staged.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> UniversalStack:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                order = json.loads((file.metadata() or {})["order"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise PassError(f"quantize: {path} is no stack that quantize wrote: {error}") from error
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            found.setdefault(name, {})[part] = tensor
        return UniversalStack({name: Terms.of_tensors(parts) for name, parts in found.items()}, order)

    def check(self, layers: Sequence[Layer], where: str) -> None:
        """Raise PassError where the stack is not one of the weights of these layers."""
        shapes = {name: terms.signs.shape[1:] for name, terms in self.weights.items()}
        wanted = {layer.weight.name: torch.Size((layer.outputs, layer.columns)) for layer in layers}
        if shapes != wanted:
            other = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise PassError(f"quantize: the stack in {where} is of another model: {other[0]} differs")


def bytes_of(found: Mapping[str, Terms]) -> int:
    return int(sum(terms.bits for terms in found.values()) / 8)


def stack_at(
    path: str | None, graph: Graph, layers: Sequence[Layer], rank: int | None, context: Context, *, by: str
) -> UniversalStack:
    """The stack of a file; where there is none it is made on the data, and written if there is a path."""
    if path is not None and Path(path).exists():
        stack = UniversalStack.load(path)
        stack.check(layers, path)
        return stack
    stack = stack_of(graph, layers, calibration_batches(graph, context), rank, by=by)
    if path is not None:
        stack.save(path)
    return stack


def stack_of(
    graph: Graph, layers: Sequence[Layer], batches: Sequence[Any], rank: int | None, *, by: str
) -> UniversalStack:
    """The terms of the weights of layers, and their order as measured on data."""
    weights: dict[str, Terms] = {}
    for layer, moments in visit_moments(graph, layers, batches):
        norms = moments.gram.diag()[:-1].clamp(min=0).sqrt()
        weights[layer.weight.name] = stacked(rows_of(layer), norms, TERMS, rank)
    some = [part_of(batches[0], slice(0, MEASURED), examples_in(batches[0]))]
    worth = _worth(graph, layers, weights, some, by)
    ranked = sorted(((value, place, name) for name, values in worth.items() for place, value in enumerate(values)),
                    key=lambda entry: (entry[1] > 0, -entry[0], entry[1]))  # fmt: skip
    return UniversalStack(weights, [name for _, _, name in ranked])


def _worth(
    graph: Graph, layers: Sequence[Layer], weights: Mapping[str, Terms], batches: Sequence[Any], by: str
) -> dict[str, list[float]]:
    """How much less the outputs change for each byte with each term of each weight; never more than the term before."""
    trial = graph.copy()
    wanted = [_outputs(graph, batch) for batch in batches]
    found: dict[str, list[float]] = {}
    for layer in layers:
        name, terms = layer.weight.name, weights[layer.weight.name]
        own, before = trial.parameters[name], trial.parameters[name].weight
        losses = []
        for count in range(terms.count + 1):
            values = terms.first(count).values if count else torch.zeros_like(rows_of(layer))
            set_weight(trial, own, layer.stored(values), by=by)
            pairs = zip(wanted, batches, strict=True)
            losses.append(sum(_change(outputs, _outputs(trial, batch)) for outputs, batch in pairs))
        own.weight = before
        gains = [max(0.0, was - now) / terms.bytes_of_a_term for was, now in zip(losses, losses[1:], strict=False)]
        for place in range(1, len(gains)):
            gains[place] = min(gains[place], gains[place - 1])
        found[name] = gains
    return found


def _outputs(graph: Graph, batch: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [y for y in graph.run(batch) if isinstance(y, torch.Tensor) and y.is_floating_point()]


def _change(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> float:
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(before, now, strict=True))
