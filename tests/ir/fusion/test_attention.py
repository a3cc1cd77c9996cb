"""Which nodes become attention in one pass: a softmax between two contractions, as one node or written out."""

from math import prod

import pytest
import torch

import regauge
from decoder_block import decoder_block
from decoders import Rotary, decoder
from regauge.ir.cost import item_size, smallest_sizes
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention import find_attention
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.plan import Plan, plan_fusion
from regauge.ir.fusion.prologues import again
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.splits import slice_splits
from regauge.ir.fusion.tracing import trace
from regauge.ir.fusion.traffic import bytes_moved
from regauge.ir.graph import Graph


def ops(plan: Plan) -> list[list[str]]:
    return [[node.op for node in region.nodes] for region in plan.regions]


def built() -> tuple[Graph, Builder]:
    graph = Graph("g")
    return graph, Builder(graph)


def test_with_few_queries_attention_turns_its_keys_itself() -> None:
    plan = plan_fusion(decoder_block(tokens=64))
    (attention,) = (region for region in plan.regions if region.kind == "attention")
    assert [node.op for node in attention.nodes].count("concat") == 2 and len(plan.kernels) == 7
    assert list(attention.names.values()) == ["b0", "b1", "m0", "n0", "k0", "s0", "s1", "s2", "s3", "s4"]


def test_what_is_between_two_contractions_may_be_no_softmax() -> None:
    def reason(op: str, **options: object) -> str | None:
        graph, build = built()
        q, k, v = (build.input(name, (8, 64, 32), torch.float32) for name in "qkv")
        scores = build.matmul(q, build.permute(k, dims=(0, 2, 1)))
        graph.outputs = [build.matmul(build(op, scores, **options), v)]
        return fault(trace(graph.nodes, graph.outputs))

    assert reason("softmax", dim=2) is None
    assert reason("log_softmax", dim=2) == "its second contraction is not of what the softmax gives and of values"
    assert reason("softmax", dim=1) == "its second contraction is not of what the softmax gives and of values"
    assert reason("rms_norm", normalized_shape=(64,)) == "it would have two contractions, and no softmax between them"
    assert reason("relu") == "it would have two contractions"


def test_one_query_reads_keys_and_values_as_codes() -> None:
    def kernels(length: int) -> list[list[str]]:
        graph, build = built()
        q = build.input("q", (1, 8, length, 64), torch.float16)
        k, v = (build.input(name, (1, 8, 4096, 64), torch.uint8) for name in "kv")
        scales = [build.input(name, (1, 8, 4096, 1), torch.float16) for name in ("k_scale", "v_scale")]
        read = [build.mul(build.cast(x, dtype=torch.float16), scale) for x, scale in zip((k, v), scales, strict=True)]
        graph.outputs = [build.attention(q, *read, scale=0.125)]
        return ops(plan_fusion(graph))

    assert kernels(1) == [["cast", "mul", "cast", "mul", "attention"]]
    assert kernels(4096) == [["cast", "mul", "cast", "mul"], ["attention"]]  # they would be read back for each tile


SIZES = {"batch": 4, "past": 1000}


def cached(passes: str, length: int) -> tuple[Graph, dict[object, int], Plan, list[Region]]:
    """A decoder with caches and sizes, its plan there, and regions that are attention."""
    torch.manual_seed(0)
    graph = regauge.optimize(decoder(Rotary(width=256)), f"{passes},kv-cache")
    slice_splits(graph)
    at = {symbol: {**SIZES, "length": length}[str(symbol)] for symbol in graph.symbols}
    plan = plan_fusion(graph, at=at, contractions=False)
    return graph, at, plan, [region for region in plan.regions if region.kind == "attention"]


@pytest.mark.parametrize("length", [1, 128])
def test_attention_reads_caches_of_four_bits(length: int) -> None:
    graph, at, _, regions = cached("kv-quantize{bits=4}", length)
    bound = smallest_sizes(graph, at)
    assert len(regions) == 2
    for region in regions:
        assert region.attention is not None and region.attention.coded_keys and region.attention.coded_values
        assert [node.op for node in region.nodes].count("unpack") == 2
        moved = bytes_moved(region, lambda v: prod(map(bound, v.shape)) * item_size(v.dtype), bound)
        places = 2 * 4 * (1000 + length)  # of two heads and four sequences
        codes, ranges = 2 * 64 // 2 * places, 2 * 2 * 2 * places
        queries, mask = 2 * 4 * 4 * 64 * length * 4, length * (1000 + length)
        assert moved == codes + ranges + queries + mask


def test_numbers_are_made_of_codes_once_for_more_rows() -> None:
    *_, plan, regions = cached("kv-quantize{bits=4}", 257)  # two heads of queries read one of keys
    assert not any("unpack" in [node.op for node in region.nodes] for region in regions)
    assert "with more than 512 rows numbers of keys and values are faster" in {one.reason for one in plan.refusals}


