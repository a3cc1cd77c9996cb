"""Layers as factors whose ranks training is to find."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.problems import plain_problems

NAME = "full-rank-factors"


def full_rank_factors(
    graph: Graph,
    *,
    form: Literal["low-rank", "tucker"] = "low-rank",
    share: float = 1.0,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Graph:
    """A graph that computes the same, in which layers are two, with as many directions between as their rank may be.

    With ``form="tucker"`` convolutions of several places are three, the kernel between two maps of single places, and
    other layers stay. It has more parameters: emit it, ``to_torch()``, and train ranks in it that are worth it.
    ``include`` and ``exclude`` are globs on names of weights; with a ``share`` below 1 only the first singular
    directions are kept (no longer the same function). Raises PassError for a share that is none.
    """
    if not 0 < share <= 1:
        raise PassError(f"full_rank_factors: share={share:g} is to be above 0 and at most 1")
    own, result = FORMS[form], graph.copy()
    for layer in chosen_layers(result, include, exclude, Counter(), own.misfit):
        (ranks,) = own.lossless(layer)
        links, _ = links_of(own, plain_problems(layer), [max(1, round(share * rank)) for rank in ranks])
        write_chain(result, layer, links, by=NAME)
    remove_dead(result)
    return result
