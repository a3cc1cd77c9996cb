"""The command line: what the Python interface does, for files.

Tables and text are as wide as the terminal, and not broken in a pipe. Exit status 0: done; 1: a comparison found a
difference; 2: an error, told in one line on stderr (of a pipeline text, with the text and a caret), with nothing
written.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from regauge.cli_files import (
    PATH,
    check_output,
    data_option,
    file_figures,
    is_onnx,
    model_argument,
    open_file,
    read_batches,
    written_model,
)
from regauge.cli_inspect import explain, groups, inspect, memory, scales
from regauge.cli_kernels import autotune, fusion, kernels
from regauge.cli_run import run
from regauge.ir.errors import PipelineError, RegaugeError
from regauge.terminal import print_prose, print_table, print_text

OBJECTS_UNSEEN = 100_000  # made before Python looks for garbage among them


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from regauge import __version__

        print(f"regauge {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version",
    is_flag=True,
    callback=_version,
    expose_value=False,
    is_eager=True,
    help="Show the version and exit.",
)
def app() -> None:
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
    except PipelineError as error:
        return _failed(str(error), lines=3)
    except (RegaugeError, OSError) as error:
        return _failed(str(error))
    except (KeyboardInterrupt, click.Abort):
        return _failed("stopped")
    except click.ClickException as error:  # wrong usage
        return _failed(error.format_message())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"regauge: warning: {str(message).splitlines()[0]}", file=sys.stderr)


def _failed(message: str, lines: int = 1) -> int:
    said = message.strip().splitlines() or ["failed"]
    print("\n".join([f"regauge: {said[0]}", *said[1:lines]]), file=sys.stderr)
    return 2


@app.command()
@model_argument
@click.option(
    "-o", "--output", metavar="OUT", type=PATH, required=True, help="an .onnx file, or a folder for torch source"
)
@click.option(
    "--passes",
    metavar="PIPELINE",
    multiple=True,
    help="a pipeline, such as 'prune{ratio=0.5}'; may be repeated. None: the model is converted only",
)
@data_option
@click.option("--sparse-weights", is_flag=True, help="store weights with many zeros sparsely where smaller (ONNX)")
@click.option("--functions", is_flag=True, help="write fused regions as local functions (ONNX; see the pass fuse)")
@click.option("--opset", type=int, help="convert an ONNX model to this newer opset first, proven by running both")
def optimize(
    model: Path,
    output: Path,
    passes: Sequence[str],
    data: Sequence[Path],
    sparse_weights: bool,
    functions: bool,
    opset: int | None,
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
    if output.suffix == "":
        for option, given in (("--sparse-weights", sparse_weights), ("--functions", functions)):
            if given:
                raise RegaugeError(f"{option} is for ONNX files, and {output} would be a folder: name an .onnx file")
    check_output(output, ".onnx" if output.suffix else "")
    pipeline = as_passes(list(passes))  # a wrong option is told before a large file is read
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
@click.argument("model", metavar="IN", type=PATH, help="an ONNX file")
@click.option("-o", "--output", metavar="OUT", type=PATH, required=True, help="an .onnx file")
@click.option("--only", metavar="NAMES", multiple=True, help="rules, rule sets or steps to apply: none of the others")
@click.option("--skip", metavar="NAMES", multiple=True, help="rules, rule sets or steps to leave out")
@click.option("--explain", is_flag=True, help="say what was nearly done, and why it was not")
@click.option("--freeze", is_flag=True, help="initializers that callers may override are weights")
@data_option
def simplify(
    model: Path,
    output: Path,
    only: Sequence[str],
    skip: Sequence[str],
    explain: bool,
    freeze: bool,
    data: Sequence[Path],
) -> None:
    """Write an ONNX model that computes the same with fewer nodes.

    Before anything is written the new file is held to the old one: by the onnx checker, and in onnxruntime with its
    optimisations off and on, at two values of dynamic sizes, one of them 1.

    \b
    regauge simplify model.onnx -o simple.onnx
    regauge simplify model.onnx -o simple.onnx --skip merging --skip constants --explain
    """
    from regauge.backends.onnx_model.proof import Proof
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


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    """Names given one by one or with commas."""
    return tuple(name for given in names for part in given.split(",") if (name := part.strip()))


def _check_onnx(model: Path, output: Path) -> None:
    if not is_onnx(model):
        raise RegaugeError(f"{model} is no ONNX file: regauge optimize --passes simplify takes programs of torch too")
    if output.suffix.lower() != ".onnx":
        raise RegaugeError(f"{output} would be no ONNX file: name an .onnx file")
    check_output(output, ".onnx")


for command in (inspect, groups, explain, scales, fusion, memory, run, kernels, autotune):
    app.add_command(command)


@app.command()
@click.argument("first", metavar="A", type=PATH, help="an ONNX file or a .pt2 file")
@click.argument("second", metavar="B", type=PATH, help="an ONNX file or a .pt2 file")
@data_option
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    metavar="SHARE",
    help="difference allowed, relative to the greatest output",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="how many times inputs are made up where no data is given",
)
def compare(first: Path, second: Path, data: Sequence[Path], tolerance: float, seeds: int) -> int:
    """Run two models on the same inputs and show how far they differ.

    The exit status is 1 where an output differs by more than the tolerance.

    \b
    regauge compare model.onnx small.onnx --data images.npz --tolerance 1e-3
    """
    from regauge.backends.compare import compare as run_compare
    from regauge.ir.running.sample_inputs import fitting_inputs

    models: list[Any] = [path if is_onnx(path) else open_file(path) for path in (first, second)]
    batches: list[Any] | None = read_batches(data, models[0])
    if batches is None:
        graph = open_file(first) if is_onnx(first) else models[0]
        batches = [fitting_inputs(graph, seed=seed) for seed in range(seeds)]
    equal = True
    for batch in batches:
        found = run_compare(models[0], models[1], batch)
        print_table(found.rows())
        equal = equal and found.equal(tolerance)
    print("equal" if equal else "different", f"within {tolerance:g}")
    return 0 if equal else 1


@app.command()
@click.argument("name", metavar="[NAME]", required=False, help="a pass, to see its options")
def passes(name: str | None) -> None:
    """List the passes, or describe one: its options and rules.

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
@click.argument("name", metavar="[NAME]", required=False, help="an operator, as torch, ONNX or Regauge has it")
def operators(name: str | None) -> None:
    """List the operators that are known, or describe one of them.

    Told of an operator are its axis rule, and what it is called elsewhere.

    \b
    regauge operators
    regauge operators LayerNormalization
    """
    from regauge.ir.printing.operator_table import described, operator_rows

    if name is None:
        print_table(operator_rows())
        return
    for number, rows in enumerate(described(name)):
        if number:
            print()
        print_table(rows)


@app.command()
@click.option("--quick", is_flag=True, help="train for a few seconds only")
@click.option(
    "--save", metavar="FILE", type=PATH, help="keep the trained network as this ONNX file, the pruned one beside it"
)
def demo(quick: bool, save: Path | None) -> None:
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
