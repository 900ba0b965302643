"""Write many texts at once: one prompt for all rows, a cache with room, no work for ended rows.

The Hugging Face layers below TransformerLens's run here, so hooks on the model do not fire: this is
for a model without any.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tl_melbo.model.bridge import Model, without_bridge

# Copying the cache to leave ended rows out pays once this share of the rows has ended.
_ENDED = 0.25


class Writer:
    """The Hugging Face model below a bridge, steered after one layer."""

    def __init__(self, model: Model, layer: int) -> None:
        name = next(
            name
            for name, module in model.original_model.named_modules()
            if module is model.blocks[layer]
        )
        self.plain: Any = without_bridge(model.original_model)
        self.block, self.layer = self.plain.get_submodule(name), layer

    def probe(self, tokens: Tensor, theta: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Logits after the prompt, [row, d_vocab], and after one more token in the last row alone.

        All that `write` does once, for comparison: many rows from one, a row left out, the cache.
        """
        first, cache = self._after_prompt(tokens, theta, 1)
        cache.batch_select_indices(torch.tensor([len(theta) - 1], device=tokens.device))
        with self._steered(theta[-1:]):
            return first, self._logits(new, cache)

    def write(
        self,
        tokens: Tensor,
        theta: Tensor,
        max_new_tokens: int,
        ends: Tensor,
        choose: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """New tokens after the prompt, a row for each vector; ended rows go on with `ends[0]`.

        And for which rows the logits came to be not finite, [row]: they end there.

        Args:
            tokens: one prompt, [1, pos].
            theta: what is added in each row, [row, d_model].
            max_new_tokens: the most tokens of a row.
            ends: tokens that end a text.
            choose: from logits, [row, d_vocab], to the next tokens, [row].
        """
        logits, cache = self._after_prompt(tokens, theta, max_new_tokens)
        rows = torch.arange(len(theta), device=tokens.device)
        filler = int(ends[0]) if len(ends) else 0
        written = tokens.new_full((len(theta), max_new_tokens), filler)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=tokens.device)
        broken = ended.clone()
        for step in range(max_new_tokens):
            # The largest is NaN if any is.
            bad = ~(logits.amax(-1).isfinite() | ended)
            if bad.any():
                broken[rows[bad]] = True
                ended = ended | bad
                logits = logits.masked_fill(bad[:, None], 0.0)
            new = choose(logits).masked_fill(ended, filler)
            written[rows, step] = new
            ended = ended | torch.isin(new, ends)
            if ended.all() or step + 1 == max_new_tokens:
                return written[:, : step + 1], broken
            if ended.float().mean() >= _ENDED:
                going_on = (~ended).nonzero().flatten()
                cache.batch_select_indices(going_on)
                rows, new, theta = rows[going_on], new[going_on], theta[going_on]
                ended = ended[going_on]
            with self._steered(theta):
                logits = self._logits(new[:, None], cache)
        return written, broken

    def _after_prompt(
        self, tokens: Tensor, theta: Tensor, max_new_tokens: int
    ) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=self.plain.config)
        cache.layers = [
            _RoomyLayer(max_new_tokens) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
        # Up to the steered layer all rows are alike: one runs, and adding the vectors makes many.
        with self._steered(theta):
            logits = self._logits(tokens, cache)
        shared: list[Any] = cache.layers[: self.layer + 1]
        for layer in shared:
            layer.batch_repeat_interleave(len(theta))
        return logits, cache

    def _logits(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        out = self.plain(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    @contextmanager
    def _steered(self, theta: Tensor) -> Iterator[None]:
        def add(block: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + theta[:, None], *output[1:])
            return output + theta[:, None]

        handle = self.block.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes new keys and values into room it has, instead of copying all."""

    def __init__(self, n_more: int) -> None:
        super().__init__()
        self.n_more = n_more
        self.rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        self.keys = self._extended("keys", self.keys, key_states, past)
        self.values = self._extended("values", self.values, value_states, past)
        return self.keys, self.values

    def _extended(self, name: str, held: Any, new: Tensor, past: int) -> Tensor:
        length, room = past + new.shape[-2], self.rooms.get(name)
        # Rows that were picked or repeated since then lie elsewhere.
        own = room is not None and held.data_ptr() == room.data_ptr() and len(held) == len(room)
        if room is None or not own or length > room.shape[-2]:
            room = new.new_empty(*new.shape[:-2], length + self.n_more, new.shape[-1])
            if past:
                room[..., :past, :] = held
            self.rooms[name] = room
        room[..., past:length, :] = new
        return room[..., :length, :]
