"""What 8 bits leave of two networks trained on digits, in onnxruntime, beside other quantizers (quantize_peers.py).

    PYTHONPATH=PEERS python benchmarks/quantize_digits.py [--only digits-cnn digits-vit] [--kept FOLDER] [--write]

256 training images calibrate, 450 test images judge: decibels are 10 log10(|y|^2 / |y - y'|^2) of the logits. Times are
of the processor, medians in turns, one thread: the float file over the quantized one. ``--kept`` is where trained
weights are kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks.digits_networks import NETWORKS, trained
from benchmarks.quantize_peers import compare
from benchmarks.report import append_table, environment

HEADS = ["network", "quantizer", "dB", "accuracy", "size", "speed, 1 image", "speed, 16 images"]
SIZE = 16  # of batches


def rows(name: str, kept: Path | None, tools: list[str]) -> Iterator[list[str]]:
    network = trained(name, kept)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        _export(network.model, network.images, path)
        image = regauge.load(path).inputs[0].name
        chosen = [{image: part} for part in network.images[:256].split(SIZE)]
        tests = [{image: part} for part in network.test_images.split(SIZE)]
        timed = [{image: network.test_images[:count]} for count in (1, SIZE)]
        transformer = name == "digits-vit"
        for row in compare(path, chosen, tests, timed, transformer=transformer, judge=network.accuracy, tools=tools):
            yield [name, *row, *[""] * (len(HEADS) - 1 - len(row))]


def _export(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """A file without the exporter's notes on its nodes, which are a fiftieth of so small a one."""
    import onnx

    regauge.capture(model, (images[:2],), dynamic={0: {0: "batch"}}).to_onnx(path)
    plain = onnx.load(path)
    for node in plain.graph.node:
        del node.metadata_props[:]
    onnx.save(plain, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--tools", nargs="*", default=["*"], help="globs on names of quantizers, of a file in 8 bits")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in options.only:
        for row in rows(name, options.kept, options.tools):
            print("  ".join(row), flush=True)
            found.append(row)
    print(environment())
    if options.write:
        append_table("Digits in 8 bits in onnxruntime", HEADS, found)


if __name__ == "__main__":
    main()
