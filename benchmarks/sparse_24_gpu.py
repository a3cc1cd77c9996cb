"""What 2:4 weights gain on sparse tensor cores: a stack of linear layers, dense beside torch's semi-structured kernels.

    python benchmarks/sparse_24_gpu.py [--widths 1024 4096] [--rows 1 64 1024 4096] [--layers 4] [--write]

Needs a CUDA device of compute capability 8.0 or more. The layers are made 2:4 by ``sparsify``, the dense runs multiply
by the same weights with their zeros, and both are run as one CUDA graph, so that the time is that of the kernels and
not of launching them. ``error`` is the greatest difference of the results, relative to the greatest of the dense one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # a GPU machine may have the files only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import regauge
from benchmarks.report import append_table, environment
from regauge.passes.sparsity.kernels import use_sparse_kernels

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = ("cuSPARSELt", "CUTLASS")
TOLERANCE = {"fp16": 1e-2, "bf16": 5e-2}
HEADS = ["width", "rows", "type", "backend", "error", "dense ms", "sparse ms", "ratio"]


def sparse_stack(width: int, layers: int) -> nn.Sequential:
    """Linear layers without biases, 2:4 by the pass; scaled so that the result stays near one."""
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    stack = nn.Sequential(*linears)
    with torch.no_grad():
        for layer in linears:
            layer.weight.normal_(std=(2 / width) ** 0.5)
    graph = regauge.capture(stack.eval(), (torch.randn(8, width),), dynamic={0: {0: "rows"}})
    module = regauge.optimize(graph, "sparsify{pattern=2:4}").to_torch()
    for own, made in zip(stack, (m for m in module.modules() if isinstance(m, nn.Linear)), strict=True):
        own.weight.data = made.weight.detach().clone()
    return stack


def milliseconds(call: Callable[[], torch.Tensor], repeats: int = 20) -> float:
    """The median time of one call, run from a CUDA graph where it can be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    run: Callable[[], object] = call
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    except RuntimeError as error:  # a kernel that cannot be captured is timed with its launch
        torch.cuda.synchronize()
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 10)
    return statistics.median(times)


def choose_backend(name: str) -> None:
    """Let torch's semi-structured tensors use this library."""
    from torch.sparse import SparseSemiStructuredTensor

    SparseSemiStructuredTensor._FORCE_CUTLASS = name == "CUTLASS"


@torch.inference_mode()
def measure(stack: nn.Sequential, rows: int, kind: str) -> list[list[str]]:
    """One line for each backend; what a backend does not take is told and left out."""
    dtype, width = TYPES[kind], stack.get_parameter("0.weight").shape[1]
    dense = copy.deepcopy(stack).to("cuda", dtype)
    x = torch.randn(rows, width, device="cuda", dtype=dtype)
    wanted, dense_time = dense(x), milliseconds(lambda: dense(x))
    found = []
    for backend in BACKENDS:
        try:
            choose_backend(backend)
            sparse = copy.deepcopy(dense)
            left = use_sparse_kernels(sparse)
            if left:
                raise RuntimeError(f"{len(left)} layers stay dense: {next(iter(left.values()))}")
            result = sparse(x)
            error = float((result.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            if not error <= TOLERANCE[kind]:
                raise RuntimeError(f"the sparse result differs by {error:.2g}")
            time = milliseconds(lambda model=sparse: model(x))  # type: ignore[misc]
        except (RuntimeError, NotImplementedError, ValueError) as reason:
            torch.cuda.synchronize()
            print(f"{width} {rows} {kind} {backend}: {str(reason).splitlines()[0]}", file=sys.stderr)
            continue
        row = [str(width), str(rows), kind, backend, f"{error:.1e}", f"{dense_time:.4f}", f"{time:.4f}"]
        found.append([*row, f"{dense_time / time:.2f}"])
        print("  ".join(found[-1]), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 256, 1024, 4096])
    parser.add_argument("--types", nargs="*", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print("there is no CUDA device of compute capability 8.0 here: nothing is measured")
        return 0
    print(environment(), torch.cuda.get_device_name(), sep=", ")
    print("  ".join(HEADS))
    rows = []
    for width in options.widths:
        stack = sparse_stack(width, options.layers)
        rows += [row for kind in options.types for count in options.rows for row in measure(stack, count, kind)]
    if options.write:
        note = f"{torch.cuda.get_device_name()}; {options.layers} square linear layers in a row, from one CUDA graph."
        append_table("2:4 weights on sparse tensor cores", HEADS, rows, note)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
