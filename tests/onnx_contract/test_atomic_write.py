"""A file appears whole or not at all, and what was there before stays until then."""

import os
from pathlib import Path

import onnx
import pytest

import regauge.backends.onnx_model.write as writing
from onnx_models import PERCEPTRON, PERCEPTRON_WEIGHTS, model_of, pruned, save
from regauge.frontends.from_onnx import load
from regauge.ir.errors import EmitError

MODEL = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["onnx_model.write._serialize", "onnx_model.write._write_data", "staged_files._flush"])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_the_folder_as_it_was(
    step: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "p.onnx"
    if existing:
        target.write_bytes(b"precious")
        (tmp_path / "p.onnx.data").write_bytes(b"precious too")
    before = contents(tmp_path)
    graph = pruned(load(MODEL))
    monkeypatch.setattr(f"regauge.backends.{step}", fail)
    monkeypatch.setattr(writing, "LEAST_EXTERNAL_BYTES", 0)
    with pytest.raises(EmitError, match="No space left"):
        graph.to_onnx(target, external_data=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_failure_while_renaming_puts_everything_back(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.onnx").write_bytes(b"precious")
    (tmp_path / "p.onnx.data").write_bytes(b"precious too")
    before = contents(tmp_path)
    graph = pruned(load(MODEL))
    real, count = os.replace, 0

    def replace(source: object, target: object) -> None:
        nonlocal count
        # onnx_ir renames its own data file inside the staging folder first.
        inside = Path(str(target)).parent != tmp_path and Path(str(source)).parent != tmp_path
        count += not inside
        if count == failing and not inside:
            count = 100
            raise OSError(5, "Input/output error")
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(writing, "LEAST_EXTERNAL_BYTES", 0)
    with pytest.raises(EmitError, match="Input/output error"):
        graph.to_onnx(tmp_path / "p.onnx", external_data=True)
    assert contents(tmp_path) == before


def test_failed_check_publishes_nothing(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        assert path.is_file()
        raise EmitError("not what it should be")

    import onnx_ir

    with pytest.raises(EmitError, match="not what it should be"):
        writing.write_model(onnx_ir.from_proto(MODEL), tmp_path / "p.onnx", checks=[check])
    assert not contents(tmp_path)


def test_interrupt_publishes_nothing(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        raise KeyboardInterrupt

    import onnx_ir

    with pytest.raises(KeyboardInterrupt):
        writing.write_model(onnx_ir.from_proto(MODEL), tmp_path / "p.onnx", checks=[check])
    assert not list(tmp_path.iterdir())


def test_existing_file_is_kept_when_it_may_not_be_overwritten(tmp_path: Path) -> None:
    source = save(MODEL, tmp_path / "m.onnx")
    before = source.read_bytes()
    for graph in (load(source), pruned(load(source))):
        with pytest.raises(EmitError, match="overwrite=True"):
            graph.to_onnx(tmp_path / "m.onnx", overwrite=False)
    assert source.read_bytes() == before


def test_a_model_can_be_written_over_itself(tmp_path: Path) -> None:
    source = save(MODEL, tmp_path / "m.onnx")
    before = source.read_bytes()
    load(source).to_onnx(source)
    assert source.read_bytes() == before
    pruned(load(source)).to_onnx(source)
    onnx.checker.check_model(onnx.load(source))
    assert len(source.read_bytes()) < len(before) and len(list(tmp_path.iterdir())) == 1


def test_target_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="does not exist, make it first"):
        load(MODEL).to_onnx(tmp_path / "nowhere" / "p.onnx")
    with pytest.raises(EmitError, match="it is a folder"):
        load(MODEL).to_onnx(tmp_path)
    assert not list(tmp_path.iterdir())
