"""The source of layers, as it is copied into emitted modules: without the annotations that they have in their files."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from functools import cache

from regauge.backends.torch_module import onednn as torch_onednn
from regauge.backends.torch_module import quantized as torch_quantized
from regauge.backends.torch_module.expressions import Unannotated


def layer_sources(texts: Iterable[str]) -> dict[str, str]:
    """Source by name of the classes that some layers are made of, such as ``QLinear(64, 32)``, and of what they use."""
    parts = _parts()
    needed, pending = set(), [text.partition("(")[0] for text in texts]
    while pending:
        name = pending.pop()
        if name in parts and name not in needed:
            needed.add(name)
            pending.extend(re.findall(r"\w+", parts[name]))
    return {name: text for name, text in parts.items() if name in needed}


@cache
def _parts() -> dict[str, str]:
    trees = [Unannotated().visit(ast.parse(inspect.getsource(module))) for module in (torch_quantized, torch_onednn)]
    parts = [part for tree in trees for part in ast.fix_missing_locations(tree).body]
    return {part.name: ast.unparse(part) for part in parts if isinstance(part, ast.FunctionDef | ast.ClassDef)}
