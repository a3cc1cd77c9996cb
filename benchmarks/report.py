"""Writing what was measured to docs/benchmarks.md, with date, versions and machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "timm", "torchvision", "transformers", "torch-pruning",
            "onnxsim", "onnxslim", "onnxscript", "onnxoptimizer", "triton")  # fmt: skip


def environment() -> str:
    """``2026-11-21, Linux x86_64, 2 cores, Python 3.11.7, torch 2.13.0, ...``"""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{datetime.date.today().isoformat()}, {machine}, {', '.join(versions)}"


def section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table under its title, with what it was measured with."""
    lines = [f"## {title}", "", environment(), ""]
    if note:
        lines += [note, ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def append_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Put a section into the document; a section of the same title is replaced."""
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else "# Benchmarks\n"
    parts = old.split("\n## ")
    kept = [parts[0], *(part for part in parts[1:] if part.splitlines()[0] != title)]
    DOCUMENT.parent.mkdir(exist_ok=True)
    text = "\n## ".join(kept).rstrip("\n") + "\n\n" + section(title, heads, rows, note)
    DOCUMENT.write_text(text, encoding="utf-8")
