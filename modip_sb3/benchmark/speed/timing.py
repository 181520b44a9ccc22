"""Two ways of doing a thing take turns on the clock, and a function runs against its own matrix products."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Function = Callable[[], Any]
SHORTEST = 0.02  # seconds of one measurement: shorter ones are repeated within it


class Clock:
    """
    :param device: whose work is waited for
    :param repeats: measurements of each function
    """

    def __init__(self, device: th.device | str = "cpu", repeats: int = 9):
        self.device, self.repeats = th.device(device), repeats

    def _seconds(self, function: Function, calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self._wait()
        return (time.perf_counter() - start) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            th.cuda.synchronize(self.device)

    def medians(self, *functions: Function) -> list[float]:
        """
        :param functions: what is measured, in turns, and in the opposite order every second time
        :return: the median time of a call of each, in seconds
        """
        calls = [self._calibrate(function) for function in functions]
        seconds = np.empty((self.repeats, len(functions)))
        for turn in range(self.repeats):
            for index in range(len(functions))[:: 1 if turn % 2 == 0 else -1]:
                seconds[turn, index] = self._seconds(functions[index], calls[index])
        return [float(median) for median in np.median(seconds, axis=0)]

    def _calibrate(self, function: Function) -> int:
        function()  # warm-up
        return max(1, round(SHORTEST / max(self._seconds(function, 1), 1e-9)))

    def ratio(self, numerator: Function, denominator: Function) -> tuple[float, dict[str, float]]:
        """
        :param numerator: the one whose time is divided
        :param denominator: the one by whose time it is divided
        :return: the ratio of the medians, and both in milliseconds
        """
        first, second = self.medians(numerator, denominator)
        return first / second, {"numerator_ms": 1e3 * first, "denominator_ms": 1e3 * second}

    def matmul_share(self, function: Function) -> tuple[float, dict[str, float]]:
        """
        :param function: has matrix products among what it does
        :return: time of its products alone over that of the whole, which is the ratio of the rates of arithmetic; with
            times in milliseconds and rates in GFLOP/s
        """
        function()
        with FlopCounterMode(display=False) as counter:
            function()
        with _Products() as products:
            function()
        share, times = self.ratio(products.replay, function)
        rates = {
            name: counter.get_total_flops() / (1e6 * times[key])
            for name, key in (("matmul_gflops", "numerator_ms"), ("gflops", "denominator_ms"))
        }
        return share, times | rates


class _Products(TorchDispatchMode):
    """Keeps the operands of every matrix product, as random numbers of the same layout."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            same_layout = [th.randn_like(arg) if isinstance(arg, th.Tensor) else arg for arg in args]
            self.calls.append((func, tuple(same_layout), kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        """All products again, and nothing else."""
        with th.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
