"""Values that wait in temporary files."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import regauge
from regauge.ir.memory.mapped import can_be_stored
from regauge.ir.memory.set_aside import Loaded, SetAside
from regauge.ir.running import lockstep
from regauge.ir.running.lockstep import Lockstep

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(3, 4).to(dtype).t()
    found = SetAside(x).load()
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    torch.testing.assert_close(found.to(torch.complex64), x.to(torch.complex64), rtol=0, atol=0)


def test_the_file_goes_with_the_tensor() -> None:
    held = SetAside(torch.ones(3))
    path = Path(held.path)
    assert path.exists()
    del held
    gc.collect()
    assert not path.exists()


def test_items_are_read_when_they_are_asked_for() -> None:
    items = Loaded([SetAside(torch.full((2,), float(place))) for place in range(3)] + [7])
    assert [float(x[0]) for x in items[1:3]] == [1.0, 2.0]
    assert (len(items), items[3]) == (4, 7)


def test_what_takes_no_memory_here_is_not_set_aside() -> None:
    assert can_be_stored(torch.ones(1))
    assert not any(map(can_be_stored, [torch.ones(0), torch.ones(2, device="meta"), torch.ones(2).to_sparse(), 3]))


def test_a_run_whose_values_are_set_aside_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).eval()
    batches = [(torch.randn(5, 8),) for _ in range(3)]
    graph = regauge.capture(model, batches[0])
    monkeypatch.setattr(lockstep, "HELD", 0)
    monkeypatch.setattr(lockstep, "_SMALL", 0)
    run, seen = Lockstep(graph, batches), []
    for node in run.steps():
        run.execute(node)
        seen.append(run.values(node.output))
    assert all(isinstance(item, SetAside) for values in seen for item in values._items)  # type: ignore[attr-defined]
    for (batch,), found in zip(batches, seen[-1], strict=True):
        torch.testing.assert_close(found, model(batch))
