"""The command line: what it prints, what it writes, and how it fails."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.cli import main
from regauge.ir.operator import all_operators


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    torch.onnx.export(model, (torch.randn(2, 6),), path, dynamo=True, external_data=False, verbose=False)
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_optimize_writes_a_smaller_model_and_says_what_it_did(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "small.onnx"
    assert run("optimize", model_file, "-o", target, "--passes", "prune{ratio=0.5}") == 0
    shown = capsys.readouterr().out
    assert "prune{ratio=0.5}" in shown and "32 -> 16" in shown and f"wrote {target}" in shown
    assert target.stat().st_size < model_file.stat().st_size


def test_optimize_without_passes_gives_an_equal_model(model_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "same.onnx"
    assert run("optimize", model_file, "-o", target) == 0
    assert run("compare", model_file, target, "--tolerance", 0) == 0


def test_optimize_writes_torch_source_into_a_folder(model_file: Path, tmp_path: Path) -> None:
    assert run("optimize", model_file, "-o", tmp_path / "small", "--passes", "prune{params=0.5}") == 0
    assert {"model.py", "model.safetensors"} <= {path.name for path in (tmp_path / "small").iterdir()}


def test_compare_tells_a_difference_by_its_status(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, data = tmp_path / "small.onnx", tmp_path / "data.npz"
    run("optimize", model_file, "-o", small, "--passes", "prune{ratio=0.5}")
    name = _input_name(model_file)
    np.savez(data, **{name: np.ones((2, 6), dtype=np.float32)})
    assert run("compare", model_file, small, "--data", data) == 1
    assert run("compare", model_file, model_file, "--data", data) == 0
    assert "different within 1e-05" in capsys.readouterr().out


def _input_name(path: Path) -> str:
    from regauge.backends.run_onnxruntime import Session

    return Session(path).inputs[0]


def test_inspect_groups_and_explain(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model_file) == 0
    assert "parameters" in capsys.readouterr().out
    assert run("inspect", model_file, "--text") == 0
    assert "linear" in capsys.readouterr().out
    assert run("groups", model_file, "--free") == 0
    lines = capsys.readouterr().out.splitlines()
    name = lines[1].split()[0]
    assert len(lines) == 3 and lines[0].split() == ["Dim", "size", "members"]
    assert run("groups", model_file, "--of", name) == 0
    assert name in capsys.readouterr().out
    assert run("explain", model_file, name) == 0
    assert capsys.readouterr().out.strip()


def test_inspect_says_for_which_sizes_macs_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(nn.Linear(6, 3), (torch.randn(2, 6),), dynamic_shapes={"input": {0: batch}})
    torch.export.save(program, tmp_path / "model.pt2")
    assert run("inspect", tmp_path / "model.pt2") == 0
    macs = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MACs"))
    assert "18 with " in macs and macs.endswith("=1")


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("passes") == 0
    assert "prune" in capsys.readouterr().out
    assert run("passes", "simplify") == 0
    assert "identities/neutral-number" in capsys.readouterr().out
    assert run("passes", "prune") == 0
    shown = capsys.readouterr().out
    assert "before" in shown and "round_to" in shown and "score=mask-gradient" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "MODEL", "-o", "OUT", "--passes", "prune{ratio=2}"), "'ratio' of prune must be at least 0"),
        (("optimize", "MODEL", "-o", "OUT", "--passes", "prune{rato=0.5}"), "did you mean 'ratio'"),
        (("optimize", "MODEL", "-o", "OUT", "--passes", "prun"), "did you mean 'prune'"),
        (("optimize", "MODEL", "-o", "OUT", "--passes", "prune{params=1,exclude=x}"), "matches no parameter"),
        (("optimize", "MODEL", "-o", "OUT", "--data", "MODEL"), "is not an .npz file of arrays: save one by"),
        (("optimize", "MODEL", "-o", "OUT", "--data", "ZIP"), "is not an .npz file of arrays: save one by"),
        (("inspect", "ZIP"), "is no ONNX file: export the module to .onnx, or save what torch.export gives of it"),
        (("inspect", "TEXT"), "is not a program that torch.export saved: save it by torch.export.save"),
        (("optimize", "MODEL", "-o", "FOLDER", "--functions"), "--functions is for ONNX files, and"),
        (("optimize", "MODEL", "-o", "FOLDER", "--sparse-weights"), "--sparse-weights is for ONNX files, and"),
        (("optimize", "missing.onnx", "-o", "OUT"), "there is no file missing.onnx"),
        (("optimize", "MODEL", "-o", "OUT", "--data", "missing.npz"), "there is no file missing.npz"),
        (("compare", "MODEL", "MODEL", "--data", "missing.npz"), "there is no file missing.npz"),
        (("optimize", "MODEL", "-o", "WRONG"), "small.pt2 would be a .pt2 file: name an .onnx file, or a folder"),
        (("optimize", "MODEL", "-o", "OUT", "--passes", "prune{macs=1.5}"), "macs=1.5 is neither a share"),
        (("optimize", "MODEL"), "Missing option '-o'"),
        (("optimize", "MODEL", "-o", "OUT", "--pases", "x"), "No such option '--pases'"),
        (("optimise", "MODEL"), "No such command 'optimise'"),
        (("groups", "MODEL", "--of", "nothing:0"), "no Dim or parameter axis is called 'nothing:0'"),
        (("explain", "MODEL", "nothing"), "no Dim, parameter axis, parameter or value is called 'nothing'; `reg"),
        (("explain", "MODEL", "linera"), "is called 'linera'; did you mean linear"),
        (("passes", "prun"), "did you mean 'prune'"),
        (("compare", "MODEL", "BROKEN"), ""),
        (("inspect", "BROKEN"), ""),
    ],
)
def test_errors_take_one_line_and_leave_nothing(
    arguments: tuple[str, ...], message: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model_file.read_bytes()[:200])
    zipped, text = broken.with_suffix(".pt"), broken.with_suffix(".pt2")
    zipped.write_bytes(b"PK\x03\x04")
    text.write_text("this is no archive")
    files = {
        "MODEL": model_file, "OUT": tmp_path / "out.onnx", "BROKEN": broken, "WRONG": tmp_path / "small.pt2",
        "FOLDER": tmp_path / "small", "ZIP": zipped, "TEXT": text,
    }  # fmt: skip
    assert run(*[files.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("regauge: ") and len(error.splitlines()) == 1 and message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "broken.pt", "broken.pt2"]


def test_a_caret_shows_what_is_wrong_with_a_pipeline(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("optimize", model_file, "-o", tmp_path / "out.onnx", "--passes", "prune{ratio=") == 2
    first, text, caret = capsys.readouterr().err.splitlines()
    assert first == "regauge: pass pipeline, column 13: expected a value, but the text ends"
    assert text == "    prune{ratio=" and caret == " " * 16 + "^"


@pytest.mark.parametrize("command", [("optimize", "MODEL", "-o", "OUT"), ("compare", "MODEL", "MODEL")])
def test_arrays_under_wrong_names_are_told_with_those_expected(
    command: tuple[str, ...], model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, pixels=np.ones((2, 6), dtype=np.float32))
    files = {"MODEL": model_file, "OUT": tmp_path / "out.onnx"}
    assert run(*[files.get(part, part) for part in command], "--data", data) == 2
    name = _input_name(model_file)
    assert capsys.readouterr().err == f"regauge: {data} holds arrays called pixels, but the model takes {name}\n"


@pytest.mark.parametrize("command", [("optimize", "MODEL", "-o", "OUT"), ("compare", "MODEL", "MODEL")])
def test_arrays_are_held_to_the_inputs_with_their_file(
    command: tuple[str, ...], model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy makes double precision where nothing else is said; other numbers and shapes are mistakes."""
    name, data = _input_name(model_file), tmp_path / "data.npz"
    files = {"MODEL": model_file, "OUT": tmp_path / "out.onnx"}
    arguments = [*[files.get(part, part) for part in command], "--data", data]
    np.savez(data, **{name: np.ones((2, 6))})
    assert run(*arguments) == 0
    assert f"regauge: warning: {data}: {name} is f64[2,6], taken as f32\n" in capsys.readouterr().err
    for wrong, what, how in (
        (np.ones((2, 6), dtype=int), "i64[2,6]", "type"),
        (np.ones((2, 6, 1)), "f64[2,6,1]", "shape"),
    ):
        np.savez(data, **{name: wrong})
        assert run(*arguments) == 2
        message = f"regauge: {data}: {name} is {what}, the model takes f32[2,6]: give it in that {how}\n"
        assert capsys.readouterr().err == message
    np.savez(data, **{name: np.array(["a", "b"])})
    assert run(*arguments) == 2
    assert f"{data}: {name} holds <U1, which is no type of numbers" in capsys.readouterr().err


