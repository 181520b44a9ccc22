"""The rows as a table and a JSON file."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch as th
from rich.console import Console
from rich.table import Table

from modip_sb3.benchmark.settings import describe_hardware, describe_software
from modip_sb3.benchmark.speed.rows import ROWS, Row
from modip_sb3.benchmark.speed.timing import Clock
from modip_sb3.storage import write_json


def measure(names: Sequence[str], clock: Clock, output: Path | None, console: Console) -> list[Row]:
    """
    :param names: keys of :data:`ROWS`
    :param clock: measures
    :param output: folder of ``speed.json``, which holds every row as soon as it is measured; None for no file
    :param console: where the table goes
    :return: the rows
    """
    rows: list[Row] = []
    with console.status("") as status:
        for name in names:
            status.update(f"{name}: {(ROWS[name].__doc__ or '').partition(': ')[2]}")
            for row in ROWS[name](clock):
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
