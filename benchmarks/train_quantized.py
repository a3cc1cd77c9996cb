"""What training is worth to networks in few bits: before it, and after a few hundred steps by each method.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/train_quantized.py [--only NAME ...] [--schemes w2 ...] [--write]

char_gpt is judged by perplexity, and trained on windows of the text that it learned from; a residual network by the
share of photograph crops that stay in their class, and trained on other crops against what it gave in float.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks import char_gpt, cifar_resnet
from benchmarks.prune_networks import residual
from benchmarks.report import append_table, environment
from regauge import training

HEADS = ["network", "scheme", "method", "before", "after"]
RATE, CALIBRATION = 5e-4, 128
DISTILLED = 0.3  # share of the labels in the loss where the rest is distillation
Method = Callable[["Network", str], Any]


@dataclass(frozen=True)
class Network:
    """A trained network with its graph, what it is calibrated and trained on, its loss and its judge."""

    model: nn.Module
    graph: Any
    data: list[torch.Tensor]
    batches: Callable[[int], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None  # of logits and inputs; None without labels
    judge: Callable[[nn.Module], float]
    steps: int

    def train(self, module: nn.Module, after: Callable[[int], None], share: float = 1.0) -> None:
        """``share`` is that of the labels in the loss, the rest is distillation: all of it where there are none."""
        distil = training.Distillation(self.model, module, logits=1 - share if self.loss else 1.0)
        optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        module.train()
        for step in range(self.steps):
            x = self.batches(step)
            logits = module(x)
            total = share * self.loss(logits, x) if self.loss else torch.zeros(())
            if share < 1 or not self.loss:
                total = total + distil(logits, x)
            total.backward()
            optimizer.step()
            after(step)
            optimizer.zero_grad()
            schedule.step()
        distil.remove()
        module.eval()


def characters(steps: int) -> Network:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(4096, seed=1)

    def loss(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    return Network(
        model,
        regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}}),
        list(char_gpt.calibration_windows(CALIBRATION).split(32)),
        lambda step: windows[16 * step % 4096 :][:16],
        loss,
        char_gpt.perplexity,
        steps,
    )


def images(steps: int) -> Network:
    network = residual(20, 2 * CALIBRATION, 0)
    crops = cifar_resnet.crops(4096, held_out=False, seed=1)
    return Network(
        network.model,
        network.graph,
        list(network.batches),
        lambda step: crops[32 * step % 4096 :][:32],
        None,
        lambda module: network.judge(module)[0],
        steps,
    )


def quantized(
    *, on_data: bool = True, share: float = 1.0, anneal: bool = False, products: bool = False, **options: Any
) -> Method:
    """Training with fake quantization; ``products`` of queries and keys are quantized in place of these.

    Where it is ``partial`` half, three quarters and seven eighths of the weights are frozen on the way.
    """

    def run(network: Network, scheme: str) -> tuple[float, float]:
        data = network.data if on_data else None
        graph = training.query_key_products(network.graph) if products else network.graph
        qat = training.Qat(graph, scheme, data=data, target="reference", **options)
        before = network.judge(qat.finish().to_torch())

        def after(step: int) -> None:
            if anneal and step == 4 * network.steps // 5:
                qat.anneal()
            if options.get("partial") and step in (rounds := [n * network.steps // 8 for n in (3, 5, 7)]):
                qat.freeze((0.5, 0.75, 0.875)[rounds.index(step)])
            qat.step()

        network.train(qat.module, after, share)
        return before, network.judge(qat.finish().to_torch())

    return run


def levels(network: Network, scheme: str) -> tuple[float, float]:
    """Differentiable quantization of weights alone."""
    found = training.LearnedLevels(network.graph, int(scheme[1]))
    before = network.judge(found.finish().to_torch())
    network.train(found.module, lambda step: None)
    return before, network.judge(found.finish().to_torch())


def sparse_first(network: Network, scheme: str) -> tuple[float, float]:
    """2:4 and then integers, both learnt under distillation; the steps are shared out."""
    half = replace(network, steps=network.steps // 2)
    model = copy.deepcopy(network.model)
    sparsifier = training.NMSparsity(model, network.graph)
    half.train(model, lambda step: sparsifier.step(), DISTILLED)
    options: dict[str, Any] = {} if scheme.endswith("a8") else {"symmetric": True}
    sparse = sparsifier.finish()
    qat = training.Qat(sparse, scheme, data=network.data, target="reference", keep_zeros=True, **options)
    before = network.judge(qat.finish().to_torch())
    half.train(qat.module, lambda step: qat.step(), DISTILLED)
    return before, network.judge(qat.finish().to_torch())


METHODS: dict[str, Method] = {
    "learned scales, from nearest codes": quantized(on_data=False),
    "learned scales, from codes chosen on data": quantized(),
    "fixed scales, from codes chosen on data": quantized(scales="fixed"),
    "fixed scales, salient weights frozen in rounds": quantized(scales="fixed", partial=True),
    "StatsQ": quantized(scales="statistics"),
    "StatsQ, then CGA": quantized(scales="statistics", anneal=True),
    "StatsQ with QKR": quantized(scales="statistics", products=True),
    "quantized distillation": quantized(share=DISTILLED),
    "differentiable levels": levels,
    "2:4, then integers, distilled": sparse_first,
}

WEIGHTS_ALONE = (METHODS["learned scales, from nearest codes"], levels)


def measure(only: list[str], schemes: list[str], chosen: list[str], steps: int) -> Iterator[list[str]]:
    networks = {"char_gpt": characters, "resnet20": images}
    for name, build in networks.items():
        if only and name not in only:
            continue
        network = build(steps)
        yield [name, "float", "", "", f"{network.judge(network.model):.3f}"]
        for scheme in schemes:
            for method, run in METHODS.items():
                if chosen and method not in chosen:
                    continue
                if method == "quantized distillation" and network.loss is None:
                    continue  # without labels all are distilled
                if method == "StatsQ with QKR" and not any(node.op == "attention" for node in network.graph.nodes):
                    continue
                if run in WEIGHTS_ALONE and scheme.endswith("a8"):
                    continue
                before, after = run(network, scheme)
                yield [name, scheme, method, f"{before:.3f}", f"{after:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--schemes", nargs="*", default=["w2"])
    parser.add_argument("--methods", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for row in measure(options.only, options.schemes, options.methods, options.steps):
        print("  ".join(row), flush=True)
        rows.append(row)
    print(environment())
    if options.write:
        note = (
            f"{options.steps} steps of Adam at {RATE:g}, of 16 windows of text or 32 crops. Perplexity of char_gpt; "
            "share of 2,000 photograph crops that stay in their class. before: without training."
        )
        append_table("Training in few bits", HEADS, rows, note)


if __name__ == "__main__":
    main()
