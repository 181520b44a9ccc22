"""The rows as a table and a JSON file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch as th
from rich.console import Console
from rich.table import Table

from modip_sb3.benchmark.settings import describe_hardware, describe_software
from modip_sb3.benchmark.speed.before import COMPARISONS
from modip_sb3.benchmark.speed.rows import ROWS, Row
from modip_sb3.benchmark.speed.timing import Clock
from modip_sb3.storage import write_json

Measurement = Callable[[Clock], Iterator[Row]]


def choose(names: Sequence[str] | None, before: Path | None) -> list[tuple[str, Measurement]]:
    """
    :param names: P1 to P10; None for all but the demo, which takes half an hour
    :param before: an older checkout, or None
    :return: what is measured, in words, and what measures it
    :raises ValueError: if there is no such row or checkout, or a row lacks the checkout
    """
    known = sorted({*ROWS, *COMPARISONS}, key=lambda name: int(name[1:]))
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"--rows has unknown {unknown}; choose from {known}.")
    if before is not None and not (before / "modip_sb3").is_dir():
        raise ValueError(f"--before {before} is no checkout of this project: it has no folder modip_sb3.")
    if before is None and (lacking := [name for name in names or () if name not in ROWS]):
        raise ValueError(f"{lacking} compare with an older checkout: name one by --before.")
    chosen: list[tuple[str, Measurement]] = []
    for name in names or ROWS:
        if name in ROWS:
            chosen.append((ROWS[name].__doc__ or "", ROWS[name]))
        if before is not None and name in COMPARISONS:
            chosen.append((COMPARISONS[name].__doc__ or "", partial(COMPARISONS[name], before)))
    return chosen


def measure(
    measurements: Iterable[tuple[str, Measurement]], clock: Clock, output: Path | None, console: Console
) -> list[Row]:
    """
    :param measurements: of :func:`choose`
    :param clock: measures
    :param output: folder of ``speed.json``, which holds every row as soon as it is measured; None for no file
    :param console: where the table goes
    :return: the rows
    """
    rows: list[Row] = []
    with console.status("") as status:
        for words, measurement in measurements:
            status.update(words)
            for row in measurement(clock):
                rows.append(row)
                if output is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    write_json(output / "speed.json", content(rows, clock))
    console.print(make_table(rows))
    return rows


def content(rows: Iterable[Row], clock: Clock) -> dict[str, Any]:
    """
    :param rows: measured ones
    :param clock: that measured them
    :return: the rows, the versions and the machine, in plain values
    """
    hardware = describe_hardware(th.get_num_threads(), str(clock.device))
    return {"rows": [asdict(row) for row in rows], "hardware": hardware, **describe_software()}


def make_table(rows: Iterable[Row]) -> Table:
    """
    :param rows: measured ones
    :return: a table for people
    """
    table = Table("", "measure", "ratio", "goal", "details")
    for row in rows:
        goal = "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}"
        color = {True: "green", False: "red", None: "default"}[row.met]
        details = ", ".join(f"{name} {value:.3g}" for name, value in row.details.items())
        table.add_row(row.number, row.measure, f"[{color}]{row.value:.2f}[/]", goal, details)
    return table
