"""Commands for kernels: tables of their configurations, and kernels compiled into files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli_files import At, Model, check_output, dynamic_sizes, open_file
from regauge.ir.errors import RegaugeError
from regauge.terminal import print_table

Architectures = Annotated[
    list[str] | None, typer.Option("--arch", metavar="ARCH", help="sm_80 or sm_90; may be repeated")
]


def kernels(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="a folder for sources and binaries")],
    architectures: Architectures = None,
    at: At = None,
    tuned: Annotated[Path | None, typer.Option(metavar="FILE", help="a table that regauge autotune wrote")] = None,
    library: Annotated[
        bool, typer.Option("--library", help="build the library of onnxruntime operators that launches them, too")
    ] = False,
) -> None:
    """Compile the kernels of a model for GPUs, without one.

    What each of them takes of the GPU is listed: registers, bytes that spill, shared memory.

    \b
    regauge kernels model.onnx --arch sm_90 -o kernels
    regauge kernels model.pt2 --arch sm_80 --arch sm_90 --at batch=8 -o kernels
    """
    from regauge.backends.ort_library import build_library, missing
    from regauge.backends.triton_kernels.compile import ARCHITECTURES
    from regauge.backends.triton_kernels.configs import Table
    from regauge.backends.triton_kernels.files import write_kernels

    if library and missing():
        raise RegaugeError(f"--library: {missing()}")
    table = Table.read(tuned) if tuned is not None else None
    graph = open_file(model)
    found = write_kernels(graph, output, architectures or list(ARCHITECTURES), dynamic_sizes(graph, at or ()), table)
    rows = [["kernel", "form", "registers", "spilled", "shared", "programs", ""]]
    for one in found:
        figures = [str(one.metadata[name]) for name in ("form", "registers", "spilled", "shared", "grid")]
        rows.append([one.path.name, *figures, "as it was" if one.cached else ""])
    print_table(rows)
    if library:
        path, left = build_library(output, found)
        for reason in left:
            print(f"not in the library: {reason}")
        print(f"wrote {path}")
    print(f"wrote {output}")


def autotune(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the table, a .json file")],
    model: Annotated[
        Path | None, typer.Argument(metavar="IN", help="an ONNX file or a .pt2 file whose kernels are tuned")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="FORM:SIZES:TYPE", help="such as rows:4096x8192:bf16 or contraction:16x8192x4096:f16"),
    ] = None,
    device: Annotated[str, typer.Option(help="where kernels are timed")] = "cuda",
    offline: Annotated[
        bool, typer.Option("--offline", help="time nothing: compile, drop what spills, and trust a roofline")
    ] = False,
    architectures: Architectures = None,
    at: At = None,
) -> None:
    """Find how the kernels of a model are best cut into programs.

    The table that is written is read by to_torch(kernels="triton", tuned=) and by regauge kernels --tuned.

    \b
    regauge autotune model.onnx --at batch=8 -o table.json
    regauge autotune --shapes contraction:16x11008x4096:bf16 -o table.json
    regauge autotune model.onnx --offline --arch sm_90 -o table.json
    """
    import torch

    from regauge.backends.torch_module.kernels import with_kernels
    from regauge.backends.triton_kernels.configs import Table, architecture_of
    from regauge.backends.triton_kernels.samples import parsed
    from regauge.backends.triton_kernels.tuning import measured, tune

    check_output(output, ".json")
    if not offline and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise RegaugeError(
            "there is no GPU to time kernels on: --offline --arch sm_90 screens configurations by compiling them"
        )
    if offline != bool(architectures):
        raise RegaugeError(
            "--offline needs an --arch to compile for, such as sm_90"
            if offline
            else "--arch is for --offline: a GPU has its own"
        )
    tried = [parsed(text) for text in shapes or ()]
    if model is not None:
        graph = open_file(model)
        sized = with_kernels(graph).sized(dynamic_sizes(graph, at or ()))
        tried += [(operator.kernel, sizes) for operator, sizes in sized]
    if not tried:
        raise RegaugeError("there is nothing to tune: give a model with regions that gain as kernels, or --shapes")
    found = []
    rows = [["architecture", "form", "numbers", "sizes", "configuration", "predicted", "measured", "shipped"]]
    measure = None if offline else measured(torch.device(device))
    for architecture in architectures or [architecture_of(torch.device(device))]:
        for one in tune(tried, architecture, measure):
            found.append(one.entry)
            case = one.entry.case
            figures = [f"{s * 1e6:.1f} us" if s is not None else "" for s in (one.predicted, one.seconds, one.shipped)]
            sizes = "x".join(map(str, case.sizes))
            rows.append([architecture, case.form, case.numbers, sizes, str(one.entry.config), *figures])
    how = "screened without a GPU, not measured" if offline else f"measured on {torch.cuda.get_device_name(device)}"
    Table(found).write(output, f"written by regauge autotune: {how}")
    print_table(rows)
    print(f"wrote {output}")
