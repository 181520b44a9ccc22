"""``benchmark report``: real runs of seconds, copied and damaged; numbers recomputed by hand."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bench import ENV_ID, NAME, command, run

from modip_sb3.benchmark import statistics
from modip_sb3.benchmark.__main__ import make_parser
from modip_sb3.benchmark.plan import plan
from modip_sb3.benchmark.records import check_comparable, read_runs
from modip_sb3.benchmark.report import Report
from modip_sb3.benchmark.runs import EVALUATION_COLUMNS, RunFolder, as_csv, read_rows
from modip_sb3.benchmark.tables import make_curves
from modip_sb3.benchmark.worker import execute
from modip_sb3.datasets import normalized_score

FILES = {"report.md", "runs.csv", "curves.csv", "aggregates.csv", "comparison.csv"}
FILES |= {f"{name}.png" for name in ("curves_steps", "curves_wall", "iqm", "profiles", "improvement")}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REPS", 100)


@pytest.fixture(scope="module")
def text(benchmark: Path) -> str:
    """Its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "REPS", 100)
        return report(benchmark)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAC and MODIP with two seeds."""
    output = tmp_path_factory.mktemp("benchmark")
    for folder in plan(make_parser().parse_args(command(output, "sac", "modip", seeds=(0, 1)))):
        execute(folder.path, 1)
    return output


@pytest.fixture
def copied(benchmark: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(benchmark, tmp_path / "runs", ignore=shutil.ignore_patterns("report")))


def tables_of(output: Path) -> str:
    """Without figures and intervals, which take most of the time."""
    report = Report(*read_runs(output))
    return "\n\n".join([*report.gap_list(), *report.env_tables(), *report.costs(), *report.runs()])


def report(output: Path) -> str:
    assert run("report", str(output), "--out", str(output / "report")) == 0
    return (output / "report" / "report.md").read_text()


def cells(text: str, section: str, row: str) -> dict[str, str]:
    """One row of a section's first table."""
    lines = [line for line in text.split(f"## {section}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    (found,) = [line for line in table if row in line]
    return dict(zip(table[0], found, strict=True))


def finals(output: Path, algo: str, inference: str, step: str = "40") -> np.ndarray:
    """Mean return of each seed's last evaluation, straight from the files."""
    means = []
    for seed in (0, 1):
        rows = read_rows(output / NAME / algo / f"seed-{seed}" / "evaluations.csv")
        means.append([float(r["return"]) for r in rows if (r["inference"], r["env_steps"]) == (inference, step)])
    return np.mean(means, axis=1)


# ----------------------------------------------------------------------- numbers


def as_written(value: float, spread: str = "", *figures: float) -> str:
    """With one digit after the point, and with two where the value is small."""
    text = ("{:,.$f}" + spread).replace("$", "1" if abs(value) >= 10 else "2")
    return text.format(value, *figures)


def test_tables_and_figures(benchmark: Path, text: str) -> None:
    assert {path.name for path in (benchmark / "report").iterdir()} == FILES
    assert all((benchmark / "report" / name).stat().st_size > 4000 for name in FILES if name.endswith(".png"))
    assert set(re.findall(r"\((\w+\.png)\)", text)) == {name for name in FILES if name.endswith(".png")}
    for entry, algo, inference in (
        ("sac", "sac", "policy"),
        ("modip (policy)", "modip", "policy"),
        ("modip (planner)", "modip", "planner"),
    ):
        found, expected = cells(text, ENV_ID, entry), finals(benchmark, algo, inference)
        assert found["seeds"] == "2/2"
        assert found["final return"] == as_written(expected.mean(), " ± {:,.$f}", expected.std(ddof=1))
        best = np.max([finals(benchmark, algo, inference, step) for step in ("0", "20", "40")], axis=0)
        assert found["best return"] == as_written(best.mean(), " ± {:,.$f}", best.std(ddof=1))
        low, high = sorted(expected)  # two runs have three resamples
        assert found["final return, IQM"] == as_written(expected.mean(), " [{:,.$f}, {:,.$f}]", low, high)
        assert cells(text, "Runs", entry)["seed 1"] == as_written(expected[1])
    assert "normalised" not in cells(text, ENV_ID, "sac") and "Gaps" not in text
    assert "actions: deterministic for sac; sampled for modip" in text and "2 episodes each time" in text
    assert "What 2 seeds allow to be said" in text and "0 of 4 finished runs were stopped" in text


def test_costs(benchmark: Path, text: str) -> None:
    found = cells(text, "Cost", "modip")
    folders = [RunFolder(benchmark / NAME / "modip" / f"seed-{seed}") for seed in (0, 1)]
    statuses = [folder.read_status() for folder in folders]
    assert found["steps/s"] == f"{np.mean([status['steps_per_second'] for status in statuses]):,.1f}"
    assert found["memory, MB"] == f"{np.mean([status['peak_memory_mb'] for status in statuses]):,.0f}"
    assert re.fullmatch(r"policy \d+\.\d, planner \d+\.\d", found["ms per action"])
    assert found["hardware"].endswith(" cores")


@pytest.mark.usefixtures("text")
def test_csv(benchmark: Path) -> None:
    runs = pd.read_csv(benchmark / "report" / "runs.csv")
    assert len(runs) == 6 and set(runs["entry"]) == {"sac", "modip (policy)", "modip (planner)"}
    np.testing.assert_allclose(runs.loc[runs["entry"] == "sac", "final_return"], finals(benchmark, "sac", "policy"))
    curves = pd.read_csv(benchmark / "report" / "curves.csv")
    assert len(curves) == 18 and set(curves["env_steps"]) == {0, 20, 40}
    aggregates = pd.read_csv(benchmark / "report" / "aggregates.csv")
    assert (aggregates["low"] <= aggregates["value"]).all() and (aggregates["value"] <= aggregates["high"]).all()


def test_comparison(benchmark: Path, text: str) -> None:
    against = "modip (policy)"
    found = pd.read_csv(benchmark / "report" / "comparison.csv")
    assert set(found["baseline"]) == {against} and len(found) == 3 * 3
    row = found[(found["entry"] == "sac") & (found["env_steps"] == 40)].iloc[0]
    ours, theirs = finals(benchmark, "sac", "policy"), finals(benchmark, "modip", "policy")
    assert row["mean"] == pytest.approx(ours.mean()) and np.isnan(row["ratio"])  # Pendulum's returns are negative
    assert row["better"] == np.mean(ours[:, None] > theirs)
    assert row["below"] == (ours.mean() < theirs.min())  # of two runs' means the interval reaches from one to the other
    assert f"P {row['better']:.2f} [" in cells(text, f"Against {against}", "sac")["40 steps"]


def write_run(output: Path, env: str, rows: list[tuple[Any, ...]], **settings: Any) -> None:
    """A finished run with one evaluation."""
    protocol = {"freq": 20, "episodes": len(rows), "seed": 1000, "actions": "default"}
    given = {"env": env, "algo": "sac", "seed": 0, "timesteps": 20, "evaluation": protocol, "hyperparameters": {}}
    given |= {"dataset": None, "deterministic": True, **settings}
    folder = RunFolder.of(output, given)
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps({"settings": given}))
    folder.update_status(state="finished", env_steps=20)
    acted = [(steps, 1.0, "policy", i, *row) for steps in (0, 20) for i, row in enumerate(rows)]
    folder.write_evaluations([dict(zip(EVALUATION_COLUMNS, row, strict=True)) for row in acted])


def test_normalised_scores(tmp_path: Path) -> None:
    write_run(tmp_path, "modip/hopper-sac-medium-v5", [(1000.0, 10, None), (2000.0, 10, None)])
    write_run(tmp_path, "modip/lift-ph-v1", [(0.0, 10, 0), (1.0, 10, 1), (1.0, 10, 1), (1.0, 10, 1)])
    with pytest.raises(
        ValueError, match=r"evaluation.episodes differs: 2 in .*hopper.*; 4 in modip-lift-ph-v1/sac/seed-0"
    ):
        read_runs(tmp_path)
    shutil.rmtree(tmp_path / "modip-lift-ph-v1")
    write_run(tmp_path, "modip/lift-ph-v1", [(0.0, 10, 0), (1.0, 10, 1)])
    records, gaps = read_runs(tmp_path)
    scores = {record.key.env: record.curve["score"].tolist() for record in records}
    hopper = normalized_score("hopper", 1500.0)
    assert scores == {"modip/hopper-sac-medium-v5": [pytest.approx(hopper)] * 2, "modip/lift-ph-v1": [50.0, 50.0]}
    assert not gaps
    text = report(tmp_path)
    assert cells(text, "modip/lift-ph-v1", "sac")["final success"] == "50.0 %"
    found = cells(text, "Over 2 environments", "sac")["IQM of the final normalised score"]
    assert found.startswith(f"{(hopper + 50) / 2:.1f} [") and "allows no statement" in text
    write_run(tmp_path, "Pendulum-v1", [(-1.0, 10, None), (-2.0, 10, None)])
    assert "Not aggregated: some environments have no normalised score." in report(tmp_path)


# -------------------------------------------------------------------------- gaps


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def interrupt(folder: Path) -> None:
    RunFolder(folder).update_status(state="running", env_steps=20)


def fail(folder: Path) -> None:
    RunFolder(folder).update_status(state="failed", env_steps=20, error="RuntimeError: it fell")


def never_start(folder: Path) -> None:
    (folder / "status.json").unlink()


def cut_settings(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


def cut_evaluations(folder: Path) -> None:
    path = folder / "evaluations.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))


def skip_an_evaluation(folder: Path) -> None:
    rows = [row for row in read_rows(folder / "evaluations.csv") if row["env_steps"] != "20"]
    (folder / "evaluations.csv").write_text(as_csv(rows, EVALUATION_COLUMNS))


def write_words(folder: Path) -> None:
    path = folder / "evaluations.csv"
    path.write_text(re.sub(r",-?\d+\.\d+,10,", ",much,10,", path.read_text()))


def lose_evaluations(folder: Path) -> None:
    (folder / "evaluations.csv").unlink()


def exchange(folder: Path) -> None:
    shutil.copy(folder.parent / "seed-0" / "config.json", folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, "no such run"),
        (interrupt, "unfinished, 20 steps so far"),
        (fail, "failed after 20 steps: RuntimeError: it fell"),
        (never_start, "not started"),
        (cut_settings, "corrupt folder: config.json cannot be read ("),
        (cut_evaluations, "corrupt folder: evaluations.csv has 1 rows for planner at 40 steps, expected 2 episodes"),
        (
            skip_an_evaluation,
            "corrupt folder: evaluations.csv has evaluations of planner at [0, 40] steps, expected them",
        ),
        (write_words, "corrupt folder: evaluations.csv has cells that are no numbers"),
        (lose_evaluations, "corrupt folder: evaluations.csv cannot be read ("),
        (exchange, "corrupt folder: its config.json is that of Pendulum-v1, modip, seed 0"),
    ],
)
def test_gaps_are_marked_and_not_averaged_over(copied: Path, damage: Callable[[Path], None], reason: str) -> None:
    before = tables_of(copied)
    damage(copied / NAME / "modip" / "seed-1")
    text = tables_of(copied)
    assert f"- **{ENV_ID}, modip, seed 1**: {reason}" in text and "Gaps" not in before
    for entry in ("modip (policy)", "modip (planner)"):
        row = cells(text, ENV_ID, entry)
        assert (row["seeds"], row["final return"]) == ("1/2", "**gap** (seed 1)")
        assert not any(row[name] for name in row if name not in ("algorithm", "seeds", "final return"))
        row = cells(text, "Runs", entry)
        assert row["seed 1"].startswith("**gap**: ") and row["seed 0"] == cells(before, "Runs", entry)["seed 0"]
    assert cells(text, ENV_ID, "sac") == cells(before, ENV_ID, "sac")


