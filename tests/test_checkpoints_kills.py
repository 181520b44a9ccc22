"""The harness of kills: it kills, it compares, and it sees what differs."""

from pathlib import Path

import numpy as np
import pytest
import torch as th

from modip_sb3.benchmark import kills


def test_killed_and_interrupted_at_five_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"UPDATES": 10, "STEPS": 40, "SAVE_FREQ": 8}.items():
        monkeypatch.setattr(kills, name, value)
    output = tmp_path / "kills"
    arguments = ["--algos", "tdmpc2", "--envs", "Pendulum-v1", "--n-envs", "1", "--output", str(output)]
    with pytest.raises(SystemExit) as end:
        kills.main(["--kills", "5", *arguments])
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    assert "5 of 5 kills survived, 3 of them a Ctrl-C\n1 of 1 trainings equal" in printed
    with pytest.raises(SystemExit, match="exists already: give another folder"):
        kills.main(arguments)

    killed, reference = (
        kills.Training("tdmpc2", "Pendulum-v1", 1, output / "Pendulum-v1" / f"tdmpc2-1-{name}", output)
        for name in ("killed", "reference")
    )
    assert len(list(killed.folder.glob("log-*"))) >= 4 and len(list(reference.folder.glob("log-*"))) == 1
    result = th.load(killed.folder / "result.pt", weights_only=False)
    name = "/replay_buffer/rewards"
    result[name] = np.nextafter(result[name], np.float32(np.inf))
    th.save(result, killed.folder / "result.pt")
    log = next(iter(reference.folder.glob("log-*")))
    log.write_text(log.read_text().replace("0x1.", "0x2.", 1))
    kills.compare(killed, reference)
    assert killed.differences[0] == name and "0x2." in " ".join(killed.differences[1:])
