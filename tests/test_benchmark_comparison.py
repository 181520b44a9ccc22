"""Rows of a report against a baseline, from records made by hand."""

import numpy as np
import pandas as pd
import pytest

from modip_sb3.benchmark import comparison, statistics
from modip_sb3.benchmark.records import Key, Record
from modip_sb3.benchmark.report import Report
from modip_sb3.benchmark.tables import describe_frequency, make_curves


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REPS", 100)


def test_what_fell_below_the_baseline() -> None:
    returns = {"bc": [[10, 10, 10], [20, 20, 20]], "a": [[8, 8, 30], [8, 8, 31]], "b": [[30, 5, 30], [30, 5, 30]]}
    records = [
        make_record(env, algo, seed, run, [1.0, 2.0, 3.0])
        for env in ("x", "y")
        for algo, runs in returns.items()
        for seed, run in enumerate(runs)
    ]
    entries = {"x": ["bc", "a", "b"], "y": ["bc", "a"]}
    found = comparison.compare(make_curves(records), entries, "bc", "return")
    values = found.set_index(["env", "entry", "env_steps"])
    assert values.loc[("x", "b", 0), "ratio"] == 2.0 and values.loc[("x", "a", 40), "better"] == 1.0
    below = found[found["below"].eq(True)]
    assert list(zip(below["env"], below["entry"], below["env_steps"], strict=True)) == [
        *[("x", "a", 0), ("y", "a", 0)],
        *[("x", "a", 20), ("x", "b", 20), ("y", "a", 20)],
    ]
    *tables, sentence = comparison.make_tables(found, "bc")
    assert sentence == "Below bc in two evaluations running: a in x, a in y."
    assert "| b | 30.0, × 2.00, P 1.00 [1.00, 1.00] | 5.00 ▼, × 0.33, P 0.00 [0.00, 0.00] |" in tables[1]
    assert tables[4] == "### Over all environments" and "| b |" not in tables[5]
    assert set(comparison.make_curves(found)) == {"a"}


def make_record(env: str, algo: str, seed: int, returns: list[float], seconds: list[float], freq: int = 20) -> Record:
    curve = {"inference": "policy", "env_steps": range(0, 41, freq), "wall_seconds": seconds, "return": returns}
    frame = pd.DataFrame(curve).assign(length=1, success=np.nan, score=np.nan)
    settings = {"dataset": None, "evaluation": {"freq": freq}}
    return Record(Key(env, algo, seed), f"{env}/{algo}/seed-{seed}", settings, {}, {}, frame)


def test_what_is_evaluated_less_often_is_compared_where_both_are() -> None:
    records = [
        make_record(env, algo, seed, returns, seconds, freq)
        for env in ("x", "y")
        for algo, returns, seconds, freq in (
            ("sac", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 20),
            ("slow", [0.0, 9.0], [1.0, 9.0], 40),
        )
        for seed in (0, 1)
    ]
    entries = {env: ["sac", "slow"] for env in ("x", "y")}
    found = comparison.compare(make_curves(records), entries, "sac", "return")
    better = found[found["entry"] == "slow"].set_index(["env", "env_steps"])["better"]
    assert better.to_dict() == {(env, step): step / 40 for env in ("x", "y", comparison.EVERYWHERE) for step in (0, 40)}
    tables = comparison.make_tables(found, "sac")
    assert "| slow | 0.00 ▼, P 0.00 [0.00, 0.00] |  | 9.00, × 3.00, P 1.00 [1.00, 1.00] |" in tables[1]
    found = comparison.compare(make_curves(records), entries, "slow", "return")
    assert set(found["env_steps"]) == {0, 40}
    assert describe_frequency(records) == "20 steps (sac) or 40 steps (slow)"
    assert describe_frequency(records[:2]) == "20 steps"


def test_curves_over_wall_time_are_compared_at_the_same_time() -> None:
    fast, slow = [0.0, 60.0, 120.0], [60.0, 180.0, 300.0]
    records = [make_record("a", "sac", 0, [0.0, 1.0, 2.0], fast), make_record("a", "sac", 1, [0.0, 2.0, 4.0], slow)]
    report = Report(records, {})
    ((minutes, estimate),) = report._curves_over("a", ["sac"], "return", "wall_seconds").values()
    assert (minutes[0], minutes[-1]) == (1.0, 2.0)  # from where the last has begun to where the first has ended
    np.testing.assert_allclose(estimate.value, (minutes + (minutes - 1)) / 2)  # one a minute, and one a minute later
    ((steps, estimate),) = report._curves_over("a", ["sac"], "return", "env_steps").values()
    assert steps.tolist() == [0, 20, 40] and estimate.value.tolist() == [0.0, 1.5, 3.0]