def test_rows_with_a_gap_are_in_no_figure(copied: Path) -> None:
    (copied / "report").mkdir()
    (copied / "report" / "improvement.png").write_text("of an earlier report")
    remove(copied / NAME / "modip" / "seed-1")
    text = report(copied)
    assert set(pd.read_csv(copied / "report" / "aggregates.csv")["entry"]) == {"sac"}
    assert not (copied / "report" / "improvement.png").exists() and "improvement.png" not in text


def test_nothing_finished(copied: Path) -> None:
    for folder in copied.glob("*/*/seed-*"):
        never_start(folder)
    text = report(copied)
    assert text.count("not started") == 4 + 4 and "Not aggregated" in text
    assert cells(text, ENV_ID, "modip")["final return"] == "**gap** (seed 0, seed 1)"


# ------------------------------------------------------------------ comparability


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"timesteps": 60}, "timesteps differs: 40 in .*; 60 in Pendulum-v1/sac/seed-1"),
        ({"evaluation": {"episodes": 3}}, "evaluation.episodes differs: 2 in .*; 3 in Pendulum-v1/sac/seed-1"),
        (
            {"evaluation": {"freq": 10}},
            "evaluation.freq differs for sac: 20 in Pendulum-v1/sac/seed-0; 10 in Pendulum-v1/sac/seed-1",
        ),
        (
            {"dataset": {"sha256": "b" * 64}},
            "dataset differs for Pendulum-v1: 'b{12}' in .*sac/seed-1; 'a{12}' in .*modip/seed-0, ",
        ),
        ({"hyperparameters": {"gamma": 0.9}}, "hyperparameters.gamma differs for Pendulum-v1/sac: 0.99 in .*; 0.9 in "),
        ({"hyperparameters": {"env_kwargs": {"g": 1}}}, r"env_kwargs.g differs for Pendulum-v1: .*seed-1"),
    ],
)
def test_what_must_not_be_mixed(change: dict[str, Any], sentence: str) -> None:
    settings = {}
    for algo in ("sac", "modip"):
        for seed in (0, 1):
            entry: dict[str, Any] = {
                "env": ENV_ID,
                "algo": algo,
                "seed": seed,
                "timesteps": 40,
                "evaluation": {"episodes": 2, "freq": 20},
                "dataset": {"sha256": "a" * 64} if algo == "modip" else None,
                "hyperparameters": {"gamma": 0.99, "env_kwargs": {"g": 10}},
            }
            settings[f"{ENV_ID}/{algo}/seed-{seed}"] = entry
    check_comparable(settings)
    changed = settings[f"{ENV_ID}/sac/seed-1"]
    for name, value in change.items():
        changed[name] = changed[name] | value if isinstance(changed[name], dict) and name != "dataset" else value
    with pytest.raises(ValueError, match=f"cannot be compared; report them from separate folders:\n  {sentence}"):
        check_comparable(settings)


