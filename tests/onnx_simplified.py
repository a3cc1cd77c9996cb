"""What the contract tests of ``simplify`` share: a model simplified through files, and runs of both in onnxruntime."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir

import regauge
from onnx_oracle import runtime_outputs


def parsed(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from its text, with these arrays as initializers."""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model


def simplified(model: onnx.ModelProto, folder: Path, passes: str = "simplify", **options: bool) -> onnx.ModelProto:
    """The model after a way through files, ``folder/source.onnx`` and ``folder/small.onnx``; warnings do not count."""
    source = folder / "source.onnx"
    onnx.save(model, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = regauge.optimize(regauge.load(source, **options), passes)
        return onnx.load(graph.to_onnx(folder / "small.onnx"))


def assert_equal_runs(model: onnx.ModelProto, small: onnx.ModelProto, *feeds: Mapping[str, np.ndarray]) -> None:
    for given in feeds:
        for a, b in zip(runtime_outputs(model, given), runtime_outputs(small, given), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def padded_network(*, idle: bool = False) -> onnx.ModelProto:
    """A shift that the zero padding behind it keeps from being folded, and a batch norm; ``idle`` adds an Identity."""
    end = "i = Identity (m)  y = Relu (i)" if idle else "y = Relu (m)"
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) {{
      s = Add (x, shift)
      h = Conv <pads = [1, 1, 1, 1]> (s, k)
      m = BatchNormalization (h, gain, bias, mean, var)
      {end}
    }}
    """
    vectors = {"gain": normal(4), "bias": normal(4), "mean": normal(4), "var": np.abs(normal(4)) + 1}
    return parsed(text, k=normal(4, 3, 3, 3), shift=normal(3, 1, 1), **vectors)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those nested in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def operators(model: onnx.ModelProto) -> Counter[str]:
    """Nodes of all scopes, without Constants."""
    return Counter(n.op_type for graph in graphs(model.graph) for n in graph.node if n.op_type != "Constant")


def canonical(message: object) -> bytes:
    """Field order and fields that are spelt out with their default value are no difference."""
    return bytes(onnx_ir.to_proto(onnx_ir.from_proto(message)).SerializeToString(deterministic=True))


def props(message: object) -> dict[str, str]:
    return {entry.key: entry.value for entry in message.metadata_props}  # type: ignore[attr-defined]
