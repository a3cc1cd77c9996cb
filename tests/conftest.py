"""Settings for the whole suite: hypothesis without deadlines (shared machines stall), goldens that can be rewritten."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, settings

from regauge.backends.onnx_model.registry import kept_registry

settings.register_profile(
    "regauge", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("regauge")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def translations_read_once() -> Iterator[None]:
    """Tests that call torch's ONNX exporter themselves save half of its time too."""
    with kept_registry():
        yield


class _OneThread(onnxruntime.InferenceSession):  # type: ignore[misc]
    def __init__(self, model: Any, sess_options: Any = None, *rest: Any, **named: Any) -> None:
        options = sess_options or onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        super().__init__(model, options, *rest, **named)


@pytest.fixture(autouse=True, scope="session")
def sessions_of_one_thread() -> Iterator[None]:
    """Threads of onnxruntime spin while they wait, and would take the cores of the other test processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", _OneThread)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files from what the tests print")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> object:
    """``golden("name", text)`` compares text with tests/golden/name.txt; ``--update-golden`` rewrites the file."""
    folder = Path(__file__).parent / "golden"

    def compare(name: str, text: str) -> None:
        file = folder / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n", encoding="utf-8")
        assert file.exists(), f"{file.name} is missing: run pytest with --update-golden"
        assert text + "\n" == file.read_text(encoding="utf-8")

    return compare
