"""Seconds in turns, the machine's matrix rate, and the memory that a call takes."""

import ctypes
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

REPEATS = 3


def seconds(*functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The median time of each, taken in turns so that a slow minute of the machine hits all."""
    return [statistics.median(taken) for taken in _in_turns(functions, repeats)]


def fastest(*functions: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The smallest time of each, in turns: where other work disturbs, the median is its time."""
    return [min(taken) for taken in _in_turns(functions, repeats)]


def _in_turns(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return times


def square_product(size: int = 2048) -> tuple[Callable[[], Any], int]:
    """A product of square matrices, and its floating-point operations: 2 n^3."""
    a = torch.randn(size, size)
    return lambda: a @ a, 2 * size**3


def matrix_rate() -> float:
    """Floating-point operations per second of a square product."""
    product, operations = square_product()
    (taken,) = seconds(product, repeats=7)
    return operations / taken


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes by which the process grows while a function runs, looked at every millisecond."""
    process, stop, highest = psutil.Process(), threading.Event(), [0]
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide the growth
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.001):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        stop.set()
        watcher.join()
    return max(0, highest[0] - before)
