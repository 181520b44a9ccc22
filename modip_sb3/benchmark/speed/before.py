"""This code against an older checkout of it, each in processes of its own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch as th

import modip_sb3
from modip_sb3.benchmark.runs import read_rows
from modip_sb3.benchmark.speed.rows import ENV, Row
from modip_sb3.benchmark.speed.timing import Clock

WORK = Path(__file__).with_name("work.py")
NOW = Path(modip_sb3.__file__).parents[1]


class Worker:
    """
    A process that runs ``work.py`` with the package of a checkout.

    :param checkout: folder that has ``modip_sb3``
    :param arguments: of ``work.py``
    :raises ValueError: if the process does not start with that package
    """

    def __init__(self, checkout: Path, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, str(WORK), *arguments],
            env=_environment(checkout),
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package = self._read()
        if not package.startswith(f"{checkout.resolve()}{os.sep}"):
            self.close()
            raise ValueError(f"{checkout} cannot do the work of {WORK.name}: {package or 'see its error above'}.")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def work(self) -> None:
        """
        Once, and wait for its end.

        :raises ChildProcessError: if the process has died
        """
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not self._read():
            raise ChildProcessError(f"{WORK.name} ended with exit code {self.process.wait()}; see its error above.")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(th.get_num_threads())}


def tdmpc2(before: Path, clock: Clock) -> Iterator[Row]:
    """P10: a step of TD-MPC2, before and now."""
    for size in (1, 5):
        arguments = ["--env", ENV, "--size", str(size), "--device", str(clock.device)]
        workers: list[Worker] = []
        try:
            workers += [Worker(before, *arguments)]
            workers += [Worker(NOW, *arguments)]
            value, details = clock.ratio(*(worker.work for worker in workers))
        finally:
            for worker in workers:
                worker.close()
        yield Row("P10", f"TD-MPC2, size {size}: plan + update, before ÷ now", value, 1.5, details=details)


def demo(before: Path, clock: Clock) -> Iterator[Row]:
    """P9: the demo, before and now, once: half an hour or more."""
    runs = (("before", before), ("now", NOW))
    with tempfile.TemporaryDirectory() as folder:
        seconds, gains = zip(*(run_demo(checkout, Path(folder, name)) for name, checkout in runs), strict=True)
    names = ("before_s", "now_s", "before_gain", "now_gain")
    details = dict(zip(names, (*seconds, *gains), strict=True))
    yield Row("P9", "the demo, without the installation: now ÷ before", seconds[1] / seconds[0], 0.6, True, details)


def run_demo(checkout: Path, output: Path, *arguments: str) -> tuple[float, float]:
    """
    :param checkout: whose demo is run with its package
    :param output: folder that the demo writes to
    :param arguments: further ones of the demo
    :return: wall time in seconds, and the return of policy + planner over that of BC
    :raises subprocess.CalledProcessError: if the demo fails
    """
    script = checkout.resolve() / "examples" / "finetune_hopper.py"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, str(script), "--output", str(output), *arguments],
        env=_environment(checkout),
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - start
    rows = read_rows(next(output.glob("*.csv")))
    returns = {(row["stage"], row["inference"]): float(row["mean"]) for row in rows}
    return seconds, returns["modip", "planner"] / returns["bc", "policy"]


COMPARISONS: dict[str, Callable[[Path, Clock], Iterator[Row]]] = {"P9": demo, "P10": tdmpc2}
