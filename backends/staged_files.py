"""Files that appear whole or not at all.

Everything is first written to a hidden folder beside the target, flushed to disk, and only then renamed into place, the
target last. Whatever fails, no new file is left and every file that was there stays as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType

from regauge.ir.errors import EmitError


@dataclass
class Staging:
    """A hidden folder beside the target in which files come to be; ``publish`` renames them into place together.

    Raises EmitError where the target cannot be a file: its folder is missing, it is a folder, or it exists and may not
    be overwritten.
    """

    target: Path
    overwrite: bool = True
    folder: Path = field(init=False)

    def __enter__(self) -> Staging:
        parent = self.target.parent
        if not parent.is_dir():
            raise EmitError(f"cannot write {self.target}: the folder {parent} does not exist, make it first")
        if self.target.is_dir():
            raise EmitError(f"cannot write {self.target}: it is a folder, name a file in it")
        if self.target.exists() and not self.overwrite:
            raise EmitError(f"cannot write {self.target}: it exists, pass overwrite=True to replace it")
        try:
            self.folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{self.target.name}."))
        except OSError as error:
            raise EmitError(f"cannot write {self.target}: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise EmitError(f"cannot write {self.target}: {error.strerror or error}") from error

    @property
    def main(self) -> Path:
        return self.folder / self.target.name

    def place(self, location: str) -> Path:
        """Where the data file ``location`` is to be written, its folders made; raises EmitError if it would escape."""
        check_location(location)
        path = self.folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self) -> None:
        """Rename every staged file into place, the model last; when one fails, those before it are put back."""
        staged = sorted((p for p in self.folder.rglob("*") if p.is_file()), key=lambda p: (p == self.main, p))
        for path in staged:
            _flush(path)
        backups = Path(tempfile.mkdtemp(dir=self.folder, prefix=".before."))
        moved: list[tuple[Path, Path | None]] = []
        try:
            for number, path in enumerate(staged):
                moved.append(self._move(path, backups / str(number)))
        except BaseException:
            for destination, backup in reversed(moved):
                destination.unlink() if backup is None else os.replace(backup, destination)
            raise
        _flush(self.target.parent)

    def _move(self, path: Path, backup: Path) -> tuple[Path, Path | None]:
        destination = self.target.parent / path.relative_to(self.folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        existed = destination.exists()
        if existed:
            shutil.copymode(destination, path)
        if existed and path != self.main:
            os.replace(destination, backup)
        try:
            os.replace(path, destination)
        except OSError:
            if existed and path != self.main:
                os.replace(backup, destination)
            raise
        return destination, backup if existed else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot flush a folder
    finally:
        os.close(descriptor)


def check_location(location: str) -> None:
    """Raise EmitError for a data file outside the folder of its model."""
    pure = PurePosixPath(location.replace("\\", "/"))
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        raise EmitError(f"external data cannot be in {location!r}: name a file inside the folder of the model")