def test_rotated_keys_are_computed_from_latents_where_scores_are() -> None:
    graph, _, plan, regions = cached("kv-latent{bytes=0.5}", 1)
    assert len(regions) == 2
    for region in regions:
        assert region.attention is not None and region.attention.latent_keys is not None
        latents, *_ = region.attention.latent_keys.latents.value.value.shape[2:]
        assert [dim.size for dim in region.attention.rank] == [latents] and latents < 2 * 64
        assert len(region.attention.latent_keys.products) == 2  # as they are, and with halves swapped
        assert region.attention.latent_values is not None and not region.attention.latent_values.shifts
        assert region.attention.value_rank.isdisjoint(region.attention.rank)
    linear = [step.op for step in plan.kernels if not isinstance(step, Region)].count("linear")
    assert linear == sum(node.op == "linear" for node in graph.nodes) - 4  # of keys, and of values


def latent_attention(rows: int, *, rank: int = 24, turned: bool = True, other: bool = False) -> Graph:
    graph, build = built()
    q, latents, v = (
        build.input(n, s, torch.float16) for n, s in (("q", (rows, 64)), ("l", (999, rank)), ("v", (999, 64)))
    )
    weight = build.parameter("w", torch.zeros(64, rank, dtype=torch.float16))
    keys = build.linear(latents, weight)
    if turned:
        halves = [build.slice(keys, dim=1, start=start, end=start + 32, step=1) for start in (0, 32)]
        keys = build.mul(
            build.concat(build.neg(halves[1]), halves[0], dim=1), build.input("sin", (999, 64), torch.float16)
        )
    if other:
        keys = build.add(keys, build.linear(build.tanh(latents), weight))
    graph.outputs = [build.attention(q, keys, v, scale=0.125)]
    return graph


def test_keys_of_many_queries_are_computed_once() -> None:
    def kernels(rows: int) -> int:
        return len(plan_fusion(latent_attention(rows), contractions=False).kernels)

    assert [kernels(rows) for rows in (2, 128, 129)] == [1, 1, 3]
    assert len(plan_fusion(latent_attention(2, rank=64), contractions=False).kernels) == 2  # latents are no fewer


