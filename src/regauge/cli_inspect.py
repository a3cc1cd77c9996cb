"""Commands that look at a model: its size, its Dims and scales, its kernels and its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from regauge.cli_files import at_option, dynamic_sizes, model_argument, most_option, open_file
from regauge.cli_tables import group_state, member_rows, summary_rows
from regauge.terminal import print_table, print_text


@click.command()
@model_argument
@click.option("--text", is_flag=True, help="print the whole graph (regauge.ir.printing.parse reads it)")
def inspect(model: Path, text: bool) -> None:
    """Show what a model is made of, its costs, and what can be cut.

    \b
    regauge inspect model.onnx
    regauge inspect model.onnx --text > model.txt
    """
    graph = open_file(model)
    if text:
        print(graph)
        return
    print_table([["model", str(model)], *summary_rows(graph)])


@click.command()
@model_argument
@click.option("--of", metavar="AXIS", help="only the Dims of this parameter axis, such as conv1.weight:0")
@click.option("--free", is_flag=True, help="only Dims that can be cut, nothing about the others")
@click.option("--all", "everything", is_flag=True, help="also each Dim that cannot be cut, and why not")
def groups(model: Path, of: str | None, free: bool, everything: bool) -> None:
    """List the Dims of a model: axes that can only be cut together.

    Those that can be cut are listed, and the others counted by what keeps them from it.

    \b
    regauge groups model.onnx
    regauge groups model.onnx --all
    regauge groups model.onnx --of conv1.weight:0
    """
    from regauge.ir.dims.groups import find_groups

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


@click.command()
@model_argument
@click.argument("what", metavar="DIM", help="a Dim, a parameter axis (conv1.weight:0) or a value")
def explain(model: Path, what: str) -> None:
    """Say what a Dim, an axis or a value is, and if it can be cut.

    \b
    regauge explain model.onnx conv1.weight:0
    """
    print_text(open_file(model).explain(what))


@click.command()
@model_argument
@click.option("--all", "everything", is_flag=True, help="also the scales that weights alone have")
def scales(model: Path, everything: bool) -> None:
    """List the scales that values share, and which can be moved.

    Where a scale moves, the weights named beside it take it up, and the same function is computed. Beside the others
    stands what holds them.

    \b
    regauge scales model.onnx
    """
    from regauge.ir.scales.table import scale_counts, scale_rows
    from regauge.ir.scales.variables import find_scales

    found = find_scales(open_file(model))
    print_table(scale_rows(found, everything=everything))
    print(f"\n{scale_counts(found)}")


@click.command()
@model_argument
@at_option
@most_option("--values", 10, "list so many of the values alive at the peak")
def memory(model: Path, at: Sequence[str], most: int) -> None:
    """Say when a run holds most memory, and what is alive then.

    Also said is how large a block the whole run fits into. Weights are not counted, and what torch gives as a view
    takes nothing. Prune with 'peak=', or see 'remat'.

    \b
    regauge memory model.onnx --at batch=8 --values 30
    """
    from regauge.ir.memory.plan import peak_rows, plan_memory, plan_summary

    graph = open_file(model)
    plan = plan_memory(graph, dynamic_sizes(graph, at))
    print_text(plan_summary(plan))
    print()
    print_table(peak_rows(plan, most))
