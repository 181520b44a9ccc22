"""Markdown, figures and CSV from the folders of a benchmark's runs."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modip_sb3.benchmark import comparison, plots, statistics, tables
from modip_sb3.benchmark.records import Key, Record, read_runs
from modip_sb3.benchmark.statistics import Estimate
from modip_sb3.storage import write_atomically

WALL_POINTS = 60  # of a learning curve over wall time
THRESHOLDS = 101

FIGURES = ("curves_steps", "curves_wall", "iqm", "profiles", "improvement")

MEASURES = {"score": "normalised score", "return": "return"}


def write(output: Path, folder: Path, baselines: Sequence[str] = (), timesteps: int | None = None) -> None:
    """
    Write ``report.md``, its figures, ``runs.csv``, ``curves.csv``, ``aggregates.csv`` and ``comparison.csv``.

    :param output: folder of a benchmark
    :param folder: of the report
    :param baselines: rows that every other one is compared with, such as "sac" or "modip (policy)"; the first row by
        default
    :param timesteps: what to compare of longer runs; all of them by default
    :raises ValueError: if the runs cannot be compared, or there is no such row
    """
    records, gaps = read_runs(output, timesteps)
    report = Report(records, gaps)
    for baseline in baselines:
        if baseline not in report.complete:
            raise ValueError(f"--baseline {baseline!r} is no complete row; choose from {list(report.complete)}.")
    baselines = baselines or report.complete[:1]
    folder.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:  # of an earlier report, that had more to show
        (folder / f"{figure}.png").unlink(missing_ok=True)
    sections = [
        f"# Benchmark of {output.name}",
        *report.protocol(),
        *report.gap_list(),
        *report.env_tables(),
        *report.aggregate(folder),
        *report.comparisons(folder, baselines),
        *report.learning_curves(folder),
        *report.costs(),
        *report.runs(),
        *report.provenance(output),
    ]
    for name, table in report.csv.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
    write_atomically(folder / "report.md", "\n\n".join(sections) + "\n")


class Report:
    """
    The sections of a report.

    :param records: finished runs, which can be compared
    :param gaps: why every other run is missing
    """

    def __init__(self, records: Sequence[Record], gaps: Mapping[Key, str]) -> None:
        self.records, self.gaps = records, gaps
        keys = [*(record.key for record in records), *gaps]
        self.envs, self.algos, seeds = (list(dict.fromkeys(values)) for values in zip(*keys, strict=True))
        self.seeds = sorted(seeds)
        self.curves = tables.make_curves(records)
        self.results = tables.make_results(self.curves)
        self.entries = self._entries()
        self.complete = [entry for entry in self.entries if not self._gaps_of(entry)]
        self.colors = plots.make_colors(self.entries)
        self.csv = {"runs": self.results, "curves": self.curves}

    def _entries(self) -> list[str]:
        """Rows: each algorithm's policy alone and its planner; one row for an algorithm of which no run is finished."""
        rows = []
        for algo in self.algos:
            found = self.curves.loc[self.curves["algo"] == algo, "entry"] if len(self.curves) else []
            rows += list(dict.fromkeys(found)) or [algo]
        return rows

    def _gaps_of(self, entry: str, env: str | None = None) -> dict[Key, str]:
        algo = entry.split(" (")[0]
        return {key: why for key, why in self.gaps.items() if key.algo == algo and env in (None, key.env)}

    # ---------------------------------------------------------------- sections

    def protocol(self) -> list[str]:
        """What all runs have in common."""
        if not self.records:
            return []
        settings = self.records[0].settings
        evaluation = settings["evaluation"]
        lines = [
            f"- {settings['timesteps']:,} environment steps; evaluated before the first one (after the offline phase), "
            f"then every {tables.describe_frequency(self.records)} and at the end",
            f"- {evaluation['episodes']} episodes each time, from the same first states (seed {evaluation['seed']}); "
            f"actions: {tables.describe_actions(self.records)}",
            f"- seeds {', '.join(map(str, self.seeds))}",
        ]
        for env in self.envs:
            lines.append(f"- {env}: {tables.describe_data(self.records, env)}")
        return ["\n".join(lines)]

    def gap_list(self) -> list[str]:
        """Every run that is missing, and why."""
        if not self.gaps:
            return []
        lines = [f"- **{key.env}, {key.algo}, seed {key.seed}**: {why}" for key, why in sorted(self.gaps.items())]
        intro = "**Gaps.** Rows with a gap have no averages, and are in no figure; what is there of them is under Runs."
        return [intro, "\n".join(lines)]

    def env_tables(self) -> list[str]:
        """For each environment a row for each algorithm, with the policy alone and the planner apart."""
        sections = []
        for env in self.envs:
            rows = [self._env_row(env, entry) for entry in self.entries]
            sections += [f"## {env}", tables.markdown(rows)]
        sections.append(
            "Mean ± standard deviation over the seeds, of each run's mean over its episodes. Best: the highest of a "
            "run's evaluations, which flatters whoever varies most or is evaluated most often. IQM: interquartile mean "
            "of the final return over the seeds, with its 95 % bootstrap interval. Normalised: D4RL's score, or the "
            "success rate in percent."
        )
        return sections

    def _env_row(self, env: str, entry: str) -> dict[str, str]:
        gaps = self._gaps_of(entry, env)
        row = {"algorithm": entry, "seeds": f"{len(self.seeds) - len(gaps)}/{len(self.seeds)}"}
        if gaps:
            listed = ", ".join(f"seed {key.seed}" for key in gaps)
            return row | {"final return": f"**gap** ({listed})"}
        found = self.results[(self.results["env"] == env) & (self.results["entry"] == entry)]
        iqm = statistics.interquartile_means({entry: found[["final_return"]].to_numpy()})[entry]
        return row | {
            "final return": tables.mean_std(found["final_return"]),
            "best return": tables.mean_std(found["best_return"]),
            "final return, IQM": tables.interval(iqm),
            "final, normalised": tables.mean_std(found["final_score"]),
            "best, normalised": tables.mean_std(found["best_score"]),
            "final success": tables.mean_std(100 * found["final_success"], " %"),
        }

    def aggregate(self, folder: Path) -> list[str]:
        """Over all environments: interquartile mean and performance profiles."""
        heading = f"## Over {len(self.envs)} environments" if len(self.envs) > 1 else "## Over the seeds"
        measure = self._measure()
        if measure is None:
            return [heading, "Not aggregated: some environments have no normalised score."]
        if not self.complete:
            return [heading, "Not aggregated: no row is complete."]
        scores = {entry: self._matrix(entry, f"final_{measure}") for entry in self.complete}
        iqm, mean = statistics.interquartile_means(scores), statistics.means(scores)
        low, high = min(map(np.min, scores.values())), max(map(np.max, scores.values()))
        thresholds = np.linspace(low - 0.02 * (high - low), high, THRESHOLDS)
        profiles = statistics.performance_profiles(scores, thresholds)
        name = f"final {MEASURES[measure]}"
        plots.plot_intervals(iqm, f"IQM of the {name}", self.colors, folder / "iqm.png")
        plots.plot_profiles(thresholds, profiles, name, self.colors, folder / "profiles.png")
        figures = "![IQM](iqm.png)\n![Performance profiles](profiles.png)"
        rows = [
            {
                "algorithm": entry,
                f"IQM of the {name}": tables.interval(iqm[entry]),
                "mean": tables.interval(mean[entry]),
            }
            for entry in self.complete
        ]
        self.csv["aggregates"] = tables.as_long({"iqm": iqm, "mean": mean}, measure)
        return [heading, tables.markdown(rows), tables.what_seeds_allow(len(self.seeds)), figures]

    def comparisons(self, folder: Path, baselines: Sequence[str]) -> list[str]:
        """Every row against each baseline, at every evaluation."""
        measure = self._measure()
        if measure is None or len(self.complete) < 2:
            return []
        complete = {env: [entry for entry in self.entries if not self._gaps_of(entry, env)] for env in self.envs}
        found = {baseline: comparison.compare(self.curves, complete, baseline, measure) for baseline in baselines}
        sections = []
        for baseline, compared in found.items():
            sections += [f"## Against {baseline}", *comparison.make_tables(compared, baseline)]
        improvement = {f"against {baseline}": comparison.make_curves(compared) for baseline, compared in found.items()}
        labels = dict.fromkeys(improvement, "P(better)")
        plots.plot_curves(improvement, labels, "environment steps", self.colors, folder / "improvement.png")
        self.csv["comparison"] = pd.concat([compared.assign(baseline=name) for name, compared in found.items()])
        return [*sections, comparison.EXPLANATION, "![Probability of improvement](improvement.png)"]

    def learning_curves(self, folder: Path) -> list[str]:
        """Over environment steps and over wall time."""
        over_steps: dict[str, Any] = {}
        over_time: dict[str, Any] = {}
        labels = {}
        for env in self.envs:
            measure = "score" if self._has_score(env) else "return"
            complete = [entry for entry in self.entries if not self._gaps_of(entry, env)]
            if not complete:
                continue
            labels[env] = MEASURES[measure]
            over_steps[env] = self._curves_over(env, complete, measure, "env_steps")
            over_time[env] = self._curves_over(env, complete, measure, "wall_seconds")
        if not labels:
            return []
        plots.plot_curves(over_steps, labels, "environment steps", self.colors, folder / "curves_steps.png")
        plots.plot_curves(over_time, labels, "wall time in minutes", self.colors, folder / "curves_wall.png")
        return [
            "## Learning curves",
            "Interquartile mean over the seeds, with its 95 % bootstrap interval. Wall time is that of the offline "
            "phase and of learning, without evaluations and checkpoints; a curve begins where the offline phase of all "
            "seeds is over.",
            "![Over environment steps](curves_steps.png)\n![Over wall time](curves_wall.png)",
        ]

    def _curves_over(
        self, env: str, entries: Sequence[str], measure: str, axis: str
    ) -> dict[str, tuple[np.ndarray, Estimate]]:
        where, values = {}, {}
        for entry in entries:
            rows = self.curves[(self.curves["env"] == env) & (self.curves["entry"] == entry)]
            runs = [run.sort_values("env_steps") for _, run in rows.groupby("seed")]
            if axis == "env_steps":
                where[entry] = runs[0]["env_steps"].to_numpy()
                values[entry] = np.stack([run[measure].to_numpy() for run in runs])
            else:
                first, last = (pick(run["wall_seconds"].iloc[i] for run in runs) for pick, i in ((max, 0), (min, -1)))
                seconds = np.linspace(first, last, WALL_POINTS)
                where[entry] = seconds / 60
                values[entry] = np.stack([np.interp(seconds, run["wall_seconds"], run[measure]) for run in runs])
        estimates = statistics.curves(values)
        return {entry: (where[entry], estimates[entry]) for entry in entries}

    def costs(self) -> list[str]:
        """What the runs took."""
        rows = []
        for env in self.envs:
            for algo in self.algos:
                found = [record for record in self.records if record.key[:2] == (env, algo)]
                if found:
                    rows.append(
                        {"env": env, "algorithm": algo, **tables.describe_costs([record.status for record in found])}
                    )
        if not rows:
            return []
        note = (
            "Mean over the finished seeds. Wall time: offline phase and learning; CPU time: that of all threads in it, "
            "which other work on the machine does not lengthen; steps/s: of learning alone; ms per action: `predict` "
            "for one environment; memory: the most that the process held."
        )
        return ["## Cost", tables.markdown(rows), note]

    def runs(self) -> list[str]:
        """Every run by itself."""
        rows = []
        for env in self.envs:
            for entry in self.entries:
                found = self.results[(self.results["env"] == env) & (self.results["entry"] == entry)]
                by_seed = found.set_index("seed")["final_return"].to_dict()
                finals = {seed: f"{final:,.{tables.digits_for(final)}f}" for seed, final in by_seed.items()}
                gaps = {key.seed: f"**gap**: {why}" for key, why in self._gaps_of(entry, env).items()}
                cells = {f"seed {seed}": (finals | gaps).get(seed, "") for seed in self.seeds}
                rows.append({"env": env, "algorithm": entry, **cells})
        return ["## Runs", "Final return of each run.", tables.markdown(rows)]

    def provenance(self, output: Path) -> list[str]:
        """Where the figures are from."""
        versions = {repr(record.software.get("versions")): record.software.get("versions") for record in self.records}
        sessions = [session for record in self.records for session in record.status.get("sessions", [])]
        commits = sorted({str(session.get("commit")) for session in sessions})
        resumed = sum(len(record.status.get("sessions", [])) > 1 for record in self.records)
        lines = [
            f"- versions: {', '.join(f'{k} {v}' for k, v in (found or {}).items() if v)}" for found in versions.values()
        ]
        if len(versions) > 1:
            lines.append(f"- **the runs were made with {len(versions)} sets of versions**")
        lines.append(f"- commit: {', '.join(commits)}")
        lines.append(f"- {resumed} of {len(self.records)} finished runs were stopped and resumed on the way")
        lines.append(f"- written {time.strftime('%Y-%m-%d')} by `python -m modip_sb3.benchmark report {output}`")
        return ["## Provenance", "\n".join(lines)]

    # ----------------------------------------------------------------- numbers

    def _has_score(self, env: str) -> bool:
        scores = self.results.loc[self.results["env"] == env, "final_score"]
        return len(scores) > 0 and bool(scores.notna().all())

    def _measure(self) -> str | None:
        if all(map(self._has_score, self.envs)):
            return "score"
        return "return" if len(self.envs) == 1 else None

    def _matrix(self, entry: str, column: str) -> np.ndarray:
        rows = self.results[self.results["entry"] == entry]
        return rows.pivot(index="seed", columns="env", values=column).to_numpy()
