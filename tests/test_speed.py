"""The clock and the rows of the speed benchmark."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch as th

from modip_sb3.benchmark.__main__ import main
from modip_sb3.benchmark.runs import read_rows
from modip_sb3.benchmark.speed.before import NOW, Worker, run_demo
from modip_sb3.benchmark.speed.rows import ENV, Row
from modip_sb3.benchmark.speed.timing import Clock, _Products


def test_functions_take_turns_and_the_median_is_theirs() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.03)

    def slower() -> None:
        order.append("slower")
        time.sleep(0.06)

    ratio, details = Clock(repeats=3).ratio(slower, slow)
    assert order[-6:] == ["slower", "slow", "slow", "slower", "slower", "slow"]
    assert details["numerator_ms"] >= 60 and details["denominator_ms"] >= 30
    assert ratio == details["numerator_ms"] / details["denominator_ms"]


def test_products_are_those_of_forward_and_backward() -> None:
    weight = th.randn(6, 5, requires_grad=True)
    inputs = th.randn(7, 5, requires_grad=True)
    with _Products() as products:
        th.nn.functional.linear(inputs, weight).sum().backward()
    shapes = [tuple(arg.shape for arg in args) for _, args, _ in products.calls]
    assert len(shapes) == 3  # one forward, one for each gradient
    assert {(7, 5), (5, 6)} == set(shapes[0])
    products.replay()


def test_share_of_nothing_but_a_product_is_one() -> None:
    a, b = th.randn(300, 300), th.randn(300, 300)
    share, details = Clock(repeats=5).matmul_share(lambda: a @ b)
    assert 0.3 < share < 3  # the same work; other processes may take part of the machine
    assert details["gflops"] == pytest.approx(2 * 300**3 / (1e6 * details["denominator_ms"]))


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("P1", "", 5.0, 5.0), True),
        (Row("P1", "", 4.9, 5.0), False),
        (Row("P6", "", 2.0, 2.0, at_most=True), True),
        (Row("P6", "", 2.1, 2.0, at_most=True), False),
        (Row("P7", "", 2.1), None),
    ],
)
def test_goals(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = th.get_num_threads()
    with pytest.raises(SystemExit) as end:
        main(["speed", "--rows", "P2", "--repeats", "1", "--threads", str(threads), "--output", str(tmp_path / "out")])
    assert end.value.code == 0
    assert "policy-coupled" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["number"] for row in content["rows"]] == ["P2"]
    assert content["rows"][0]["value"] > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "P99"], r"unknown \['P99'\]; choose from \['P1', .*'P10'\]"),
        (["--rows", "P9"], r"\['P9'\] compare with an older checkout: name one by --before"),
        (
            ["--rows", "P10", "--before", "nowhere"],
            "nowhere is no checkout of this project: it has no folder modip_sb3",
        ),
    ],
)
def test_bad_commands(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(["speed", *arguments])


def test_workers_run_the_package_of_their_checkout(tmp_path: Path) -> None:
    arguments = ("--env", ENV, "--size", "1", "--device", "cpu")
    older = tmp_path / "older"
    shutil.copytree(NOW / "modip_sb3", older / "modip_sb3")
    for folder in ("examples", "zoo_configs"):
        (older / folder).symlink_to(NOW / folder)
    worker = Worker(older, *arguments)
    worker.work()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises((ChildProcessError, BrokenPipeError)):
        worker.work()
    worker.close()
    (older / "modip_sb3" / "baselines" / "tdmpc2.py").unlink()
    with pytest.raises(ValueError, match=r"older cannot do the work of work\.py"):
        Worker(older, *arguments)


def test_the_demo_is_timed_and_its_gain_read(tmp_path: Path) -> None:
    budget = "--pretrain 2 --clone 2 --bc-gap 2 --timesteps 104 --episodes 2 --curve-episodes 1 --eval-freq 52".split()
    seconds, gain = run_demo(NOW, tmp_path / "out", *budget)
    rows = read_rows(tmp_path / "out" / "mlp.csv")
    returns = {(row["stage"], row["inference"]): float(row["mean"]) for row in rows}
    assert gain == returns["modip", "planner"] / returns["bc", "policy"]
    assert seconds > 0