def turned_keys(width: int, dtype: torch.dtype, rank: int) -> Graph:
    graph, build = built()
    q, latents, v, cos, sin = (
        build.input(name, shape, dtype)
        for name, shape in {
            "q": (2, width), "l": (999, rank), "v": (999, width), "cos": (999, width), "sin": (999, width)
        }.items()
    )  # fmt: skip
    keys = build.linear(latents, build.parameter("w", torch.zeros(width, rank, dtype=dtype)))
    low, high = (build.slice(keys, dim=1, start=s, end=s + width // 2, step=1) for s in (0, width // 2))
    keys = build.add(build.mul(keys, cos), build.mul(build.concat(build.neg(high), low, dim=1), sin))
    graph.outputs = [build.attention(q, keys, v, scale=0.125)]
    return graph


@pytest.mark.parametrize(
    ("width", "dtype", "rank", "why"),
    [
        (256, torch.float32, 32, "128 in single precision"),
        (256, torch.bfloat16, 40, "128 where 16 does not divide their rank"),
        (128, torch.float32, 40, "64 in single precision and where 16 does not divide their rank"),
        (256, torch.bfloat16, 32, None),
        (128, torch.float32, 32, None),
        (64, torch.float32, 40, None),
    ],
)
def test_keys_of_more_products_than_a_program_holds_are_computed_before(
    width: int, dtype: torch.dtype, rank: int, why: str | None
) -> None:
    """Such kernels would spill registers: the plan has a product for the keys, and attention that reads them."""
    graph = turned_keys(width, dtype, rank)
    reason = why and f"its keys are 2 products of heads of {width} numbers: of those a program holds {why}"
    assert fault(trace(graph.nodes, graph.outputs)) == reason  # type: ignore[arg-type]
    plan = plan_fusion(graph, contractions=False)
    attention = [region for region in plan.regions if region.kind == "attention"]
    assert [region.attention.latent_keys is None for region in attention] == [why is not None]  # type: ignore[union-attr]


def test_keys_may_be_products_with_one_tensor_of_latents() -> None:
    for options in ({}, {"turned": False}):
        graph = latent_attention(2, **options)
        assert fault(trace(graph.nodes, graph.outputs)) is None  # type: ignore[arg-type]
    graph = latent_attention(2, other=True)
    with pytest.raises(FusionError, match="keys or values are .* not as sums of products of the same latents"):
        find_attention(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]


def latent_values(rows: int, rank: int, *, heads: int = 8, scaled: str = "") -> Graph:
    """Heads of 64 values that are products with latents of all heads."""
    graph, build = built()
    q = build.input("q", (heads, rows, 64), torch.float16)
    k, latents = (build.input(n, s, torch.float16) for n, s in (("k", (heads, 999, 64)), ("l", (999, rank))))
    if scaled == "before":
        latents = build.mul(latents, build.input("s", (999, 1), torch.float16))
    weight = build.parameter("w", torch.zeros(heads * 64, rank, dtype=torch.float16))
    values = build.linear(latents, weight, build.parameter("b", torch.zeros(heads * 64, dtype=torch.float16)))
    values = build.permute(build.reshape(values, shape=(999, heads, 64)), dims=(1, 0, 2))
    if scaled == "behind":
        values = build.mul(values, build.input("s", (999, 1), torch.float16))
    graph.outputs = [build.attention(q, k, values, scale=0.125)]
    return graph


def test_latents_are_mixed_in_place_of_values() -> None:
    (region,) = plan_fusion(latent_values(1, 96), contractions=False).regions
    parts = region.attention
    assert parts is not None and parts.latent_values is not None
    assert [load.value.value.name for load in region.loads] == ["l", "w", "b", "q", "k"]
    assert [[term.value.value.name for term in shift] for shift in parts.latent_values.shifts] == [["b"]]
    assert [dim.size for dim in parts.value_rank] == [96] and [dim.size for dim in parts.batch] == [8]
    places, heads = 999, 8 * 64
    moved = bytes_moved(region, lambda v: prod(v.shape) * item_size(v.dtype), lambda size: size)
    assert moved == 2 * (places * 96 + heads * 96 + heads + places * heads + 2 * heads)  # values are not there


@pytest.mark.parametrize(
    ("rows", "rank", "reason"),
    [
        (128, 64, ""),
        (96, 192, ""),  # as many multiplications for each place: 96 x 192 with latents, (96 + 192) x 64 apart
        (97, 192, "it would take more multiplications to mix what values are made of than to compute these once"),
        (129, 64, "it would take more multiplications to mix what values are made of than to compute these once"),
        (1, 257, "latents of values have 256 numbers at most, and not a dynamic number"),
    ],
)
def test_values_are_computed_where_that_takes_fewer_multiplications(rows: int, rank: int, reason: str) -> None:
    graph = latent_values(rows, rank)
    region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
    kernels = plan_fusion(graph, contractions=False).kernels
    assert len(kernels) == (2 if reason else 1)
    if "256" in reason:
        with pytest.raises(FusionError, match=reason):
            find_attention(region)
    else:
        assert again(region, int) == reason


def test_latents_that_are_no_fewer_than_values_are_not_read_for_them() -> None:
    assert len(plan_fusion(latent_values(1, 64, heads=1), contractions=False).kernels) == 2


def test_values_that_are_scaled_by_place_behind_their_product_are_computed() -> None:
    found = {scaled: latent_values(1, 48, scaled=scaled) for scaled in ("before", "behind")}
    regions = {scaled: trace(graph.nodes, graph.outputs) for scaled, graph in found.items()}  # type: ignore[arg-type]
    assert find_attention(regions["before"]).latent_values is not None
    with pytest.raises(FusionError, match="its values are computed by products, and scaled by place"):
        find_attention(regions["behind"])


def test_heads_that_are_repeated_are_read_once_in_attention() -> None:
    graph, build = built()
    q, k, v = (build.input(name, (1, heads, 256, 64), torch.float16) for name, heads in (("q", 8), ("k", 2), ("v", 2)))
    k = build.repeat_interleave(k, repeats=4, dim=1)
    v = build.reshape(build.expand(build.unsqueeze(v, dim=2), shape=(1, 2, 4, 256, 64)), shape=(1, 8, 256, 64))
    graph.outputs = [build.attention(q, k, v, scale=0.125)]
    (region,) = plan_fusion(graph).regions
    assert [load.value.value.name for load in region.loads] == ["k", "unsqueeze", "q"]
    assert {name: dim.size for dim, name in region.names.items() if name[0] in "bm"} == {"b0": 2, "m0": 4, "m1": 256}


def test_attention_is_refused_where_more_is_wanted_of_it_than_one_pass_gives() -> None:
    def reason(width: int, *, weights: bool = False) -> str | None:
        graph, build = built()
        q, k, v = (build.input(name, (8, 64, width), torch.float32) for name in "qkv")
        shares = build.softmax(build.matmul(q, build.permute(k, dims=(0, 2, 1))), dim=2)
        graph.outputs = [build.matmul(shares, v), *([shares] if weights else [])]
        return fault(trace(graph.nodes, graph.outputs))

    assert reason(256) is None and reason(257) is None
    assert reason(4097) == "heads have 4096 numbers at most, and not a dynamic number"
    assert reason(32, weights=True) == "its weights are read behind the second contraction"
