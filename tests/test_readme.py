"""The examples of the README and of the guides run as they stand there.

Every ```python block is executed, each in a namespace and a folder of its own. Of every ```sh and ```console block the
lines that begin with `regauge` (after a `$ `, if there is one) are run, in one folder for the block: in this process,
since to import torch would take most of their time (tests/test_cli.py runs programs). A block that cannot be run says
`no-test` after its language.
"""

import re
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from regauge.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>\w[^`\n]*)\n(?P<text>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    language: str
    line: int  # of the block's first line in its page, from 1
    text: str


def runnable_blocks(page: Path, markdown: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(markdown):
        language, *flags = re.split(r"[\s,{}]+", match["info"].strip())
        if "no-test" not in flags:
            blocks.append(Block(page, language, markdown.count("\n", 0, match.start("text")) + 1, match["text"]))
    return blocks


def regauge_commands(text: str) -> list[str]:
    """The commands of a shell block that run regauge; a line that ends in a backslash goes on in the next."""
    commands = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [command for command in commands if re.match(r"regauge(\s|$)", command)]


BLOCKS = [block for page in PAGES for block in runnable_blocks(page, page.read_text(encoding="utf-8"))]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash", "shell", "console")]


def place(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.mark.parametrize("block", PYTHON, ids=place)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    at_its_line = "\n" * (block.line - 1) + block.text  # so that a traceback points into the page
    exec(compile(at_its_line, str(block.page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_shell_block_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main puts its own there
    for command in regauge_commands(block.text):
        status = main(shlex.split(command, comments=True)[1:])
        assert status == 0, f"{place(block)}: {command}\n{capsys.readouterr().err}"


PAGE = """
```python
x = 1
```
```sh no-test
regauge left out
```
```
no language, no example
```
```console
$ regauge shown \\
    twice
its output
```
"""


def test_blocks_are_found_in_a_page() -> None:
    first, second = runnable_blocks(Path("page.md"), PAGE)
    assert first == Block(Path("page.md"), "python", 3, "x = 1\n")
    assert regauge_commands(second.text) == ["regauge shown      twice"]


def test_readme_shows_python_and_a_command() -> None:
    languages = {block.language for block in BLOCKS if block.page.name == "README.md"}
    assert {"python", "sh"} <= languages, f"README.md has blocks of {languages} only"


LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing
