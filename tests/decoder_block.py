"""A Llama-like decoder block as a graph: RMS norms, rotary positions, attention written out, a gated layer."""

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value


def decoder_block(
    tokens: int = 512,
    width: int = 256,
    heads: int = 4,
    hidden: int = 688,
    dtype: torch.dtype = torch.float16,
    *,
    written_out: bool = False,
) -> Graph:
    """Of x[2, tokens, width], with the tables of the rotary position code as inputs.

    ``written_out``: norms and the softmax, too, node by node, as decompositions have them.
    """
    graph = Graph("block")
    build = Builder(graph)
    x = build.input("x", (2, tokens, width), dtype)
    tables = [build.input(name, (tokens, width // heads), dtype) for name in ("cos", "sin")]

    def weight(name: str, *shape: int) -> Value:
        return build.parameter(name, torch.zeros(shape, dtype=dtype))

    def rotated(x: Value) -> Value:
        half = width // heads // 2
        low, high = (build.slice(x, dim=3, start=start, end=start + half, step=1) for start in (0, half))
        turned = build.concat(build.neg(high), low, dim=3)
        return build.add(build.mul(x, tables[0]), build.mul(turned, tables[1]))

    def norm(name: str, x: Value) -> Value:
        if written_out:
            square = build.mean(build.mul(x, x), dims=(2,), keepdim=True)
            return build.mul(build.mul(x, build.rsqrt(build.add(square, 1e-6))), weight(name, width))
        return build.rms_norm(x, weight(name, width), normalized_shape=(width,), eps=1e-6)

    def softmax(x: Value) -> Value:
        if written_out:
            power = build.exp(build.sub(x, build.amax(x, dims=(3,), keepdim=True)))
            return build.div(power, build.sum(power, dims=(3,), keepdim=True))
        return build.softmax(x, dim=3)

    h = norm("norm1", x)
    split = [
        build.permute(
            build.reshape(build.linear(h, weight(name, width, width)), shape=(2, tokens, heads, width // heads)),
            dims=(0, 2, 1, 3),
        )
        for name in "qkv"
    ]
    query, key = map(rotated, split[:2])
    scores = build.mul(build.matmul(query, build.permute(key, dims=(0, 1, 3, 2))), (width // heads) ** -0.5)
    mixed = build.matmul(softmax(scores), split[2])
    joined = build.reshape(build.permute(mixed, dims=(0, 2, 1, 3)), shape=(2, tokens, width))
    x = build.add(x, build.linear(joined, weight("o", width, width)))
    h = norm("norm2", x)
    gate, up = (build.linear(h, weight(name, hidden, width)) for name in ("gate", "up"))
    down = build.linear(build.mul(build.silu(gate), up), weight("down", width, hidden))
    graph.outputs = [build.add(x, down)]
    return graph
