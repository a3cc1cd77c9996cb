"""The origin of an exported node: the module it was called in and the user's source line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = str(Path(torch.__file__).parent)
_OURS = (str(Path(__file__).parent), str(Path(__file__).resolve().parent))  # the package is reached through a link
Scope = tuple[tuple[str, str], ...]


def scope_of(meta: dict[str, Any]) -> Scope:
    """Module path and class name from the root down; a module called again keeps torch's ``@1`` mark on its path."""
    result = []
    for key, (path, owner) in (meta.get("nn_module_stack") or {}).items():
        if "from_metadata_hook" in key:
            continue
        name = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
        mark = re.search(r"@\d+$", key)
        clean = re.sub(r"^L\['self'\]\.?|^L__self__\.?", "", path)
        result.append((clean + (mark.group() if mark else ""), name.rpartition(".")[2]))
    return tuple(result)


def source_of(meta: dict[str, Any]) -> str:
    """``file.py:12 in forward``: the innermost frame that is not torch's own."""
    return _source_of_trace(meta.get("stack_trace") or "")


@lru_cache(maxsize=65536)
def _source_of_trace(trace: str) -> str:
    frames = _FRAME.findall(trace)
    return _pick((file, int(line), function) for file, line, function in frames)


def source_of_error(error: BaseException) -> str:
    """The innermost frame of an exception (or of what caused it) that is neither torch's nor ours; "" where none is."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in reversed(chain):
        frames = traceback.extract_tb(link.__traceback__)
        user = [f for f in frames if is_users(f.filename)]
        if user:
            return f"{Path(user[-1].filename).name}:{user[-1].lineno} in {user[-1].name}"
    return ""


def is_users(file: str) -> bool:
    """Whether a source file is neither torch's nor ours nor made up by a tracer."""
    return not file.startswith((_TORCH, *_OURS, "<")) and "/contextlib.py" not in file


def _pick(frames: Iterable[tuple[str, int, str]]) -> str:
    found = ""
    for file, line, function in frames:
        if is_users(file) or not found:
            found = f"{Path(file).name}:{line} in {function}"
    return found
