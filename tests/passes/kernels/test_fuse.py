"""``fuse`` makes regions nodes and says what it left; other passes want the nodes, and ``unfuse`` gives them back."""

import pytest
import torch

import regauge
from decoder_block import decoder_block
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.fusion.fused import fused_nodes
from regauge.ir.graph import Graph
from regauge.ir.roofline import DEVICES
from regauge.ir.sizes.expressions import symbol
from regauge.passes.catalog import BUILT_IN, find_pass

# Options that passes cannot do without.
OPTIONS = {
    "convert-gqa": {"kv_heads": 1},
    "depth": {"blocks": 1},
    "factorize": {"params": 0.8},
    "prune": {"ratio": 0.5},
    "remat": {"memory": "0.9"},
    "share": {"blocks": 1},
    "share-kv": {"layers": 1},
    "vocabulary": {"count": 4},
}


def block() -> Graph:
    return decoder_block(tokens=16, width=32, hidden=48, dtype=torch.float32)


def test_the_report_has_regions_bytes_and_what_was_left() -> None:
    found = regauge.optimize(block(), "fuse")
    (entry,) = found.report.passes
    assert entry.notes == (
        "3 regions: 12 kernels instead of 27, 179KB moved instead of 320KB",
        "most bytes stay at linear_4, 12.3KB: products are left to the runtime's library",
    )
    assert entry.left == {
        "products are left to the runtime's library": 10,
        "a path leaves them and comes back": 1,
        "with what else reads it: a path leaves them and comes back": 1,
    }
    assert entry.error == 0 and entry.before == entry.after
    assert {node.metadata["regauge.added_by"] for node in fused_nodes(found)} == {"fuse"}


def test_unfuse_gives_the_nodes_back() -> None:
    graph = block()
    found = regauge.optimize(graph, "fuse,unfuse")
    assert sorted(str(found).splitlines()) == sorted(str(graph).splitlines())
    assert regauge.optimize(graph, "unfuse").report.passes[0].changed is False


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_passes_take_fused_graphs_or_say_how_to_go_on(name: str) -> None:
    one = find_pass(name).from_options(OPTIONS.get(name, {}))
    fused = regauge.optimize(block(), "fuse")
    if one.takes_fused:
        assert regauge.optimize(fused, one).report is not None
        return
    with pytest.raises(PassError, match=rf"^{name}.*works on nodes.*let fuse come last, or unfuse first"):
        regauge.optimize(fused, one, data=[torch.zeros(2, 16, 32)])


def test_attention_as_one_node_is_a_region_where_there_is_a_gpu() -> None:
    graph = Graph("g")
    build = Builder(graph)
    q, k, v = (build.input(name, (1, 2, 64, 16), torch.float32) for name in "qkv")
    graph.outputs = [build.attention(q, k, v, scale=0.25)]
    assert len(fused_nodes(regauge.optimize(graph, "fuse"))) == 1
    assert not fused_nodes(regauge.optimize(graph, "fuse{target=cpu}"))


def test_rounding_and_target_are_options() -> None:
    found = regauge.optimize(block(), "fuse{rounding=eager,target=cpu}")
    assert {node.attributes["rounding"] for node in fused_nodes(found)} == {"eager"}
    (target, _) = find_pass("fuse").option_table()
    assert target.kind == f"one of {', '.join(sorted(DEVICES, reverse=True))}"
    with pytest.raises(PassError, match="option 'target' of fuse must be one of gpu, cpu, not 'tpu'"):
        regauge.optimize(block(), "fuse{target=tpu}")
    with pytest.raises(PassError, match="fuse has no option 'device': options are target, rounding"):
        regauge.optimize(block(), "fuse{device=cpu}")


def test_a_size_that_no_operand_has_is_left() -> None:
    rows = symbol("rows")
    graph = Graph("g")
    graph.symbols[rows] = (2, None)
    build = Builder(graph)
    x = build.input("x", (8 * rows, 4), torch.float32)
    y = build.softmax(build.mul(x, 0.5), dim=1)
    graph.outputs = [build.neg(build.add(build.reshape(build.relu(y), shape=(rows, 8, 4)), 1.0))]
    found = regauge.optimize(graph, "fuse")
    (entry,) = found.report.passes
    reason = "it reads the dynamic size rows, which no operand of it has"
    assert entry.left.get(reason, 0) == len([n for n in found.nodes if n.op == "reshape"]) == 1
