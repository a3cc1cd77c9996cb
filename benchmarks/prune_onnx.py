"""A file-type classifier pruned from ONNX to ONNX and measured in onnxruntime, on labelled files.

The files are put into two halves. With data the classifier is calibrated on one half, without labels, and measured on
the other, and the other way round: each file is judged by a network that was not calibrated on it. Shown are the share
of files whose label is found, the share put into the class that the original puts them in, and the mean negative log
likelihood of the labels. torch-pruning reads no ONNX; it is given the torch source that Regauge makes of the file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import regauge
from benchmarks.prune_peer import best_of_peer
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures

CORPUS = Path(__file__).resolve().parent.parent.parent / "shared" / "corpus"
FILE = CORPUS / "onnx" / "magika_standard_v2_1.onnx"
DATA = CORPUS / "data" / "magika_standard_v2_1_inputs.npz"
BUDGETS = [(unit, share) for unit in ("params", "macs") for share in (0.7, 0.5)]
METHODS = {
    "l2 masked": ("score=l2,compensate=false", False),
    "no data": ("", False),
    "with data": ("", True),
}
HEADS = ["network", "kept", "method", "params left", "MACs left", "top-1", "same class", "loss"]
BATCH = 19  # files in one run: each becomes 4,096 vectors of 257 numbers


class Files:
    """Bytes i32[152,4096], classes i64[152], and for each half (calibration, evaluation) indices."""

    def __init__(self, seed: int) -> None:
        with np.load(DATA) as data:
            self.bytes = data["bytes"].astype(np.int32)
            number = {name: index for index, name in enumerate(data["classes"].tolist())}
            self.classes = np.array([number[label] for label in data["label"].tolist()])
        order = np.random.default_rng(seed).permutation(len(self.classes))
        first, second = np.array_split(order, 2)
        self.halves = [(first, second), (second, first)]

    def batches(self, indices: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(self.bytes[part]) for part in np.split(indices, range(BATCH, len(indices), BATCH))]


class Judge:
    def __init__(self, files: Files) -> None:
        self.files = files
        self.everything = np.arange(len(files.classes))
        self.original = self.run(FILE, self.everything).argmax(1)

    def run(self, path: Path, indices: np.ndarray) -> np.ndarray:
        """Probabilities [files, classes], by onnxruntime."""
        session = Session(path)
        return np.concatenate([session.run([batch])[0].numpy() for batch in self.files.batches(indices)])

    def __call__(self, indices: np.ndarray, probabilities: np.ndarray) -> tuple[float, float, float]:
        labels, found = self.files.classes[indices], probabilities.argmax(1)
        likelihood = probabilities[np.arange(len(labels)), labels].clip(min=1e-12)
        top1, same = float((found == labels).mean()), float((found == self.original[indices]).mean())
        return top1, same, float(-np.log(likelihood).mean())


def measure(seed: int) -> Iterator[list[str]]:
    files = Files(seed)
    judge = Judge(files)
    graph = regauge.load(FILE)
    whole = judge(judge.everything, judge.run(FILE, judge.everything))
    yield _row("original", "", (1.0, 1.0), whole)
    for unit, share in BUDGETS:
        kept = f"{share:.2f} of {'MACs' if unit == 'macs' else unit}"
        if unit == "macs":
            yield [FILE.stem, kept, "torch-pruning", "", "", _peer(graph, files, share), "", ""]
        for method, (options, with_data) in METHODS.items():
            pipeline = f"prune{{{unit}={share}{',' if options else ''}{options}}}"
            runs = files.halves if with_data else [(None, judge.everything)]
            indices = np.concatenate([rest for _, rest in runs])
            pruned = [_pruned(graph, pipeline, judge, calibration, rest) for calibration, rest in runs]
            probabilities = np.concatenate([found for found, _ in pruned])
            yield _row(method, kept, pruned[0][1], judge(indices, probabilities))


def _row(method: str, kept: str, left: tuple[float, float], found: tuple[float, float, float]) -> list[str]:
    top1, same, loss = found
    return [FILE.stem, kept, method, f"{left[0]:.3f}", f"{left[1]:.3f}", f"{top1:.1%}", f"{same:.1%}", f"{loss:.3f}"]


def _pruned(
    graph: Any, pipeline: str, judge: Judge, calibration: np.ndarray | None, rest: np.ndarray
) -> tuple[np.ndarray, tuple[float, float]]:
    """Probabilities of the pruned file, and the shares of parameters and MACs it has."""
    data = None if calibration is None else [(batch,) for batch in judge.files.batches(calibration)]
    small = regauge.optimize(graph, pipeline, data=data)
    before, after = figures(graph), figures(small)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        small.to_onnx(path)
        found = judge.run(path, rest)
    return found, (after.parameters / before.parameters, after.macs / before.macs)


def _peer(graph: Any, files: Files, share: float) -> str:
    """What torch-pruning makes of our torch source, as exported and with whole operators put together."""
    batches = files.batches(files.halves[0][0])

    def top1(model: Any) -> tuple[float, ...]:
        with torch.no_grad():
            found = np.concatenate([model(batch).argmax(1).numpy() for batch in files.batches(files.halves[0][1])])
        return (float((found == files.classes[files.halves[0][1]]).mean()),)

    reasons = []
    for source in (graph, regauge.optimize(graph, "simplify{assemble=always}")):
        try:
            found, left = best_of_peer(source.to_torch().eval(), share, batches, top1, [lambda model: []])
            return f"{found[0]:.1%} at {left:.2f}, on our torch source"
        except Exception as error:  # the peer raises what it meets
            reasons.append(str(error))
    print("\n".join(reasons), file=sys.stderr)
    return f"reads no ONNX; of our torch source: {reasons[-1][:70]}"
