"""What 8 bits leave of two networks trained on digits, in onnxruntime, beside its own quantizer.

    python benchmarks/quantize_digits.py [--only digits-cnn digits-vit] [--kept FOLDER] [--write]

256 training images calibrate, 450 test images judge: decibels are 10 log10(|y|^2 / |y - y'|^2) of the logits. Times are
medians in turns, one thread: the float file over the quantized one. ``--kept`` is where trained weights are kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks.digits_networks import NETWORKS, trained
from benchmarks.quantize import theirs
from benchmarks.report import append_table, environment
from regauge.backends.run_onnxruntime import Session, latency

HEADS = ["network", "quantizer", "dB", "accuracy", "size", "speed, 1 image", "speed, 16 images"]


def rows(name: str, kept: Path | None) -> Iterator[list[str]]:
    network = trained(name, kept)
    batches = [(part,) for part in network.images[:256].split(32)]
    with tempfile.TemporaryDirectory() as folder:
        files = {tool: Path(folder) / f"{tool}.onnx" for tool in ("float", "regauge", "onnxruntime, static")}
        _export(network.model, batches[0][0], files["float"])
        graph = regauge.load(files["float"])
        regauge.optimize(graph, "quantize", data=batches).to_onnx(files["regauge"])
        theirs(files["float"], files["onnxruntime, static"], [{graph.inputs[0].name: part} for (part,) in batches])
        sessions = {tool: Session(file, threads=1) for tool, file in files.items()}
        images = network.test_images
        found = {tool: torch.cat([s.run((part,))[0] for part in images.split(50)]) for tool, s in sessions.items()}
        times = [latency(sessions, (images[:count],), repeats=60) for count in (1, 16)]
        for tool, logits in found.items():
            wanted = found["float"]
            noise = float((logits - wanted).square().sum())
            decibels = f"{10 * math.log10(float(wanted.square().sum()) / noise):.1f}" if noise else ""
            right = float((logits.argmax(1) == network.test_labels).float().mean())
            size = files["float"].stat().st_size / files[tool].stat().st_size
            speeds = [f"{t['float'] / t[tool]:.2f}" for t in times]
            yield [name, tool, decibels, f"{right:.3f}", f"{size:.2f}", *speeds]


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
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in options.only:
        for row in rows(name, options.kept):
            print("  ".join(row), flush=True)
            found.append(row)
    print(environment())
    if options.write:
        append_table("Digits in 8 bits in onnxruntime", HEADS, found)


if __name__ == "__main__":
    main()
