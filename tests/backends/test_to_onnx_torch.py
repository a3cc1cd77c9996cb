"""Graphs captured from torch, written through torch's exporter: names, dynamic axes and results are kept."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from onnx_models import pruned
from regauge.backends.compare import compare
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.capture import capture
from regauge.ir.errors import EmitError, RegaugeWarning
from regauge.ir.graph import Graph


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.norm(self.embed(x)))
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        return {"logits": self.head(hidden), "hidden": hidden.sum(-1)}


@pytest.fixture(scope="module")
def module() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def graph(module: Network) -> Graph:
    inputs = {"mask": torch.ones(2, 5)}
    dynamic = {"x": {0: "batch", 1: "time"}, "mask": {0: "batch", 1: "time"}}
    return capture(module, (torch.randn(2, 5, 6),), inputs, dynamic=dynamic)


def test_file_computes_what_the_module_does(module: Network, graph: Graph, tmp_path: Path) -> None:
    path = graph.to_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes == {"x": ["batch", "time", 6], "mask": ["batch", "time"]}
    assert [v.name for v in model.graph.output] == ["logits", "hidden"]
    assert {"embed.bias", "norm.weight", "head.bias"} <= {i.name for i in model.graph.initializer}
    for batch, time in ((1, 1), (3, 4)):
        x, mask = torch.randn(batch, time, 6), torch.rand(batch, time)
        with torch.no_grad():
            expected = module(x, mask=mask)
        found = Session(path).run({"x": x, "mask": mask})
        torch.testing.assert_close(found, [expected["logits"], expected["hidden"]], rtol=1e-4, atol=1e-5)


def test_pruned_graph_is_written_with_its_history(graph: Graph, tmp_path: Path) -> None:
    small = pruned(graph)
    model = onnx.load(small.to_onnx(tmp_path / "p.onnx"))
    noted = {entry.key: entry.value for entry in model.metadata_props}
    assert noted["regauge.passes"] == "prune" and noted["regauge.version"]
    (bias,) = [i for i in model.graph.initializer if i.name == "embed.bias"]
    assert list(bias.dims) == [4]


class BiasedAttention(nn.Module):
    """Attention with a relative position bias, as in Swin and T5."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.arange(36) % 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).reshape(x.shape[0], 6, 2, 4).transpose(1, 2) for layer in self.maps)
        bias = self.table[self.index].reshape(6, 6, 2).permute(2, 0, 1).unsqueeze(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(1, 2).reshape(x.shape[0], 6, 8)


def test_attention_with_a_bias_keeps_its_dynamic_batch(tmp_path: Path) -> None:
    graph = capture(BiasedAttention().eval(), (torch.randn(2, 6, 8),), dynamic={0: {0: "batch"}})
    graph.to_onnx(tmp_path / "m.onnx")
    x = torch.randn(5, 6, 8)
    torch.testing.assert_close(Session(tmp_path / "m.onnx").run((x,))[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


class MaskedAttention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_queries_without_any_key_are_written_as_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch's exporter writes the mean of what is hidden, and of numbers for a mask NaN."""
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    graph = capture(MaskedAttention().eval(), (q, k, mask), dynamic=dict.fromkeys(range(3), {0: "batch"}))
    graph.to_onnx(tmp_path / "m.onnx")
    expected = MaskedAttention()(q, k, mask)
    assert expected[0, :, 2].count_nonzero() == 0
    torch.testing.assert_close(Session(tmp_path / "m.onnx").run((q, k, mask))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "amax", "amin", "sum"])
def test_reductions_over_all_axes_are_written(name: str, tmp_path: Path) -> None:
    class Reduced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x.sin() * getattr(x.cos(), name)()
            return result

    graph = capture(Reduced().eval(), (torch.randn(2, 6, 8),), dynamic={0: {0: "batch"}})
    graph.to_onnx(tmp_path / "m.onnx")
    x = torch.randn(5, 6, 8)
    torch.testing.assert_close(Session(tmp_path / "m.onnx").run((x,))[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


def test_weights_go_beside_the_model_on_request(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regauge.backends.onnx_model.write.LEAST_EXTERNAL_BYTES", 96)
    graph.to_onnx(tmp_path / "m.onnx", external_data=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


def test_what_the_exporter_refuses_is_one_line(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("stage 2 failed\nwith a long story") from ValueError(
            "no decomposition for aten.strange\nmore"
        )

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(EmitError, match="refused the emitted module: no decomposition for aten.strange$"):
        graph.to_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_an_lstm_with_projected_states_is_refused_by_name(tmp_path: Path) -> None:
    """torch's exporter writes its projection off, with states of the wrong size."""
    network = nn.LSTM(6, 8, proj_size=4, batch_first=True).eval()
    with pytest.raises(EmitError, match="lstm.*projects its states"):
        capture(network, (torch.randn(2, 5, 6),)).to_onnx(tmp_path / "projected.onnx")


class Counting(nn.Module):
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.mean(0))
        return x + self.total


def test_a_file_that_forgets_what_runs_write_says_so(tmp_path: Path) -> None:
    graph = capture(Counting().eval(), (torch.randn(2, 4),))
    with pytest.warns(RegaugeWarning, match="each run of the module writes total; an ONNX file keeps nothing"):
        graph.to_onnx(tmp_path / "counting.onnx")


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x >> 2


def test_a_file_that_gives_another_type_is_refused(tmp_path: Path) -> None:
    """torch's exporter casts shifted bytes to signed ones; only their values were held to the graph's."""
    graph = capture(Shifted(), (torch.arange(6, dtype=torch.uint8),))
    with pytest.raises(EmitError, match="the type torch.int8, the graph gives torch.uint8"):
        graph.to_onnx(tmp_path / "shifted.onnx")


def test_windows_of_a_dynamic_size_fit_what_the_exporter_traces(tmp_path: Path) -> None:
    """It was given two entries, on which a kernel of five does not fit; so was ``compare``."""
    graph = capture(nn.Conv1d(3, 4, 5), (torch.randn(2, 3, 20),), dynamic={0: {2: "length"}})
    path = graph.to_onnx(tmp_path / "window.onnx")
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(Session(path).run([x])[0], graph.run([x])[0], rtol=1e-5, atol=1e-5)
    assert compare(graph, path).equal()


def test_recurrent_layers_stay_dynamic_in_every_export(tmp_path: Path) -> None:
    """torch's exporter unrolls all but the first of a process, which fixes the length of the sequence."""
    graph = capture(nn.GRU(3, 4, batch_first=True), (torch.randn(2, 5, 3),), dynamic={0: {0: "batch", 1: "length"}})
    for name in ("first", "second"):
        path = graph.to_onnx(tmp_path / f"{name}.onnx")
        x = torch.randn(3, 7, 3)
        torch.testing.assert_close(Session(path).run([x])[0], graph.run([x])[0], rtol=1e-5, atol=1e-5)
