"""What pruning without fine-tuning leaves of trained networks, beside torch-pruning.

    python benchmarks/prune.py [--write] [--networks resnet20 digits-vit classifier ...] [--examples 1000]
    python benchmarks/prune.py --scopes uniform global knapsack dp [--write] [--networks resnet20] [--examples 500]

resnet20, resnet56: trained residual networks for 32x32 images, on crops of photographs that no method saw: the share of
    images put into the class that the original puts them in, and the squared error of the logits as a share of their
    variance. By default these crops come from photographs on which nothing in Regauge was decided (scikit-image has to
    be installed; without it they are drawn anew from the halves below). ``--photographs halves`` measures on the crops
    that defaults of ``prune`` without data were chosen on: the right halves of the photographs whose left halves are
    calibrated on. ``--seed`` draws other crops of either.
digits-cnn, digits-vit: a convolutional network and a vision transformer trained on scikit-learn's digits: accuracy on
    test images, mean and least over ``--seeds`` trainings.
classifier: a file-type classifier, ONNX to ONNX, in onnxruntime (prune_onnx.py).
shortcuts: are residual networks with zero-padded shortcuts their masked originals? (prune_shortcuts.py)

The peer's row is the best of what prune_peer.py tries. ``left`` is the share of multiply-accumulates that is left.
With ``--scopes`` ways to weigh Dims against one another are compared, all by distortion and refitted. On a machine that
others use, ``--no-seconds`` leaves times out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import prune_onnx, prune_shortcuts
from benchmarks.cifar_resnet import has_fresh_photographs
from benchmarks.prune_networks import Network, on_digits, residual
from benchmarks.prune_peer import best_of_peer
from benchmarks.report import append_table, environment
from regauge.ir.cost import figures

SHARES = (0.7, 0.5)
OURS = {
    "l2 masked": ("score=l2,compensate=false", False),
    "no data": ("", False),
    "distortion, masked": ("compensate=false", True),
    "l2, refitted": ("score=l2", True),
    "with data": ("", True),
}
SCOPES = ("uniform", "isomorphic", "global", "knapsack", "dp")
RESIDUAL = {"resnet20": 20, "resnet56": 56}
DIGITS = {"digits-cnn": "convolutional", "digits-vit": "transformer"}
NETWORKS = [*RESIDUAL, *DIGITS, "classifier", "shortcuts"]
Found = tuple[tuple[float, ...], float, float]  # what the judge says, the share of MACs left, seconds


def methods(network: Network, share: float) -> Iterator[tuple[str, Callable[[], tuple[tuple[float, ...], float]]]]:
    """Name of the method, and a function that gives what the judge says and the share of MACs left."""

    def peer() -> tuple[tuple[float, ...], float]:
        return best_of_peer(network.model, share, network.batches, network.judge, network.ignored, network.labels)

    def ours(options: str, with_data: bool) -> tuple[tuple[float, ...], float]:
        data = [(batch,) for batch in network.batches] if with_data else None
        small = regauge.optimize(network.graph, f"prune{{macs={share}{',' if options else ''}{options}}}", data=data)
        return network.judge(small.to_torch().eval()), figures(small).macs / figures(network.graph).macs

    yield "torch-pruning", peer
    for name, (options, with_data) in OURS.items():
        yield name, lambda options=options, with_data=with_data: ours(options, with_data)  # type: ignore[misc]


def measure(network: Network) -> dict[tuple[float, str], Found]:
    found: dict[tuple[float, str], Found] = {(1.0, "original"): (network.judge(network.model), 1.0, 0.0)}
    for share in SHARES:
        for name, method in methods(network, share):
            start = time.perf_counter()
            try:
                result, left = method()
            except RuntimeError as error:  # the peer may not take the network
                print(f"{name}: {error}", file=sys.stderr)
                continue
            found[share, name] = (result, left, time.perf_counter() - start)
            print(share, name, *(f"{value:.3f}" for value in (*result, *found[share, name][1:])), flush=True)
    return found


def table(name: str, networks: Sequence[Network], seconds: bool) -> tuple[list[str], list[list[str]]]:
    """Heads, and rows of means over networks that were trained alike."""
    several = len(networks) > 1
    heads = ["network", "MACs kept", "method", "left", networks[0].measures[0], *(["least"] if several else [])]
    heads += [*networks[0].measures[1:], *(["seconds"] if seconds else [])]
    found = [measure(network) for network in networks]
    rows = []
    for share, method in found[0]:
        results = [each[share, method] for each in found if (share, method) in each]
        firsts, *others = zip(*(result for result, _, _ in results), strict=True)
        row = [name, f"{share:.2f}", method, f"{statistics.mean(left for _, left, _ in results):.3f}"]
        row += [f"{statistics.mean(firsts):.1%}", *([f"{min(firsts):.1%}"] if several else [])]
        row += [f"{statistics.mean(values):.3f}" for values in others]
        rows.append(row + ([f"{statistics.mean(spent for _, _, spent in results):.0f}"] if seconds else []))
    return heads, rows


def measure_scopes(name: str, network: Network, scopes: Sequence[str], seconds: bool) -> list[list[str]]:
    data = [(batch,) for batch in network.batches]
    rows = []
    for share in SHARES:
        for scope in scopes:
            start = time.perf_counter()
            small = regauge.optimize(network.graph, f"prune{{macs={share},scope={scope}}}", data=data)
            spent, (same, error) = time.perf_counter() - start, network.judge(small.to_torch().eval())
            rows.append([name, f"{share:.2f}", scope, f"{same:.1%}", f"{error:.3f}"] + [f"{spent:.0f}"] * seconds)
            print("  ".join(rows[-1]), flush=True)
    return rows


def where_from(options: argparse.Namespace) -> str:
    """Of what photographs the held-out crops are."""
    if options.photographs == "halves":
        return "held-out crops of the other halves, on which defaults were chosen"
    if has_fresh_photographs():
        return "crops of other photographs (scikit-image), on which nothing was decided"
    return "crops of the other halves, drawn anew"


def section(name: str, options: argparse.Namespace) -> tuple[str, list[str], list[list[str]], str]:
    """Title, heads, rows and note of one network."""
    fresh = options.photographs == "fresh"
    if name == "classifier":
        rows = []
        for row in prune_onnx.measure(options.seed):
            rows.append(row)
            print("  ".join(row), flush=True)
        note = "152 labelled files in two halves, each judged by a network calibrated on the other; onnxruntime."
        note += " One Dim of the file can be cut. loss: mean negative log likelihood of the labels."
        return "Pruning without fine-tuning: ONNX file-type classifier", prune_onnx.HEADS, rows, note
    if name == "shortcuts":
        rows = [row for depth in RESIDUAL.values() for row in prune_shortcuts.measure(depth)]
        note = "Zero-padded shortcuts: logits on 256 crops against those of the original with zeros where entries were"
        note += " removed, float64, nothing refitted."
        return "Pruned against masked: zero-padded shortcuts", prune_shortcuts.HEADS, rows, note
    if name in RESIDUAL:
        networks = [residual(RESIDUAL[name], options.examples, options.seed, fresh=fresh)]
        note = f"{options.examples} calibration crops; 2,000 {where_from(options)}; seed {options.seed}."
    else:
        seeds = range(options.seed, options.seed + options.seeds)
        networks = [on_digits(DIGITS[name], options.examples, seed) for seed in seeds]
        note = f"{options.seeds} trainings; {len(networks[0].batches)} batches of 125 training images to calibrate on,"
        note += " whose labels only torch-pruning's Taylor criterion sees; 450 test images."
    heads, rows = table(name, networks, not options.no_seconds)
    return f"Pruning without fine-tuning: {name}", heads, rows, f"No fine-tuning. {note}"


def compare_scopes(options: argparse.Namespace) -> None:
    heads = ["network", "MACs kept", "scope", "same class", "error", *([] if options.no_seconds else ["seconds"])]
    rows = []
    for name in (name for name in options.networks if name in RESIDUAL):
        fresh = options.photographs == "fresh"
        network = residual(RESIDUAL[name], options.examples, options.seed, fresh=fresh, held_out=1000)
        rows += measure_scopes(name, network, options.scopes, not options.no_seconds)
    if options.write:
        note = (
            f"No fine-tuning; {options.examples} calibration crops; 1,000 {where_from(options)}; seed {options.seed}."
        )
        append_table("Allocation with data", heads, rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--scopes", nargs="*", choices=SCOPES)
    parser.add_argument("--seed", type=int, default=0, help="of crops, of trainings, of how files are put into halves")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings on digits")
    parser.add_argument("--photographs", choices=["fresh", "halves"], default="fresh")
    parser.add_argument("--no-seconds", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.scopes:
        compare_scopes(options)
        return
    for name in options.networks:
        title, heads, rows, note = section(name, options)
        for row in rows:
            print("  ".join(row), flush=True)
        if options.write:
            append_table(title, heads, rows, note)
    print(environment())


if __name__ == "__main__":
    main()
