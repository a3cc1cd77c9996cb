"""``kv-quantize`` by other methods than ranges: what they take and lose, and the same step by step, in ONNX too."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import regauge
from decoders import Placed, Rotary, characters, decoder, stepped
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, carried
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes


@cache
def graph(kind: str) -> Graph:
    torch.manual_seed(0)
    return decoder(Placed() if kind == "places" else Rotary(kind))


@cache
def rounded(kind: str, options: str) -> Graph:
    return regauge.optimize(graph(kind), f"kv-quantize{{{options}}}", data=[characters(32, 20)])


def error(kind: str, options: str) -> float:
    tokens = characters(16, 20, 5)
    (wanted,), (got,) = graph(kind).run(tokens), rounded(kind, options).run(tokens)
    return float((wanted - got).square().sum() / wanted.square().sum()) ** 0.5


SIZES = {  # bytes of a position; two attentions of 32 channels of keys and of values each, or 16 where heads are shared
    ("places", "bits=2,method=coupled"): 2 * 2 * 32 // 4,
    ("shared", "bits=4,method=rotated"): 2 * 2 * 2 * (4 + 4),
    ("shared", "bits=2,predict=true"): 2 * 2 * 2 * (2 + 4),
    ("shared", "bits=1,method=coupled,predict=true"): 2 * 2 * 16 // 8,
}


@pytest.mark.sweep  # each takes torch's exporter ten seconds
@pytest.mark.parametrize(("kind", "options"), SIZES)
def test_steps_give_what_the_whole_gives(kind: str, options: str, tmp_path: Path) -> None:
    whole = rounded(kind, options)
    cached = regauge.optimize(whole, "kv-cache")
    verify(cached, axes=True)
    assert cache_bytes(cached) == SIZES[kind, options]
    tokens = characters(2, 9)
    wanted = whole.run(tokens)[0]
    torch.testing.assert_close(stepped(Steps(cached), tokens, (4, 1, 1, 3)), wanted, rtol=1e-3, atol=1e-4)
    loaded = regauge.load(cached.to_onnx(tmp_path / "cached.onnx"))
    assert len(carried(loaded)) == len(carried(cached))
    session = _session(tmp_path / "cached.onnx", cached)
    torch.testing.assert_close(stepped(Steps(cached, session), tokens, (4, 1, 4)), wanted, rtol=1e-3, atol=1e-4)


def _session(path: Path, cached: Graph) -> object:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    ]


@pytest.mark.parametrize("kind", ["places"])
def test_vectors_lose_less_than_ranges_in_a_third_of_the_room(kind: str) -> None:
    assert error(kind, "bits=2,method=coupled") < 0.85 * error(kind, "bits=2")
    assert error(kind, "bits=4,method=coupled") < 0.5 * error(kind, "bits=2,method=coupled")


def test_what_a_layer_before_tells_need_not_be_kept() -> None:
    assert error("places", "bits=2,predict=true") < 0.5 * error("places", "bits=2")
    assert error("shared", "bits=2,predict=true") < 0.5 * error("shared", "bits=2")


def test_turned_channels_have_no_outliers() -> None:
    torch.manual_seed(0)
    model = Rotary("shared")
    for attention in model.attentions:  # one pair of channels of each head far above the others, as in trained keys
        gain = torch.ones(8)
        gain[[1, 5]] = 20.0
        for layer, scales in ((attention.q, (1 / gain).repeat(4)), (attention.k, gain.repeat(2))):
            layer.weight.data.mul_(scales[:, None])
    whole, tokens = decoder(model), characters(16, 20)
    lost = []
    for options in ("bits=4", "bits=4,method=rotated"):
        found = regauge.optimize(whole, f"kv-quantize{{{options}}}")
        lost.append(float((whole.run(tokens)[0] - found.run(tokens)[0]).square().mean()))
    assert lost[1] < 0.8 * lost[0]


def test_bits_go_where_errors_count() -> None:
    torch.manual_seed(0)
    model = Placed()
    model.out[1].weight.data.mul_(1e-3)  # nearly nothing comes of the second attention
    whole, tokens = decoder(model), characters(16, 20, 5)
    data = [characters(32, 20)]
    found = regauge.optimize(whole, "kv-quantize{bytes=96}", data=data)
    even = regauge.optimize(whole, "kv-quantize{bits=2}", data=data)
    assert cache_bytes(regauge.optimize(found, "kv-cache")) <= 96 == cache_bytes(regauge.optimize(even, "kv-cache"))
    more = regauge.optimize(whole, "kv-quantize{bytes=128}", data=data)
    assert cache_bytes(regauge.optimize(more, "kv-cache")) <= 128
    assert "4 bits" in str(more.report) and "2 bits" in str(more.report)
    (wanted,) = whole.run(tokens)
    evenly = regauge.optimize(whole, "kv-quantize{bits=4}", data=data)  # 128 bytes, too
    lost = [float((wanted - other.run(tokens)[0]).square().mean()) for other in (more, evenly, even)]
    assert lost[0] < 0.5 * lost[1] < 0.5 * lost[2]


def test_what_is_missing_is_told() -> None:
    with pytest.raises(PassError, match="makes its tables from data"):
        regauge.optimize(graph("places"), "kv-quantize{method=coupled}")
    with pytest.raises(PassError, match="predict needs data"):
        regauge.optimize(graph("places"), "kv-quantize{predict=true}")
    with pytest.raises(PassError, match="bits=1 is for method=coupled"):
        regauge.optimize(graph("places"), "kv-quantize{bits=1}")
    with pytest.raises(PassError, match="the fewest bits take 96"):
        regauge.optimize(graph("places"), "kv-quantize{bytes=64}", data=[characters(32, 20)])