def test_what_longer_runs_reached_earlier(benchmark: Path) -> None:
    cut, whole = Report(*read_runs(benchmark, 20)), Report(*read_runs(benchmark))
    for entry, algo, inference in (("sac", "sac", "policy"), ("modip (planner)", "modip", "planner")):
        found = cut.results.set_index("entry").loc[entry].sort_values("seed")
        np.testing.assert_allclose(found["final_return"], finals(benchmark, algo, inference, "20"))
    assert cut.protocol()[0].startswith("- 20 environment steps") and set(cut.curves["env_steps"]) == {0, 20}
    costs, expected = ("\n\n".join(report.costs()) for report in (cut, whole))
    assert cells(expected, "Cost", "modip")["memory, MB"] and "memory, MB" not in cells(costs, "Cost", "modip")
    seconds = whole.curves.set_index(["algo", "env_steps"]).sort_index().loc[("modip", 20), "wall_seconds"]
    assert cells(costs, "Cost", "modip")["wall time, min"] == f"{seconds.mean() / 60:,.1f}"


@pytest.mark.parametrize("timesteps", [0, 30, 60])
def test_what_was_not_evaluated_is_not_reported(benchmark: Path, timesteps: int) -> None:
    assert run("report", str(benchmark), "--timesteps", str(timesteps)) == (
        f"{NAME}/modip/seed-0 has 40 steps and is evaluated every 20, not at {timesteps}: choose another "
        "--timesteps, or leave it out."
    )


