"""Kernels compiled into files: the same in every byte each time, and made once."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from decoder_block import decoder_block
from regauge.backends.torch_module.kernels import with_kernels
from regauge.backends.torch_module.runtime import source_of
from regauge.backends.triton_kernels.configs import Config, Entry, Table
from regauge.backends.triton_kernels.files import grid_formula, write_kernels
from regauge.backends.triton_kernels.kernel import case_of, launch_of
from regauge.backends.triton_kernels.samples import SAMPLES, sample
from regauge.cli import main
from regauge.ir.errors import EmitError, FusionError
from regauge.ir.graph import Graph

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def block() -> Graph:
    return decoder_block(tokens=64, width=64, heads=2, hidden=96)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_give_equal_bytes_and_a_third_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for name in ("first", "second"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache of {name}"))
        runs.append(write_kernels(block(), tmp_path / name, ["sm_90"]))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert len(runs[0]) == 3 and not any(one.cached for run in runs for one in run)
    assert all(one.metadata["spilled"] == 0 and one.metadata["registers"] > 8 for one in runs[0])
    first = runs[0][0].path
    first.with_name(f"{first.name}.cubin").write_bytes(b"cut off")
    again = write_kernels(block(), tmp_path / "first", ["sm_90"])
    assert [one.cached for one in again] == [False] + [True] * 2
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_what_a_file_says_starts_the_kernel(tmp_path: Path) -> None:
    graph = block()
    (one, *_) = write_kernels(graph, tmp_path, ["sm_90"])
    operator = with_kernels(graph).operators[0]
    assert one.path.name == f"{operator.name}.sm_90"
    written = json.loads((tmp_path / f"{operator.name}.sm_90.json").read_text())
    names = [argument["name"] for argument in written["arguments"]]
    assert names[: len(written["reads"])] == [f"{tensor['name']}_ptr" for tensor in written["reads"]]
    assert all(name.rpartition("_")[0] for name in names) and "cdiv(" in written["grid"]
    assert (tmp_path / f"{operator.name}.py").read_text() == operator.kernel.source().text


@pytest.mark.parametrize("form", SAMPLES)
def test_the_formula_gives_the_number_of_programs(form: str) -> None:
    kernel, sizes = sample(form, (100, 3000, 200), "f32")
    source = kernel.source(form)  # type: ignore[arg-type]
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 8} if form == "contraction" else {"ENTRIES": 2048}
    start = launch_of(source, sizes, Config(tile, 4, 2))
    known = {f"size_{loop.name}": loop.size(sizes) for loop in source.loops.all}
    known["cdiv"] = lambda a, b: -(-a // b)  # type: ignore[assignment]
    assert eval(grid_formula(source, start.constants), known) == start.programs > 1


def test_another_table_is_another_operator_and_another_binary(tmp_path: Path) -> None:
    graph = block()
    operator, sizes = with_kernels(graph).sized()[1]  # attention comes first, which no table holds
    case = case_of(operator.kernel.source(), sizes)
    tuned = Table([Entry("sm_90", case, Config({"ENTRIES": 512}, 8, 2))])
    tuned.write(tmp_path / "table.json", "")
    plain, other = (write_kernels(graph, tmp_path / "kernels", ["sm_90"], tuned=t)[1] for t in (None, tuned))
    assert plain.path.name != other.path.name and plain.metadata["key"] != other.metadata["key"]
    assert other.metadata["warps"] == 8
    module = graph.to_torch(kernels="triton", tuned=tmp_path / "table.json")
    assert f'""", tuned={str(tmp_path / "table.json")!r})' in source_of(module)
    assert hasattr(torch.ops.regauge_kernels, other.path.name.partition(".")[0])
    with pytest.raises(EmitError, match="give kernels='triton', too"):
        graph.to_torch(tuned=tmp_path / "table.json")


def test_kernels_of_a_file_are_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.softmax(nn.functional.silu(x) * y, -1)

    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Gated(), (torch.randn(4096, 128), torch.randn(4096, 128))), file)
    command = ["kernels", str(file), "--arch", "sm_90", "-o", str(tmp_path / "kernels")]
    assert main(command) == 0
    assert "silu_mul_softmax" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "kernels").iterdir()} == {".py", ".cubin", ".json"}
    assert main(command) == 0
    assert "as it was" in capsys.readouterr().out
    assert main([*command[:-1], str(file)]) == 2
    assert "it is a file, name a folder" in capsys.readouterr().err
    table = tmp_path / "table.json"
    assert main(["autotune", str(file), "--offline", "--arch", "sm_90", "-o", str(table)]) == 0
    (entry,) = Table.read(table).entries
    assert entry.case.form == "rows" and entry.case.sizes == (4096, 128, 1)
    assert main([*command, "--tuned", str(table)]) == 0
    assert "as it was" not in capsys.readouterr().out  # another operator, as its table is another


def test_a_graph_without_kernels_is_told(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="no region of empty would gain as a kernel"):
        write_kernels(Graph("empty"), tmp_path, ["sm_90"])
