"""Formats of weights beyond integers of a few bits: what they lose, how small they are, and the same numbers in torch
and onnxruntime."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import regauge
from format_network import decibels, network, share
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.codebooks import Tables
from regauge.passes.quantization.float_grids import Float8, Powers
from regauge.passes.quantization.grid import Form, Grid, Ternary
from regauge.passes.quantization.signs import OneBit


def stored(scheme: str, tmp_path: Path, *, data: bool = True) -> tuple[float, float, float]:
    """Decibels of a scheme, and bytes in memory and in a file as shares; torch and onnxruntime agree with the graph."""
    graph, batches = network()
    step = f"quantize{{scheme={scheme},target=reference}}"
    small = regauge.optimize(graph, step, data=batches if data else None)
    x = torch.randn(5, 6, 6)
    (wanted,) = small.run((x,))
    assert torch.allclose(small.to_torch()(x), wanted, atol=1e-5)
    small.to_onnx(tmp_path / "small.onnx")
    level: Any = (
        "off" if scheme == "fp8" else "all"
    )  # onnxruntime moves 8-bit floats to where it has no kernels for them
    (found,) = Session(tmp_path / "small.onnx", optimisation=level).run({small.inputs[0].name: x})
    assert torch.allclose(found, wanted, atol=1e-4)
    whole = int(figures(graph).bytes)
    size = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer)
    return decibels(graph, small), int(figures(small).bytes) / whole, size / whole


def problem(rows: int = 24, columns: int = 64) -> Quadratic:
    x = torch.randn(2000, columns, dtype=torch.float64).cumsum(1) * torch.linspace(0.1, 3, columns).double()
    hessian = x.t() @ x + torch.eye(columns, dtype=torch.float64)
    zero = torch.zeros(columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return Quadratic(hessian, weight, zero, torch.zeros(rows, dtype=torch.float64))


def test_ternary_scales_are_those_of_bitnet() -> None:
    """round(w / g) within -1 ... 1, g the mean or median of magnitudes, of the tensor, of a row, or of a group."""
    weight = torch.randn(6, 64).double()
    for statistic, g in (("mean", weight.abs().mean()), ("median", weight.abs().median())):
        coded = Form(Ternary(), 64, statistic, shared=True).rounded(weight)
        assert torch.allclose(coded.values, (weight / g).round().clamp(-1, 1) * g)
    rows = Form(Ternary(), 16, "mean").rounded(weight)
    assert torch.allclose(rows.scale, weight.abs().reshape(6, 4, 16).mean(2))
    errors = [share(weight, Form(Ternary(), 64, s).rounded(weight).values) for s in ("least", "mean", "median")]
    assert errors[0] < 0.21 and errors[0] < min(errors[1:])  # a normal weight keeps 0.19 of its square at best


@pytest.mark.parametrize(("bias", "told"), [(4, False), (30, True), (-14, True)])
def test_weights_beyond_one_exponent_are_told(bias: int, told: bool) -> None:
    """They saturated, or vanished, without a word."""
    graph = regauge.capture(torch.nn.Linear(16, 8), (torch.randn(2, 16),))
    notes = (
        regauge.optimize(graph, f"quantize{{scheme=e4m3,target=reference,rule=cscale,bias={bias}}}")
        .report.passes[0]
        .notes
    )
    assert any("beyond the range of one exponent" in note and "weight" in note for note in notes) is told


@pytest.mark.parametrize("shared", [False, True])
def test_ternary_columns_make_up_for_one_another(shared: bool) -> None:
    given = problem()
    for scales in ("least", "mean"):
        form = Form(Ternary(), 64, scales, shared)  # type: ignore[arg-type]
        losses = [
            float(given.losses(coded.values).sum())
            for coded in (form.rounded(given.optimum), form.fitted(given, "columns"), form.fitted(given, None))
        ]
        assert losses[1] < 0.6 * losses[0] and losses[2] < losses[1]
        assert set(form.fitted(given, None).codes.unique().tolist()) == {-1, 0, 1}


def test_ternary_weights_in_a_file(tmp_path: Path) -> None:
    """Two bits in a graph of torch take four in a file of opset 21; packed, five trits share a byte in both."""
    gained, _, size = stored("ternary,per=row", tmp_path)
    _, packed, packed_size = stored("ternary,per=row,packed=true", tmp_path)
    assert gained > 8 and size < 0.14
    assert packed < 0.065 and packed_size < 0.065


def test_ternary_blocks_run_on_the_kernel_of_onnxruntime(tmp_path: Path) -> None:
    batches = [(torch.randn(16, 9, 64),)]
    graph = regauge.capture(nn.Linear(64, 32).eval(), batches[0], dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "quantize{scheme=ternary}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")  # audited
    with pytest.raises(PassError, match="ort-x86 reads blocks of 16, 32, 64, ... inputs, not per=tensor"):
        regauge.optimize(graph, "quantize{scheme=ternary,per=tensor}")
    with pytest.raises(PassError, match="statistic does nothing with scheme=w4"):
        regauge.optimize(graph, "quantize{scheme=w4,statistic=mean}")


def test_floats_of_eight_bits() -> None:
    """The nearest float of the type; scales are powers of two, and nothing goes beyond the greatest float."""
    weight = torch.randn(8, 64).double() * torch.logspace(-3, 3, 8)[:, None].double()
    for kind, most in ((torch.float8_e4m3fn, 8e-4), (torch.float8_e4m3fnuz, 8e-4), (torch.float8_e5m2, 3e-3)):
        coded = Form(Float8(kind=kind), 64).rounded(weight)
        assert torch.equal(torch.exp2(torch.log2(coded.scale).round()), coded.scale)
        assert share(weight, coded.values) < most and coded.codes.abs().max() <= torch.finfo(kind).max
        assert torch.equal(coded.codes.float().to(kind).double(), coded.codes)


def test_exponents_of_floats_follow_a_rule() -> None:
    """AMAX: b = floor(log2(most / max |x|)) - margin, of a type whose most is 448, 240 or 57344; CSCALE: one b for all,
    and what it puts beyond the greatest float is clipped."""
    weight = torch.randn(8, 64).double() * torch.logspace(-3, 3, 8)[:, None].double()
    for kind, most in ((torch.float8_e4m3fn, 448), (torch.float8_e4m3fnuz, 240), (torch.float8_e5m2, 57344)):
        for margin in (0, 2):
            scale = Form(Float8(kind=kind, margin=margin), 64, "whole").rounded(weight).scale[:, 0]
            b = torch.floor(torch.log2(most / weight.abs().amax(1))) - margin
            assert torch.equal(scale, torch.exp2(-b))
    coded = Form(Float8(bias=3), 64, "whole").rounded(weight)
    assert bool((coded.scale == 2.0**-3).all())
    assert torch.equal(coded.values, (weight * 8).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() / 8)


def test_exponents_of_a_graph_in_floats_follow_a_rule() -> None:
    """Of weights and activations; one for all needs no data."""
    graph, batches = network()

    def scales(options: str, data: Any) -> dict[str, torch.Tensor]:
        small = regauge.optimize(graph, f"quantize{{scheme=fp8,target=reference{options}}}", data=data)
        return {p.name: p.tensor for p in small.all_parameters() if p.name.endswith("_scale")}

    plain, wide = scales("", batches), scales(",margin=1", batches)
    values = [name for name, scale in plain.items() if scale.dim() == 0]
    assert values and all(float(wide[name]) == 2 * float(plain[name]) for name in values)
    assert all(
        torch.equal(scale, torch.full_like(scale, 2.0**-4)) for scale in scales(",rule=cscale,bias=4", None).values()
    )
    fitted = scales(",method=descent", batches)
    assert all(torch.equal(scale.log2().round().exp2(), scale) for scale in fitted.values())  # stay powers of two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("scheme=fp8,rule=cscale,margin=1", "margin does nothing with rule=cscale"),
        ("scheme=fp8,bias=1", "bias does nothing without rule=cscale"),
        ("scheme=w8,rule=cscale", "rule does nothing with scheme=w8"),
        ("scheme=fp8,rule=cscale,calibration=mse", "calibration does nothing with rule=cscale"),
        ("scheme=fp8,activations=dynamic,rule=cscale", "rule=cscale is not for exponents of every run"),
        ("scheme=fp8,activations=dynamic,margin=1", "margin=1 is not for exponents of every run"),
    ],
)
def test_rules_of_exponents_that_do_nothing_are_refused(options: str, words: str) -> None:
    with pytest.raises(PassError, match=words):
        regauge.optimize(network()[0], f"quantize{{target=reference,{options}}}")


@pytest.mark.parametrize(("scheme", "least"), [("e4m3", 30), ("e5m2,per=tensor", 23), ("fp8", 24)])
def test_floats_of_eight_bits_in_a_file(scheme: str, least: float, tmp_path: Path) -> None:
    gained, size, in_file = stored(scheme, tmp_path)
    assert gained > least and size < 0.27 and in_file < 0.27


def test_a_runtime_without_their_kernels_is_refused_formats() -> None:
    graph, batches = network()
    for scheme, kind in (("fp8", "float8"), ("e4m3", "float8"), ("pow2", "powers of two")):
        with pytest.raises(PassError, match=f"no kernel of ort-x86 reads {kind}.*target=reference stores"):
            regauge.optimize(graph, f"quantize{{scheme={scheme}}}", data=batches)


def test_floats_of_eight_bits_are_read_back_and_cut(tmp_path: Path) -> None:
    """Types without zero points: a file that was quantized to them can be pruned."""
    graph, batches = network()
    regauge.optimize(graph, "quantize{scheme=fp8,target=reference}", data=batches).to_onnx(tmp_path / "small.onnx")
    again = regauge.load(tmp_path / "small.onnx")
    cut = regauge.optimize(again, "prune{ratio=0.5,compensate=false}")
    kinds = [p for p in cut.all_parameters() if p.dtype == torch.float8_e4m3fn]
    assert sorted(tuple(p.shape) for p in kinds) == [(20, 6, 3), (80, 128), (128, 128)]
    assert cut.run((torch.randn(4, 6, 6),))[0].isfinite().all()


def test_powers_of_two() -> None:
    """sign 2^round(log2 |w|) beside a scale that is a power of two itself, and zeros stay zeros."""
    weight = torch.randn(8, 64).double()
    weight[:, 5] = 0
    coded = Form(Powers(4), 64).rounded(weight)
    logarithm = torch.log2(coded.values.abs()[coded.values != 0])
    assert torch.equal(logarithm, logarithm.round()) and not coded.values[:, 5].any()
    wanted = torch.sign(weight) * torch.exp2(torch.log2(weight.abs()).round())
    inside = (weight.abs() < coded.scale) & (weight.abs() > coded.scale / 64)
    assert torch.allclose(coded.values[inside], wanted[inside])
    assert share(weight, coded.values) < 0.037
    digits, base = coded.grid.digits(coded.codes)
    table = coded.grid.table
    assert table is not None and base == len(table) == 15 and torch.equal(table[digits.long()], coded.codes.float())


def test_powers_of_two_in_a_file(tmp_path: Path) -> None:
    gained, size, in_file = stored("pow2", tmp_path)
    assert gained > 12 and size < 0.145 and in_file < 0.145
    grouped, *_ = stored("pow2,bits=3,group=16", tmp_path)
    assert 9 < grouped < gained


def test_blocks_share_an_exponent(tmp_path: Path) -> None:
    """e = floor(log2 max |w|) of a block, mantissas of m bits in steps of 2^(e - m + 2)."""
    weight = torch.randn(4, 64).double()
    coded = Form(Grid(5), 16, "powers").rounded(weight)
    exponent = torch.floor(torch.log2(weight.reshape(4, 4, 16).abs().amax(2)))
    assert torch.equal(coded.scale, torch.exp2(exponent - 5 + 2))
    assert (coded.codes.abs() <= 16).all() and share(weight, coded.values) < 4e-3
    gained, size, _ = stored("bfp,bits=4,packed=true", tmp_path)
    assert gained > 20 and size < 0.17


def test_codebooks_are_those_of_k_means() -> None:
    """Four clusters are found; importance draws numbers to the columns that have it."""
    centres = torch.tensor([-3.0, -0.5, 0.2, 2.0]).double()
    weight = centres[torch.randint(0, 4, (8, 64))] + 0.01 * torch.randn(8, 64).double()
    found = Tables(2).rounded(weight)
    assert torch.allclose(found.table[0], centres, atol=0.01) and share(weight, found.values) < 1e-4
    normal = torch.randn(4, 64).double()
    importance = torch.ones(64).double()
    importance[:8] = 100
    plain, weighted = Tables(3).rounded(normal), Tables(3).rounded(normal, importance)
    assert share(normal[:, :8], weighted.values[:, :8]) < 0.6 * share(normal[:, :8], plain.values[:, :8])
    assert share(normal, plain.values) < 0.05  # of a normal variable 8 numbers keep all but 0.035
    rows = Tables(3, 1).rounded(normal)
    assert rows.table.shape == (4, 8) and share(normal, rows.values) < share(normal, plain.values)


@pytest.mark.parametrize("rows", [None, 8, 1])
def test_tables_and_codes_are_bettered_in_turns(rows: int | None) -> None:
    given, form = problem(), Tables(3, rows)
    start = form.rounded(given.optimum)
    losses = [
        float(given.losses(found.values).sum())
        for found in (start, start.refitted(given), form.fitted(given, "columns"), form.fitted(given, None))
    ]
    assert losses[1] < losses[0] and losses[2] < 0.3 * losses[0] and losses[3] < losses[2]


def test_codebooks_in_a_file(tmp_path: Path) -> None:
    gained, size, in_file = stored("codebook,bits=4", tmp_path)
    assert gained > 20 and size < 0.14 and in_file < 0.14
    two, size, _ = stored("codebook,bits=2,group=8", tmp_path)
    assert 8 < two < gained and size < 0.085


def test_like_outputs_share_a_codebook() -> None:
    """Rows of two kinds that alternate: brought together, exactly, a table for each kind loses far less."""
    front, back = nn.Linear(64, 32), nn.Linear(32, 8)
    with torch.no_grad():
        front.weight[::2] *= 20
        back.weight[:, ::2] /= 20
    graph = regauge.capture(nn.Sequential(front, nn.ReLU(), back).eval(), (torch.randn(2, 64),))
    step = "quantize{scheme=codebook,bits=2,group=16,target=reference,include=0.weight"
    x = torch.randn(2, 64)
    (wanted,) = graph.run((x,))
    errors = []
    for rest in ("}", ",permute=true}"):
        small = regauge.optimize(graph, step + rest)
        errors.append(float((small.run((x,))[0] - wanted).square().sum()))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(PassError, match="say group=N"):
        regauge.optimize(graph, "quantize{scheme=codebook,permute=true,target=reference}")


def test_signs_and_the_best_magnitudes_of_rank_one() -> None:
    weight = torch.randn(24, 64).double() * torch.rand(24, 1).double() * torch.rand(64).double()
    found = OneBit().rounded(weight)
    assert torch.equal(torch.sign(found.values), torch.sign(weight)) and (found.a > 0).all() and (found.b > 0).all()
    sizes = torch.linalg.svdvals(weight.abs())
    left = float((weight.abs() - torch.outer(found.a, found.b)).square().sum())
    assert left == pytest.approx(float(sizes[1:].square().sum()), rel=1e-3)
    assert found.bits == 24 * 64 + 16 * (24 + 64)


def test_signs_make_up_for_one_another() -> None:
    given = problem()
    start = OneBit().rounded(given.optimum)
    losses = [
        float(given.losses(found.values).sum())
        for found in (start, start.refitted(given), OneBit().fitted(given, "columns"), OneBit().fitted(given, None))
    ]
    assert losses[1] < losses[0] and losses[2] < 0.6 * losses[0] and losses[3] < 0.9 * losses[2]
    assert set(OneBit().fitted(given, None).codes.unique().tolist()) == {-1, 1}


def test_signs_in_a_file(tmp_path: Path) -> None:
    """y = ((x b) s') a: a bit for each weight."""
    gained, size, in_file = stored("onebit", tmp_path)
    assert gained > 4 and size < 0.06 and in_file < 0.06


@pytest.mark.parametrize(
    "scheme", ["onebit", "pow2", "codebook,bits=2", "w4,packed=true,symmetric=true", "ternary,per=row,packed=true"]
)
def test_what_is_packed_is_cut_by_bytes(scheme: str) -> None:
    """Outputs go one by one, inputs as many at a time as share a byte; where none divides them they stay."""
    graph, batches = network()
    small = regauge.optimize(graph, f"quantize{{scheme={scheme},target=reference}}", data=batches)
    cut = regauge.optimize(small, "prune{ratio=0.5,compensate=false}")
    assert cut.run((torch.randn(4, 6, 6),))[0].isfinite().all()
    assert figures(cut).bytes < 0.6 * figures(small).bytes


def test_simplify_leaves_what_is_stored_small() -> None:
    graph, batches = network()
    small = regauge.optimize(graph, "quantize{scheme=onebit,target=reference}", data=batches)
    assert figures(regauge.optimize(small, "simplify")).bytes == figures(small).bytes


@pytest.mark.parametrize("scheme", ["onebit", "ternary,packed=true", "codebook,bits=2,group=8", "pow2,group=16", "fp8"])
def test_formats_in_a_file_that_was_loaded(scheme: str, tmp_path: Path) -> None:
    """Written by the records, in the opset that the file has, and read back."""
    graph, batches = network()
    loaded = regauge.load(graph.to_onnx(tmp_path / "float.onnx"))
    small = regauge.optimize(loaded, f"quantize{{scheme={scheme},target=reference}}", data=batches)
    small.to_onnx(tmp_path / "small.onnx")
    x = torch.randn(5, 6, 6)
    (wanted,) = small.run((x,))
    (found,) = Session(tmp_path / "small.onnx", optimisation="off").run({small.inputs[0].name: x})
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(regauge.load(tmp_path / "small.onnx").run((x,))[0], wanted, atol=1e-5)
