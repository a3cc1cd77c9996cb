"""What training that finds ranks ends with, beside factors of the same size that are trained plainly.

    python benchmarks/train_ranks.py [--networks NAME ...] [--seeds 2] [--steps 600] [--write]

Networks on scikit-learn's digits, all from the same first weights, with as many steps of one optimizer; DLRT takes
three of these for one of its own. Shown are parameters as a share of the dense network's, and of held-out digits the
share that is right and the cross-entropy, means over seeds. The last layer, of ten classes, stays whole.

dense                    trained as it is
trained, then factorized that, without further steps, at the size that Maestro found
Maestro                  full-rank factors with ordered dropout; tucker: kernels between two maps of single places
plain factors            of the same size, with one share of the greatest rank in all layers
self-guided factors      the same factors with a dense layer beside them for the first half of the steps
DLRT                     from factors of full rank, at the rate of its own that the network is listed with
plain factors, as DLRT   factors of that size
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks.merge import perceptron
from benchmarks.report import append_table, environment
from benchmarks.train_sparse import Transformer, convolutional
from regauge.demo import Digits, load_digits
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import layer_of
from regauge.training import Dlrt, OrderedDropout, SelfGuided, full_rank_factors

BATCH, RATE = 64, 3e-3
HEADS = ["network", "method", "parameters", "right", "cross-entropy"]


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    form: Literal["low-rank", "tucker"]
    penalty: float  # of Maestro
    rate: float  # of DLRT
    tolerance: float  # of DLRT


NETWORKS = {
    "perceptron": Network(lambda: perceptron(256, norms=False), "low-rank", 1e-4, 0.5, 0.1),
    "transformer": Network(Transformer, "low-rank", 1e-3, 0.1, 0.25),
    "convolutional, tucker": Network(convolutional, "tucker", 1e-3, 0.5, 0.2),
}


class Run:
    """One seed of one network: its first weights, and what every method makes of them."""

    def __init__(self, network: Network, digits: Digits, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.network, self.digits, self.steps, self.seed = network, digits, steps, seed
        self.start = self.captured(network.build())
        self.head = [layer.weight.name for node in self.start.nodes if (layer := layer_of(node)) is not None][-1]
        self.found: dict[str, tuple[float, float, float]] = {}

    def captured(self, model: nn.Module) -> Graph:
        return regauge.capture(model.eval(), (self.digits.images[:2],), dynamic={0: {0: "batch"}})

    def factors(self, share: float) -> Graph:
        return full_rank_factors(self.start, form=self.network.form, share=share, exclude=(self.head,))

    def of_size(self, parameters: int) -> Graph:
        """Factors with the greatest share of ranks that has no more parameters."""
        below, above = 0.0, 1.0
        for _ in range(8):
            middle = (below + above) / 2
            few = figures(self.factors(middle)).parameters <= parameters
            below, above = (middle, above) if few else (below, middle)
        return self.factors(max(below, 1 / 256))

    def trained(self, graph: Graph, make: Callable[[nn.Module, Graph], Any] | None = None) -> Graph:
        """A graph after all steps, with what ``make`` gives beside the optimizer."""
        model = graph.to_torch()
        graph = self.captured(model)
        beside = make(model, graph) if make is not None else None
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps)
        generator = torch.Generator().manual_seed(self.seed)
        model.train()
        for _ in range(self.steps):
            batch = torch.randint(len(self.digits.images), (BATCH,), generator=generator)
            loss = F.cross_entropy(model(self.digits.images[batch]), self.digits.labels[batch])
            (loss + beside.loss() if beside is not None else loss).backward()
            optimizer.step()
            if beside is not None:
                beside.step()
            optimizer.zero_grad()
            schedule.step()
        return self.captured(model) if beside is None else beside.finish()

    @torch.no_grad()
    def note(self, name: str, graph: Graph) -> None:
        logits = graph.to_torch().eval()(self.digits.test_images)
        right = float((logits.argmax(1) == self.digits.test_labels).float().mean())
        loss = float(F.cross_entropy(logits, self.digits.test_labels))
        self.found[name] = figures(graph).parameters / figures(self.start).parameters, right, loss
        print(name, self.seed, *(f"{value:.3f}" for value in self.found[name]), flush=True)

    def all(self) -> dict[str, tuple[float, float, float]]:
        own, half = self.network, self.steps // 2
        dense = self.trained(self.start)
        self.note("dense", dense)
        learning = 4 * self.steps // 5
        maestro = self.trained(
            self.factors(1.0), lambda m, g: OrderedDropout(m, g, learning=learning, penalty=own.penalty, tolerance=0.01)
        )
        size = figures(maestro).parameters
        self.note(
            "trained, then factorized", regauge.optimize(dense, f"factorize{{params={size},exclude={self.head}}}")
        )
        self.note("Maestro", maestro)
        self.note("plain factors", self.trained(self.of_size(size)))
        if own.form == "low-rank":
            guided = self.trained(self.of_size(size), lambda m, g: SelfGuided(m, g, learning=half, rate=RATE))
            self.note("self-guided factors", guided)
        dlrt = self.trained(
            self.factors(1.0),
            lambda m, g: Dlrt(m, g, learning=self.steps // 3 * 3, rate=own.rate, tolerance=own.tolerance),
        )
        self.note("DLRT", dlrt)
        self.note("plain factors, as DLRT", self.trained(self.of_size(figures(dlrt).parameters)))
        return self.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    digits, rows = load_digits(), []
    for name in options.networks:
        runs = [Run(NETWORKS[name], digits, options.steps, seed).all() for seed in range(options.seeds)]
        for method in runs[0]:
            means = [statistics.mean(values) for values in zip(*(run[method] for run in runs), strict=True)]
            rows.append([name, method, *(f"{mean:.{digits}f}" for mean, digits in zip(means, (2, 3, 3), strict=True))])
            print("  ".join(rows[-1]), flush=True)
    print(environment())
    if options.write:
        note = f"`python benchmarks/train_ranks.py`: {options.seeds} seeds, {options.steps} steps of {BATCH} digits."
        append_table("Ranks found while training", HEADS, rows, note)


if __name__ == "__main__":
    main()
