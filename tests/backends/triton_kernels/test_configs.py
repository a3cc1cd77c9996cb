"""How kernels are cut: the shipped table, tuned ones, and what the screen without a GPU keeps."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.backends.triton_kernels import screen as kernel_screen
from regauge.backends.triton_kernels import tuning as kernel_tuning
from regauge.backends.triton_kernels.compile import Compiled, build_of
from regauge.backends.triton_kernels.configs import Case, Config, Entry, Table, config_of, shipped
from regauge.backends.triton_kernels.kernel import Launch, case_of, launch_of
from regauge.backends.triton_kernels.samples import SAMPLES, parsed, sample
from regauge.backends.triton_kernels.screen import GPUS, Model, candidates, resident, screen
from regauge.backends.triton_kernels.tuning import tune
from regauge.cli import main
from regauge.ir.errors import FusionError

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 8}
SIZES = {"pointwise": (64, 4096, 1), "rows": (64, 4096, 1), "looped": (64, 65536, 1), "contraction": (64, 256, 512)}


@pytest.mark.parametrize("architecture", GPUS)
@pytest.mark.parametrize("form", SAMPLES)
def test_the_shipped_table_has_every_form_and_type(form: str, architecture: str) -> None:
    for numbers in ("half", "single"):
        assert any(
            (e.architecture, e.case.form, e.case.numbers) == (architecture, form, numbers) for e in shipped().entries
        )
        assert config_of(Case(form, numbers, (3, 1000, 7)), architecture).warps >= 4


def test_the_nearest_sizes_count_and_of_rows_the_columns_first() -> None:
    near, far = (Config({"ENTRIES": n}, 4, 2) for n in (1024, 2048))
    entries = [Entry("sm_80", Case("rows", "half", s), c) for s, c in (((8, 4096, 1), near), ((4096, 512, 1), far))]
    table = Table(entries)
    assert table.nearest("sm_80", Case("rows", "half", (4096, 3000, 1))) == near
    assert table.nearest("sm_90", Case("rows", "half", (8, 600, 1))) == far  # a newer one takes those of an older one
    assert table.nearest("sm_80", Case("pointwise", "half", (8, 600, 1))) is None


def test_of_pointwise_kernels_the_number_of_entries_counts() -> None:
    few, many = (Config({"ENTRIES": n}, 4, 2) for n in (512, 1024))
    sizes = {(16, 4096, 1): few, (4096, 4096, 1): many}
    table = Table([Entry("sm_80", Case("pointwise", "half", s), config) for s, config in sizes.items()])
    assert table.nearest("sm_80", Case("pointwise", "half", (1, 2**24, 1))) == many
    assert table.nearest("sm_80", Case("pointwise", "half", (1, 2**17, 1))) == few


def test_a_tuned_entry_is_for_sizes_with_the_same_powers_of_two() -> None:
    case = Case("contraction", "half", (60, 4000, 4096))
    tuned = Table([Entry("sm_90", case, Config(TILE, 4, 3))])
    assert config_of(replace(case, sizes=(33, 2049, 4000)), "sm_90", tuned).tile == TILE
    for other in (replace(case, sizes=(32, 4000, 4096)), replace(case, numbers="single")):
        assert config_of(other, "sm_90", tuned) == config_of(other, "sm_90")
    assert config_of(case, "sm_80", tuned) == config_of(case, "sm_80")


def test_a_table_is_written_an_entry_a_line_and_read_again(tmp_path: Path) -> None:
    table = Table([Entry("sm_90", Case("contraction", "half", (16, 64, 64)), Config(TILE, 4, 3))])
    table.write(tmp_path / "table.json", "made by hand")
    assert Table.read(tmp_path / "table.json").entries == table.entries
    assert (tmp_path / "table.json").read_text().count("\n") == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("warps"), "entry 0: KeyError\\('warps'\\) is missing or wrong"),
        (lambda row: row.update(warps=6), "entry 0: 6 is no power of two"),
        (
            lambda row: row["tile"].pop("GROUP"),
            "a tile of the form contraction has BLOCK_M, .*, not BLOCK_M, BLOCK_N, B",
        ),
        (lambda row: row.update(architecture="gfx90a"), "is missing or wrong"),
    ],
)
def test_a_wrong_entry_is_told(change: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    Table([Entry("sm_90", Case("contraction", "half", (16, 64, 64)), Config(TILE, 4, 3))]).write(path, "")
    whole = json.loads(path.read_text())
    change(whole["entries"][0])
    path.write_text(json.dumps(whole))
    with pytest.raises(FusionError, match=message):
        Table.read(path)
    path.write_text("[]")
    with pytest.raises(FusionError, match="is no table of kernel configurations: regauge autotune writes one"):
        Table.read(path)
    with pytest.raises(FusionError, match="there is no file"):
        Table.read(tmp_path / "none.json")


def test_tiles_are_no_larger_than_what_there_is() -> None:
    kernel, sizes = sample("contraction", (5, 40, 24), "bf16")
    config = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, 8, 3)
    start = launch_of(kernel.source(), sizes, config)
    assert start == Launch(1, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}, 4, 3)
    assert case_of(kernel.source(), sizes) == Case("contraction", "half", (5, 40, 24))


def test_what_a_multiprocessor_holds_follows_from_what_a_program_takes() -> None:
    gpu = GPUS["sm_90"]
    assert resident(Launch(1, {}, 4), 32, 0, gpu) == 16  # 2048 threads
    assert resident(Launch(1, {}, 8), 168, 0, gpu) == 1  # 65536 registers
    assert resident(Launch(1, {}, 4), 64, 100 * 1024, gpu) == 2  # 228 KiB


def test_the_model_likes_more_bytes_in_flight_and_tiles_that_fill_the_device() -> None:
    kernel, sizes = sample("contraction", (16, 4096, 4096), "bf16")
    model = Model(kernel.source(), sizes, GPUS["sm_90"])

    def seconds(wide: int, stages: int) -> float:
        tile = {"BLOCK_M": 16, "BLOCK_N": wide, "BLOCK_K": 64, "GROUP": 8}
        return model.guess(launch_of(kernel.source(), sizes, Config(tile, 4, stages)))

    assert seconds(64, 4) < seconds(64, 2) and seconds(64, 5) < seconds(256, 5)
    assert model.guess(launch_of(kernel.source(), sizes, Config(TILE | {"BLOCK_K": 4096}, 4, 5))) == float("inf")


@needs_triton
def test_what_spills_or_takes_too_much_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, sizes = sample("pointwise", (64, 4096, 1), "bf16")

    def compiled(source: Any, sizes: Any, architecture: str, config: Config) -> Compiled:
        entries = config.tile["ENTRIES"]
        build = build_of(source, sizes, architecture, config)
        return Compiled(b"", 64, 8 if entries > 2048 else 0, 400 * 1024 if entries < 1024 else 0, build)

    monkeypatch.setattr(kernel_screen, "compile_kernel", compiled)
    found = screen([(kernel.source(), sizes)], "sm_90", most=100)
    assert {one.config.tile["ENTRIES"] for one in found} == {1024, 2048}
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    with pytest.raises(FusionError, match="screened for sm_80 or sm_90, not for sm_75"):
        screen([(kernel.source(), sizes)], "sm_75")


@needs_triton
def test_the_fastest_of_those_that_fit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_tuning, "TIMED", 5)
    samples = [sample("pointwise", (64, columns, 1), "bf16") for columns in (4096, 3000)]
    timed: list[Config] = []

    def measure(sample: Any, rivals: Any) -> list[float]:
        configs = [rival.tuned.entries[0].config for rival in rivals]
        timed.extend(configs)
        return [abs(config.tile["ENTRIES"] - 2048) + config.warps for config in configs]

    (one,) = tune(samples, "sm_90", measure)  # one case for both
    assert one.entry.config == Config({"ENTRIES": 2048}, 4, 2) and one.entry.case.sizes == (64, 4096, 1)
    assert one.seconds == 8 and one.shipped is not None and one.shipped > 8
    assert len(timed) % 2 == 0 and config_of(one.entry.case, "sm_90") in timed


@needs_triton
def test_on_a_newer_gpu_what_is_timed_is_screened_for_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_tuning, "TIMED", 1)
    samples = [sample("pointwise", (64, 1024, 1), "bf16")]
    (one,) = tune(samples, "sm_89", lambda _, rivals: [1.0] * len(rivals))
    assert one.entry.architecture == "sm_89"
    with pytest.raises(FusionError, match="screened for sm_80 or sm_90, not for sm_89"):
        list(tune(samples, "sm_89"))


@pytest.mark.parametrize("form", SAMPLES)
def test_every_form_has_candidates(form: str) -> None:
    kernel, sizes = sample(form, SIZES[form], "bf16")
    found = candidates(case_of(kernel.source(form), sizes))  # type: ignore[arg-type]
    assert 4 <= len(found) == len({str(config) for config in found})


@pytest.mark.parametrize("text", ["rows:4096:bf16", "contraction:1x2:bf16", "rows:0x5:bf16", "rows:4xx4:bf16"])
def test_wrong_shapes_are_told(text: str) -> None:
    with pytest.raises(FusionError, match=f"--shapes {text}: give rows, columns"):
        parsed(text)


def test_a_type_without_kernels_is_told() -> None:
    with pytest.raises(FusionError, match="there are no kernels of type 'i9': give f32, f16 or bf16"):
        parsed("rows:4x8:i9")


def test_without_a_gpu_autotune_says_what_it_can_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    command = ["autotune", "--shapes", "pointwise:64x1024:bf16", "-o", str(table)]
    if not torch.cuda.is_available():
        assert main(command) == 2
        assert "no GPU to time kernels on: --offline --arch sm_90 screens" in capsys.readouterr().err
    assert main([*command, "--offline"]) == 2
    assert "--offline needs an --arch" in capsys.readouterr().err
    assert not table.exists()
    assert main(["autotune", "--shapes", "pointwise:64x1024:bf16", "-o", str(tmp_path / "none" / "table.json")]) == 2
    assert "none does not exist, make it first" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_configurations_are_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert main(["autotune", "--shapes", "pointwise:4096x1024:bf16", "-o", str(table)]) == 0
    assert len(Table.read(table).entries) == 1 and "measured on" in table.read_text()
    assert capsys.readouterr().out.count(" us") == 3


@needs_triton
def test_a_table_is_screened_offline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    shapes = ["--shapes", "pointwise:64x1024:bf16", "--shapes", "rows:64x512:f32"]
    assert main(["autotune", *shapes, "--offline", "--arch", "sm_90", "-o", str(table)]) == 0
    shown = capsys.readouterr().out
    assert [entry.case.form for entry in Table.read(table).entries] == ["pointwise", "rows"]
    assert "64x1024x1" in shown and "single" in shown and "not measured" in table.read_text()
