"""The loader benchmark measures every format, and its figures are those of the data."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from modip_sb3.benchmark.loaders import (
    FORMATS,
    Measurement,
    SyntheticEnv,
    main,
    make_dataset,
    measure,
    save,
    write_formats,
)
from modip_sb3.datasets import OfflineDataset

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory with Linux's /proc")


def test_every_format_holds_the_same_data(tmp_path: Path) -> None:
    dataset = make_dataset(600, 5, 2)
    assert dataset.episode_lengths.tolist() == [280, 280, 40] and dataset.terminations.sum() == 0
    write_formats(dataset, tmp_path, SyntheticEnv(5, 2))
    for name in ("d4rl.hdf5", "robomimic.hdf5", "synthetic-v0"):
        found = OfflineDataset.load(tmp_path / name)
        for column in ("observations", "actions", "rewards", "truncations", "final_observations"):
            np.testing.assert_array_equal(getattr(found, column), getattr(dataset, column))
    for name in FORMATS:
        found_in = measure(name, tmp_path, 5, 2)
        assert (found_in.format, found_in.transitions) == (name, 600)
        assert found_in.bare_mb == pytest.approx((600 * (5 + 2 + 1) * 4 + 1200 + 3 * 5 * 4) / 1e6)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "loaders.csv"
    main(["--formats", "d4rl", "--transitions", "200000", "--obs-dim", "20", "--output", str(output)])
    with output.open() as file:
        (row,) = csv.DictReader(file)
    assert row.pop("format") == "d4rl" and "d4rl" in capsys.readouterr().out
    found = {name: float(value) for name, value in row.items()}
    assert found["transitions"] == 200_000
    assert found["rows_per_second"] == pytest.approx(200_000 / found["seconds"])
    assert found["resident_ratio"] == pytest.approx(found["resident_mb"] / found["bare_mb"])
    # The arrays, what libraries load at first use, and blocks: never a second copy
    assert 20 < found["bare_mb"] - 1 < found["resident_mb"] <= found["peak_mb"] + 0.1 < found["bare_mb"] + 15


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--transitions", "0"], "must be at least 1"),
        (["--output", "figures.txt"], "expected a .json or .csv file"),
        (["--output", "nowhere/figures.csv"], "in a folder that exists"),
    ],
)
def test_wrong_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(args)
    assert message in capsys.readouterr().err


def test_json(tmp_path: Path) -> None:
    save([Measurement("d4rl", 10, 2.0, 5.0, 1.0, 1.0, 2.0, 1.0, 2.0)], tmp_path / "loaders.json")
    assert json.loads((tmp_path / "loaders.json").read_text())[0]["peak_ratio"] == 2.0
