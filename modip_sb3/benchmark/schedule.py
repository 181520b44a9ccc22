"""Who executes the runs, a few processes here or Ray's workers, and the table that follows them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from modip_sb3.benchmark.runs import RunFolder
from modip_sb3.benchmark.worker import execute

PATIENCE = 20.0  # seconds that a worker has to stop

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Backend(Protocol):
    """Where runs are executed, each in a process of its own."""

    def submit(self, run: RunFolder) -> None:
        """Start a run."""

    @property
    def has_room(self) -> bool:
        """Whether another run can be submitted."""

    @property
    def pending(self) -> Sequence[RunFolder]:
        """What was submitted and has not ended."""

    def wait(self, seconds: float) -> Iterable[tuple[RunFolder, str | None]]:
        """Runs that ended within some seconds, with what killed them if they could not tell themselves."""

    def stop(self) -> None:
        """End all."""


class LocalBackend:
    """
    Processes on this machine.

    :param workers: how many at a time
    :param threads: of each
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.workers, self.threads = workers, threads
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[BaseProcess, RunFolder] = {}

    @property
    def has_room(self) -> bool:
        """Whether another run can be submitted."""
        return len(self._processes) < self.workers

    @property
    def pending(self) -> Sequence[RunFolder]:
        """What was submitted and has not ended."""
        return list(self._processes.values())

    def submit(self, run: RunFolder) -> None:
        """
        :param run: to be started
        """
        process = self._context.Process(target=_work, args=(run.path, self.threads), daemon=True)
        with _inherited_by_workers(self.threads):
            process.start()
        self._processes[process] = run

    def wait(self, seconds: float) -> Iterator[tuple[RunFolder, str | None]]:
        """
        :param seconds: at most
        :return: runs that ended, with what killed them if they could not tell themselves
        """
        ended = connection.wait([process.sentinel for process in self._processes], seconds)
        for process in [process for process in self._processes if process.sentinel in ended]:
            process.join()
            code = process.exitcode or 0
            killed = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            yield self._processes.pop(process), killed if code != 0 else None

    def stop(self) -> None:
        """Ask every worker to stop, and wait for it."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()


@contextmanager
def _inherited_by_workers(threads: int) -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal: workers leave it to this one, from their first line on."""
    environment = dict(os.environ)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _work(folder: Path, threads: int) -> None:
    """What a local worker does: everything it prints goes into the run's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (folder / "output.log").open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        execute(folder, threads)


def _end_with(sentinel: int) -> None:
    """Two processes must never be at one run: a worker does not outlive the benchmark that started it."""
    connection.wait([sentinel])
    os._exit(1)


class RayBackend:
    """
    Tasks of Ray: on the cluster that ``RAY_ADDRESS`` names, which must see the same files, or else on this machine.

    :param workers: how many at a time on this machine; a cluster runs as many as it has room for
    :param threads: cores that each asks for
    :param device: of the networks; each run on "cuda" asks for one
    :raises ImportError: if Ray is not installed
    """

    def __init__(self, workers: int, threads: int, device: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('--backend ray needs Ray: run pip install "modip-sb3[ray]".') from error
        self._ray = ray
        os.environ.setdefault("RAY_worker_niceness", "0")  # or other processes would slow down what is measured
        here: dict[str, Any] = (
            {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, **here)
        # max_calls=1: a process for each run, so that memory can be measured
        options: dict[str, Any] = {"num_cpus": threads, "max_calls": 1, "max_retries": 0}
        self._execute = ray.remote(**options, num_gpus=int(device.startswith("cuda")))(_work_elsewhere)
        self._threads = threads
        self._tasks: dict[Any, RunFolder] = {}

    has_room = True  # Ray keeps the queue

    @property
    def pending(self) -> Sequence[RunFolder]:
        """What was submitted and has not ended."""
        return list(self._tasks.values())

    def submit(self, run: RunFolder) -> None:
        """
        :param run: to be started
        """
        self._tasks[self._execute.remote(run.path, self._threads, Path.cwd())] = run

    def wait(self, seconds: float) -> Iterator[tuple[RunFolder, str | None]]:
        """
        :param seconds: at most
        :return: runs that ended, with what killed them if they could not tell themselves
        """
        ended, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        for task in ended:
            run = self._tasks.pop(task)
            try:
                self._ray.get(task)
                yield run, None
            except self._ray.exceptions.RayError as error:
                yield run, str(error).strip().splitlines()[-1]

    def stop(self) -> None:
        """End all tasks, and leave Ray."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def _work_elsewhere(folder: Path, threads: int, directory: Path) -> None:
    os.chdir(directory)  # datasets may be named by relative paths
    execute(folder, threads)


# --------------------------------------------------------------------- following


def run_all(runs: Sequence[RunFolder], backend: Backend, console: Console) -> list[RunFolder]:
    """
    Execute runs, and show how far they are.

    :param runs: of the benchmark, finished ones too: those are only shown
    :param backend: executes them
    :param console: where the table goes
    :return: the runs that failed
    """
    waiting = [run for run in runs if run.read_status()["state"] != "finished"]
    failed = []
    try:
        with Live(progress_table(runs, []), console=console, auto_refresh=False) as live:
            while waiting or backend.pending:
                while waiting and backend.has_room:
                    backend.submit(waiting.pop(0))
                for run, killed in backend.wait(1.0):
                    state = run.read_status()["state"]
                    if killed is not None and state != "failed":
                        run.update_status(state="failed", error=killed)
                    if killed is not None:
                        failed.append(run)
                    live.console.print(f"{time.strftime('%H:%M:%S')} {run.name}: {run.read_status()['state']}")
                live.update(progress_table(runs, backend.pending), refresh=True)
    finally:
        backend.stop()
    return failed


def progress_table(runs: Sequence[RunFolder], pending: Sequence[RunFolder]) -> Table:
    """
    :param runs: to show
    :param pending: those that are being executed
    :return: how far each run is
    """
    table = Table()
    for heading in ("env", "algo", "seed", "state", "steps", "steps/s", "last evaluation", "ETA"):
        table.add_column(heading, justify="right" if heading in ("seed", "steps", "steps/s", "ETA") else "left")
    for run in runs:
        settings, status = run.read_settings(), run.read_status()
        state = status["state"]
        if state == "running" and run not in pending:
            state = "stopped"  # by a kill, which it could not write down
        elif state == "running" and status["env_steps"] == 0 and status.get("last_evaluation") is None:
            state = "offline phase"
        speed = status.get("steps_per_second")
        left = (settings["timesteps"] - status["env_steps"]) / speed if speed and state == "running" else None
        table.add_row(
            settings["env"],
            settings["algo"],
            str(settings["seed"]),
            state,
            f"{status['env_steps']:,}",
            f"{speed:.1f}" if speed else "",
            _last_evaluation(status.get("last_evaluation")),
            "" if left is None else time.strftime("%H:%M:%S", time.gmtime(left)),
        )
    return table


def _last_evaluation(means: dict[str, float] | None) -> str:
    if not means:
        return ""
    scores = ", ".join(f"{name} {mean:,.2f}" for name, mean in means.items() if name != "env_steps")
    return f"{scores} at {means['env_steps']:,}"
