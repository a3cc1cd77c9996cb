"""Tables of vectors: bits of their numbers, and one storage for a table that is the weight of a layer as well."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import regauge
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures
from regauge.ir.graph import Graph

ENTRIES, WIDTH = 60, 48


class Tied(nn.Module):
    """Token ids to logits by way of a hidden layer; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(ENTRIES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return nn.functional.linear(x + self.hidden(x).relu(), self.table.weight)


def tied(*, dynamic: bool = False) -> tuple[Graph, list[tuple[torch.Tensor]]]:
    batches = [(torch.randint(0, ENTRIES, (8, 5)),) for _ in range(4)]
    return regauge.capture(Tied().eval(), batches[0], dynamic={0: {0: "batch"}} if dynamic else None), batches


def decibels(graph: Graph, other: Graph) -> float:
    x = torch.randint(0, ENTRIES, (8, 5))
    (a,), (b,) = graph.run((x,)), other.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


def integers(path: Path) -> dict[str, tuple[int, ...]]:
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    found = onnx.load(path).graph.initializer
    return {tensor.name: tuple(tensor.dims) for tensor in found if tensor.data_type in kinds and len(tensor.dims) == 2}


def same_in_onnx(small: Graph, path: Path) -> None:
    x = torch.randint(0, ENTRIES, (8, 5))
    (wanted,) = small.run((x,))
    session = Session(path, optimisation="off")  # else it may quantize what a product with dequantized weights reads
    (found,) = session.run({small.inputs[0].name: x})
    assert torch.allclose(found, wanted, atol=1e-4) and torch.allclose(small.to_torch()(x), wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_tied_weight_is_stored_once(bits: int, tmp_path: Path) -> None:
    """The lookup and the head read the same numbers."""
    graph, _ = tied(dynamic=True)
    step = f"quantize{{scheme=w8,target=reference,table_bits={bits}}}"
    small = regauge.optimize(graph, step)
    stored = [p for p in small.all_parameters() if "table" in p.name and p.dtype in (torch.int8, torch.uint8)]
    own = [p for p in stored if len(p.shape) == 2]
    assert len(own) == 1 and len(own[0].uses) == 2 and "table.weight" not in small.parameters
    assert figures(small).bytes < figures(graph).bytes * (0.35 if bits == 8 else 0.28)
    assert decibels(graph, small) > {8: 40, 4: 16, 3: 9, 2: 3}[bits]
    small.to_onnx(tmp_path / "small.onnx")
    same_in_onnx(small, tmp_path / "small.onnx")
    assert len(integers(tmp_path / "small.onnx")) == 2


def test_a_tied_head_multiplies_the_integers_of_the_table(tmp_path: Path) -> None:
    graph, batches = tied()
    small = regauge.optimize(graph, "quantize", data=batches)
    assert decibels(graph, small) > 30 and figures(small).bytes < 0.35 * figures(graph).bytes
    small.to_onnx(tmp_path / "small.onnx")  # audited
    assert kernels_of(tmp_path / "small.onnx")[0]["QGemm"] == 2
    assert list(integers(tmp_path / "small.onnx").values()).count((ENTRIES, WIDTH)) == 1
    same_in_onnx(small, tmp_path / "small.onnx")


@pytest.mark.parametrize(
    ("target", "activations"),
    [("torch-cpu", "static"), ("torch-cpu", "dynamic"), ("reference", "dynamic"), ("tensorrt", "static")],
)
def test_a_tied_head_reads_the_table_as_lookups_do(target: str, activations: str) -> None:
    """Where others turn weights round for products, the rows of a table stay its vectors."""
    graph, batches = tied(dynamic=True)
    small = regauge.optimize(graph, f"quantize{{activations={activations},target={target},smoothing=0}}", data=batches)
    codes = [p for p in small.all_parameters() if p.dtype == torch.int8 and tuple(p.shape) == (ENTRIES, WIDTH)]
    assert len(codes) == 1 and len(codes[0].uses) == 2 and "table.weight" not in small.parameters
    assert decibels(graph, small) > 30
    x = torch.randint(0, ENTRIES, (8, 5))
    assert torch.allclose(small.to_torch()(x), small.run((x,))[0], atol=1e-4)


def test_a_tied_weight_that_a_runtime_would_convert_is_left(tmp_path: Path) -> None:
    graph, batches = tied(dynamic=True)
    for step, reason in (
        ("quantize", "if sizes are known"),
        ("quantize{activations=dynamic}", "if activations=static"),
        ("quantize{scheme=w4,group=16,storage=false}", "blocks of inputs alone"),
    ):
        small = regauge.optimize(graph, step, data=batches)
        assert [reason in left for left in small.report.passes[0].left] == [True]
        assert small.parameters["table.weight"].dtype == torch.float32


def test_bits_of_tables_that_stay_are_refused() -> None:
    graph, _ = tied()
    with pytest.raises(regauge.RegaugeError, match="table_bits does nothing with embeddings=false"):
        regauge.optimize(graph, "quantize{scheme=w8,table_bits=4,embeddings=false}")


def test_tables_of_few_vectors_stay_as_they_are() -> None:
    """Kinds of tokens: what 8 bits lose of one vector is in every position, and does not average out."""

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds = nn.Embedding(500, 32), nn.Embedding(2, 32)

        def forward(self, tokens: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            return self.words(tokens) + self.kinds(kinds)

    tokens = torch.randint(0, 500, (2, 9))
    graph = regauge.capture(Kinds().eval(), (tokens, tokens % 2))
    small = regauge.optimize(graph, "quantize{scheme=w8}")
    assert "kinds.weight" in small.parameters and "words.weight_quantized" in small.parameters
    assert "1 tables of vectors" in str(small.report) and "few vectors" in str(small.report)
