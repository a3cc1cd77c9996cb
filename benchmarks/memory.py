"""Resident memory of working on half a gigabyte of external data, and of calibration on few and on many examples.

    python benchmarks/memory.py [--write] [--folder DIR] [--only files calibration]

A model of eight matrices of 4096 x 4096 (0.5 GB) is loaded, analysed and saved without a pass; then every second of
its widths is pruned to half and the result saved. Each job runs in a child process of its own; what counts is the peak
of its resident memory over what it is after the imports and a first tiny model (libraries load lazily). Without a pass
it must add less than 64 MiB; pruning must stay below 1.5 times the bytes of the weights it touches.

Calibration: an encoder of four layers, 384 wide, is quantized to 8 bits with 8 and with 512 examples of 64 tokens. The
peak of its process, libraries included, must at most double.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import append_table, environment

WIDTH, LAYERS = 4096, 8
MIB = 1 << 20
JOBS = {"load, analyse, save": ("copy", False), "prune, save": ("prune", False), "prune, save, verify": ("prune", True)}


def make_model(path: Path, width: int, layers: int) -> None:
    """A perceptron without biases, its weights written piece by piece."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    generator = np.random.default_rng(0)
    nodes, tensors, offset = [], [], 0
    with open(path.with_suffix(".data"), "wb") as data:
        for layer in range(layers):
            data.write((generator.standard_normal((width, width), dtype=np.float32) / width**0.5).tobytes())
            tensor = TensorProto(name=f"w{layer}", dims=[width, width], data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": path.with_suffix(".data").name, "offset": offset, "length": width * width * 4}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += width * width * 4
            nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
            nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer + 1}"]))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(f"h{layers}", TensorProto.FLOAT, ["batch", width])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def resident(field: str) -> int:
    """Bytes of this process that are resident now (VmRSS), or were at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


class Peak:
    """The most resident memory while it is entered, sampled every few milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident("VmRSS")
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.most = max(self.most, resident("VmRSS"))

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.most = max(self.most, resident("VmRSS"))

    @property
    def added(self) -> int:
        return self.most - self.start


def work(source: Path, target: Path, job: str, verify: bool) -> int:
    """One job; gives the bytes of the weights it touches."""
    from regauge.frontends.from_onnx import load
    from regauge.ir.dims.groups import free_groups
    from regauge.ir.dims.resize import resize

    graph = load(source)
    groups = free_groups(graph)
    assert groups
    if job == "copy":
        graph.to_onnx(target)
        return 0
    chosen = groups[::2]
    touched = {member.parameter for group in chosen for member in group.members}
    resize(graph, {group.dim: range(0, group.size, 2) for group in chosen}).to_onnx(target, verify=verify)
    return sum(p.shape[0] * p.shape[1] * 4 for p in touched)


def child(source: Path, tiny: Path, folder: Path, job: str, verify: bool) -> None:
    work(tiny, folder / "warm.onnx", job, verify)
    with Peak() as peak:
        touched = work(source, folder / "out.onnx", job, verify)
    print(json.dumps({"added": peak.added, "touched": touched}))


def measure(source: Path, tiny: Path, job: str, verify: bool) -> dict[str, int]:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        return told("--child", str(source), str(tiny), folder, job, str(int(verify)))


def told(*arguments: str) -> dict[str, int]:
    """What a child process prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def calibrate(examples: int) -> None:
    """Quantize an encoder in batches of eight; prints the peak of this process."""
    import torch

    import regauge

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    batches = [(part,) for part in torch.randn(examples, 64, 384).split(8)]
    graph = regauge.capture(model, batches[0])
    with Peak() as peak:
        regauge.optimize(graph, "quantize", data=batches)
    print(json.dumps({"most": peak.most}))


def calibration_rows() -> Iterator[list[str]]:
    few, many = (told("--calibrate", str(examples))["most"] for examples in (8, 512))
    yield [*(f"{most / MIB:.0f}" for most in (few, many)), f"{many / few:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    parser.add_argument("--only", nargs="*", default=["files", "calibration"], choices=["files", "calibration"])
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate:
        calibrate(options.calibrate)
        return 0
    if options.child:
        source, tiny, folder, job, verify = options.child
        child(Path(source), Path(tiny), Path(folder), job, verify == "1")
        return 0
    print(environment())
    passed = True
    if "files" in options.only:
        passed &= files(options.folder, options.write)
    if "calibration" in options.only:
        rows = list(calibration_rows())
        print("  ".join(rows[0]))
        passed &= float(rows[0][-1]) <= 2
        if options.write:
            append_table("Memory of calibration", ["8 examples, MiB", "512 examples, MiB", "ratio"], rows)
    return 0 if passed else 1


def files(folder: Path | None, write: bool) -> bool:
    """The jobs on external data; whether each stays below its limit."""
    rows, passed = [], True
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        source, tiny = Path(inner) / "large.onnx", Path(inner) / "tiny.onnx"
        make_model(source, WIDTH, LAYERS)
        make_model(tiny, 64, LAYERS)
        size = source.with_suffix(".data").stat().st_size
        for name, (job, verify) in JOBS.items():
            found = measure(source, tiny, job, verify)
            limit = 1.5 * found["touched"] if job == "prune" else 64 * MIB
            passed &= found["added"] < limit
            rows.append([name, *(f"{count / MIB:.0f}" for count in (size, found["touched"], found["added"], limit))])
            print("  ".join(rows[-1]))
    if write:
        heads = ["job", "file, MiB", "touched weights, MiB", "resident memory added, MiB", "limit, MiB"]
        append_table("Memory with external data", heads, rows)
    return passed


if __name__ == "__main__":
    sys.exit(main())
