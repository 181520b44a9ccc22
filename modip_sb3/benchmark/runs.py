"""The folder of a run: settings, status, evaluations and checkpoints, each of them written atomically."""

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modip_sb3.storage import Checkpoints, write_atomically, write_json

EVALUATION_COLUMNS = ("env_steps", "wall_seconds", "inference", "episode", "return", "length", "success")
Row = dict[str, Any]


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """
    :param rows: by column
    :param columns: in their order
    :return: the text of a CSV file; None is an empty cell
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def evaluation_steps(settings: Mapping[str, Any]) -> list[int]:
    """
    :param settings: of a run
    :return: the environment steps after which its evaluations are due
    """
    timesteps = settings["timesteps"]
    return [*range(0, timesteps, settings["evaluation"]["freq"]), timesteps]


def read_rows(path: Path) -> list[Row]:
    """
    :param path: a CSV file
    :return: its rows, texts by column
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """
    Hold a folder's lock, which the system gives back when the process dies, whatever it dies of.

    :param folder: an existing folder
    :param wait: whether to wait for it
    :raises ValueError: if another process holds it and ``wait`` is False
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use by another benchmark: wait for it, or choose another --output."
            ) from error
        yield


@dataclass(frozen=True)
class RunFolder:
    """
    One algorithm on one environment with one seed.

    ``config.json`` says what is run, ``status.json`` how far it is; ``evaluations.csv`` has a row for each evaluation
    episode, ``progress.csv`` the losses. ``checkpoint-STEPS`` is there until the run is finished.

    :param path: the folder
    """

    path: Path

    @classmethod
    def of(cls, output: Path, settings: Mapping[str, Any]) -> "RunFolder":
        """
        :param output: folder of the benchmark
        :param settings: of the run
        :return: where it goes: an environment's id has slashes, its folder has not
        """
        return cls(output / settings["env"].replace("/", "-") / settings["algo"] / f"seed-{settings['seed']}")

    @property
    def name(self) -> str:
        """Environment, algorithm and seed, as the folders have them."""
        return "/".join(self.path.parts[-3:])

    def read_settings(self) -> dict[str, Any]:
        """What is run."""
        return json.loads((self.path / "config.json").read_text())["settings"]

    def read_status(self) -> dict[str, Any]:
        """How far it is; a run that was never started is "waiting"."""
        path = self.path / "status.json"
        return json.loads(path.read_text()) if path.exists() else {"state": "waiting", "env_steps": 0}

    def update_status(self, **changes: Any) -> None:
        """
        :param changes: new entries of ``status.json``
        """
        write_json(self.path / "status.json", self.read_status() | changes)

    def write_evaluations(self, rows: Sequence[Row]) -> None:
        """
        :param rows: all evaluation episodes so far
        """
        write_atomically(self.path / "evaluations.csv", as_csv(rows, EVALUATION_COLUMNS))

    # ---------------------------------------------------------------- checkpoints

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return Checkpoints(self.path).newest()

    def new_checkpoint(self, env_steps: int) -> AbstractContextManager[Path]:
        """
        A folder to write a checkpoint to, see :meth:`Checkpoints.new`.

        :param env_steps: environment steps so far
        """
        return Checkpoints(self.path).new(env_steps)

    def remove_checkpoints(self) -> None:
        """Forget them: the run is finished."""
        Checkpoints(self.path).remove()


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    :param content: nested mappings
    :param prefix: of every name
    :return: their values by dotted names
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """
    :param old: settings
    :param new: settings
    :return: for each that differs, a phrase with both values
    """
    before, after = flatten(old), flatten(new)
    names = [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
    return [f"{name} was {_shown(before, name)} and is now {_shown(after, name)}" for name in names]


_ABSENT = object()


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"
