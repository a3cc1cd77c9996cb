"""The README's examples run as they stand there.

Every ```python block is executed, each in a namespace and a folder of its own. Of every ```sh and ```console block the
lines that begin with `regauge` (after a `$ `, if there is one) are run, in one folder for the block. A block that
cannot be run says `no-test` after its language.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
FENCE = re.compile(r"^```(?P<info>\w[^`\n]*)\n(?P<text>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

if not README.exists():
    pytest.skip("there is no README.md yet", allow_module_level=True)


class Block(NamedTuple):
    language: str
    line: int  # of the block's first line in the README, from 1
    text: str


def runnable_blocks(markdown: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(markdown):
        language, *flags = re.split(r"[\s,{}]+", match["info"].strip())
        if "no-test" not in flags:
            blocks.append(Block(language, markdown.count("\n", 0, match.start("text")) + 1, match["text"]))
    return blocks


def regauge_commands(text: str) -> list[str]:
    """The commands of a shell block that run regauge; a line that ends in a backslash goes on in the next."""
    commands = (line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines())
    return [command for command in commands if re.match(r"regauge(\s|$)", command)]


BLOCKS = runnable_blocks(README.read_text(encoding="utf-8"))
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash", "shell", "console")]


def line_of(block: Block) -> str:
    return f"line{block.line}"


@pytest.mark.parametrize("block", PYTHON, ids=line_of)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    at_its_line = "\n" * (block.line - 1) + block.text  # so that a traceback points into the README
    exec(compile(at_its_line, str(README), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", SHELL, ids=line_of)
def test_shell_block_runs(block: Block, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command in regauge_commands(block.text):
        environment = {**os.environ, "PATH": path, "NO_COLOR": "1"}
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"README.md:{block.line}: {command}\n{done.stdout}\n{done.stderr}"


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
    first, second = runnable_blocks(PAGE)
    assert first == Block("python", 3, "x = 1\n")
    assert regauge_commands(second.text) == ["regauge shown      twice"]


def test_readme_shows_python_and_a_command() -> None:
    assert PYTHON, "README.md has no ```python block"
    assert SHELL, "README.md has no ```sh or ```console block that runs"
