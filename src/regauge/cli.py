"""The command line: what the Python interface does, for files.

Tables and text are as wide as the terminal, and not broken in a pipe. Exit status 0: done; 1: a comparison found a
difference; 2: an error, told in one line on stderr, with nothing written.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regauge.cli_files import dynamic_sizes, file_figures, is_onnx, open_file, read_batches, written_model
from regauge.cli_kernels import autotune, kernels
from regauge.cli_run import run
from regauge.cli_tables import group_state, member_rows, summary_rows
from regauge.ir.errors import RegaugeError
from regauge.terminal import print_prose, print_table, print_text

# Errors are printed by main(), in one line; docstrings are shown as they are written.
app = typer.Typer(
    name="regauge",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OBJECTS_UNSEEN = 100_000  # made before Python looks for garbage among them

Model = Annotated[Path, typer.Argument(metavar="IN", help="an ONNX file, or a program saved by torch.export (.pt2)")]
Data = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="an .npz file, one array per input; may be repeated")
]
At = Annotated[list[str] | None, typer.Option(metavar="SYMBOL=SIZE", help="the value of a dynamic size")]


def _version(asked: bool) -> None:
    if asked:
        from regauge import __version__

        print(f"regauge {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune and rewrite neural networks that already exist."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    warnings.showwarning = _show_warning
    if arguments is None:  # the process is ours: to look for garbage while torch is imported costs a tenth of its time
        gc.set_threshold(OBJECTS_UNSEEN, *gc.get_threshold()[1:])
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(args=given or ["--help"], standalone_mode=False, prog_name="regauge")
        sys.stdout.flush()
        return int(status or 0)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RegaugeError, OSError) as error:
        return _failed(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _failed("stopped")
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong usage; typer carries a click of its own, so no class can be named
            return _failed(error.format_message())
        raise


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"regauge: warning: {str(message).splitlines()[0]}", file=sys.stderr)


def _failed(message: str) -> int:
    lines = message.strip().splitlines() or ["failed"]
    print(f"regauge: {lines[0]}", file=sys.stderr)
    return 2


@app.command()
def optimize(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="an .onnx file, or a folder for torch source")
    ],
    passes: Annotated[
        list[str] | None,
        typer.Option(help="a pipeline, such as 'prune{ratio=0.5}'; may be repeated. None: the model is converted only"),
    ] = None,
    data: Data = None,
    sparse_weights: Annotated[
        bool,
        typer.Option("--sparse-weights", help="store weights with many zeros sparsely where that is smaller (ONNX)"),
    ] = False,
    functions: Annotated[
        bool, typer.Option("--functions", help="write fused regions as local functions (ONNX; see the pass fuse)")
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="convert an ONNX model to this newer opset first, proven by running both")
    ] = None,
) -> None:
    """Run passes over a model and write the result.

    \b
    regauge optimize model.onnx -o small.onnx --passes "prune{ratio=0.5}"
    regauge optimize model.onnx -o small.onnx --passes "prune{macs=300M,scope=global,exclude=[head.*]}"
    regauge optimize model.pt2 -o small_model --passes "prune{params=0.4,round_to=8}"
    """
    from regauge.optimize import optimize as run_optimize
    from regauge.passes.catalog import as_passes

    if output.suffix.lower() not in (".onnx", ""):
        raise RegaugeError(
            f"{output} would be a {output.suffix} file: name an .onnx file, or a folder without a suffix"
        )
    pipeline = as_passes(passes or [])  # a wrong option is told before a large file is read
    graph = open_file(model, opset=opset)
    result = run_optimize(graph, pipeline, read_batches(data, graph))
    if output.suffix.lower() == ".onnx":
        result.to_onnx(output, sparse_weights=sparse_weights, functions=functions)
    else:
        result.write(output)
    if result.report.passes:
        print_table(result.report.rows())
        for entry in result.report.passes:
            for line in entry.lines():
                print_text(f"  {line}")
    print(f"wrote {output}" + ("" if pipeline else ", converted only: no passes are given"))


@app.command()
def simplify(
    model: Annotated[Path, typer.Argument(metavar="IN", help="an ONNX file")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="an .onnx file")],
    only: Annotated[
        list[str] | None, typer.Option(help="rules, rule sets or steps to apply: none of the others")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="rules, rule sets or steps to leave out")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="say what was nearly done, and why it was not")] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="initializers that callers may override are weights")
    ] = False,
    data: Data = None,
) -> None:
    """Write an ONNX model that computes the same with fewer nodes.

    Before anything is written the new file is held to the old one: by the onnx checker, and in onnxruntime with its
    optimisations off and on, at two values of dynamic sizes, one of them 1.

    \b
    regauge simplify model.onnx -o simple.onnx
    regauge simplify model.onnx -o simple.onnx --skip merging --skip constants --explain
    """
    from regauge.backends.onnx_proof import Proof
    from regauge.optimize import optimize as run_optimize
    from regauge.passes.simplify.simplify import Simplify
    from regauge.settings import current, using

    _check_onnx(model, output)
    one = Simplify(only=_listed(only), skip=_listed(skip))
    graph = open_file(model, freeze=freeze)
    before = file_figures(model, graph.metadata["onnx"], graph)
    batches = read_batches(data, graph)
    # The proof holds the new file to the old one, on the inputs that checks of the graph between them would make up.
    with using(verify="off" if current().verify == "off" else "structure"):
        result = run_optimize(graph, one, batches)
    result.to_onnx(output, verify=False, check=Proof(model, graph, batches))
    after = file_figures(output, written_model(output), result)
    (entry,) = result.report.passes
    if all(new >= old for new, old in zip(after, before, strict=True)):
        print("nothing to simplify")
    else:
        names = ("nodes", "bytes", "MACs")
        print_table(
            [
                ["", "before", "after"],
                *([name, str(a), str(b)] for name, a, b in zip(names, before, after, strict=True)),
            ]
        )
        for note in (*entry.notes, *graph.metadata["onnx_notes"]):
            print_text(f"  {note}")
    for reason, count in entry.left.items() if explain else ():
        print_text(f"  left alone: {count} x {reason}")
    print(f"wrote {output}")


def _listed(names: Sequence[str] | None) -> tuple[str, ...]:
    """Names given one by one or with commas."""
    return tuple(name for given in names or () for part in given.split(",") if (name := part.strip()))


def _check_onnx(model: Path, output: Path) -> None:
    if not is_onnx(model):
        raise RegaugeError(f"{model} is no ONNX file: regauge optimize --passes simplify takes programs of torch too")
    if output.suffix.lower() != ".onnx":
        raise RegaugeError(f"{output} would be no ONNX file: name an .onnx file")


@app.command()
def inspect(
    model: Model,
    text: Annotated[bool, typer.Option("--text", help="print the whole graph (regauge.ir.parse reads it)")] = False,
) -> None:
    """Show what a model is made of, what it costs and what can be cut.

    \b
    regauge inspect model.onnx
    regauge inspect model.onnx --text > model.txt
    """
    graph = open_file(model)
    if text:
        print(graph)
        return
    print_table([["model", str(model)], *summary_rows(graph)])


@app.command()
def groups(
    model: Model,
    of: Annotated[str | None, typer.Option(help="only the Dims of this parameter axis, such as conv1.weight:0")] = None,
    free: Annotated[bool, typer.Option("--free", help="only Dims that can be cut, nothing about the others")] = False,
    everything: Annotated[bool, typer.Option("--all", help="also each Dim that cannot be cut, and why not")] = False,
) -> None:
    """List the Dims of a model: axes that can only be cut together.

    Those that can be cut are listed, and the others counted by what keeps them from it.

    \b
    regauge groups model.onnx
    regauge groups model.onnx --all
    regauge groups model.onnx --of conv1.weight:0
    """
    from regauge.ir.groups import find_groups

    graph = open_file(model)
    if of:
        print_table(member_rows(find_groups(graph, of)))
        return
    found = graph.groups()
    rows = [["Dim", "size", "members"] + (["state"] if everything else [])]
    for group in found:
        if group.free or everything and not free:
            rows.append([group.name, str(group.size), str(len(group.members)), group_state(group)][: len(rows[0])])
    print_table(rows)
    pinned = Counter(group.pins[0].reason if group.pins else "nothing to cut" for group in found if not group.free)
    if pinned and not free and not everything:
        print(f"\n{pinned.total()} more cannot be cut (--all lists them):")
        for reason, count in pinned.most_common():
            print_text(f"  {count} x {reason}")


@app.command()
def explain(
    model: Model,
    what: Annotated[str, typer.Argument(metavar="DIM", help="a Dim, a parameter axis (conv1.weight:0) or a value")],
) -> None:
    """Say what a Dim, an axis or a value is, and if it can be cut.

    \b
    regauge explain model.onnx conv1.weight:0
    """
    print_text(open_file(model).explain(what))


@app.command()
def scales(
    model: Model,
    everything: Annotated[bool, typer.Option("--all", help="also the scales that weights alone have")] = False,
) -> None:
    """List the scales that values share, which of them can be moved, and what holds the others.

    Where a scale moves, the weights named beside it take it up, and the same function is computed.

    \b
    regauge scales model.onnx
    """
    from regauge.ir.scale_table import scale_counts, scale_rows
    from regauge.ir.scales import find_scales

    found = find_scales(open_file(model))
    print_table(scale_rows(found, everything=everything))
    print(f"\n{scale_counts(found)}")


@app.command()
def fusion(
    model: Model,
    device: Annotated[str, typer.Option(help="for which device the kernels have to gain: gpu or cpu")] = "gpu",
    at: At = None,
    most: Annotated[int, typer.Option("--refusals", help="list so many of the refusals", min=0)] = 20,
) -> None:
    """Plan which nodes of a model become one kernel, and list what is refused, with the bytes that this costs.

    \b
    regauge fusion model.onnx
    regauge fusion model.onnx --at batch=8 --refusals 50
    """
    from regauge.ir.fusion.fused import without_fused
    from regauge.ir.fusion.plan import plan_fusion
    from regauge.ir.fusion.plan_rows import plan_rows, plan_summary, refusal_rows
    from regauge.ir.roofline import DEVICES

    if device not in DEVICES:
        raise RegaugeError(f"there is no device {device!r}: give {' or '.join(sorted(DEVICES))}")
    graph = without_fused(open_file(model))
    plan = plan_fusion(graph, DEVICES[device], dynamic_sizes(graph, at or ()))
    print_table(plan_rows(plan))
    print(f"\n{plan_summary(plan)}")
    if plan.refusals and most:
        print()
        print_table(refusal_rows(plan.refusals[:most]))
        if len(plan.refusals) > most:
            print(f"{len(plan.refusals) - most} more were refused")


for command in (run, kernels, autotune):
    app.command()(command)


@app.command()
def memory(
    model: Model,
    at: At = None,
    most: Annotated[int, typer.Option("--values", help="list so many of the values alive at the peak", min=0)] = 10,
) -> None:
    """Say when a run holds most memory, what is alive then, and how large a block the whole run fits into.

    Weights are not counted, and what torch gives as a view takes nothing. Prune with 'peak=', or see 'remat'.

    \b
    regauge memory model.onnx --at batch=8 --values 30
    """
    from regauge.ir.memory_plan import peak_rows, plan_memory, plan_summary

    graph = open_file(model)
    plan = plan_memory(graph, dynamic_sizes(graph, at or ()))
    print_text(plan_summary(plan))
    print()
    print_table(peak_rows(plan, most))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="an ONNX file or a .pt2 file")],
    second: Annotated[Path, typer.Argument(metavar="B", help="an ONNX file or a .pt2 file")],
    data: Data = None,
    tolerance: Annotated[float, typer.Option(help="difference allowed, relative to the greatest output", min=0)] = 1e-5,
    seeds: Annotated[int, typer.Option(help="how many times inputs are made up where no data is given", min=1)] = 1,
) -> int:
    """Run two models on the same inputs and show how far they differ.

    The exit status is 1 where an output differs by more than the tolerance.

    \b
    regauge compare model.onnx small.onnx --data images.npz --tolerance 1e-3
    """
    from regauge.backends.compare import compare as run_compare
    from regauge.ir.sample_inputs import sample_inputs

    models: list[Any] = [path if is_onnx(path) else open_file(path) for path in (first, second)]
    batches: list[Any] | None = read_batches(data, models[0])
    if batches is None:
        graph = open_file(first) if is_onnx(first) else models[0]
        batches = [sample_inputs(graph, seed=seed) for seed in range(seeds)]
    equal = True
    for batch in batches:
        found = run_compare(models[0], models[1], batch)
        print_table(found.rows())
        equal = equal and found.equal(tolerance)
    print("equal" if equal else "different", f"within {tolerance:g}")
    return 0 if equal else 1


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a pass, to see its options")] = None,
) -> None:
    """List the passes, or describe one of them, its options and its rules.

    \b
    regauge passes
    regauge passes prune
    """
    from regauge.passes.catalog import find_pass, pass_rows

    if name is None:
        print_table([["pass", "contract", "what it does"], *pass_rows()])
        return
    import inspect as python_inspect

    one = find_pass(name)
    print_prose(f"{one.name} ({one.contract})\n\n{python_inspect.getdoc(one)}")
    print()
    rows = [[info.name, info.kind, info.default, info.help] for info in one.option_table()]
    if rows:
        print_table([["option", "value", "default", ""], *rows])
    else:
        print("no options")
    if one.details():
        print()
        print_table([["choice", "what it does"], *map(list, one.details())])


@app.command()
def operators(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="an operator, as torch, ONNX or Regauge has it")
    ] = None,
) -> None:
    """List the operators that Regauge knows, or describe one of them: its axis rule and what it is called elsewhere.

    \b
    regauge operators
    regauge operators LayerNormalization
    """
    from regauge.ir.operator_table import described, operator_rows

    if name is None:
        print_table(operator_rows())
        return
    for number, rows in enumerate(described(name)):
        if number:
            print()
        print_table(rows)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="train for a few seconds only")] = False,
    save: Annotated[
        Path | None, typer.Option(help="keep the trained network as this ONNX file, the pruned one beside it")
    ] = None,
) -> None:
    """Train, prune, fine-tune and measure a small network.

    \b
    regauge demo
    regauge demo --quick --save digits.onnx
    """
    from regauge.demo import pruned_path, run_demo

    rows = run_demo(quick=quick, save=save)
    print_table(rows)
    if save is not None:
        print(f"wrote {save} and {pruned_path(save)}")
