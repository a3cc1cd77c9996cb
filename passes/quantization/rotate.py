"""``rotate``: streams and heads in another orthogonal basis, in which no channel is an outlier; the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from regauge.ir.errors import PassError
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame, find_frames
from regauge.ir.gauge.insertion import rotated
from regauge.ir.graph import Graph
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.options import option
from regauge.passes.quantization.hadamard import rotation
from regauge.passes.quantization.learned_rotations import learned
from regauge.passes.quantization.online_rotations import rotate_inputs, rotate_queries
from regauge.passes.quantization.preparation import prepared
from regauge.passes.quantization.rms_streams import with_bare_norms
from regauge.passes.quantization.subspaces import Readers, high_count, principal, read_apart, readers_of
from regauge.passes.simplify.simplify import Simplify

Online = Literal["inputs", "queries"]


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotate what layers read, so that no channel is far greater than others: fewer bits lose less then.

    before  x = table[ids]        x = x + f(norm(x) * g, w1') w2'         y = norm(x) * g w3'
    after   x = (table R')[ids]   x = x + f(norm(x), (w1 g R')') (R w2)'  y = norm(x) (w3 g R')'

    Gains of norms go into the layers behind them, the mean that a layer norm takes off into what writes its stream, and
    a weight tied to a table becomes its own. Streams of residual networks and heads between values and outputs are
    rotated in the weights alone (R1 and R2 of SpinQuant, Liu et al. 2024), and whatever else admits it. ``online`` adds
    nodes: ``inputs`` in front of layers whose inputs no weight can rotate (R4, behind an activation), ``queries``
    between queries and keys behind a position code (R3), for caches of few bits.

    kind=learned starts at hadamard and follows the error of the rounded network by Cayley steps; the pass stays exact.
    kind=pca turns the directions of the greatest variance to the front, spreads outliers among them and among the
    others, and lets layers read both apart: ``quantize`` with fewer bits keeps 8 for the first (ResQ).
    """

    name: ClassVar[str] = "rotate"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    kind: Literal["hadamard", "random", "learned", "pca"] = option(
        "hadamard", "orthogonal matrices; learned and pca need data"
    )
    high: float = option(0.125, "of kind=pca: share of the directions that layers read apart", above=0, below=1)
    online: tuple[Online, ...] = option((), "rotations computed in each run: inputs, queries")
    bits: int = option(4, "of weights, that kind=learned rounds to", at_least=2, at_most=8)
    activation_bits: int = option(8, "of what layers read, that kind=learned rounds to", at_least=2, at_most=16)
    steps: int = option(60, "of kind=learned", at_least=1)
    seed: int = option(0, "of signs and random matrices", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        of: dict[str, tuple[str, ...]] = {"learned": ("bits", "activation_bits", "steps"), "pca": ("high",)}
        taken = of.get(self.kind, ())
        idle = [name for names in of.values() for name in names if name in self.given_options() and name not in taken]
        if idle:
            raise PassError(f"rotate: {idle[0]} does nothing with kind={self.kind}: leave it out")

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.kind in ("learned", "pca") and context.data is None:
            raise PassError(f"rotate needs data for kind={self.kind}: {GIVE_DATA}")
        start = with_bare_norms(prepared(Simplify(assemble="always").call(graph, Context())), by=self.name)
        frames = [frame for frame in find_frames(start) if Gauge.ORTHOGONAL in frame.gauge]
        generator = torch.Generator().manual_seed(self.seed)
        readers = readers_of(start, frames) if self.kind == "pca" else {}
        matrices = self._matrices(start, frames, readers, generator, context)
        result = rotated(start, matrices, by=self.name) if frames else start
        if readers:
            read_apart(result, self._columns(start, readers), by=self.name)
            context.note(f"{sum(map(len, readers.values()))} layers read {self.high:.1%} of their inputs apart")
        names = [frame.name for frame in frames]
        context.note(
            f"{len(names)} Dims rotated{': ' if names else ''}{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        )
        count = rotate_inputs(result, generator, by=self.name) if "inputs" in self.online else 0
        count += rotate_queries(result, generator, by=self.name) if "queries" in self.online else 0
        if self.online:
            context.note(f"{count} values rotated in each run")
        return result if frames or count else graph

    def _matrices(
        self, graph: Graph, frames: Sequence[Frame], readers: Readers, generator: torch.Generator, context: Context
    ) -> dict[Frame, torch.Tensor]:
        kind: Literal["hadamard", "random"] = "random" if self.kind == "random" else "hadamard"
        matrices = {frame: rotation(kind, int(frame.dim.size), generator) for frame in frames}
        if not frames or self.kind not in ("learned", "pca"):
            return matrices
        batches = calibration_batches(graph, context)
        if self.kind == "pca":
            return {**matrices, **principal(graph, readers, batches, self.high, kind, generator)}
        found, before, after = learned(graph, matrices, batches, self.bits, self.activation_bits, self.steps)
        context.note(f"squared error of the rounded network: {before:.3g} to {after:.3g} of the outputs'")
        return found

    def _columns(self, graph: Graph, readers: Readers) -> dict[str, torch.Tensor]:
        """The columns of each layer, by the name of its node, that read the first directions of a frame."""
        return {
            layer.node.name: torch.from_numpy(
                layer.columns_of(graph, frame.dim)[: high_count(frame, self.high)]
            ).flatten()
            for frame, layers in readers.items()
            for layer in layers
        }
