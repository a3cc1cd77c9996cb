"""Work without the garbage collector: it comes back, what was made is not lost to it, and what is frozen stays so."""

import gc
import weakref

import pytest

from regauge.ir import collection as allocation
from regauge.ir.collection import without_collection


class Link:
    def __init__(self) -> None:
        self.own = self


def test_garbage_made_meanwhile_is_still_found() -> None:
    with without_collection():
        assert not gc.isenabled()
        link = Link()
        seen = weakref.ref(link)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    del link
    gc.collect()
    assert seen() is None


def test_after_many_objects_the_collector_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "MOST_UNSEEN", 1000)
    seen = weakref.ref(Link())
    with without_collection():
        kept = [[] for _ in range(2000)]  # type: ignore[var-annotated]
    assert seen() is None and len(kept) == 2000


def test_a_collector_that_is_off_stays_off_and_frozen_objects_stay_frozen() -> None:
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with without_collection():
            pass
        assert gc.get_freeze_count() >= frozen * 0.9 > 0
    finally:
        gc.unfreeze()
