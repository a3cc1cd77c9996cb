"""The coverage lists as tests: every model captured and emitted equal, pruned equal to its masked original.

Slow: run them with ``pytest -m sweep``. They need timm, torchvision and transformers; the list of 66 also needs
``shared/tools`` beside the repository.
"""

import importlib.util
import sys

import pytest
from benchmarks.coverage import EXACT, measure
from benchmarks.isolated import isolated
from benchmarks.model_case import SHARED
from benchmarks.wide_models import NAMES, REFUSED, build

from benchmarks import factorize_exact

LIST = SHARED / "tools" / "coverage_models.py"
MISSING = [name for name in ("timm", "torchvision", "transformers") if importlib.util.find_spec(name) is None]


def models() -> list[str]:
    if not LIST.exists() or MISSING:
        return []
    from benchmarks.zoo import names

    return names()


ANY = "sweep" in " ".join(sys.argv)
needs_libraries = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@needs_libraries
@pytest.mark.parametrize("name", models() if ANY else ["any"])
def test_model_of_the_coverage_list(name: str) -> None:
    check(name)


@pytest.mark.sweep
@needs_libraries
@pytest.mark.parametrize("name", NAMES if ANY else ["any"])
def test_model_of_the_wide_list(name: str) -> None:
    if name in REFUSED:
        row = measure("regauge", name, ratio=0.5, limit=600)
        assert row.verdict == "error" and "CaptureError" in row.note, f"no longer refused: {row}"
    else:
        check(name)


@pytest.mark.sweep
@pytest.mark.skipif(not LIST.exists(), reason="the model list lies in shared/tools beside the repository")
@needs_libraries
@pytest.mark.parametrize("name", models() if ANY else ["any"])
def test_factors_of_full_rank_change_nothing_in_any_form(name: str) -> None:
    found = isolated(factorize_exact.moved, name, limit=1800)
    assert {form: error for form, _, error in found if not error <= factorize_exact.EXACT} == {}


def test_the_wide_list_names_each_model_once() -> None:
    assert len(NAMES) == len(set(NAMES)) == 240
    assert set(REFUSED) < set(NAMES)
    with pytest.raises(ValueError, match="not on the wide list"):
        build("timm:resnet18:64")


def check(name: str) -> None:
    row = measure("regauge", name, ratio=0.5, limit=600)
    assert row.captured is not None and row.captured <= 1e-5, row
    assert row.emitted is not None and row.emitted <= 1e-5 and row.keys_equal, row
    assert row.verdict == "exact" and row.error is not None and row.error <= EXACT, row
