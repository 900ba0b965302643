"""Batches that fit: one that does not is halved until it does."""

import gc
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import psutil
import torch
from torch import Tensor

Result = TypeVar("Result")
# Columns that are float64 at a time: enough for a product to run at full speed.
_GRAM_COLUMNS = 2048


class _Sliced(Protocol):
    """Rows that can be counted and cut: a tensor, or what steers a model."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Self: ...


Rows = TypeVar("Rows", bound=_Sliced)


def map_batches(
    function: Callable[[Rows], Result],
    rows: Rows,
    size: int,
    on_batch: Callable[[float], None] | None = None,
) -> tuple[list[Result], int]:
    """Call a function on batches of rows, in order, with smaller ones where memory is full.

    Returns the results, and the size of the batches that fit. `on_batch` is called after each with
    the share that is done. The error comes through where one row alone does not fit.
    """
    results: list[Result] = []
    start = 0
    while start < len(rows):
        batch = rows[start : start + size]
        try:
            results.append(function(batch))
            start += len(batch)
            if on_batch is not None:
                on_batch(start / len(rows))
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            size = len(batch) // 2
        if size < len(batch):
            # Here and not in the handler: until it ends, the failed call's tensors are held.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return results, size


def add_gram(gram: Tensor, parts: Sequence[Tensor], device: torch.device) -> None:
    """Add A A' to a float64 matrix, with A the rows of all parts, widened some columns at a time.

    So there is never a second copy of all parts. `device` multiplies.
    """
    for first in range(0, parts[0].shape[1], _GRAM_COLUMNS):
        some = torch.cat([part[:, first : first + _GRAM_COLUMNS] for part in parts])
        wide = some.to(device).double()
        gram += (wide @ wide.T).to(gram.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, on a CPU or a GPU."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, Exception)
        and (should_reduce_batch_size(error) or "CUDA error: out of memory" in str(error))
    )


def free_memory(device: torch.device) -> int:
    """How many bytes a device can still give."""
    if device.type == "cuda":
        # What torch holds in reserve is free to it.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reserve)
    return int(psutil.virtual_memory().available)
