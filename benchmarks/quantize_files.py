"""What quantization leaves of real ONNX files, judged by what they are for, beside onnxruntime's own quantizer.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/quantize_files.py [--only NAME ...] [--write]

file types       share of right answers on labelled files, by networks calibrated on the other half of them
face detectors   faces of scikit-image's data, pasted into photographs: of all anchors that score above 0.7 in float or
                 quantized, the share that does in both (intersection over union)
voice activity   the greatest and the mean difference of probabilities over 20 s of speech, weights alone; 10 s more
                 calibrate
Times are medians in turns, one thread, one example: the float file over the quantized one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import regauge
from benchmarks.quantize_peers import onnxruntime_static
from benchmarks.report import append_table, environment
from regauge.backends.run_onnxruntime import Session, latency
from regauge.ir.states import carried, first_states, ordinary_inputs, pair_states

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"
HEADS = ["file", "quantizer", "what it is for", "size", "speed, 1 example"]
PHOTOGRAPHS = ("coffee.png", "chelsea.png", "rocket.jpg", "astronaut.png")
OPSET = 13
THRESHOLD = 0.7  # of scores of anchors
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """Examples that calibrate, one to take the time of, and what a session's answers are worth beside the float's."""

    calibration: list[Batch]
    one: Batch
    judge: Callable[[Session, Session], str]
    scheme: str = "quantize"
    peer: bool = True


def file_types(half: int) -> Task:
    """Calibrated on every other file, judged on the rest."""
    with np.load(CORPUS / "data" / "magika_standard_v2_1_inputs.npz") as arrays:
        files, classes = torch.from_numpy(arrays["bytes"].astype(np.int32)), list(arrays["classes"])
        labels = torch.tensor([classes.index(label) for label in arrays["label"]])
    chosen, rest = files[half::2], files[1 - half :: 2]

    def judge(session: Session, _: Session) -> str:
        found = torch.cat([session.run((part,))[0] for part in rest.split(8)]).argmax(1)
        return f"{int((found == labels[1 - half :: 2]).sum())} of {len(rest)} right"

    return Task([{"bytes": part} for part in chosen.split(8)], {"bytes": rest[:1]}, judge)


def faces() -> Task:
    images = [_scene(seed) for seed in range(40)]
    calibration, rest = images[:16], images[16:]

    def anchors(session: Session) -> torch.Tensor:
        return torch.stack([session.run((image,))[0][0, :, 1] > THRESHOLD for image in rest])

    def judge(session: Session, plain: Session) -> str:
        a, b = anchors(plain), anchors(session)
        return f"{float((a & b).sum() / (a | b).sum()):.3f} IoU of {int(a.sum())} anchors"

    return Task([{"input": image} for image in calibration], {"input": rest[0]}, judge)


def _scene(seed: int) -> torch.Tensor:
    """f32[1,3,240,320]: a photograph with one to four faces; those of even seeds are of other people."""
    from PIL import Image

    found = find_spec("skimage")  # it need not be importable
    if found is None or not found.submodule_search_locations:
        raise SystemExit("scikit-image is needed for its photographs: put it on PYTHONPATH")
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    random = np.random.default_rng(seed)
    photograph = np.array(Image.open(folder / PHOTOGRAPHS[seed % len(PHOTOGRAPHS)]).convert("RGB"))[:400]
    image = torch.from_numpy(photograph).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, (240, 320), mode="bilinear", antialias=True)
    people = torch.from_numpy(np.load(folder / "lfw_subset.npy")[:100]).float()
    for _ in range(int(random.integers(1, 5))):
        person = people[int(random.integers(0, 50)) + 50 * (seed % 2)]
        side = int(random.integers(40, 120))
        y, x = int(random.integers(0, 240 - side)), int(random.integers(0, 320 - side))
        image[:, :, y : y + side, x : x + side] = 255 * F.interpolate(person[None, None], (side, side), mode="bicubic")
    return (image - 127) / 128


def voice(name: str, rate: int, frame: int, context: int) -> Task:
    """``frame`` new samples at a time behind ``context`` of those before; 10 s of speech calibrate, 20 s judge.

    Which inputs are states is told by the results that come back in their form.
    """
    path = CORPUS / "onnx" / f"{name}.onnx"
    with wave.open(str(CORPUS / "data" / "speech_16k.wav")) as file:
        sound = np.frombuffer(file.readframes(30 * file.getframerate()), np.int16).astype(np.float32) / 32768
    sound = np.pad(sound[:: 16000 // rate], (context, 0))
    windows = torch.from_numpy(sound).unfold(0, frame + context, frame)
    judged = 20 * rate // frame
    graph = regauge.load(path)
    pair_states(graph)
    states = carried(graph)

    def batches(session: Session, frames: torch.Tensor) -> Iterator[tuple[Batch, torch.Tensor]]:
        """What goes in, frame by frame, and the probability that comes out."""
        given = {value.name: torch.tensor(rate) for value in ordinary_inputs(graph)}
        first = first_states(graph, [frames[:1], *list(given.values())[1:]])
        given |= {state.before.name: zeros for state, zeros in zip(states, first, strict=True)}
        for window in frames:
            batch = {**given, graph.inputs[0].name: window[None]}
            results = session.run(batch)
            yield batch, results[0].flatten()[-1]
            given |= {state.before.name: results[graph.outputs.index(state.after)] for state in states}

    def judge(session: Session, plain: Session) -> str:
        a, b = (torch.stack([p for _, p in batches(one, windows[:judged])]) for one in (session, plain))
        apart = (a - b).abs()
        return f"{float(apart.max()):.3f} at most, {float(apart.mean()):.4f} on average, {rate} Hz"

    chosen = [batch for batch, _ in batches(Session(path, threads=1), windows[judged:])]
    return Task(chosen, chosen[0], judge, scheme="quantize{scheme=w8}", peer=False)


TASKS: Mapping[str, list[tuple[str, Callable[[], Task]]]] = {
    "magika": [("magika_standard_v2_1", lambda: file_types(0)), ("magika_standard_v2_1", lambda: file_types(1))],
    "faces": [("face_version-RFB-320", faces), ("face_version-RFB-320_simplified", faces)],
    "voice": [
        ("silero_v6", lambda: voice("silero_v6", 16000, 512, 64)),
        ("silero_v6", lambda: voice("silero_v6", 8000, 256, 32)),
        ("silero_v6_16k_op15", lambda: voice("silero_v6_16k_op15", 16000, 512, 64)),
        ("silero_v3", lambda: voice("silero_v3", 16000, 1536, 0)),
    ],
}


def rows(name: str, task: Task) -> Iterator[list[str]]:
    """A row for the file in float, one for what Regauge makes of it, and one for onnxruntime's."""
    with tempfile.TemporaryDirectory() as folder:
        path = _newer(CORPUS / "onnx" / f"{name}.onnx", Path(folder))
        files = {"float": path, "regauge": Path(folder) / "ours.onnx"}
        regauge.optimize(regauge.load(path), task.scheme, data=task.calibration or None).to_onnx(files["regauge"])
        if task.peer:
            files["onnxruntime, static"] = Path(folder) / "theirs.onnx"
            onnxruntime_static(path, files["onnxruntime, static"], task.calibration)
        sessions = {tool: Session(file, threads=1) for tool, file in files.items()}
        plain = sessions["float"]
        times = latency(sessions, {name: x for name, x in task.one.items() if name in plain.inputs}, repeats=30)
        for tool, file in files.items():
            size = path.stat().st_size / file.stat().st_size
            speed = times["float"] / times[tool]
            yield [name, tool, task.judge(sessions[tool], plain), f"{size:.2f}", f"{speed:.2f}"]


def _newer(path: Path, folder: Path) -> Path:
    """The file, or a copy of an opset that has a scale for each channel: regauge keeps that of the file."""
    import onnx

    model = onnx.load(path)
    if model.opset_import[0].version >= OPSET:
        return path
    onnx.save(onnx.version_converter.convert_version(model, OPSET), folder / path.name)
    return folder / path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in options.only:
        for file, build in TASKS[name]:
            for row in rows(file, build()):
                print("  ".join(row), flush=True)
                found.append(row)
    print(environment())
    if options.write:
        append_table("Quantized ONNX files, by what they are for", HEADS, found)


if __name__ == "__main__":
    main()
