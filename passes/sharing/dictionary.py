"""Layers that are mixtures of common atoms: W_l = sum over s of c_ls A_s (MASA).

Zhussip et al. 2025, Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning, a dictionary
for each kind of layer. Atoms of trained layers are the first principal ones (section on pretrained models), here not
centred: of all mixtures of so many matrices they lose least. Deviations: with data atoms and coefficients are least
squares in the metrics of the layers, and each layer is fitted once more on what those before give, with no training;
every layer of a repeated block may have a dictionary, where the paper has those of attention; and how many atoms each
has is found by what they lose within a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.forms import ranks_up_to
from regauge.passes.factorization.problems import Problem
from regauge.passes.sharing.fitting import atoms, coefficients
from regauge.passes.sharing.grouping import least_loss
from regauge.passes.sharing.sites import Problems, Site, problems_at
from regauge.passes.sharing.writing import write_mixture


@dataclass
class Mixed:
    """Layers that are mixtures of atoms [count, outputs, columns]."""

    names: tuple[str, ...]
    atoms: torch.Tensor
    _mixtures: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return self.atoms.numel() + len(self.names) * len(self.atoms)

    def matrix(self, problem: Problem) -> torch.Tensor:
        mixture = self._mixtures[problem.layer.weight.name] = coefficients(problem, self.atoms)
        return torch.einsum("s,sij->ij", mixture, self.atoms)

    def write(self, graph: Graph, layers: Sequence[Layer], *, by: str) -> None:
        mixtures = [self._mixtures[name] for name in self.names]
        write_mixture(graph, layers, self.atoms, mixtures, by=by)


def dictionaries(sites: Sequence[Site], problems: Problems, count: int | None, allowed: float | None) -> list[Mixed]:
    """A dictionary for each site: of ``count`` atoms, or so many that least is lost within ``allowed`` parameters.

    Raises PassError where no choice is small enough.
    """
    found = {site: [_mixed(site, problems, own) for own in _counts(site, count)] for site in sites}
    if allowed is None:
        return [own[0] for own in found.values() if own]
    options = {}
    for site, own in found.items():
        losses = [sum(p.error(one.matrix(p)) for p in problems_at(site, problems)) for one in own]
        whole = (len(site.names) * site.size, 0.0)
        options[site] = [whole, *((one.parameters, loss) for one, loss in zip(own, losses, strict=True))]
    picks, _ = least_loss(options, allowed)
    return [found[site][pick - 1] for site, pick in picks.items() if pick]


def _mixed(site: Site, problems: Problems, count: int) -> Mixed:
    return Mixed(site.names, atoms(problems_at(site, problems), count)[0])


def _counts(site: Site, count: int | None) -> list[int]:
    """Numbers of atoms with which a site has fewer parameters than its layers have."""
    layers = len(site.names)
    asked = ranks_up_to(layers, 1) if count is None else [count]
    return [own for own in asked if own * (site.size + layers) < layers * site.size]
