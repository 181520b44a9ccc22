"""How the rows of a report compare with one of them, the baseline, at every evaluation that they share."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from modip_sb3.benchmark import statistics, tables

EVERYWHERE = "all"  # in the column "env", for what is said of all environments together
EXPLANATION = (
    "Mean over the seeds; ×: its ratio to the baseline's; P: how probably a run is better than one of the baseline, "
    "with its 95 % bootstrap interval over the seeds; ▼: below the lower end of the interval of the baseline's mean."
)


def compare(curves: pd.DataFrame, entries: Mapping[str, Sequence[str]], baseline: str, measure: str) -> pd.DataFrame:
    """
    :param curves: of :func:`~modip_sb3.benchmark.tables.make_curves`
    :param entries: complete rows of each environment, the baseline among them
    :param baseline: row that the others are compared with
    :param measure: column that they are compared by, "score" or "return"
    :return: for each environment, row and evaluation of the baseline: the "mean" over the seeds, its "ratio" to the
        baseline's where both are positive, whether it is "below" the low end of the baseline's 95 % interval, and how
        probably a run is "better" than one of the baseline, with "better_low" and "better_high"; and the last three for
        all environments together, for the rows that are complete in each
    """
    rows = []
    shared = curves.loc[curves["entry"] == baseline, "env_steps"]
    for step, at_step in curves[curves["env_steps"].isin(shared)].groupby("env_steps"):
        scores = {env: _scores(at_step[at_step["env"] == env], names, measure) for env, names in entries.items()}
        for env, found in scores.items():
            reference = statistics.means({baseline: found[baseline]})[baseline]
            better = statistics.probabilities_of_improvement(found, baseline)
            for entry, values in found.items():
                mean = values.mean()
                ratio = mean / reference.value if min(mean, reference.value) > 0 else np.nan
                row = {"env": env, "entry": entry, "env_steps": step, "mean": mean, "ratio": ratio}
                rows.append(row | {"below": bool(mean < reference.low)} | _as_columns(better.get(entry)))
        if len(entries) > 1:
            everywhere = set.intersection(*map(set, scores.values()))
            pooled = {
                entry: np.concatenate([found[entry] for found in scores.values()], axis=1)
                for entry in next(iter(entries.values()))
                if entry in everywhere
            }
            for entry, estimate in statistics.probabilities_of_improvement(pooled, baseline).items():
                rows.append({"env": EVERYWHERE, "entry": entry, "env_steps": step} | _as_columns(estimate))
    return pd.DataFrame(rows)


def _scores(at_step: pd.DataFrame, entries: Sequence[str], measure: str) -> dict[str, np.ndarray]:
    """Of each row that was evaluated then, in one environment ``(seeds, 1)``."""
    evaluated = [entry for entry in entries if entry in set(at_step["entry"])]
    return {entry: at_step.loc[at_step["entry"] == entry, [measure]].to_numpy() for entry in evaluated}


def _as_columns(better: statistics.Estimate | None) -> dict[str, float]:
    names = ("better", "better_low", "better_high")
    return {} if better is None else dict(zip(names, better, strict=True))


def make_tables(comparison: pd.DataFrame, baseline: str) -> list[str]:
    """
    :param comparison: of :func:`compare`
    :param baseline: row that the others are compared with
    :return: for each environment a table with a column for each evaluation, and the environments in which a row was
        below the baseline twice running
    """
    sections = []
    for env, in_env in comparison.groupby("env", sort=False):
        rows = []
        for entry, found in in_env.groupby("entry", sort=False):
            cells = {f"{step:,} steps": "" for step in sorted(in_env["env_steps"].unique())}
            cells |= {f"{step:,} steps": _cell(row) for step, row in found.set_index("env_steps").iterrows()}
            rows.append({"algorithm": str(entry), **cells})
        sections += [f"### {'Over all environments' if env == EVERYWHERE else env}", tables.markdown(rows)]
    fallen = [
        f"{entry} in {env}"
        for (env, entry), found in comparison[comparison["env"] != EVERYWHERE].groupby(["env", "entry"], sort=False)
        if (found["below"].to_numpy()[1:] & found["below"].to_numpy()[:-1]).any()
    ]
    sections.append(f"Below {baseline} in two evaluations running: {', '.join(fallen) or 'none'}.")
    return sections


def make_curves(comparison: pd.DataFrame) -> dict[str, tuple[np.ndarray, statistics.Estimate]]:
    """
    :param comparison: of :func:`compare`
    :return: for each row the evaluations ``(P,)`` and the probability of improvement over all environments ``(P,)``
    """
    envs = comparison["env"].unique()
    pooled = comparison[
        (comparison["env"] == (EVERYWHERE if len(envs) > 1 else envs[0])) & comparison["better"].notna()
    ]
    return {
        entry: (
            rows["env_steps"].to_numpy(),
            statistics.Estimate(rows["better"], rows["better_low"], rows["better_high"]),
        )
        for entry, rows in pooled.groupby("entry", sort=False)
    }


def _cell(row: pd.Series) -> str:
    parts = []
    if not pd.isna(row["mean"]):
        parts.append(f"{row['mean']:,.{tables.digits_for(row['mean'])}f}{' ▼' if row['below'] else ''}")
    if not pd.isna(row["ratio"]):
        parts.append(f"× {row['ratio']:.2f}")
    if not pd.isna(row["better"]):
        better = statistics.Estimate(row["better"], row["better_low"], row["better_high"])
        parts.append(f"P {tables.interval(better)}")
    return ", ".join(parts)
