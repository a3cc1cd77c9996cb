"""How much memory the tensors take that a piece of torch code makes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counted(TorchDispatchMode):
    """Follows the memory of all results of ATen operators, but for what was there before."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.before and key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))


def storage_peak(module: torch.nn.Module, *inputs: torch.Tensor, run: Callable[..., Any] | None = None) -> int:
    """Bytes of results alive at the worst moment of a call, without weights and inputs, which the caller holds."""
    before = [*inputs, *module.parameters(), *module.buffers()]
    with torch.no_grad(), _Counted(before) as counted:
        (run or module)(*inputs)
    return counted.peak
