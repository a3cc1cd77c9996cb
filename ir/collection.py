"""Making many small objects at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MOST_UNSEEN = 1_000_000  # objects made before the collector is to look for garbage once
_unseen = 0


@contextmanager
def without_collection() -> Iterator[None]:
    """Suspend cyclic garbage collection for work that makes many objects and no garbage.

    Each of its passes would walk the whole heap, which beside torch and a large model costs more than the work itself.
    What was made counts as old afterwards, so that it is not walked through at once either; after every
    ``MOST_UNSEEN`` objects the collector does look for garbage, that is, for models that nobody holds any more.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _age()
        gc.enable()


def _age() -> None:
    global _unseen
    _unseen += gc.get_count()[0]
    if _unseen > MOST_UNSEEN:
        _unseen = 0
        gc.collect()
    elif not gc.get_freeze_count():  # else the user has frozen objects, which are to stay so
        gc.freeze()
        gc.unfreeze()
