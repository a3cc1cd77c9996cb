"""The coverage list as a test: every model captured and emitted equal, pruned equal to its masked original.

Slow: run it with ``pytest -m sweep``. It needs ``shared/tools`` beside the repository, timm, torchvision and
transformers.
"""

import importlib.util
import sys

import pytest
from benchmarks.zoo import SHARED

LIST = SHARED / "tools" / "coverage_models.py"
MISSING = [name for name in ("timm", "torchvision", "transformers") if importlib.util.find_spec(name) is None]


def models() -> list[str]:
    if not LIST.exists() or MISSING:
        return []
    from benchmarks.zoo import names

    return names()


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("name", models() if "sweep" in " ".join(sys.argv) else ["any"])
def test_model_of_the_coverage_list(name: str) -> None:
    from benchmarks.coverage import EXACT, measure

    row = measure("regauge", name, ratio=0.5, limit=600)
    assert row.captured is not None and row.captured <= 1e-5, row
    assert row.emitted is not None and row.emitted <= 1e-5 and row.keys_equal, row
    assert row.verdict == "exact" and row.error is not None and row.error <= EXACT, row
