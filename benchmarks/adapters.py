"""What adapters of one size learn of another kind of text in as many steps, beside all weights and LoRA.

    python benchmarks/adapters.py [--only TEXT ...] [--steps 60] [--write]

The character model, trained on plays, is trained on the help texts of Python's own ``pydoc`` (of what it knows of their
characters), each method at 0.004 and at its best rate, found in factors of four. Ranks are those that come
nearest to the parameters of LoRA of rank 4. Shown is the loss in nats for each character of texts that it was not
trained on, after a quarter of the steps and after all, and how far the logits are from those with adapters
merged into the weights, at most, as a share of the greatest.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from benchmarks import char_gpt
from benchmarks.report import append_table, environment
from regauge.ir.graph import Graph

METHODS = {
    "LoRA": "form=lora",
    "LoRA along the inputs (EVA)": "form=lora,init=eva",
    "LoRA of first directions (PiSSA)": "form=lora,init=principal",
    "DoRA": "form=dora",
    "singular values (SVFit)": "form=svfit",
    "tensor trains (LoRETTA)": "form=tensor-train",
    "tensor trains of weights (DoTA)": "form=tensor-train,init=principal",
    "common factors (LoTR)": "form=lotr",
    "core and factors (FLoRA)": "form=tucker",
    "Kronecker sums (PHM)": "form=kronecker",
    "Kronecker sums of weights (SoKA)": "form=kronecker,init=principal",
    "common Kronecker sides (Compacter)": "form=compacter",
    "blocks (Bone)": "form=bone",
    "columns (S2FT)": "form=s2ft",
}
SMALL = "LoRA, rank 1"  # beside those that have no more parameters than about as many
FIXED = {"common Kronecker sides (Compacter)": 4}  # its rank is a number of blocks, whose parameters are as many
RATE, FASTER = 4e-3, 4.0  # what is begun with, and by how much the next rate is greater or smaller
HEADS = ["method", "rank", "trained", "a quarter, rate 0.004", "best rate", "a quarter", "all steps", "merged"]
BATCH, WINDOW, HELD_OUT, GIVEN, MOST = 4, char_gpt.CONTEXT, 64, 32, 96


class Task:
    """Windows of one text as inputs and wanted characters, [windows, WINDOW] each: for training, and held out."""

    def __init__(self, steps: int) -> None:
        self.model, self.steps = char_gpt.trained(), steps
        topics = pydoc_data.topics.topics
        text = char_gpt.as_numbers("".join(topics[name] for name in sorted(topics)))
        count = (len(text) - 1) // WINDOW
        windows = text[: count * WINDOW].view(-1, WINDOW), text[1 : count * WINDOW + 1].view(-1, WINDOW)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.held_out = [part[order[:HELD_OUT]] for part in windows]
        self.training = [part[order[HELD_OUT:]] for part in windows]
        self.graph = regauge.capture(self.model, (windows[0][:2],), dynamic={0: {0: "batch"}})

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        inputs, wanted = self.held_out
        return float(F.cross_entropy(module(inputs).flatten(0, 1), wanted.flatten()))

    def train(self, graph: Graph, rate: float) -> tuple[nn.Module, float, float]:
        """The trained module, and its loss after a quarter of the steps and after all."""
        module, early = graph.to_torch(), 0.0
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
        order = torch.randperm(len(self.training[0]), generator=torch.Generator().manual_seed(1))
        for step, batch in enumerate(order[: self.steps * BATCH].split(BATCH)):
            if step == self.steps // 4:
                early = self.loss(module)
            inputs, wanted = (part[batch] for part in self.training)
            F.cross_entropy(module(inputs).flatten(0, 1), wanted.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return module, early, self.loss(module)

    def adapted(self, options: str, rank: int) -> Graph:
        data = [(self.training[0][:GIVEN],)] if "eva" in options else None
        return regauge.optimize(self.graph, f"adapt{{{options},rank={rank}}}", data=data)

    def nearest(self, options: str, budget: int) -> int:
        """The rank whose trained parameters come nearest to a number of them."""
        start = options.replace(",init=eva", "")
        below, above = 1, MOST
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if trained(self.adapted(start, middle)) <= budget else (below, middle)
        return min((below, above), key=lambda rank: abs(trained(self.adapted(start, rank)) - budget))

    def row(self, name: str, rank: str, graph: Graph) -> list[str]:
        rate, best = RATE, self.train(graph, RATE)
        shown = [name, rank, str(trained(graph)), f"{best[1]:.3f}"]
        for factor in (FASTER, 1 / FASTER):
            while (found := self.train(graph, rate * factor))[2] < best[2]:
                rate, best = rate * factor, found
            if rate > RATE:
                break
        module, early, late = best
        shown += [f"{rate:g}", f"{early:.3f}", f"{late:.3f}"]
        if graph is self.graph:
            return [*shown, ""]
        (inputs, _), example = self.held_out, (self.held_out[0][:2],)
        again = regauge.capture(module, example, dynamic={0: {0: "batch"}})
        merged = regauge.optimize(again, "merge-adapters")
        if merged.parameters.keys() != self.graph.parameters.keys():
            raise SystemExit(f"{name}: the merged network has other parameters")
        with torch.no_grad():
            wanted = module(inputs)
            apart = float((merged.to_torch()(inputs) - wanted).abs().max() / wanted.abs().max())
        return [*shown, f"{apart:.1e}"]


def trained(graph: Graph) -> int:
    return sum(p.tensor.numel() for p in graph.all_parameters() if p.trainable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of what methods are called")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task, rows = Task(options.steps), []
    print(f"before: {task.loss(task.model):.3f}")

    def show(name: str, rank: str, graph: Graph) -> None:
        if not options.only or any(text in name for text in options.only):
            rows.append(task.row(name, rank, graph))
            print("  ".join(rows[-1]), flush=True)

    show("all weights", "", task.graph)
    show(SMALL, "1", task.adapted(METHODS["LoRA"], 1))
    budget = trained(task.adapted(METHODS["LoRA"], 4))
    for name, step in METHODS.items():
        if not options.only or any(text in name for text in options.only):
            rank = FIXED.get(name) or task.nearest(step, budget)
            show(name, str(rank), task.adapted(step, rank))
    print(environment())
    if options.write:
        note = f"`python benchmarks/adapters.py`: {options.steps} steps of {BATCH} windows of {WINDOW} characters. "
        append_table("Adapters on another kind of text", HEADS, rows, note + f"Before: {task.loss(task.model):.3f}.")


if __name__ == "__main__":
    main()
