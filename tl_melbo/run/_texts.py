"""The completions in a run's folder: `Run.texts`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tl_melbo import checks
from tl_melbo.generation import DEFAULT_TEMPERATURE
from tl_melbo.run import _files
from tl_melbo.run._files import COMPLETIONS, RANDOM
from tl_melbo.shapes import shape_checked

if TYPE_CHECKING:
    import pandas as pd

    from tl_melbo.activation_map import ActivationMap
    from tl_melbo.model.bridge import Model
    from tl_melbo.vectors import SteeringVectors

OnCount = Callable[[int, int], None]
# The settings of completions that their control shares.
_WRITTEN = ("max_new_tokens", "n_samples", "temperature")


@shape_checked
def write_texts(
    self: Any,
    model: "Model",
    *,
    max_new_tokens: int | None = None,
    n_samples: int | None = None,
    temperature: float | None = None,
    scales: Sequence[float] | None = None,
    overwrite: bool = False,
    on_batch: OnCount | None = None,
) -> "pd.DataFrame":
    """The completions of `report.collect_completions`: read back, or written and saved.

    None takes what is there, or else 50 tokens, no samples, and the scales 1 and -1. Where
    something is asked for that is not there, all completions are written anew.
    """
    from tl_melbo import report

    checks.at_least(1, max_new_tokens=max_new_tokens, n_samples=n_samples)
    asked: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "n_samples": n_samples,
        "temperature": temperature,
        "scales": scales and sorted({*map(float, scales), 1.0, -1.0}),
    }
    known: dict[str, Any]
    with self.writing():
        found, known = self.found, self.settings
        # Of completions that version 0.1 wrote, the length may be unknown.
        length = max_new_tokens or known.get("max_new_tokens") or 50
        known = {**known, "max_new_tokens": known.get("max_new_tokens") or length}
        if asked["scales"] and {*asked["scales"]} <= {*(known.get("scales") or (-1.0, 1.0))}:
            asked["scales"] = None
        chosen = {name: known.get(name) if v is None else v for name, v in asked.items()}
        if chosen["n_samples"] and chosen["temperature"] is None:
            chosen["temperature"] = DEFAULT_TEMPERATURE
        same = not overwrite and all(known.get(name) == v for name, v in chosen.items())
        texts = self._table(COMPLETIONS, found) if same else None
        if texts is None:
            given = {name: value for name, value in chosen.items() if value is not None}
            texts = report.collect_completions(
                model, found.story["prompts"], found, on_batch=on_batch, **given
            )
            self._save(COMPLETIONS, texts, found, **chosen)
    return noted(texts, found)


def noted(texts: "pd.DataFrame", found: "SteeringVectors") -> "pd.DataFrame":
    """With what no file holds of a frame, and `generate` notes: whether prompts were chats."""
    from tl_melbo.steering import as_chat

    texts.attrs["chat"] = as_chat(found, None)
    return texts


@shape_checked
def write_random_texts(
    self: Any,
    model: "Model",
    f: "ActivationMap",
    *,
    overwrite: bool = False,
    on_batch: OnCount | None = None,
) -> "pd.DataFrame | None":
    """The control of `texts`: completions under random vectors of the same norm, as many of each.

    Read back, or written and saved. None where the norms of the library differ.
    """
    from tl_melbo.analysis._random_baseline import random_texts

    with self.writing():
        found, known = self.found, self.settings
        texts = None if overwrite else load_control(self, found)
        if texts is not None:
            return noted(texts, found)
        if not overwrite:
            self._check_own(RANDOM)
        written = {name: known[name] for name in _WRITTEN if known.get(name) is not None}
        prompts = list(dict.fromkeys(found.story["prompts"]))
        texts = random_texts(model, f, found, prompts, on_batch=on_batch, **written)
        if texts is not None:
            _files.save_table(self.folder / RANDOM, texts)
            self.note(random_texts_of=_key(found, known))
    return texts


def load_control(run: Any, found: "SteeringVectors") -> "pd.DataFrame | None":
    """The texts of random vectors, if they are there and were written as those of the vectors."""
    path, known = run.folder / RANDOM, run.settings
    if known.get("random_texts_of") != _key(found, known) or not path.is_file():
        return None
    return _files.load_table(path)


def _key(found: "SteeringVectors", settings: dict[str, Any]) -> list[Any]:
    return [_files.digest(found), *(settings.get(name) for name in _WRITTEN)]
