"""Keeping some token ids: what is computed of them stays, inputs and outputs have new numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.passes.pruning.vocabulary import new_ids

KEPT = [2, 3, 7, 11, 19]


class Language(nn.Module):
    """Ids [batch, length] to logits [batch, length, ids]; the head is the table, or a weight of its own."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.tok, self.pos = nn.Embedding(20, 12, padding_idx=3), nn.Embedding(8, 12)
        self.mix, self.head, self.segments = nn.Linear(12, 12), nn.Linear(12, 20), nn.Embedding(4, 12)

    def forward(self, ids: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        if self.kind == "segments":
            x = x + self.segments(more[0])
        if self.kind == "pair":
            x = x + self.tok(more[0]).mean(1, keepdim=True)
        if self.kind == "start":
            x = x + self.tok(torch.tensor([3]))
        if self.kind == "padding":
            x = x * (ids != 3)[..., None]
        x = self.mix(x).cumsum(1).relu()
        if self.kind == "untied":
            return self.head(x).log_softmax(-1)
        logits = x @ self.tok.weight.t()
        return logits.flip(-1) if self.kind == "turned" else logits + torch.arange(20)


def captured(kind: str = "", more: Any = ()) -> Graph:
    torch.manual_seed(0)
    model = Language(kind).eval()
    nn.init.normal_(model.tok.weight)
    ids = torch.randint(0, 20, (2, 6))
    return regauge.capture(model, (ids, *more), dynamic={0: {0: "batch", 1: "length"}} if not more else None)


def sentence(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept ids, as the original counts them and as the result does."""
    new = torch.randint(0, len(KEPT), shape, generator=torch.Generator().manual_seed(1))
    return torch.tensor(KEPT)[new], new


def test_logits_of_kept_ids_are_those_of_the_original(tmp_path: Path) -> None:
    graph = captured()
    small = regauge.optimize(graph, f"vocabulary{{keep={KEPT},mapping={tmp_path / 'ids.json'}}}")
    old, new = sentence(3, 5)
    expected = run(graph, [old])[0][..., KEPT]
    torch.testing.assert_close(run(small, [new])[0], expected)
    torch.testing.assert_close(small.to_torch()(new), expected)
    assert small.parameters["tok.weight"].shape == (5, 12) and small.outputs[0].shape[-1] == 5  # type: ignore[union-attr]
    pairs = {2: 0, 3: 1, 7: 2, 11: 3, 19: 4}
    assert new_ids(graph, small) == pairs
    assert json.loads((tmp_path / "ids.json").read_text()) == {str(old): new for old, new in pairs.items()}
    text = str(small.report)
    assert "ids takes new ids, 0 to 4 for 20: 2 -> 0, 3 -> 1" in text and "columns of the new ids alone: add_1" in text
    assert "padding_idx=1" in str(small)


def test_a_head_of_its_own_goes_too_and_a_softmax_over_ids_is_told() -> None:
    graph = captured("untied")
    small = regauge.optimize(graph, f"vocabulary{{keep={KEPT}}}")
    assert [list(small.parameters[name].shape) for name in ("tok.weight", "head.weight", "head.bias")] == [
        [5, 12], [5, 12], [5],
    ]  # fmt: skip
    assert any("log_softmax is computed over the kept indices" in note for note in small.report.passes[0].notes)
    old, new = sentence(2, 4)
    expected = run(graph, [old])[0][..., KEPT].log_softmax(-1)
    torch.testing.assert_close(run(small, [new])[0], expected)


def test_all_inputs_that_are_looked_up_in_the_table_are_told() -> None:
    ids = torch.randint(0, 20, (2, 3))
    graph = captured("pair", (ids,))
    small = regauge.optimize(graph, f"vocabulary{{keep={KEPT}}}")
    (old, new), (other_old, other_new) = sentence(2, 6), sentence(2, 3)
    expected = run(graph, [old, other_old])[0][..., KEPT]
    torch.testing.assert_close(run(small, [new, other_new])[0], expected)
    assert "ids and more.0 take new ids" in small.report.passes[0].notes[0]


def test_the_most_frequent_ids_of_the_data_stay() -> None:
    batches = [torch.tensor([[5, 5, 5, 9, 9, 1]]), torch.tensor([[5, 9, 4, 1, 9, 5]])]
    graph = captured()
    small = regauge.optimize(graph, "vocabulary{count=3}", data=batches)
    assert list(new_ids(graph, small)) == [1, 5, 9]
    small = regauge.optimize(graph, "vocabulary{count=3,keep=17}", data=batches)
    assert list(new_ids(graph, small)) == [5, 9, 17]


def test_an_onnx_file_loses_the_same_rows(tmp_path: Path) -> None:
    graph = captured()
    loaded = regauge.load(graph.to_onnx(tmp_path / "whole.onnx"))
    (tmp_path / "ids.txt").write_text("\n".join(map(str, KEPT)))
    small = regauge.optimize(loaded, f"vocabulary{{keep={tmp_path / 'ids.txt'}}}")
    written = regauge.load(small.to_onnx(tmp_path / "small.onnx"))
    assert written.outputs[0].shape[-1] == 5  # type: ignore[union-attr]
    old, new = sentence(2, 5)
    torch.testing.assert_close(run(written, [new])[0], run(graph, [old])[0][..., KEPT], rtol=1e-5, atol=1e-5)


def test_the_table_is_named_where_there_are_several() -> None:
    segments = torch.randint(0, 4, (2, 6))
    graph = captured("segments", (segments,))
    with pytest.raises(PassError, match="looked up in tok.weight, segments.weight: name one"):
        regauge.optimize(graph, "vocabulary{keep=[0,1]}")
    small = regauge.optimize(graph, f"vocabulary{{keep={KEPT},table=tok.*}}")
    old, new = sentence(2, 6)
    torch.testing.assert_close(run(small, [new, segments])[0], run(graph, [old, segments])[0][..., KEPT])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("padding", "keep=[1,2]", "reads token ids, which would be other ones"),
        ("start", "keep=[1,2]", "looks up ids that no input gives"),
        ("turned", "keep=[1,2]", "flip.* tells ids apart"),
        ("", "keep=[1,20]", "there is no id 20: tok.weight has 0..19"),
        ("", "keep=[]", "keep names no id"),
        ("", "count=3", "needs data"),
        ("", "table=tok.weight", "takes ids or how many"),
        ("", "keep=[1],table=mix.*", "no graph input is looked up in a table that is called mix"),
        ("", "keep=no_such_file.txt", "no_such_file.txt is no file of token ids"),
    ],
)
def test_what_cannot_be_done_is_refused(kind: str, options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        regauge.optimize(captured(kind), f"vocabulary{{{options}}}")


def test_all_ids_change_nothing() -> None:
    graph = captured()
    assert not regauge.optimize(graph, f"vocabulary{{keep={list(range(20))}}}").report.passes[0].changed


def test_a_mapping_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / "absent" / "ids.json"
    with pytest.raises(PassError, match="cannot be written: No such file"):
        regauge.optimize(captured(), f"vocabulary{{keep={KEPT},mapping={place}}}")
