"""Kernels of a graph compiled into files, for named architectures, without a GPU.

    write_kernels(graph, "kernels", ["sm_90"])

For each kernel ``NAME.py``, its source, and for each architecture ``NAME.sm_90.cubin`` and ``NAME.sm_90.json``: what it
takes of a GPU, and how it is launched. ``NAME`` is that of the operator of
:mod:`regauge.backends.torch_module.kernels`. Files are the same in every byte each time; a binary whose file says that
it was made from the same is not made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regauge.backends.torch_module.kernels import KernelOperator, with_kernels
from regauge.backends.triton_kernels.compile import Build, build_of, compile_build
from regauge.backends.triton_kernels.configs import Table
from regauge.backends.triton_kernels.kernel import Source, config_for, grid_of
from regauge.backends.triton_kernels.loops import Loop, Tensor
from regauge.ir.dims.extents import Dim
from regauge.ir.dtypes import dtype_name
from regauge.ir.errors import FusionError
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import is_static


@dataclass(frozen=True)
class Written:
    """A kernel in a folder: the path without its suffix, what its file says, and whether it was there before."""

    path: Path
    operator: KernelOperator
    build: Build
    metadata: Mapping[str, Any]
    cached: bool


def write_kernels(
    graph: Graph,
    folder: str | os.PathLike[str],
    architectures: Sequence[str],
    at: Mapping[object, int] | None = None,
    tuned: Table | None = None,
) -> list[Written]:
    """Compile the kernels that ``graph.to_torch(kernels="triton")`` would launch; returns what was written.

    Dynamic sizes are as ``at`` gives them, or the least they may be: they decide the configuration, but a binary is
    good for any. Raises FusionError where no kernel gains, or one cannot be compiled.
    """
    found = with_kernels(graph, tuned=tuned)
    if not found.operators:
        raise FusionError(f"no region of {graph.name} would gain as a kernel: regauge fusion lists what is refused")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FusionError(f"cannot write kernels into {target}: it is a file, name a folder")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for operator, sizes in found.sized(at):
        source = operator.kernel.source(operator.kernel.form_for(sizes, single=True))
        (target / f"{operator.name}.py").write_text(source.text, encoding="utf-8")
        written += [_write(target, operator, source, sizes, name) for name in dict.fromkeys(architectures)]
    return written


def _write(
    folder: Path, operator: KernelOperator, source: Source, sizes: Mapping[Dim, int], architecture: str
) -> Written:
    config = config_for(source, sizes, architecture, operator.kernel.tuned)
    open_sizes = [dim for dim in sizes if not is_static(dim.size)]
    build = build_of(source, sizes, architecture, config, open_sizes)
    path = folder / f"{operator.name}.{architecture}"
    known = _known(path, build.key)
    if known is not None:
        return Written(path, operator, build, known, cached=True)
    compiled = compile_build(build)
    metadata = {
        "name": operator.name,
        "entry": source.name,
        "form": source.form,
        "rounding": source.rounding,
        "architecture": architecture,
        "triton": version("triton"),
        "key": build.key,
        "sha256": sha256(compiled.binary).hexdigest(),
        "registers": compiled.registers,
        "spilled": compiled.spilled,
        "shared": compiled.shared,
        **_launch(build),
        "reads": [_tensor(tensor, source) for tensor in source.reads],
        "writes": [_tensor(tensor, source) for tensor in source.writes],
        **({"adds_up": [_tensor(tensor, source) for tensor in source.totals]} if source.totals else {}),
    }
    path.with_name(f"{path.name}.cubin").write_bytes(compiled.binary)
    path.with_name(f"{path.name}.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return Written(path, operator, build, metadata, cached=False)


def _known(path: Path, key: str) -> Mapping[str, Any] | None:
    """What the file of a kernel says, where it and the binary beside it were made from the same."""
    try:
        metadata: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        binary = path.with_name(f"{path.name}.cubin").read_bytes()
    except (OSError, ValueError):
        return None
    good = metadata.get("key") == key and metadata.get("sha256") == sha256(binary).hexdigest()
    return metadata if good else None


def _launch(build: Build) -> dict[str, Any]:
    """How the kernel is started: a thread block has ``warps`` times 32 threads."""
    start, source = build.launch, build.source
    return {
        "warps": start.warps,
        "stages": start.stages,
        "constants": dict(start.constants),
        "grid": grid_formula(source, start.constants),
        "arguments": [asdict(one) for one in build.arguments],
    }


def grid_formula(source: Source, constants: Mapping[str, int]) -> str:
    """How many programs there are, as an expression in the sizes of loops."""

    def factor(loops: Sequence[Loop], per: int) -> str:
        size = " * ".join(f"size_{loop.name}" for loop in loops)
        return size if per == 1 else f"cdiv({size}, {per})"

    sums = [[factor(loops, per) for loops, per in parts if loops] for parts in grid_of(source, constants)]
    return " * ".join(parts[0] if len(parts) == 1 else f"({' + '.join(parts)})" for parts in sums if parts) or "1"


def _tensor(tensor: Tensor, source: Source) -> dict[str, Any]:
    """A tensor by its axes: the loops that each is made of, where they are one loop all of them under its name."""
    names = {dim: loop.name for loop in source.loops.all for dim in loop.dims[:1]}
    axes = [[names[dim] for dim in axis if dim in names] for axis in tensor.layout]
    return {"name": tensor.name, "type": dtype_name(tensor.value.dtype), "axes": axes}
