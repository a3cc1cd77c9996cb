"""Convolutions as products at half of the multiplications: ours beside tensorly-torch's, in one process.

    python benchmarks/factorize_peer.py [--only resnet20 digits-cnn] [--examples 128] [--write]

tensorly-torch (``pip install --no-deps tensorly tensorly-torch opt_einsum``) has a factorized layer for each layer, one
share of parameters for all: that at which the network has half of its multiplications is found by halving, for forms
with kernels whole (``fixed_rank_modes="spatial"``) where there is such a thing. It takes no data; so ours is given with
and without. Judged are images that none of it saw; times are onnxruntime's of eight images, one thread, of files that
torch.onnx (theirs) and ``to_onnx`` (ours) wrote, with how many nodes reshape or permute in them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnx
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import regauge
from benchmarks import digits_networks
from benchmarks.prune_networks import Judge, residual
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure

FORMS = ("tucker", "cp", "tt")
HALF = 0.5
HALVINGS = 12
HEADS = ["network", "form", "tool", "MACs", "same class", "error", "time", "nodes", "of these reshape or permute"]
ORDER = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    graph: Any
    batches: list[torch.Tensor]
    judge: Judge


def cases(only: list[str], examples: int) -> Iterator[Case]:
    if not only or "digits-cnn" in only:
        network = digits_networks.trained("digits-cnn")
        graph = regauge.capture(network.model, (network.images[:2],), dynamic={0: {0: "batch"}})
        batches = [*network.images[:examples].split(64)]
        yield Case("digits-cnn", network.model, graph, batches, Judge(network.model, network.test_images))
    if not only or "resnet20" in only:
        own = residual(20, examples, 0)
        assert isinstance(own.judge, Judge)
        yield Case("resnet20", own.model, own.graph, [*own.batches], own.judge)


def factorized(model: nn.Module, form: str, share: float, *, fitted: bool = True) -> nn.Module:
    """A copy whose convolutions of several places are the peer's layers, fitted to the weights or not."""
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")
    found = copy.deepcopy(model)
    whole = {"fixed_rank_modes": "spatial"} if form == "tucker" else {}
    for parent in [*found.modules()]:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                own = tltorch.FactorizedConv.from_conv(
                    layer, rank=share, factorization=form, implementation="factorized", decompose_weights=fitted,
                    **whole,
                )  # fmt: skip
                setattr(parent, name, own)
    return found.eval()


def products(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def peers(case: Case, form: str) -> nn.Module:
    """The peer's network with at most half of the multiplications."""
    x = case.batches[0][:1]
    whole, low, high = products(case.model, x), 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = products(factorized(case.model, form, middle, fitted=False), x) <= HALF * whole
        low, high = (middle, high) if fits else (low, middle)
    return factorized(case.model, form, low)


def rows(case: Case) -> Iterator[list[str]]:
    x = case.batches[0][:8]
    whole = products(case.model, x[:1])
    for form in FORMS:
        step = f"factorize{{macs={HALF},form={form}}}"
        data = [(part,) for part in case.batches]
        every: dict[str, Any] = {
            "tensorly-torch": peers(case, form),
            "regauge, without data": regauge.optimize(case.graph, step),
            "regauge": regauge.optimize(case.graph, step, data=data),
        }
        with tempfile.TemporaryDirectory() as folder:
            files = {name: _written(found, x, Path(folder) / f"{name}.onnx") for name, found in every.items()}
            plain = case.graph.to_onnx(Path(folder) / "plain.onnx")
            timings = measure([regauge.load(file) for file in (plain, *files.values())], (x,))
            for (name, found), timing in zip(every.items(), timings[1:], strict=True):
                module = found if isinstance(found, nn.Module) else found.to_torch().eval()
                same, error = case.judge(module)
                nodes = [node.op_type for node in onnx.load(files[name]).graph.node]
                shape = sum(node in ORDER for node in nodes) - sum(node in ORDER for node in _nodes(plain))
                yield [
                    case.name, form, name, f"{products(module, x[:1]) / whole:.2f}", f"{same:.3f}", f"{error:.3f}",
                    f"{timing.milliseconds / timings[0].milliseconds:.2f}", str(len(nodes)), str(shape),
                ]  # fmt: skip


def _nodes(path: Any) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def _written(found: Any, x: torch.Tensor, path: Path) -> Path:
    if isinstance(found, nn.Module):
        torch.onnx.export(found, (x,), str(path), dynamo=True, verbose=False)
    else:
        found.to_onnx(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the peer's CP starts from random numbers
    found = []
    for case in cases(options.only, options.examples):
        for row in rows(case):
            print("  ".join(row), flush=True)
            found.append(row)
    print(environment())
    if options.write:
        append_table("Factorized convolutions beside tensorly-torch, no fine-tuning", HEADS, found, _note(options))


def _note(options: argparse.Namespace) -> str:
    return f"`python benchmarks/factorize_peer.py --examples {options.examples}`."


if __name__ == "__main__":
    main()
