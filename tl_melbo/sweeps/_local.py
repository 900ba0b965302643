"""Searches one after another, in this process."""

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from tl_melbo.sweeps._cell import Task, Tell, Worker
from tl_melbo.sweeps._grid import Cell


def run_local(
    cells: Sequence[Cell], task: Task, tell: Tell
) -> Generator[tuple[Cell, dict[str, Any]]]:
    """The record of each cell as it ends, model by model."""
    worker, queue = Worker(task), list(cells)
    loaded = None
    while queue:
        cell = take(queue, loaded, [])
        loaded = cell.model
        yield cell, worker.search(cell, tell)


def take(queue: list[Cell], loaded: Any, others: Sequence[Any]) -> Cell:
    """Take the next cell for a worker: of the model that it has, if there are any.

    Otherwise of the model with the most cells for each worker that has it, this one included.
    """
    left = Counter(cell.model for cell in queue)
    wanted = loaded
    if loaded not in left:
        wanted = max(left, key=lambda model: left[model] / (1 + others.count(model)))
    place = next(i for i, cell in enumerate(queue) if cell.model == wanted)
    return queue.pop(place)