def test_unequal_budgets_are_refused(copied: Path, tmp_path: Path) -> None:
    (longer,) = plan(make_parser().parse_args(command(tmp_path / "longer", "sac", seeds=(2,), timesteps=60)))
    shutil.copytree(longer.path, copied / NAME / "sac" / "seed-2")
    found = run("report", str(copied))
    assert isinstance(found, str) and not (copied / "report").exists()
    four = f"{NAME}/modip/seed-0, {NAME}/modip/seed-1, {NAME}/sac/seed-0 and 1 more"
    assert f"  timesteps differs: 40 in {four}; 60 in {NAME}/sac/seed-2" in found


def test_unequal_budgets_of_two_algorithms_are_cut_to_one(benchmark: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(benchmark / NAME / "modip", tmp_path / "runs" / NAME / "modip")).parents[1]
    for longer in plan(make_parser().parse_args(command(output, "sac", seeds=(0, 1), timesteps=60))):
        execute(longer.path, 1)
    assert "timesteps differs: 40 in" in str(run("report", str(output)))
    records, gaps = read_runs(output, 40)
    assert not gaps and {record.settings["timesteps"] for record in records} == {40}
    assert set(make_curves(records)["env_steps"]) == {0, 20, 40}


def test_faults_of_the_command(copied: Path, tmp_path: Path) -> None:
    assert run("report", str(tmp_path / "empty")) == (
        f"{tmp_path / 'empty'} has no runs (folders ENV/ALGO/seed-N); write some with the command run."
    )
    found = run("report", str(copied), "--baseline", "sac", "ppo")
    assert found == "--baseline 'ppo' is no complete row; choose from ['modip (policy)', 'modip (planner)', 'sac']."
