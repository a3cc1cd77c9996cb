"""Training that goes on from a checkpoint ends where training in one go does, to the last bit."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from digits_training import captured, convolutional, train
from regauge.training import Cric, GradualWeights, NMSparsity, SparseMomentum, Target

MAKE: dict[str, Callable[[Any, Any], Any]] = {
    "unstructured": lambda m, g: GradualWeights(m, g, 0.8, every=3, updates=6),
    "pattern": lambda m, g: GradualWeights(m, g, pattern=(1, 4), every=3, updates=6),
    "cric in a cycle": lambda m, g: Cric(
        m, g, Target(ratio=0.5), warmup=2, sampling_steps=5, cycles=2, period_steps=6, tolerance=0
    ),
    "cric in the decay": lambda m, g: Cric(
        m, g, Target(ratio=0.5), warmup=0, sampling_steps=3, cycles=2, period_steps=10, tolerance=0
    ),
    "mask decay": lambda m, g: NMSparsity(m, g, recipe="exponential", steps=15),
    "sr-ste fixed": lambda m, g: NMSparsity(m, g, freeze_at=5),
    "sparse momentum": lambda m, g: SparseMomentum(m, g, 0.4, every=4, moves=4),
}


@pytest.mark.parametrize("kind", MAKE)
def test_training_goes_on_where_it_was(kind: str) -> None:
    graph = captured(convolutional())

    def fresh() -> tuple[Any, Any, Any]:
        model = convolutional()
        return model, MAKE[kind](model, graph), torch.optim.Adam(model.parameters(), lr=3e-3)

    model, sparsifier, optimizer = fresh()
    train(model, 9, sparsifier, optimizer=optimizer)
    saved = [written(part.state_dict()) for part in (model, sparsifier, optimizer)]
    train(model, 12, sparsifier, optimizer=optimizer, seed=1)
    again, resumed, other = fresh()
    for part, file in zip((again, resumed, other), saved, strict=True):
        part.load_state_dict(torch.load(file, weights_only=True))
    train(again, 12, resumed, optimizer=other, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    ours, theirs = (part.finish().parameters for part in (sparsifier, resumed))
    assert all(torch.equal(ours[name].tensor, theirs[name].tensor) for name in ours)


def written(state: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
