"""Running ONNX models in onnxruntime: the oracle that written files are held to, and a fair measurement of latency."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from regauge.ir.errors import RegaugeError, first_line
from regauge.ir.ops.onnx_opaque import run_session, to_runtime

Optimisation = Literal["off", "all"]
Inputs = Sequence[Any] | Mapping[str, Any]

# Types of inputs, as onnxruntime calls them; of others nothing is said.
INPUT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class Session:
    """A model loaded into onnxruntime on the CPU.

    ``model`` is a path, serialised bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model`` (data files are found for a
    path only). With ``optimisation="off"`` onnxruntime computes the graph as it is written, which is what a comparison
    wants; ``"all"`` is its default and what a user gets. With ``spin``, also its default, threads keep a core busy
    while they wait, for the sake of latency; with optimisations off they never do. ``settings`` are entries of
    onnxruntime's configuration of a session: with all optimisations its kernels of weights in blocks round what they
    read to 8 bits as well, unless ``session.qdq_matmulnbits_accuracy_level`` is ``"0"``. Raises RegaugeError when
    onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        optimisation: Optimisation = "all",
        threads: int | None = None,
        spin: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if optimisation not in ("off", "all"):
            raise RegaugeError(f"optimisation is {optimisation!r}: say 'off' or 'all'")
        source = _source(model)
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self._session = _open(source, optimisation, threads, spin and optimisation != "off", settings or {})
        self.inputs: list[str] = [i.name for i in self._session.get_inputs()]
        self.overridable: list[str] = [i.name for i in self._session.get_overridable_initializers()]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]
        self.input_types: dict[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        self.input_shapes: dict[str, list[Any]] = {i.name: list(i.shape) for i in self._session.get_inputs()}

    def run(self, inputs: Inputs) -> list[Any]:
        """Results in order, as torch tensors (numpy arrays for strings); inputs in order or by name."""
        feeds = self.feeds(inputs)
        try:
            return run_session(self._session, feeds)
        except Exception as error:  # onnxruntime raises its own types, one per status code
            shapes = ", ".join(f"{name} {_shape(array)}" for name, array in feeds.items())
            raise RegaugeError(f"onnxruntime failed on inputs {shapes}: {first_line(error)}") from error

    def feeds(self, inputs: Inputs) -> dict[str, Any]:
        """Inputs as onnxruntime wants them; raises RegaugeError when one is missing or unknown."""
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self.inputs):
                names = ", ".join(self.inputs)
                raise RegaugeError(f"the model takes {len(self.inputs)} inputs ({names}), got {len(inputs)}")
            inputs = dict(zip(self.inputs, inputs, strict=True))
        wrong = (set(inputs) - set(self.overridable)) ^ set(self.inputs)
        if wrong:
            raise RegaugeError(f"inputs differ in {sorted(wrong)[0]!r}: the model takes {', '.join(self.inputs)}")
        return {name: to_runtime(value) for name, value in inputs.items()}

    def milliseconds(self, feeds: Mapping[str, Any]) -> float:
        """Time of one run on prepared feeds: of the processor where it has one thread, else on the wall.

        A run longer than a slice of a busy machine's time would be charged with what others do between its slices.
        """
        start = self._clock()
        self._session.run(None, feeds)
        return (self._clock() - start) * 1e3


def latency(sessions: Mapping[str, Session], inputs: Inputs, *, repeats: int = 50, warmup: int = 5) -> dict[str, float]:
    """Median milliseconds per run of each session, measured in turns so that a busy machine slows all of them alike."""
    feeds = {name: session.feeds(inputs) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(warmup + repeats):
        for name, session in sessions.items():
            elapsed = session.milliseconds(feeds[name])
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(measured) for name, measured in times.items()}


def optimised_file(model: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write what onnxruntime makes of a model on this machine before it runs it."""
    _open(os.fspath(model), "all", 1, False, {}, written_to=os.fspath(path))


def _source(model: Any) -> str | bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, str | os.PathLike):
        path = os.fspath(model)
        if not os.path.isfile(path):
            raise RegaugeError(f"there is no file {path}")
        return path
    if hasattr(model, "SerializeToString"):
        return bytes(model.SerializeToString())
    import onnx_ir

    if isinstance(model, onnx_ir.Model):
        return bytes(onnx_ir.to_proto(model).SerializeToString())
    raise RegaugeError(f"a {type(model).__name__} is no ONNX model: give a path, bytes, ModelProto or onnx_ir.Model")


def _open(
    source: str | bytes,
    optimisation: Optimisation,
    threads: int | None,
    spin: bool,
    settings: Mapping[str, str],
    *,
    written_to: str = "",
) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if optimisation == "off" else level.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors reach us as exceptions
    if written_to:
        options.optimized_model_filepath = written_to
        beside = os.path.basename(written_to) + ".data"  # a model of more than 2 GB has to have its weights there
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", beside)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimisation == "off":
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, one per status code
        raise RegaugeError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def _shape(fed: Any) -> tuple[int, ...]:
    """Of an array, or of an OrtValue, which holds types that numpy lacks."""
    return tuple(fed.shape() if callable(fed.shape) else fed.shape)
