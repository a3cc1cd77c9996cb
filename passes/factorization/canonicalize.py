"""``canonicalize``: bonds between layers in their singular form, so that a cut of them loses least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from regauge.ir.gauge.frames import find_frames
from regauge.ir.graph import Graph, Value
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.sites import Heads, Site, attention_sites
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.factorization.balance import Moments, balance_frame, is_bond, moments_on_data
from regauge.passes.factorization.head_bonds import balance_heads, misfit, moments_of_heads


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Bring axes whose basis is free into singular form, the same function: indices by importance, each as large on
    the one side as on the other.

    before  h = linear(x, down)      y = linear(h, up)
    after   h = linear(x, s^1/2 V')  y = linear(h, U s^1/2)       U s V' = up down

    These are the inner axes of factor pairs, those of values and outputs of attention in each head (with the outputs of
    all query heads that share it), and of queries and keys where no position code stands between: CLOVER (Meng et al.
    2024), where shared heads stay as they are. Under rotary positions each pair of indices takes a complex number.
    Channel scores such as those of ``prune`` are those of singular directions then.

    With data importance is that of the products on it: what h is, and what queries and keys are, is measured. What is
    cut then has to be chosen on data, too, as ``prune`` does by default.
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    def call(self, graph: Graph, context: Context) -> Graph:
        start = assembled(graph)
        sites = attention_sites(start)
        fit = [(site, name) for site in sites for name in ("value", "key") if _fits(site, name, context.left)]
        inside = {value for site, name in fit for value in _carrying(site, name)}
        others = (frame for frame in find_frames(start) if not any(place[0] in inside for place in frame.values))
        frames = [frame for frame in others if is_bond(frame, context.left)]
        heads: dict[Heads, torch.Tensor] = {}
        moments: Moments = {}
        if context.data is not None and (frames or fit):
            batches = calibration_batches(start, context)
            heads = moments_of_heads(start, list(dict.fromkeys(site for site, _ in fit)), batches)
            moments = moments_on_data(start, frames, batches)
        result = start.copy()
        for site, name in fit:
            balance_heads(result, site, name, heads, by=self.name)
        for frame in frames:
            balance_frame(start, result, frame, moments, by=self.name)
        context.note(f"{len(fit)} bonds in heads of attention, {len(frames)} others")
        return result if fit or frames else graph


def _fits(site: Site, name: str, left: Counter[str]) -> bool:
    reason = misfit(site, name)
    if reason is not None:
        left[reason] += 1
    return reason is None


def _carrying(site: Site, name: str) -> Iterator[Value]:
    """The values of a site that take the map of a bond: those between its layers and attention."""
    parts = (site.value, site.output) if name == "value" else (site.key, site.query)
    for part in parts:
        for node in part.nodes if part is not None else ():
            yield from node.outputs
    if name == "value":
        yield site.node.output
