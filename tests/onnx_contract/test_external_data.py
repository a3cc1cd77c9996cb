"""Weights beside the model: the layout is kept, nothing dangles, nothing of the source is overwritten."""

import weakref
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

import regauge.frontends.onnx_model.weights
from onnx_models import NETWORK, NETWORK_WEIGHTS, halves, masked, model_of, pruned, save
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.from_onnx import load
from regauge.ir.errors import EmitError

MODEL = model_of(NETWORK, NETWORK_WEIGHTS)
INPUT = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with all weights in one file beside it."""
    folder = tmp_path / "source"
    folder.mkdir()
    return save(MODEL, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)


@pytest.fixture(autouse=True)
def every_tensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are small: let no tensor be too small to be put beside them."""
    monkeypatch.setattr("regauge.backends.onnx_model.write.LEAST_EXTERNAL_BYTES", 0)


def locations(path: Path) -> set[str]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}


def assert_right(path: Path) -> None:
    """The pruned model computes what the masked original does."""
    graph = load(MODEL)
    expected = Session(masked(MODEL, graph, halves(graph)), optimisation="off").run([INPUT])
    torch.testing.assert_close(Session(path, optimisation="off").run([INPUT]), expected, rtol=1e-4, atol=1e-4)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_unchanged_model_goes_to_another_folder_with_its_data(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    load(source).to_onnx(other / "m.onnx")
    assert contents(other) == contents(source.parent)


def test_unchanged_model_in_the_same_folder_shares_its_data(source: Path) -> None:
    load(source).to_onnx(source.parent / "copy.onnx")
    found = contents(source.parent)
    assert set(found) == {"m.onnx", "m.data", "copy.onnx"} and found["copy.onnx"] == found["m.onnx"]


def test_external_stays_external(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path = pruned(load(source)).to_onnx(other / "p.onnx")
    assert locations(path) == {"m.data"} and set(contents(other)) == {"p.onnx", "m.data"}
    assert (other / "m.data").stat().st_size < (source.parent / "m.data").stat().st_size
    assert_right(path)


def test_inside_stays_inside(tmp_path: Path) -> None:
    path = pruned(load(save(MODEL, tmp_path / "m.onnx"))).to_onnx(tmp_path / "p.onnx")
    assert not locations(path) and set(contents(tmp_path)) == {"m.onnx", "p.onnx"}
    assert_right(path)


def test_one_file_per_tensor_stays_so(tmp_path: Path) -> None:
    folder, other = tmp_path / "source", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    save(MODEL, folder / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    path = pruned(load(folder / "m.onnx")).to_onnx(other / "m.onnx")
    assert set(contents(other)) == set(contents(folder)) and len(locations(path)) == len(NETWORK_WEIGHTS)
    assert_right(path)


def test_beside_the_source_its_data_is_not_overwritten(source: Path) -> None:
    before = contents(source.parent)
    path = pruned(load(source)).to_onnx(source.parent / "p.onnx")
    after = contents(source.parent)
    assert {name: after[name] for name in before} == before
    assert locations(path) == {"p.onnx.data"}
    assert_right(path)


def test_written_over_itself_the_graph_can_still_be_read(source: Path, tmp_path: Path) -> None:
    graph = load(source)
    before = (source.parent / "m.data").read_bytes()
    path = pruned(graph).to_onnx(source)
    assert_right(path)
    assert (source.parent / "m.data").read_bytes() == before
    again = pruned(graph).to_onnx(tmp_path / "again.onnx", external_data=False)
    assert_right(again)


@pytest.mark.parametrize("wanted", [True, "weights/w.bin"])
def test_weights_are_put_beside_the_model_on_request(wanted: bool | str, tmp_path: Path) -> None:
    path = pruned(load(MODEL)).to_onnx(tmp_path / "p.onnx", external_data=wanted)
    assert locations(path) == {"p.onnx.data" if wanted is True else wanted}
    assert_right(path)


def test_weights_are_put_inside_on_request(source: Path, tmp_path: Path) -> None:
    path = pruned(load(source)).to_onnx(tmp_path / "p.onnx", external_data=False)
    assert not locations(path) and not (tmp_path / "p.onnx.data").exists()
    assert_right(path)


@pytest.mark.parametrize("name", ["../w.data", "/tmp/w.data", "a/../../w.data", "", "c:\\w.data"])
def test_data_never_leaves_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(EmitError, match="inside the folder of the model"):
        pruned(load(MODEL)).to_onnx(folder / "p.onnx", external_data=name)
    assert not list(folder.iterdir()) and list(tmp_path.iterdir()) == [folder]


def test_data_is_not_written_over_its_own_model(tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="that is the model itself"):
        pruned(load(MODEL)).to_onnx(tmp_path / "p.onnx", external_data="./p.onnx")
    assert not list(tmp_path.iterdir())


def test_data_the_graph_still_reads_is_not_overwritten_by_name(source: Path) -> None:
    with pytest.raises(EmitError, match="still reads its weights from"):
        pruned(load(source)).to_onnx(source.parent / "p.onnx", external_data="m.data")


def test_alignment_is_kept(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    wide (float[n, 700] x) => (float[n, 600] y) { h = MatMul (x, a)  r = Relu (h)  y = MatMul (r, b) }
    """
    model = onnx_ir.from_proto(model_of(text, {"a": (700, 800), "b": (800, 600)}))
    onnx_ir.save(model, tmp_path / "m.onnx", external_data="m.data", alignment=65536)
    path = pruned(load(tmp_path / "m.onnx")).to_onnx(tmp_path / "p.onnx")
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    entries = [{e.key: int(e.value) for e in t.external_data if e.key != "location"} for t in tensors]
    large = [e for e in entries if e["length"] > 1 << 20]
    assert large and all(e["offset"] % 65536 == 0 for e in large)


def test_more_than_fits_into_a_file_goes_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regauge.backends.onnx_model.write.MOST_INLINE_BYTES", 100)
    path = pruned(load(MODEL)).to_onnx(tmp_path / "p.onnx", external_data=False)
    assert locations(path) == {"p.onnx.data"}


def test_weights_are_read_one_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = regauge.frontends.onnx_model.weights.read_tensor

    def counted(tensor: Any) -> torch.Tensor:
        nonlocal most
        result = read(tensor)
        alive.add(result)
        most = max(most, len(alive))
        return result

    monkeypatch.setattr(regauge.frontends.onnx_model.weights, "read_tensor", counted)
    graph = pruned(load(source))
    assert most <= 1
    graph.to_onnx(tmp_path / "p.onnx", verify=False)
    assert most == 1
