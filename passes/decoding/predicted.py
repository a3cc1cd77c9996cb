"""Keys and values predicted from those of the layer before, of which only what is off is kept.

k' = P k'_before,  v' = P [k', v'_before]        what a cache gives back of the layer before, and of this one
kept is k - k'     k' + what its codes give back is read, here and by the layer behind
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Value
from regauge.passes.decoding.kept import Kept
from regauge.passes.decoding.kept_samples import Sample
from regauge.passes.decoding.quantized_cache import Coder, coded, tried

_RIDGE = 1e-4  # of the mean square of what is read


@dataclass(frozen=True)
class Decoded:
    """What a cache gives back of a value: in the graph, and on the sample."""

    value: Value
    sample: torch.Tensor


class Predictions:
    """AQUA-KV (Shutova et al. 2025): linear maps fitted by least squares, layer by layer, on what is given back.

    Keys are predicted from those of the attention before, values from its values and the keys of their own. The paper
    keeps the first layer in more bits; here its bits are those of the others.
    """

    def __init__(self, build: Builder) -> None:
        self.build = build
        self._done: dict[tuple[str, int], Decoded] = {}
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def residual(self, kept: Kept, sample: Sample) -> Sample:
        """The sample of what is left to keep."""
        read = self._read(kept, sample.tensor)
        if not read:
            return sample
        inputs = torch.cat([decoded.sample for decoded in read], -1)
        self._maps[kept.name] = weight, bias = _least_squares(inputs, sample.tensor, sample.gradient)
        return replace(sample, tensor=sample.tensor - (inputs @ weight.T + bias))

    def write(self, value: Value, kept: Kept, sample: Sample, left: Sample, coder: Coder) -> None:
        """Let whatever reads the value read its prediction with what a coder leaves of the rest."""
        build, readers = self.build, list(value.uses)
        assert value.producer is not None
        with build.at(value.producer):
            found = self._predicted(build, value, kept, sample, coder)
        for node, slot in readers:
            set_input(node, slot, found, build.graph)
        build.graph.version += 1
        given = sample.tensor - left.tensor + tried(coder, left.tensor)
        self._done[kept.kind, kept.number] = Decoded(found, given)

    def _predicted(self, build: Builder, value: Value, kept: Kept, sample: Sample, coder: Coder) -> Value:
        if kept.name not in self._maps:
            return coded(build, value, coder)
        read = [decoded.value for decoded in self._read(kept, sample.tensor)]
        inputs = read[0] if len(read) == 1 else build.concat(*read, dim=value.rank - 1)
        weight, bias = (build.constant(part.to(sample.tensor.dtype), "prediction") for part in self._maps[kept.name])
        expected = build.linear(inputs, weight, bias)
        return build.add(expected, coded(build, build.sub(value, expected), coder))  # type: ignore[no-any-return]

    def _read(self, kept: Kept, like: torch.Tensor) -> list[Decoded]:
        """What the prediction reads: of the same sequences and positions, channels aside."""
        wanted = [("keys", kept.number)] if kept.kind == "values" else []
        found = [self._done.get(key) for key in [(kept.kind, kept.number - 1), *wanted]]
        return [own for own in found if own is not None and own.sample.shape[:-1] == like.shape[:-1]]


def _least_squares(x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [channels, inputs] and bias of the affine map that gives y [..., channels] best; a little ridge."""
    x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += torch.eye(len(gram), dtype=gram.dtype) * (_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y)).T
    bias = mean_y - weight @ mean_x
    return weight.to(gradient.dtype), bias.to(gradient.dtype)
