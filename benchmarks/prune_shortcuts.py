"""Is a residual network with zero-padded shortcuts, pruned, its masked original? In float64, to the last bits.

The shortcuts of the networks for 32x32 images pass 16 channels into the middle of 32, and these into the middle of 64.
Removed are shares of all Dims without refitting; the logits are held to those of the original with zeros where entries
were removed. Which were is found by value (mask_oracle.py), for which weights get noise of 1e-9 that makes them unique.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import regauge
from benchmarks.cifar_resnet import fresh_crops, trained
from benchmarks.mask_oracle import mask_parameters
from benchmarks.prune_networks import beside_shortcuts

HEADS = ["network", "ratio", "tool", "parameters left", "largest difference", "of logits up to"]
RATIOS = (0.25, 0.5)


def distinct(model: nn.Module) -> nn.Module:
    """The model in float64 with no two weights alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.double().parameters():
        parameter.data.add_(1e-9 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def ours(model: nn.Module, ratio: float) -> nn.Module:
    example = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    graph = regauge.capture(model, (example,), dynamic={0: {0: "batch"}})
    return regauge.optimize(graph, f"prune{{ratio={ratio},compensate=false}}").to_torch().eval()


def peer(model: nn.Module, ratio: float, criterion: str, ignored: Callable[[nn.Module], list[nn.Module]]) -> nn.Module:
    import torch_pruning as tp

    importance: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "random": lambda: tp.importance.RandomImportance(),
    }
    trial = copy.deepcopy(model)
    example = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    tp.pruner.MagnitudePruner(
        trial, example, importance=importance[criterion](), pruning_ratio=ratio, ignored_layers=ignored(trial)
    ).step()
    return trial


def _head(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule("linear")]


TOOLS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "regauge": ours,
    "torch-pruning, magnitude": lambda model, ratio: peer(model, ratio, "magnitude", _head),
    "torch-pruning, random": lambda model, ratio: peer(model, ratio, "random", _head),
    "torch-pruning, inside blocks only": lambda model, ratio: peer(model, ratio, "magnitude", beside_shortcuts),
}


@torch.no_grad()
def difference(model: nn.Module, pruned: nn.Module, images: torch.Tensor) -> tuple[str, str]:
    """The largest difference of logits between ``pruned`` and the masked ``model``, and the largest logit."""
    masked = copy.deepcopy(model)
    strange = mask_parameters(masked, pruned)
    expected = masked(images)
    text = f"{float((pruned(images) - expected).abs().max()):.1e}"
    text += f"; {len(strange)} parameters are no part of the original" if strange else ""
    return text, f"{float(expected.abs().max()):.1f}"


def measure(depth: int) -> list[list[str]]:
    model = distinct(trained(depth))
    images = fresh_crops(256).double()
    whole = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for ratio in RATIOS:
        for tool, prune in TOOLS.items():
            try:
                pruned = prune(model, ratio)
                left = f"{sum(parameter.numel() for parameter in pruned.parameters()) / whole:.3f}"
                found = (left, *difference(model, pruned, images))
            except Exception as error:  # the peer raises what it meets
                found = ("", f"{type(error).__name__}: {error}".splitlines()[0][:80], "")
            rows.append([f"resnet{depth}", f"{ratio:.2f}", tool, *found])
            print("  ".join(rows[-1]), flush=True)
    return rows
