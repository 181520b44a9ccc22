"""Files and folders that are whole or not there, whenever the process dies; it knows nothing of what is in them."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
UNFINISHED = "unfinished-checkpoint"
KEPT = 2  # the newest, and one to fall back on


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """
    A file that appears under its name, in the place of another, once all of it is on the disk.

    :param path: the file
    :return: where to write it until then; after an error nothing is left there
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """
    :param path: a file that holds either what it held before or all of the text, whenever the process dies
    :param text: its content
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """
    :param path: a JSON file
    :param content: its content
    """
    write_atomically(path, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Checkpoints:
    """
    The last two checkpoints in a folder, ``checkpoint-NUMBER`` each, with the sizes and hashes of its files.

    :param folder: where they are
    """

    folder: Path

    def paths(self) -> list[Path]:
        """All checkpoints, also damaged ones, the newest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=_number, reverse=True)

    def next_number(self) -> int:
        """One more than that of the newest."""
        return max(map(_number, self.paths()), default=0) + 1

    def newest(self) -> Path | None:
        """The newest that is whole; for each damaged one that is passed over there is a warning."""
        for path in self.paths():
            found = find_damage(path)
            if found is None:
                return path
            warnings.warn(f"Checkpoint {path} is damaged ({found}): the one before it is used.", stacklevel=2)
        return None

    @contextmanager
    def new(self, number: int) -> Iterator[Path]:
        """
        A folder to write a checkpoint to. It counts once all of it is on the disk, and then the oldest ones go.

        :param number: its place among the others
        :raises OSError: if it cannot be written, on a full disk for one; nothing is left of it, and the others stay
        """
        temporary, path = self.folder / UNFINISHED, self.folder / f"checkpoint-{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            write_json(temporary / MANIFEST, {file.name: _describe(file) for file in sorted(temporary.iterdir())})
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            if path.exists():
                shutil.rmtree(path)  # a damaged one: nothing else has its number
            temporary.rename(path)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self.paths()[KEPT:]:
            shutil.rmtree(old)

    def remove(self) -> None:
        """Forget all of them, and what a killed process left unfinished."""
        for path in [*self.paths(), *self.folder.glob(UNFINISHED)]:
            shutil.rmtree(path)


def find_damage(path: Path) -> str | None:
    """
    :param path: a checkpoint
    :return: what is wrong with it, None if its files are those that were written
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, written in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {written['size']}"
            if _describe(file) != written:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
