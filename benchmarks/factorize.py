"""What factorization leaves of trained networks, with and without data, beside plain singular values.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/factorize.py [--only NAME ...] [--examples 128] [--cifar FOLDER] [--write]

char_gpt    perplexity with its linear layers at 0.8 and 0.6 of their parameters
heads       perplexity with fewer directions in each head of attention (without data, by norms alone), and with parts of
            the parameters, canonicalized before and not
resnet*     share of crops in the same class at half of the multiplications, of photographs that nothing saw, and of the
            other halves of those that it is calibrated on; ranks in blocks of 16, too;
            --vary changes the colours and the light of half of those that it is calibrated on;
            --cifar FOLDER calibrates on images that the network was trained on instead, and judges on 3,000 of the
            test: share in the same class, and share that is right (in brackets the network's own)
digits-cnn  the same of the digits' test images
time        onnxruntime's for one batch, of the whole network's; medians in turns, one thread

    python benchmarks/factorize.py --forms [NAME ...] [--examples 64] [--alone] [--write]

compares forms of linear layers by char_gpt: for the layers of its second block at half of their parameters what is
lost of their outputs, weighed as the pass does, with factors of weights alone and with those of data; and perplexity,
unless ``--alone`` leaves it out, which takes most of the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt, cifar_resnet, digits_networks
from benchmarks.prune_networks import Judge, residual
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import layer_of
from regauge.passes.factorization.catalog import FORMS, UNASKED
from regauge.passes.factorization.forms import Form
from regauge.passes.factorization.on_data import Sensitivity, problems_on_data
from regauge.passes.factorization.problems import Problem

HALVES = {"0.5 of MACs": "factorize{macs=0.5}", "0.5 of MACs, blocks of 16": "factorize{macs=0.5,multiple=16}"}
TEST_IMAGES = 3000
FORM_TITLE = "Forms of linear layers, char_gpt, no fine-tuning"
FORM_HEADS = ["form", "lost without data", "lost", "0.8 of linear layers", "MACs", "0.6 of linear layers", "MACs"]
HEADS = ["network", "kept", "parameters", "MACs", "without data", "with data", "time"]
OF_HEADS = ["char_gpt", "before", "parameters", "without data", "with data"]


def characters(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    own = sum(layer.outputs * layer.columns for layer in layers)
    for share in (0.8, 0.6):
        step = f"factorize{{params={round(figures(graph).parameters - (1 - share) * own)}}}"
        yield _row("char_gpt", f"{share} of linear layers", graph, step, batches, _perplexity, (windows[:8],))


def heads(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    dims = ",".join(f"blocks.{block}.qkv.weight:0.{place}" for block in range(char_gpt.BLOCKS) for place in (1, 5))
    parts = {f"{1 - ratio:g} of heads": f"ratio={ratio},include=[{dims}]" for ratio in (0.25, 0.5, 0.75)}
    parts |= {f"{share} of parameters": f"params={share}" for share in (0.8, 0.6)}
    for name, what in parts.items():
        alone = f"{what},score=l2,compensate=false" if "include" in what else what
        for first in ("", "canonicalize,"):
            found = regauge.optimize(graph, f"{first}prune{{{what}}}", data=batches)
            share = f"{figures(found).parameters / figures(graph).parameters:.2f}"
            without = regauge.optimize(graph, f"{first}prune{{{alone}}}")
            yield [name, first.strip(",") or "as they are", share, _perplexity(without), _perplexity(found)]


def of_forms(examples: int, forms: Sequence[str], alone: bool) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    some = [layer for layer in layers if layer.weight.name.startswith("blocks.1.")]
    sensitivity = Sensitivity.of(graph, some, batches, 0)
    problems = [problem for (problem,) in problems_on_data(graph, some, batches, sensitivity)]
    own = sum(layer.outputs * layer.columns for layer in layers)
    for name in forms:
        errors = [_errors_at_half(FORMS[name], problem, graph) for problem in problems]
        lost = [f"{sum(column) / len(column):.4f}" for column in zip(*errors, strict=True)]
        shown = []
        for share in () if alone else (0.8, 0.6):
            budget = round(figures(graph).parameters - (1 - share) * own)
            found = regauge.optimize(graph, f"factorize{{params={budget},form={name}}}", data=batches)
            shown += [_perplexity(found), f"{figures(found).macs / figures(graph).macs:.2f}"]
        yield [name, *lost, *(shown or [""] * 4)]


def _errors_at_half(form: Form, problem: Problem, graph: Graph) -> tuple[float, float]:
    """What is lost of all that there is to lose, without and with data."""
    whole = problem.error(torch.zeros_like(problem.weight))
    alone = Problem(problem.layer, problem.weight)
    found = []
    for given in (alone, problem):
        choices = [own for own in form.choices(given, graph, 1) if own.parameters <= 0.5 * problem.weight.numel()]
        best = min(choices, key=lambda choice: choice.loss)
        found.append(problem.error(form.links(given, best.numbers)[1]) / whole)
    return found[0], found[1]


def images(depth: int, examples: int, vary: bool) -> Iterator[list[str]]:
    network = residual(depth, examples, 0)
    given = torch.cat([*network.batches])
    if vary:
        given = torch.cat([given[: examples // 2], cifar_resnet.varied(given[examples // 2 :], seed=3)])

    beside = Judge(network.model, cifar_resnet.crops(1000, held_out=True, seed=1))

    def judge(found: Any) -> str:
        module = found.to_torch().eval()
        return f"{network.judge(module)[0]:.3f}, {beside(module)[0]:.3f}"

    batches = [(part,) for part in given.split(128)]
    for kept, step in HALVES.items():
        yield _row(f"resnet{depth}", kept, network.graph, step, batches, judge, (network.batches[0][:8],))


def of_training_data(depth: int, examples: int, folder: Path) -> Iterator[list[str]]:
    """Like :func:`images`, on the data set that the networks were trained on."""
    model = cifar_resnet.trained(depth)
    test, labels = cifar_resnet.cifar(folder, "test_batch", TEST_IMAGES)
    same, right = Judge(model, test), Judge(model, test, labels)
    own = right(model)[0]

    def judge(found: Any) -> str:
        module = found.to_torch().eval()
        return f"{same(module)[0]:.3f}, {right(module)[0]:.3f} ({own:.3f})"

    graph = regauge.capture(model, (test[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in cifar_resnet.cifar(folder, "data_batch_1", examples)[0].split(125)]
    for kept, step in HALVES.items():
        yield _row(f"resnet{depth}, its own data", kept, graph, step, batches, judge, (test[:8],))


def digits(examples: int) -> Iterator[list[str]]:
    network = digits_networks.trained("digits-cnn")
    graph = regauge.capture(network.model, (network.images[:2],), dynamic={0: {0: "batch"}})
    whole = Judge(network.model, network.test_images)

    def judge(found: Any) -> str:
        return f"{whole(found.to_torch().eval())[0]:.3f}"

    batches = [(part,) for part in network.images[:examples].split(64)]
    for kept, step in HALVES.items():
        yield _row("digits-cnn", kept, graph, step, batches, judge, (network.images[:8],))


def _perplexity(found: Any) -> str:
    return f"{char_gpt.perplexity(found.to_torch().eval()):.3f}"


def _row(
    name: str, kept: str, graph: Any, step: str, batches: Any, judge: Callable[[Any], str], inputs: Any
) -> list[str]:
    alone, found = regauge.optimize(graph, step), regauge.optimize(graph, step, data=batches)
    before, after = figures(graph), figures(found)
    with tempfile.TemporaryDirectory() as folder:
        files = [own.to_onnx(Path(folder) / f"{place}.onnx") for place, own in enumerate((graph, found))]
        whole, small = (timing.milliseconds for timing in measure([regauge.load(file) for file in files], inputs))
    shares = f"{after.parameters / before.parameters:.2f}", f"{after.macs / before.macs:.2f}"
    return [name, kept, *shares, judge(alone), judge(found), f"{small / whole:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--forms", nargs="*", help="compare these forms of linear layers instead; all if none is named")
    parser.add_argument("--alone", action="store_true", help="with --forms: what single layers lose, no perplexity")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--vary", action="store_true", help="change colours and light of half of the photographs")
    parser.add_argument("--cifar", type=Path, help="a folder of CIFAR-10, binary version, for the residual networks")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.forms is not None:
        names = options.forms or ["low-rank", *(name for name in FORMS if name not in UNASKED)]
        _shown(of_forms(options.examples, names, options.alone), FORM_TITLE, FORM_HEADS, options)
        return

    def residual_rows(depth: int) -> Iterator[list[str]]:
        if options.cifar:
            return of_training_data(depth, options.examples, options.cifar)
        return images(depth, options.examples, options.vary)

    parts: dict[str, Callable[[], Iterator[list[str]]]] = {
        "char_gpt": lambda: characters(options.examples),
        "resnet20": lambda: residual_rows(20),
        "resnet56": lambda: residual_rows(56),
        "digits-cnn": lambda: digits(options.examples),
    }

    def chosen() -> Iterator[list[str]]:
        for name, part in parts.items():
            if not options.only or name in options.only:
                yield from part()

    _shown(chosen(), "Layers as products of smaller ones, no fine-tuning", HEADS, options)
    if not options.only or "heads" in options.only:
        _shown(heads(options.examples), "Fewer directions in heads of attention, no fine-tuning", OF_HEADS, options)


def _shown(found: Iterator[list[str]], title: str, heads: list[str], options: argparse.Namespace) -> None:
    rows = []
    for row in found:
        print("  ".join(row), flush=True)
        rows.append(row)
    print(environment())
    if options.write and rows:
        append_table(title, heads, rows, f"{options.examples} examples.")


if __name__ == "__main__":
    main()
