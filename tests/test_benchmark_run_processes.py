"""``benchmark run`` in processes: stopped, killed and resumed, failures, two workers, Ray."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from bench import ENV_ID, NAME, command, run
from rich.console import Console

from modip_sb3.benchmark.__main__ import main, make_parser
from modip_sb3.benchmark.plan import plan
from modip_sb3.benchmark.runs import RunFolder, read_rows
from modip_sb3.benchmark.schedule import LocalBackend, progress_table, run_all

SCHEDULE = [(steps, episode) for steps in range(0, 161, 20) for episode in (0, 1)]


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def _run_in_group(arguments: list[str], log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))  # not those of pytest
    main(arguments)


def start(arguments: list[str], log: Path) -> BaseProcess:
    """The command in a group of processes of its own, which can get Ctrl-C; a fork, to save the imports."""
    process = multiprocessing.get_context("fork").Process(target=_run_in_group, args=(arguments, log))
    process.start()
    return process


def evaluated(folder: Path) -> list[int]:
    path = folder / "evaluations.csv"
    return [int(row["env_steps"]) for row in read_rows(path)] if path.exists() else []


def working_in(output: Path) -> list[str]:
    """Processes that still have a file of the benchmark open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:  # it ended meanwhile
            continue
        found += [process.name for link in links if link.startswith(str(output))]
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_stopped_then_killed_then_finished(tmp_path: Path) -> None:
    output, log = tmp_path / "runs", tmp_path / "log.txt"
    arguments = command(output, "modip", timesteps=160)
    folder = RunFolder(output / NAME / "modip" / "seed-0")

    first = start(arguments, log)
    wait_for(lambda: 20 in evaluated(folder.path))
    assert first.pid is not None
    os.killpg(first.pid, signal.SIGINT)
    first.join(60)
    assert first.exitcode == 130 and "Stopped; the same command goes on from here." in log.read_text()
    assert "Traceback" not in log.read_text() + (folder.path / "output.log").read_text()
    assert folder.read_status()["state"] == "stopped" and not working_in(output)
    stopped_at = max(evaluated(folder.path))

    second = start(arguments, log)
    wait_for(lambda: max(evaluated(folder.path)) > stopped_at)
    second.kill()
    second.join()
    wait_for(lambda: not working_in(output), 10)  # no worker outlives it
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None and folder.read_status()["state"] == "running"

    last = start(arguments, log)
    last.join(240)
    assert last.exitcode == 0, log.read_text()
    rows = read_rows(folder.path / "evaluations.csv")
    for inference in ("policy", "planner"):
        found = [(int(row["env_steps"]), int(row["episode"])) for row in rows if row["inference"] == inference]
        assert found == SCHEDULE
    resumed_at = [session["from_step"] for session in folder.read_status()["sessions"]]
    assert resumed_at == [0, stopped_at, int(checkpoint.name.split("-")[1])]
    logged = [int(row["time/total_timesteps"]) for row in read_rows(folder.path / "progress.csv")]
    assert logged == list(range(40, 161, 40))  # every fourth episode, once


def test_failures_are_listed_and_finished_runs_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *command(tmp_path, "sac", seeds=(0,), more=("modip.gamma:2.0",)),
        "--workers",
        "2",
        "--algos",
        "sac",
        "modip",
    ]
    assert run(*arguments) == 1
    failed, finished = (RunFolder(tmp_path / NAME / algo / "seed-0") for algo in ("modip", "sac"))
    assert (failed.read_status()["state"], finished.read_status()["state"]) == ("failed", "finished")
    printed = " ".join(capfd.readouterr().out.split())
    assert f"{failed.name} failed: ValueError: gamma=2.0 is not between 0 and 1." in printed
    assert "gamma=2.0" in (failed.path / "traceback.txt").read_text()
    before = {path: path.stat().st_mtime_ns for path in finished.path.iterdir()}
    log = (failed.path / "output.log").read_text()
    assert run(*arguments) == 1
    assert {path: path.stat().st_mtime_ns for path in finished.path.iterdir()} == before
    assert len((failed.path / "output.log").read_text()) > len(log)  # it was tried again


def test_a_killed_worker_is_a_failed_run(tmp_path: Path) -> None:
    class Killed(LocalBackend):
        """As the system kills a process that takes too much memory."""

        def submit(self, run: RunFolder) -> None:
            super().submit(run)
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)

    args = make_parser().parse_args(command(tmp_path, "sac"))
    (folder,) = plan(args)
    assert run_all([folder], Killed(1, 1), Console(file=open(os.devnull, "w"))) == [folder]
    status = folder.read_status()
    assert (status["state"], status["error"]) == ("failed", "killed by SIGKILL")


def test_the_table_says_how_far_each_run_is(tmp_path: Path) -> None:
    waiting, stopped, learning, cloning = plan(
        make_parser().parse_args(command(tmp_path, "sac", seeds=(0, 1, 2, 3), timesteps=4000))
    )
    progress = {"state": "running", "env_steps": 400, "steps_per_second": 10.0}
    progress["last_evaluation"] = {"env_steps": 400, "policy": -123.45, "planner": 6.0}
    stopped.update_status(**progress)
    learning.update_status(**progress)
    cloning.update_status(state="running", env_steps=0)
    table = progress_table([waiting, stopped, learning, cloning], [learning, cloning])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    last = "policy -123.45, planner 6.00 at 400"
    assert rows == [
        (ENV_ID, "sac", "0", "waiting", "0", "", "", ""),
        (ENV_ID, "sac", "1", "stopped", "400", "10.0", last, ""),
        (ENV_ID, "sac", "2", "running", "400", "10.0", last, "00:06:00"),
        (ENV_ID, "sac", "3", "offline phase", "0", "", "", ""),
    ]


def test_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments = command(tmp_path, "sac", "modip", more=("modip.gamma:2.0",))
    assert run(*arguments, "--backend", "ray", "--workers", "2") == 1
    finished, failed = (RunFolder(tmp_path / NAME / algo / "seed-0").read_status() for algo in ("sac", "modip"))
    assert (finished["state"], finished["env_steps"], finished["sessions"][0]["threads"]) == ("finished", 40, 1)
    assert (failed["state"], failed["error"]) == ("failed", "ValueError: gamma=2.0 is not between 0 and 1.")


def test_missing_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    sentence = '--backend ray needs Ray: run pip install "modip-sb3[ray]".'
    assert run(*command(tmp_path, "sac"), "--backend", "ray") == sentence
