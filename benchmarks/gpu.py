"""Kernels on a GPU: time over the roofline, and beside torch, torch.compile and Liger, with errors against float64.

    python benchmarks/gpu.py [--output FILE] [--write] [--only NAME] [--seconds 560]
    python benchmarks/gpu.py --small          tiny shapes in Triton's interpreter, on the CPU, whose times mean nothing

The floor is the greater of bytes (of what goes in and comes out, once) over the bandwidth and operations over the rate
of products, both measured at the start. Calls of one case run in turns, three rounds, on random data that rotates
through more than four times the second-level cache; short calls in a CUDA graph. Each cell: the median (tenth to
ninetieth percentile) in microseconds, and the greatest error, relative to the greatest entry.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

if "--small" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

import regauge
from benchmarks.gpu_cases import CASES, Case, Function, inputs, small, sparse_graph, with_gradients
from benchmarks.report import append_table, section
from regauge.backends.gpu_timing import Spread, rotating, times
from regauge.backends.triton_kernels.footprint import footprint
from regauge.backends.triton_kernels.kernel import Kernel, triton_kernel
from regauge.ir.cost import figures
from regauge.ir.fusion.plan import moves_nothing, plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.splits import slice_splits
from regauge.ir.graph import Graph, Value

TITLE = "Kernels on a GPU"
COMPILERS: dict[str, dict[str, Any]] = {"compile": {}, "max-autotune": {"mode": "max-autotune-no-cudagraphs"}}
HEADS = ["case", "kernels", "floor, us", "bound", "regauge", "x floor", "eager", *COMPILERS, "Liger"]
RESERVE = 75  # seconds that must be left for a compiler to be tried


class Ours:
    """A function as Regauge runs it: each region of the plan is a kernel, other nodes are torch's."""

    def __init__(self, case: Case, tensors: Sequence[torch.Tensor]) -> None:
        module = type("Case", (torch.nn.Module,), {"forward": lambda _, *given: case.function(*given)})()
        empty = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors)
        self.graph: Graph = (
            sparse_graph(tensors, case.pattern) if case.pattern else regauge.capture(module, empty, verify=False)
        )
        slice_splits(self.graph)
        self.trained = with_gradients(self.graph.to_torch(kernels="triton")) if case.trains else None
        self.plan = plan_fusion(self.graph, footprints=footprint)
        self.kernels: dict[Region, Kernel] = {
            step: triton_kernel(step, f"kernel_{place}")
            for place, step in enumerate(self.plan.steps)
            if isinstance(step, Region) and not all(map(moves_nothing, step.nodes))
        }

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.trained is not None:
            return tuple(self.trained(*tensors))
        known: dict[Any, Any] = dict(zip(self.graph.inputs, tensors, strict=True))
        for step in self.plan.steps:
            if isinstance(step, Region) and step in self.kernels:
                known.update(self.kernels[step].launch({v.value.value: known[v.value.value] for v in step.loads}))
                continue
            for node in step.nodes if isinstance(step, Region) else (step,):
                operands = [known[operand] if isinstance(operand, Value) else operand for operand in node.inputs]
                known[node.output] = node.operator.evaluate(*operands, **node.attributes)
        return tuple(known[value] for value in self.graph.outputs)

    def floor(self, bandwidth: float, flops: float) -> tuple[float, str]:
        """Seconds that a device takes at least, and what it waits for."""
        read = [value for value in self.graph.inputs if value.uses]
        values = [value for value in (*read, *self.graph.outputs) if isinstance(value, Value)]
        moved = sum(torch.empty(value.shape, dtype=value.dtype, device="meta").nbytes for value in values)  # type: ignore
        macs: float = figures(self.graph).macs
        if self.trained is not None:  # what is read and given has a gradient; a product has two, and attention one more
            moved, macs = 2 * moved, 3.5 * macs
        memory, products = moved / bandwidth, 2 * macs / flops
        return max(memory, products), "memory" if memory >= products else "products"


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        (spread,) = times([lambda *_: call()], [[]])
        return spread.median
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rates(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a product in bfloat16 of random numbers, as measured now."""
    cells, side = (2**29, 8192) if device.type == "cuda" else (2**20, 128)
    source = torch.randn(cells, device=device, dtype=torch.float32).to(torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(torch.bfloat16) for _ in range(2))
    copied = seconds_of(lambda: target.copy_(source), device)
    return 2 * source.nbytes / copied, 2 * side**3 / seconds_of(lambda: a @ b, device)


def error(found: Any, true: Sequence[torch.Tensor]) -> float:
    tensors = found if isinstance(found, tuple) else (found,)
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(tensors, true, strict=False))


def rivals(case: Case, ours: Ours, left: Callable[[], float]) -> dict[str, Function]:
    """What is timed beside one another; a compiler only where there is time for it."""
    found: dict[str, Function] = {"regauge": ours, "eager": case.call}
    if torch.cuda.is_available():
        for name, options in COMPILERS.items():
            if left() > RESERVE:
                torch._dynamo.reset()
                found[name] = torch.compile(case.call, fullgraph=True, dynamic=False, **options)
        peer = case.peer()
        if peer is not None:
            found["Liger"] = peer
    return found


def measure(case: Case, device: torch.device, speed: tuple[float, float], left: Callable[[], float]) -> list[str]:
    """The row of a case."""
    shapes = case.of((lambda extent: extent) if device.type == "cuda" else small)
    tensors = inputs(case, shapes, torch.bfloat16, device)
    ours = Ours(case, tensors)
    floor, bound = ours.floor(*speed)
    found = case.call(*(tensor.double() for tensor in tensors))
    true = found if isinstance(found, tuple) else (found,)
    good: dict[str, tuple[Function, float]] = {}
    cells = dict.fromkeys(HEADS, "")
    for name, call in rivals(case, ours, left).items():
        try:
            good[name] = call, error(call(*tensors), true)
        except Exception as failure:
            cells[name] = type(failure).__name__
            print(f"{case.name}: {name}: {failure}", file=sys.stderr)
    del true, found
    calls = [call for call, _ in good.values()]
    if device.type == "cuda":
        spreads = times(calls, rotating(tensors))
    else:
        spreads = [Spread.of([seconds_of(lambda call=call: call(*tensors), device)]) for call in calls]  # type: ignore
    for (name, (_, wrong)), spread in zip(good.items(), spreads, strict=True):
        median, low, high = (f"{1e6 * seconds:.1f}" for seconds in (spread.median, spread.p10, spread.p90))
        cells[name] = f"{median} ({low} to {high}), {wrong:.1e}"
    own = next((spread for name, spread in zip(good, spreads, strict=True) if name == "regauge"), None)
    cells.update({"case": f"{case.name} {'x'.join(map(str, shapes[0]))}", "kernels": str(len(ours.plan.kernels))})
    cells.update(
        {"floor, us": f"{1e6 * floor:.1f}", "bound": bound, "x floor": f"{own.median / floor:.2f}" if own else ""}
    )
    return [cells[head] for head in HEADS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=560, help="stop in front of the first case behind this time")
    parser.add_argument("--small", action="store_true", help="tiny shapes in Triton's interpreter")
    given = parser.parse_args()
    if given.small:
        import triton_interpreter

        triton_interpreter.repair()
    elif not torch.cuda.is_available():
        parser.error("there is no GPU: --small runs the kernels in Triton's interpreter")
    end = time.monotonic() + given.seconds
    device = torch.device("cpu" if given.small else "cuda")
    speed = rates(device)
    card = "the interpreter" if given.small else torch.cuda.get_device_name(device)
    note = (
        f"`python benchmarks/gpu.py` on {card}: {speed[0] / 1e12:.3g} TB/s and {speed[1] / 1e12:.3g} TFLOP/s, "
        "measured at the start; bfloat16, random data. Median (tenth to ninetieth percentile) in us; error against "
        "float64."
    )
    print(note, flush=True)
    rows = []
    for case in (case for case in CASES if given.only in case.name):
        left = end - time.monotonic()
        if left < 10:
            print(f"no time for {case.name}", flush=True)
            continue
        rows.append(measure(case, device, speed, lambda: end - time.monotonic()))
        print(*rows[-1], sep=" | ", flush=True)
        if given.output is not None:  # after each case: what is measured is kept, whatever comes
            given.output.write_text(section(TITLE, HEADS, rows, note), encoding="utf-8")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if given.write:
        append_table(TITLE, HEADS, rows, note)


if __name__ == "__main__":
    main()
