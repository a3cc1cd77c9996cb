"""A library of onnxruntime operators that launch compiled kernels, built from source with g++.

    written = write_kernels(graph, "kernels", ["sm_90"])
    library = build_library("kernels", written)
    options.register_custom_ops_library(str(library))         of a session with the CUDA provider

The operators have the names of the kernels in the domain ``regauge.kernels``: a model whose functions are called so
launches the kernels, and runs the functions' bodies where there is no driver, as then nothing is registered. Load the
library only into sessions with the CUDA provider: onnxruntime refuses models with operators of providers that it has
not. With ``REGAUGE_ORT_PROVIDER=CPUExecutionProvider`` the operators are the CPU provider's and copy their tensors to
the GPU and back: to test kernels where onnxruntime was built without CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir

from regauge.backends.triton_kernels.compile import number_dims
from regauge.backends.triton_kernels.files import Written
from regauge.backends.triton_kernels.kernel import grid_of
from regauge.ir.cost import item_size
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.sizes.expressions import is_static, product

NATIVE = Path(__file__).parent / "native" / "ort_kernels.cc"
HEADER = "onnxruntime_c_api.h"
INCLUDES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include")
"""Folders where the header lies as packages install it, behind those of ``CPLUS_INCLUDE_PATH``."""


def missing() -> str:
    """What building the library lacks here; empty where nothing."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if _include() is None:
        return (
            f"there is no {HEADER} of onnxruntime: install libonnxruntime-dev, or name its folder in CPLUS_INCLUDE_PATH"
        )
    return ""


def _include() -> Path | None:
    folders = [*os.environ.get("CPLUS_INCLUDE_PATH", "").split(":"), *INCLUDES]
    return next((Path(folder) for folder in folders if folder and (Path(folder) / HEADER).exists()), None)


def build_library(folder: str | os.PathLike[str], written: Sequence[Written]) -> tuple[Path, tuple[str, ...]]:
    """Build the library beside the kernels of a folder; returns it, and why some kernels are not in it.

    Of these onnxruntime runs the body. Raises FusionError where it cannot be built, or would hold no kernel.
    """
    reason = missing()
    if reason:
        raise FusionError(f"the library of onnxruntime operators cannot be built: {reason}")
    target = Path(folder)
    lines, left = manifest(written)
    if not lines:
        raise FusionError(f"the library of onnxruntime operators would hold no kernel: {'; '.join(left)}")
    (target / "kernels.txt").write_text(lines, encoding="utf-8")
    library = (target / "libregauge_ort.so").resolve()
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{_include()}", str(NATIVE)]
    done = subprocess.run([*command, "-o", str(library), "-ldl"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason").splitlines()[0]
        raise FusionError(f"the library of onnxruntime operators cannot be built: {reason}")
    return library, left


def manifest(written: Iterable[Written]) -> tuple[str, tuple[str, ...]]:
    """What the library reads of kernels, a line each: how sizes of loops follow from the shapes of the inputs, the
    axes of tensors as products of loops, what is passed at a launch, and how many programs there are.

    Also why some kernels are left out: sizes of loops, or places that are read, that do not follow from shapes.
    """
    texts: list[str] = []
    left: dict[str, None] = {}
    for one in written:
        try:
            texts.append("".join(f"{line}\n" for line in _lines(one)))
        except FusionError as error:
            left[str(error)] = None
    return "".join(texts), tuple(left)


def _lines(one: Written) -> Iterator[str]:
    source, operator, build = one.build.source, one.operator, one.build
    region = operator.kernel.region
    if source.totals:
        raise FusionError(f"{operator.name} leaves sums of each program, which the library does not add up")
    place = {dim: number for number, dim in enumerate(region.sized)}

    def dims(loops: Sequence[Dim]) -> str:
        return " ".join(map(str, [len(loops), *(place[dim] for dim in loops)]))

    yield f"kernel {build.architecture.removeprefix('sm_')} {operator.name}"
    yield f"start {source.name} {one.path.name}.cubin {build.launch.warps} {one.metadata['shared']}"
    for dim in region.sized:
        yield f"size {_size(one, dim)}"
    of_value = {tensor.value: tensor for tensor in reversed(source.tensors)}
    for word, values in (("read", operator.reads), ("write", operator.writes)):
        for value in values:
            kind = onnx_ir.tensor_adapters.from_torch_dtype(value.dtype)  # type: ignore[arg-type]
            axes = [dims(axis) for axis in of_value[value].layout]
            yield " ".join([word, str(int(kind)), str(item_size(value.dtype)), str(len(axes)), *axes])
    pointers = [*operator.reads, *operator.writes]
    for tensor in source.tensors:
        yield f"argument p 1 {pointers.index(tensor.value)}"
    numbers = build.arguments[len(source.tensors) :]
    for argument, loops in zip(numbers, number_dims(source), strict=True):
        if loops is None:
            raise FusionError(f"{operator.name} reads at places of its own, which the library does not compute")
        kind_of = "1" if argument.fixed is not None else "i" if argument.type == "i32" else "l"
        yield f"argument {kind_of} {int(argument.divisible)} {dims(loops)}"
    for (loops_, per), *others in grid_of(source, build.launch.constants):
        if others:
            raise FusionError(f"{operator.name} has products side by side, whose tiles the library does not count")
        yield f"grid {per} {dims([dim for loop in loops_ for dim in loop.dims])}"


def _size(one: Written, dim: Dim) -> str:
    """A number, or the axis of an input that has a loop, and what else is on it."""
    if is_static(dim.size):
        return f"n {int(dim.size)}"
    for tensor in one.build.source.reads:
        for axis, loops in enumerate(tensor.layout):
            others = [loop.size for loop in loops if loop is not dim]
            if dim in loops and all(map(is_static, others)):
                return f"a {product(others)} {one.operator.reads.index(tensor.value)} {axis}"
    raise FusionError(f"{one.operator.name}: the size of a loop does not follow from the shapes of what it reads")
