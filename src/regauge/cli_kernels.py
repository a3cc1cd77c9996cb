"""Commands for kernels: which ones a model has, tables of their configurations, and kernels compiled into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from regauge.cli_files import PATH, at_option, check_output, dynamic_sizes, model_argument, most_option, open_file
from regauge.ir.errors import RegaugeError
from regauge.terminal import print_table

architectures_option = click.option(
    "--arch", "architectures", metavar="ARCH", multiple=True, help="sm_80 or sm_90; may be repeated"
)


@click.command()
@model_argument
@click.option("--target", metavar="TARGET", default="gpu", help="for what kernels have to gain, as of fuse: gpu or cpu")
@at_option
@most_option("--refusals", 20, "list so many of the refusals")
def fusion(model: Path, target: str, at: Sequence[str], most: int) -> None:
    """Plan which nodes of a model become one kernel.

    What is refused is listed below the kernels, with the reason and the bytes that this costs.

    \b
    regauge fusion model.onnx
    regauge fusion model.onnx --at batch=8 --refusals 50
    """
    from regauge.backends.triton_kernels.footprint import footprint
    from regauge.ir.fusion.causal import mark_causal
    from regauge.ir.fusion.fused import without_fused
    from regauge.ir.fusion.plan import plan_fusion
    from regauge.ir.fusion.plan_rows import plan_rows, plan_summary, refusal_rows
    from regauge.ir.fusion.splits import slice_splits
    from regauge.ir.roofline import DEVICES

    if target not in DEVICES:
        raise RegaugeError(f"there is no target {target!r}: give {' or '.join(sorted(DEVICES))}")
    graph = without_fused(open_file(model))
    if target == "gpu":  # as graphs are made ready for kernels
        slice_splits(graph)
        mark_causal(graph)
    takes = footprint if target == "gpu" else None
    plan = plan_fusion(graph, DEVICES[target], dynamic_sizes(graph, at), footprints=takes)
    print_table(plan_rows(plan))
    print(f"\n{plan_summary(plan)}")
    if plan.refusals and most:
        print()
        print_table(refusal_rows(plan.refusals[:most]))
        if len(plan.refusals) > most:
            print(f"{len(plan.refusals) - most} more were refused")


@click.command()
@model_argument
@click.option("-o", "--output", metavar="DIR", type=PATH, required=True, help="a folder for sources and binaries")
@architectures_option
@at_option
@click.option("--tuned", metavar="FILE", type=PATH, help="a table that regauge autotune wrote")
@click.option("--library", is_flag=True, help="build the library of onnxruntime operators that launches them, too")
def kernels(
    model: Path, output: Path, architectures: Sequence[str], at: Sequence[str], tuned: Path | None, library: bool
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
    found = write_kernels(graph, output, architectures or list(ARCHITECTURES), dynamic_sizes(graph, at), table)
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


@click.command()
@click.argument(
    "model",
    metavar="[IN]",
    type=PATH,
    required=False,
    help="an ONNX file or a .pt2 file whose kernels are tuned",
)
@click.option("-o", "--output", metavar="FILE", type=PATH, required=True, help="the table, a .json file")
@click.option(
    "--shapes",
    metavar="FORM:SIZES:TYPE",
    multiple=True,
    help="such as rows:4096x8192:bf16 or contraction:16x8192x4096:f16",
)
@click.option("--device", metavar="DEVICE", default="cuda", show_default=True, help="where kernels are timed")
@click.option("--offline", is_flag=True, help="time nothing: compile, drop what spills, and trust a roofline")
@architectures_option
@at_option
def autotune(
    model: Path | None,
    output: Path,
    shapes: Sequence[str],
    device: str,
    offline: bool,
    architectures: Sequence[str],
    at: Sequence[str],
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
    tried = [parsed(text) for text in shapes]
    if model is not None:
        graph = open_file(model)
        sized = with_kernels(graph).sized(dynamic_sizes(graph, at))
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
