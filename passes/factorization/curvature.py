"""What a change of one factor of a network costs, roughly, so that conjugate gradients on it take few steps.

Between the other factors one maps a state, the features after the steps before it, to another. The curvature of the
error in it is nearly the product of two metrics for each index of its batch: that of what it contracts, which the steps
before make of the metric of inputs, and that of what it makes, which the steps behind make of the metric of outputs.
Where no axes are rows and there is no batch it is just that, and one step is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.passes.factorization.least_squares import Divided, divided_by
from regauge.passes.factorization.networks import Network, Sizes, Step, count
from regauge.passes.factorization.problems import Problem


def inverse_curvature(
    network: Network, problem: Problem, sizes: Sizes, factors: Sequence[torch.Tensor], place: int
) -> Divided:
    """What divides a gradient of a factor, with the axes of its letters, by the curvature."""
    steps = network.steps(sizes)
    (number,) = [number for number, step in enumerate(steps) if step.place == place]
    step = steps[number]
    sides = []
    for own, side, others, metric in (
        (step.contracted, network.inputs, steps[:number], problem.inputs),
        (step.made, network.outputs, steps[number + 1 :], problem.outputs),
    ):
        between = _map(network, sizes, factors, others, f"{step.batch}{step.rows}{own}", side)
        between = between.reshape(*(count(axes, sizes) for axes in (step.batch, step.rows, own)), -1)
        image = between if metric is None else between @ metric
        sides.append(torch.einsum("brcn,brdn->bcd", image, between))
    read, made = sides
    by_metrics = divided_by(made, read)
    order = step.batch + step.made + step.contracted
    shape = [count(axes, sizes) for axes in (step.batch, step.made, step.contracted)]

    def divided(gradient: torch.Tensor) -> torch.Tensor:
        grid = torch.einsum(f"{network.factors[place]}->{order}", gradient)
        found = by_metrics(grid.reshape(shape)).reshape(grid.shape)
        return torch.einsum(f"{order}->{network.factors[place]}", found)

    return divided


def _map(
    network: Network, sizes: Sizes, factors: Sequence[torch.Tensor], steps: Sequence[Step], state: str, side: str
) -> torch.Tensor:
    """The steps between a state and a side of the matrix, with the axes of both; those of the side are in capitals."""
    terms = [*(network.factors[step.place] for step in steps), *(axis + axis.upper() for axis in side)]
    eyes = [torch.eye(sizes[axis], dtype=torch.float64) for axis in side]
    return torch.einsum(f"{','.join(terms)}->{state}{side.upper()}", *(factors[step.place] for step in steps), *eyes)
