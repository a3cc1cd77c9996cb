"""``regauge run``: what a model gives, computed by the torch module it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from regauge.cli_files import PATH, check_output, model_argument, open_file, read_batches
from regauge.terminal import print_table

if TYPE_CHECKING:
    import torch


@click.command()
@model_argument
@click.option("--device", default="cpu", metavar="DEVICE", help="where: cpu, cuda, or one of several as cuda:1")
@click.option("--inputs", metavar="FILE", type=PATH, help="an .npz file, one array per input. None: they are made up")
@click.option("--kernels", is_flag=True, help="run fused regions as Triton kernels on a GPU, elsewhere as torch does")
@click.option("-o", "--output", metavar="OUT", type=PATH, help="an .npz file for the results")
def run(model: Path, device: str, inputs: Path | None, kernels: bool, output: Path | None) -> None:
    """Run a model in torch and show, or save, what it gives.

    Regions that the file holds are those that --kernels runs as kernels; where it holds none, all that gain on a GPU.

    \b
    regauge run model.onnx
    regauge run model.onnx --device cuda --kernels --inputs images.npz -o results.npz
    """
    from regauge.backends.run_torch import found_device, run_in_torch
    from regauge.ir.running.sample_inputs import fitting_inputs

    if output is not None:
        check_output(output, ".npz")
    found_device(device)  # a missing one is told before a large file is read
    graph = open_file(model)
    batches = read_batches(None if inputs is None else [inputs], graph)
    given = fitting_inputs(graph) if batches is None else batches[0]
    results = run_in_torch(graph, given, device=device, kernels="triton" if kernels else None)
    print_table([["output", "type", "shape", "least", "mean", "greatest"], *map(_row, results, results.values())])
    if batches is None:
        print("inputs were made up: give --inputs")
    if output is not None:
        _save(output, results)
        print(f"wrote {output}")


def _row(name: str, tensor: torch.Tensor) -> list[str]:
    from regauge.ir.dtypes import dtype_name

    numbers = tensor.double() if tensor.numel() and not tensor.is_complex() else None
    figures = [] if numbers is None else [f"{float(f):.6g}" for f in (numbers.min(), numbers.mean(), numbers.max())]
    return [name, dtype_name(tensor.dtype), "x".join(map(str, tensor.shape)), *(figures or ["", "", ""])]


def _save(path: Path, results: dict[str, torch.Tensor]) -> None:
    """Types that numpy lacks (bfloat16, float8) are saved in single precision."""
    import numpy as np
    import torch

    known = (torch.float16, torch.float32, torch.float64)
    plain = {n: t.float() if t.is_floating_point() and t.dtype not in known else t for n, t in results.items()}
    np.savez(path, **{name: tensor.numpy() for name, tensor in plain.items()})  # type: ignore[arg-type]
