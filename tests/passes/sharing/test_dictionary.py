"""Dictionaries of matrices: what is left is what the formulae of MASA say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layer_kinds import drawn, metric
from regauge.passes.factorization.problems import Problem
from regauge.passes.sharing.fitting import atoms, coefficients

LAYERS, OUTPUTS, COLUMNS = 8, 6, 10
layer: Any = None


def left(problems: list[Problem], found: torch.Tensor) -> float:
    """The sum of the errors of the layers, each as its best mixture of atoms."""
    mixtures = [torch.einsum("s,sij->ij", coefficients(p, found), found) for p in problems]
    return sum(p.error(own) * p.scale for p, own in zip(problems, mixtures, strict=True))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_atoms_without_data_are_the_principal_components_of_the_layers(count: int) -> None:
    weights = drawn(LAYERS, OUTPUTS, COLUMNS)
    problems = [Problem(layer, weight) for weight in weights]
    tail = float(torch.linalg.svdvals(weights.flatten(1))[count:].square().sum())
    found, mixtures = atoms(problems, count)
    assert left(problems, found) == pytest.approx(tail, rel=1e-8)
    off = weights - torch.einsum("ls,sij->lij", mixtures, found)
    assert float(off.square().sum()) == pytest.approx(tail, rel=1e-8)


def test_atoms_on_data_lose_least_in_the_metric_of_data() -> None:
    weights = drawn(LAYERS, OUTPUTS, COLUMNS)
    problems = [
        Problem(layer, weight, metric(COLUMNS, own), metric(OUTPUTS, own + 9)) for own, weight in enumerate(weights)
    ]
    plain, _ = atoms([Problem(layer, weight) for weight in weights], 3)
    fitted, _ = atoms(problems, 3)
    assert left(problems, fitted) < 0.7 * left(problems, plain)


def test_layers_that_are_mixtures_are_found_again() -> None:
    weights = torch.einsum("ls,sij->lij", drawn(LAYERS, 3), drawn(3, OUTPUTS, COLUMNS, seed=1))
    problems = [Problem(layer, weight) for weight in weights]
    assert left(problems, atoms(problems, 3)[0]) < 1e-20 * float(weights.square().sum())