def test_data_of_passes_may_hold_labels(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out.onnx"
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    np.savez(data, **{_input_name(model_file): x, "labels": np.arange(8) % 3})
    for passes in ("prune{ratio=0.5,score=taylor},simplify", "sort"):
        assert run("optimize", model_file, "-o", out, "--data", data, "--passes", passes) == 0
    assert run("compare", model_file, out, "--data", data) == 2
    np.save(tmp_path / "one.npy", x)
    assert run("optimize", model_file, "-o", out, "--data", tmp_path / "one.npy") == 2
    assert "one.npy holds one array without a name: save it by numpy.savez" in capsys.readouterr().err


def test_fusion_prints_the_kernels_and_what_is_refused(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fusion", model_file) == 0
    shown = capsys.readouterr().out
    assert shown.count("linear relu") == 2 and "3 kernels instead of 5" in shown
    assert "it would have two contractions" in shown


def test_memory_says_where_the_peak_is(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("memory", model_file, "--values", "2") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "are alive at the peak, at " in printed[0] and "holds the run" in printed[0]
    assert printed[2].split() == ["bytes", "value", "from", "to"] and len(printed) == 5


def test_fusion_tells_a_wrong_target_or_size(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fusion", model_file, "--target", "abacus") == 2
    assert "no target 'abacus': give cpu or gpu" in capsys.readouterr().err
    assert run("fusion", model_file, "--at", "batch=many") == 2
    assert "--at batch=many: give the name of a dynamic size and its value" in capsys.readouterr().err


def test_scales_tell_what_moves_and_what_takes_it_up(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("scales", model_file) == 0
    shown = capsys.readouterr().out
    assert "it is an input of the graph" in shown and "0.weight, 0.bias, 2.weight^-1" in shown
    assert shown.endswith("\n2 fixed, 2 moves\n")


def test_groups_count_what_cannot_be_cut(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("groups", model_file) == 0
    shown = capsys.readouterr().out
    assert "2 more cannot be cut (--all lists them):\n" in shown and "  1 x it is an axis of a graph output\n" in shown
    assert run("groups", model_file, "--all") == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[0].split() == ["Dim", "size", "members", "state"]
    assert run("groups", model_file, "--of", "0.weight:0") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-2 if place == 1 else -1] for place, row in enumerate(rows)] == [
        "state", "0.weight:0", "0.bias:0", "2.weight:1",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "command",
    [
        ("optimize", "MODEL", "-o", "OUT", "--passes", "prune{macs=0.5,scope=global,minimum=2}"),
        ("groups", "MODEL", "--all"),
        ("groups", "MODEL", "--of", "0.weight:0"),
        ("inspect", "MODEL"),
        ("explain", "MODEL", "0.weight:0"),
        ("passes",),
        ("passes", "prune"),
    ],
)
def test_everything_fits_into_a_terminal(
    command: tuple[str, ...], columns: int, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("regauge.terminal.width", lambda: columns)
    files = {"MODEL": model_file, "OUT": "out.onnx"}
    monkeypatch.chdir(tmp_path)
    assert run(*[files.get(part, part) for part in command]) == 0
    lines = capsys.readouterr().out.splitlines()
    path = str(model_file)
    assert max(len(line) for line in lines if path not in line) <= columns
    if command[0] == "optimize" and columns == 80:
        assert lines[0] == "prune{macs=0.5,scope=global,minimum=2}"  # in one piece, the figures below it
        assert lines[2].split()[:2] == ["MACs", "2.62K"]


def test_version_and_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"regauge {regauge.__version__}\n"
    assert run("passes", "-h") == 0 and "regauge passes prune" in capsys.readouterr().out


def test_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("operators") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 250  # of operators with a dozen names not all are listed
    rows = [line.split() for line in lines]
    assert len(rows) == len(all_operators()) + 1
    assert ["linear", "...", "i,", "o", "i,", "o?", "->", "...", "o", "linear"] in [row[:10] for row in rows]
    assert run("operators", "LayerNormalization") == 0
    assert "layer_norm" in capsys.readouterr().out
    assert run("operators", "Layernormalization") == 2
    assert "did you mean LayerNormalization" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("optimize", "inspect", "groups", "explain", "compare", "passes", "operators", "demo"):
        assert run(command, "--help") == 0
        assert f"regauge {command}" in capsys.readouterr().out.partition("\n")[2]


def test_as_a_program(model_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "regauge", "groups", str(model_file), "--of", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    piped = f"'{sys.executable}' -m regauge groups '{model_file}' | head -n 1"
    done = subprocess.run(piped, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Dim") and "Traceback" not in done.stderr and "\x1b" not in done.stdout


def test_what_could_not_be_written_is_told_before_the_work(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regauge.cli.open_file", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "folder.onnx").mkdir()
    for out, reason in {"none/o.onnx": "the folder", "folder.onnx": "it is a folder"}.items():
        assert run("optimize", model_file, "-o", tmp_path / out) == 2
        assert reason in capsys.readouterr().err


def test_source_of_others_is_not_replaced(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    assert run("optimize", model_file, "-o", own) == 0 == run("optimize", model_file, "-o", own)  # what is ours is
    (own / "model.py").write_text("class Mine: ...\n")
    capsys.readouterr()
    monkeypatch.setattr("regauge.cli.open_file", lambda *_, **__: pytest.fail("the model was read"))
    assert run("optimize", model_file, "-o", own) == 2
    assert "model.py was not written by Regauge, and is left as it is" in capsys.readouterr().err
    assert (own / "model.py").read_text() == "class Mine: ...\n"


def test_demo_makes_the_network_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert run("demo", "--quick", "--save", tmp_path / "digits.onnx") == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"wrote {tmp_path / 'digits.onnx'} and {tmp_path / 'digits.pruned.onnx'}\n")
    assert all(word in shown for word in ("accuracy", "parameters", "MACs", "ONNX file", "onnxruntime"))
    sizes = [(tmp_path / name).stat().st_size for name in ("digits.pruned.onnx", "digits.onnx")]
    assert sizes[0] < 0.5 * sizes[1]
    shares = {line.split()[0]: line.split()[-3:] for line in shown.splitlines() if "%" in line}["accuracy"]
    trained, pruned, _ = (float(share.rstrip("%")) for share in shares)
    assert pruned > trained - 5, "half of the multiply-accumulates, and no training since"


def test_reading_a_model_leaves_the_compiler_of_torch_alone(model_file: Path) -> None:
    """It takes a second to import, at every call, and the shapes of common operators need none of it."""
    code = f"import sys; from regauge.cli import main; main(['explain', {str(model_file)!r}, '0.weight:0'])"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('torch._dynamo' in sys.modules)"], capture_output=True)
    assert done.stdout.splitlines()[-1] == b"False", done.stderr


def test_passes_given_twice_run_one_after_the_other(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("optimize", model_file, "-o", tmp_path / "small.onnx")
    assert run(*command, "--passes", "prune{ratio=0.5}", "--passes", "simplify") == 0
    shown = capsys.readouterr().out
    assert "prune{ratio=0.5}" in shown and "simplify" in shown
    assert run(*command) == 0
    assert "converted only: no passes are given" in capsys.readouterr().out


def test_a_program_with_keyword_inputs_is_opened(tmp_path: Path) -> None:
    import torch

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    path = tmp_path / "scaled.pt2"
    torch.export.save(torch.export.export(Scaled(), (torch.ones(2),), {"scale": torch.ones(2)}), path)
    assert run("inspect", path) == 0
