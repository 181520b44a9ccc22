"""The soak: it trains, it measures, and its growth is the one that is there."""

from pathlib import Path

import numpy as np
import pytest

from modip_sb3.benchmark import soak


def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "soak"
    soak.main(["--minutes", "0.05", "--every", "0.5", "--output", str(output)])
    assert "environment steps" in capsys.readouterr().out
    rows = np.loadtxt(output / "memory.csv", delimiter=",", skiprows=1, ndmin=2)
    assert len(rows) >= 2 and (rows[:, 3] > 50).all()
    assert (np.diff(rows[:, 1]) > 0).all()
    assert (output / "memory.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="exists already"):
        soak.main(["--output", str(output)])


def test_growth_is_measured_after_the_warm_up() -> None:
    seconds = np.arange(0, 7200, 10.0)
    memory = np.where(seconds < 1800, 100 + seconds, 500 + 3 * seconds / 3600)
    rows = np.stack([seconds, seconds, seconds, memory, seconds, seconds], axis=1)
    growth, mean = soak.measure_growth(rows)
    assert growth == pytest.approx(3, abs=0.1)
    assert 501 < mean < 507
