"""The repository's own shape: links resolve, imports only point downward, and no file is a drawer."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "regauge"
LINKED = ("ir", "passes", "frontends", "backends")

# Who may import whom, below `regauge.`: cli -> optimize -> {frontends, passes, backends} -> ir, and settings at the
# bottom. `*` is everything, the package itself included.
MAY_IMPORT = {
    "settings": ("ir.errors",),
    "ir": ("ir", "settings"),
    "passes": ("passes", "ir", "settings"),
    "frontends": ("frontends", "ir", "settings"),
    "backends": ("backends", "ir", "settings"),
    "optimize": ("frontends", "passes", "backends", "ir", "settings"),
    "training": ("passes", "ir", "settings"),
    "sparse": ("passes", "ir", "settings"),
    "__init__": ("optimize", "sparse", "training", "frontends", "passes", "backends", "ir", "settings"),
    "demo": ("optimize", "frontends", "passes", "backends", "ir", "settings"),
    "spelling": ("frontends", "backends", "ir"),
    "terminal": ("ir",),
    "cli_inspect": ("ir", "cli_files", "cli_tables", "terminal"),
    "cli_run": ("backends", "ir", "cli_files", "terminal"),
    "cli_files": ("frontends", "backends", "ir", "settings"),
    "cli_tables": ("ir",),
    "cli_kernels": ("cli_files", "terminal", "backends", "ir", "settings"),
    "cli": ("*",),
    "__main__": ("cli",),
}
# Families of passes that stand on another one.
STANDS_ON = {
    "attention": ("depth", "simplify"),
    "adapters": ("simplify",),
    "decoding": ("factorization", "quantization"),
    "quantization": ("simplify",),
    "training": ("pruning", "quantization", "factorization", "growing"),
    "sharing": ("depth", "factorization"),
    "sparsity": ("quantization",),
    "fusing": ("depth", "sharing"),
    "elastic": ("pruning", "training"),
    "growing": ("pruning", "depth", "sharing"),
}
# A module of such a name hides the library, or says nothing about what is in it.
BANNED_NAMES = {"torch", "onnx", "triton", "utils", "helpers"}
SHARED_FOLDERS = {"calibration", "allocation", "attention"}  # of `passes`, for all families
MOST_LINES = 450


def python_files(*folders: Path) -> list[Path]:
    """The files below the folders; links are not followed, so that no file is seen twice."""
    return sorted(file for folder in folders for file in folder.rglob("*.py") if "__pycache__" not in file.parts)


def layer_files(layer: str) -> list[Path]:
    return python_files(ROOT / layer) if layer in LINKED else list(PACKAGE.glob(f"{layer}.py"))


def own_files() -> list[Path]:
    folders = [ROOT / name for name in (*LINKED, "tests", "examples", "benchmarks")]
    return [*PACKAGE.glob("*.py"), *python_files(*folders)]


def place(file: Path, line: int | None = None) -> str:
    where = file.relative_to(ROOT).as_posix()
    return where if line is None else f"{where}:{line}"


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports: `from a.b import c` is a.b.c, `from . import c` is .c"""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((node.lineno, module + alias.name) for alias in node.names)


def is_below(name: str, above: str) -> bool:
    return above == "*" or name == above or name.startswith(f"{above}.")


def wrong_imports(file: Path, layer: str) -> Iterator[str]:
    for line, name in imported(file):
        top, _, rest = name.partition(".")
        if not top:
            yield f"{place(file, line)}: write the import of {name} in full"
        elif top in LINKED:
            yield f"{place(file, line)}: import regauge.{name}"
        elif top == "regauge" and not any(is_below(rest, allowed) for allowed in MAY_IMPORT[layer]):
            yield f"{place(file, line)}: {layer} may not import {name}, only {', '.join(MAY_IMPORT[layer])}"


@pytest.mark.parametrize("folder", LINKED)
def test_package_folder_is_a_link_to_the_top_level_folder(folder: str) -> None:
    assert (PACKAGE / folder).resolve() == ROOT / folder, (
        f"src/regauge/{folder} is not a link to {folder}/: on Windows run `git config core.symlinks true`, then "
        "`git checkout -- src/regauge`"
    )


def test_every_module_of_the_package_belongs_to_a_layer() -> None:
    found = {file.parts[0].removesuffix(".py") for file in (f.relative_to(PACKAGE) for f in python_files(PACKAGE))}
    assert found <= set(MAY_IMPORT), "give the new module its line in MAY_IMPORT"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_downward(layer: str) -> None:
    wrong = [line for file in layer_files(layer) for line in wrong_imports(file, layer)]
    assert not wrong, "\n".join(wrong)


def test_pass_families_do_not_import_one_another() -> None:
    """What two families need goes down into `ir`, or beside them into `passes`, into a shared folder or a file."""
    families = [folder for folder in (ROOT / "passes").iterdir() if any(folder.glob("*.py"))]
    wrong = [
        f"{place(file, line)}: {family.name} may not import {name}"
        for family in families
        for file in python_files(family)
        for line, name in imported(file)
        for other in families
        if other != family and other.name not in {*SHARED_FOLDERS, *STANDS_ON.get(family.name, ())}
        if is_below(name, f"regauge.passes.{other.name}")
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_outside_the_package_are_written_in_full() -> None:
    folders = [ROOT / name for name in ("tests", "examples", "benchmarks")]
    wrong = [
        f"{place(file, line)}: {name}"
        for file in python_files(*folders)
        for line, name in imported(file)
        if name.startswith(".") or name.partition(".")[0] in LINKED
    ]
    assert not wrong, "\n".join(wrong)


def test_what_examples_and_benchmarks_import_is_there() -> None:
    """Nothing else runs all of them: a name that moved would be missed only by whoever measures next."""
    wrong = [
        f"{place(file, line)}: {name}"
        for file in python_files(ROOT / "examples", ROOT / "benchmarks")
        for line, name in imported(file)
        if name.startswith("regauge.") and not exists(name)
    ]
    assert not wrong, "\n".join(wrong)


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or what its module names."""
    parent, _, last = name.rpartition(".")
    if importlib.util.find_spec(parent) is None:
        return False
    module = importlib.import_module(parent)
    return hasattr(module, last) or hasattr(module, "__path__") and importlib.util.find_spec(name) is not None


def test_no_module_has_a_banned_name() -> None:
    wrong = [place(file) for file in own_files() if BANNED_NAMES & {file.stem, file.parent.name}]
    assert not wrong, f"name these for what they hold: {', '.join(wrong)}"


def test_no_file_is_too_long() -> None:
    lengths = {place(file): len(file.read_text(encoding="utf-8").splitlines()) for file in own_files()}
    wrong = [f"{where} has {lines} lines" for where, lines in lengths.items() if lines > MOST_LINES]
    assert not wrong, f"split at an idea, {MOST_LINES} lines at most: {'; '.join(wrong)}"
