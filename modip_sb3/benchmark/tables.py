"""Scores, costs and conditions of runs as tables and phrases."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from modip_sb3.benchmark.records import Record
from modip_sb3.benchmark.statistics import Estimate

WHICH = ["env", "algo", "inference", "entry", "seed"]
FIGURES = ["env_steps", "wall_seconds", "return", "length", "score", "success"]


def make_curves(records: Sequence[Record]) -> pd.DataFrame:
    """
    :param records: finished runs
    :return: a row for each evaluation; "entry" names the algorithm, and who acted where both can
    """
    parts = [pd.DataFrame(columns=[*WHICH, *FIGURES])]
    for record in records:
        curve = record.curve.assign(env=record.key.env, algo=record.key.algo, seed=record.key.seed)
        both = curve["inference"].nunique() > 1
        curve["entry"] = [f"{record.key.algo} ({acted})" if both else record.key.algo for acted in curve["inference"]]
        parts.append(curve[[*WHICH, *FIGURES]])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def make_results(curves: pd.DataFrame) -> pd.DataFrame:
    """
    :param curves: of :func:`make_curves`
    :return: a row for each run and inference, with its last evaluation and the best figure of all
    """
    groups = curves.sort_values("env_steps").groupby(WHICH, sort=False)[["return", "score", "success"]]
    return groups.last().add_prefix("final_").join(groups.max().add_prefix("best_")).reset_index()


def as_long(estimates: Mapping[str, Mapping[str, Estimate]], measure: str) -> pd.DataFrame:
    """
    :param estimates: of each row, by their names
    :param measure: what was estimated
    :return: a row for each estimate
    """
    return pd.DataFrame(
        [
            {"entry": entry, "measure": f"final_{measure}", "estimate": name, **estimate._asdict()}
            for name, rows in estimates.items()
            for entry, estimate in rows.items()
        ]
    )


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """
    :param rows: texts by heading; a heading that has no text in any row is left out
    :return: a Markdown table
    """
    headings = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)
    ]
    lines = [headings, ["---"] * len(headings)]
    lines += [[str(row.get(name, "")).replace("|", "\\|").replace("\n", " ") for name in headings] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_std(values: pd.Series, unit: str = "") -> str:
    """
    :param values: of each seed
    :param unit: beside the figures
    :return: mean ± standard deviation; nothing where it is not known
    """
    if values.isna().any():
        return ""
    digits = digits_for(values.mean())
    spread = f" ± {values.std():,.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():,.{digits}f}{spread}{unit}"


def digits_for(value: float) -> int:
    """
    :param value: a return or a score
    :return: how many digits after the point it is written with; successes and subtasks are small
    """
    return 1 if abs(value) >= 10 else 2


def interval(estimate: Estimate) -> str:
    """
    :param estimate: numbers
    :return: the value and its interval
    """
    digits = digits_for(estimate.value)
    value, low, high = (f"{part:,.{digits}f}" for part in estimate)
    return f"{value} [{low}, {high}]"


def describe_frequency(records: Sequence[Record]) -> str:
    """
    :param records: finished runs
    :return: after how many steps they are evaluated, and which ones if not all alike
    """
    algos: dict[int, dict[str, None]] = {}
    for record in records:
        algos.setdefault(record.settings["evaluation"]["freq"], {})[record.key.algo] = None
    phrases = [f"{freq:,} steps" + (f" ({', '.join(algos[freq])})" if len(algos) > 1 else "") for freq in sorted(algos)]
    return " or ".join(phrases)


def describe_actions(records: Sequence[Record]) -> str:
    """
    :param records: finished runs
    :return: who acts deterministically in evaluations, and who samples
    """
    parts = []
    for deterministic, phrase in ((True, "deterministic"), (False, "sampled")):
        algos = dict.fromkeys(r.key.algo for r in records if r.settings["deterministic"] == deterministic)
        if algos:
            parts.append(f"{phrase} for {', '.join(algos)}")
    return "; ".join(parts)


def describe_data(records: Sequence[Record], env: str) -> str:
    """
    :param records: finished runs
    :param env: Gymnasium id
    :return: the environment's offline data, and who takes none
    """
    here = [record for record in records if record.key.env == env]
    data = next((record.settings["dataset"] for record in here if record.settings["dataset"]), None)
    if data is None:
        return "no offline data"
    without = dict.fromkeys(record.key.algo for record in here if not record.settings["dataset"])
    phrase = f"offline data {data['source']}, {data['transitions']:,} transitions, sha256 {data['sha256'][:12]}"
    return phrase + (f"; without it: {', '.join(without)}" if without else "")


def describe_costs(statuses: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """
    :param statuses: of the finished seeds of one algorithm
    :return: what they took
    """

    def mean(name: str, scale: float = 1.0, digits: int = 1) -> str:
        values = [status[name] for status in statuses if status.get(name) is not None]
        return f"{np.mean(values) / scale:,.{digits}f}" if values else ""

    latencies = [status.get("ms_per_action", {}) for status in statuses]
    acted = list(dict.fromkeys(name for latency in latencies for name in latency))
    machines = dict.fromkeys(describe_machine(session) for status in statuses for session in status.get("sessions", []))
    return {
        "wall time, min": mean("train_seconds", 60),
        "of it offline, min": mean("offline_seconds", 60),
        "CPU time, min": mean("cpu_seconds", 60),
        "evaluations, min": mean("evaluation_seconds", 60),
        "steps/s": mean("steps_per_second"),
        "ms per action": ", ".join(
            f"{name} {np.mean([x[name] for x in latencies if name in x]):.1f}" for name in acted
        ),
        "memory, MB": mean("peak_memory_mb", digits=0),
        "hardware": "; ".join(machines),
    }


def describe_machine(session: Mapping[str, Any]) -> str:
    """
    :param session: of a run's ``status.json``
    :return: processor, cores, threads, and the accelerator if there is one
    """
    gpu = f", {session['gpu']}" if session.get("gpu") else ""
    return f"{session.get('cpu')}, {session.get('threads')} of {session.get('cores')} cores{gpu}"


def what_seeds_allow(seeds: int) -> str:
    """
    :param seeds: number of seeds
    :return: what may be concluded from so many
    """
    if seeds == 1:
        return "One seed has no interval, and allows no statement about the algorithms beyond these very runs."
    if seeds >= 10:
        return f"Intervals: stratified bootstrap over {seeds} seeds."
    resamples = math.comb(2 * seeds - 1, seeds)
    trimmed = "" if seeds >= 4 else " With fewer than four runs nothing is trimmed: the IQM is their mean."
    return (
        f"**What {seeds} seeds allow to be said**: a bootstrap over {seeds} seeds has {resamples} distinct resamples "
        "in an environment, so its intervals are little more than the range of these runs, and narrower than what new "
        "seeds would show. Intervals that overlap decide nothing; ones that are far apart are a hint that more seeds "
        f"may confirm.{trimmed}"
    )
