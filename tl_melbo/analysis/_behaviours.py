"""How many different things do they make the model do? Completions grouped into behaviours."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tl_melbo import checks
from tl_melbo.analysis._coherence import DEFAULT_PERPLEXITY, DEFAULT_REPETITION, judged
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.text import printable

# Average-linkage clusters are cut where two are this far apart (one minus the mean cosine). These
# numbers are where the hand-labelled completions of the tests agree best; neighbours do nearly so.
DEFAULT_DISTANCES = {"sentences": 0.65, "words": 0.85}
_DISTANCE_OF_OTHERS = 0.5
INCOHERENT = -1
_UNSTEERED = 0
_NAME_WORDS, _LONGEST_WORD = 3, 24
# Of a longer text, its beginning is looked at.
_MOST_CHARACTERS = 2_000
_GROUP_COLUMNS = ["behaviour", "name", "prompt", "n_texts", "vectors", "example"]


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Completions in groups, each group one behaviour; see `behaviours`.

    Attributes:
        texts: the completions as they came, and for each: perplexity; repetition, the share of its
            runs of three tokens that came before; coherent; put_aside, why it is not: "empty",
            "repeats itself" or "surprising", else ""; and the number of its behaviour: 0 where it
            is grouped with the unsteered text, -1 where it is not coherent. The unsteered text
            itself is always 0.
        groups: one row a behaviour, the largest first, that of the unsteered text before them:
            behaviour, name, prompt, n_texts, vectors, example.
        embedder: what made points of the texts: "sentences", "words", or "custom".
    """

    texts: pd.DataFrame
    groups: pd.DataFrame
    embedder: str

    @property
    def n_distinct(self) -> int:
        """How many behaviours there are that hold together and are not near the unsteered text.

        Those of several prompts are added up: what a vector does on one is another text on another.
        """
        return sum(number > _UNSTEERED for number in self.groups["behaviour"])

    @property
    def per_100_vectors(self) -> float:
        """The same for every hundred vectors on each prompt; 0 where there are none.

        Compare libraries of one size: the more vectors, the more of them repeat what another does.
        """
        steered = zip(self.texts["vector"], self.texts["prompt"], strict=True)
        n_tried = len({(vector, prompt) for vector, prompt in steered if vector >= 0})
        return 100 * self.n_distinct / n_tried if n_tried else 0.0

    def __repr__(self) -> str:
        n_incoherent = sum(not coherent for coherent in self.texts["coherent"])
        return (
            f"Behaviours({self.n_distinct} distinct in {len(self.texts)} completions, "
            f"{n_incoherent} not coherent, by {self.embedder})"
        )


@shape_checked
def behaviours(
    model: Model,
    completions: pd.DataFrame,
    *,
    chat: bool | None = None,
    n_behaviours: int | None = None,
    distance: float | None = None,
    largest_perplexity: float = DEFAULT_PERPLEXITY,
    largest_repetition: float = DEFAULT_REPETITION,
    embedder: Embedder | None = None,
    batch_size: int = 32,
) -> Behaviours:
    """Group what the model writes under many vectors into distinct behaviours.

        texts = tm.report.collect_completions(model, prompt, found)
        tm.analysis.behaviours(model, texts[texts["scale"] >= 0]).groups

    Texts that do not hold together are put aside: those that repeat themselves, and those that the
    unsteered model, given the prompt, finds too surprising. What it would never say is not yet
    gibberish: a surprising text of up to 25 tokens stays if the order of its words makes sense to
    the model (shuffled, they surprise it more by 1 nat a token), and it is not too far beyond the
    limit (by 55 nats in all). One or two words have no order, and a model of one language judges
    long texts in others badly: look at what was put aside as "surprising", too.

    The others are clustered by what they say (average linkage; with the embedder "sentences" over
    the mean of two cosines, that of the sentences' embeddings and that of the words), for each
    prompt by itself. Which texts go together hangs on all that are there. A group is named after
    the words that set it apart from the unsteered text and from the other groups.

    Args:
        model: the model that wrote them; it is not steered here.
        completions: as `generate` or `report.collect_completions` return them: the columns vector
            (-1 for unsteered), prompt, completion. Every row is one text to group; of a long one,
            the first 2,000 characters.
        chat: whether the prompts were formatted as chat; None goes by what `generate` noted in
            the frame, or else takes them as raw.
        n_behaviours: how many groups to make for each prompt, that of the unsteered text included;
            None lets `distance` decide.
        distance: two groups stay apart if one minus the mean cosine between them is more; None
            takes 0.65 for sentences, 0.85 for words.
        largest_perplexity: of a text that is coherent anyway, under the unsteered model after the
            prompt; see above.
        largest_repetition: of a coherent text, the share of its runs of three tokens that came
            before.
        embedder: see `embeddings`; None takes sentences where the embedder is installed.
        batch_size: the most texts at once when perplexity is measured.

    Returns:
        The texts with their groups, and the groups. Where no text is coherent, no group but the
        unsteered one's, if that text was given.

    Raises:
        ValueError: no completions or without those columns; a number out of its range; fewer
            coherent texts than `n_behaviours`.
        ModuleNotFoundError: scikit-learn, or what the embedder needs, is not installed.
    """
    check_model(model)
    _check(completions, n_behaviours, distance, largest_perplexity, largest_repetition)
    checks.batch_size(batch_size)
    chosen: Embedder = default_embedder() if embedder is None else embedder
    label = "custom" if callable(chosen) else chosen
    if distance is None:
        distance = DEFAULT_DISTANCES.get(label, _DISTANCE_OF_OTHERS)
    chat = bool(completions.attrs.get("chat")) if chat is None else chat
    texts = Table(completions).reset_index(drop=True)
    whole = texts["completion"].fillna("").astype(str)
    # Not the completions, which may be long or hold what cannot be shown.
    written = [printable(text[:_MOST_CHARACTERS]) for text in whole]
    pairs = list(zip(texts["prompt"].astype(str), written, strict=True))
    limits = (largest_perplexity, largest_repetition)
    measured = judged(model, pairs, chat, *limits, batch_size)
    texts[[*measured.columns]] = measured
    texts["coherent"] = texts["put_aside"] == ""
    texts["behaviour"] = INCOHERENT
    groups: list[dict[str, Any]] = []
    for prompt in dict.fromkeys(texts["prompt"]):
        inside = texts["coherent"] | (texts["vector"] < 0)
        rows = pd.DataFrame(texts[inside & (texts["prompt"] == prompt)])
        if rows.empty:
            continue
        said = [written[place] for place in rows.index]
        clusters = _clusters(str(prompt), said, n_behaviours, distance, chosen)
        n_there = max([_UNSTEERED, *(group["behaviour"] for group in groups)])
        numbers = _numbered(clusters, (rows["vector"] < 0).to_numpy(), n_there + 1)
        texts.loc[rows.index, "behaviour"] = numbers
        groups += _groups(str(prompt), rows, said, numbers)
    return Behaviours(texts, Table(groups, columns=_GROUP_COLUMNS), label)


def _check(
    completions: pd.DataFrame,
    n_behaviours: int | None,
    distance: float | None,
    largest_perplexity: float,
    largest_repetition: float,
) -> None:
    advice = "pass what generate or report.collect_completions returns"
    checks.columns(completions, ("vector", "prompt", "completion"), "completions", advice)
    if not pd.api.types.is_integer_dtype(completions["vector"]):
        raise ValueError(
            f"completions: vector holds {completions['vector'].dtype}, expected whole numbers, -1 "
            f"for unsteered; {advice}"
        )
    for row, prompt in enumerate(completions["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"completions: prompt of row {row} is {prompt!r}, expected a text")
    checks.at_least(1, n_behaviours=n_behaviours)
    if distance is not None and not 0 < distance <= 2:
        raise ValueError(f"distance={distance}: above 0, and at most 2, which is opposite")
    if not largest_perplexity >= 1:
        raise ValueError(
            f"largest_perplexity={largest_perplexity}: at least 1; "
            f"{DEFAULT_PERPLEXITY:g} by default"
        )
    checks.between(0, 1, "a share", largest_repetition=largest_repetition)


def _clusters(
    prompt: str, texts: Sequence[str], n_behaviours: int | None, distance: float, embedder: Embedder
) -> "np.ndarray[Any, Any]":
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "grouping texts needs scikit-learn: pip install scikit-learn"
        ) from error
    if n_behaviours is not None and len(texts) < n_behaviours:
        there = "is only 1 text" if len(texts) == 1 else f"are only {len(texts)} texts"
        raise ValueError(
            f"n_behaviours={n_behaviours}: of {printable(prompt[:60])!r} there {there} to group, "
            "the coherent ones and the unsteered; ask for fewer, or for None"
        )
    if len(texts) == 1:
        return np.zeros(1, dtype=int)
    points = embeddings(texts, embedder).double()
    cosines = points @ points.T
    if embedder == "sentences":
        # What is said counts, and how: meaning alone throws all that an assistant says together.
        words = embeddings(texts, "words").double()
        cosines = (cosines + words @ words.T) / 2
    apart = (1 - cosines).clamp_min(0).numpy()
    settings: Any = {"n_clusters": n_behaviours}  # None is allowed, whatever its stub says
    return AgglomerativeClustering(
        **settings,
        distance_threshold=distance if n_behaviours is None else None,
        metric="precomputed",
        linkage="average",
    ).fit_predict(apart)


def _numbered(
    clusters: "np.ndarray[Any, Any]", unsteered: "np.ndarray[Any, Any]", first: int
) -> "np.ndarray[Any, Any]":
    """Clusters as numbers of behaviours: the unsteered text's is 0, the largest others first."""
    own = {*clusters[unsteered].tolist()}
    sizes = {int(cluster): int((clusters == cluster).sum()) for cluster in clusters}
    others = sorted((c for c in sizes if c not in own), key=lambda cluster: -sizes[cluster])
    number_of = dict.fromkeys(own, _UNSTEERED) | {
        cluster: first + place for place, cluster in enumerate(others)
    }
    return np.array([number_of[int(cluster)] for cluster in clusters])


def _groups(
    prompt: str, rows: pd.DataFrame, said: Sequence[str], numbers: "np.ndarray[Any, Any]"
) -> list[dict[str, Any]]:
    """What is told of the groups of one prompt."""
    groups = []
    for number in sorted({*numbers.tolist()}):
        members = pd.DataFrame(rows[numbers == number])
        is_member = [bool(other == number) for other in numbers]
        texts = [text for text, inside in zip(said, is_member, strict=True) if inside]
        others = [text for text, inside in zip(said, is_member, strict=True) if not inside]
        name = _name(texts, others)
        groups.append(
            {
                "behaviour": number,
                "name": "near the unsteered text" if number == _UNSTEERED else name,
                "prompt": prompt,
                "n_texts": len(texts),
                "vectors": sorted({int(vector) for vector in members["vector"] if vector >= 0}),
                "example": texts[int(members["perplexity"].to_numpy().argmin())],
            }
        )
    return groups


def _name(texts: Sequence[str], others: Sequence[str]) -> str:
    """Words of these texts that most of them have and few of the others, as they come up."""
    from sklearn.feature_extraction.text import CountVectorizer

    def shares(stop_words: str | None) -> dict[str, float]:
        # Not "i'm", "don't" or "you're": they are no topics.
        word = r"(?u)(?<!['’])\b[^\W\d_][\w-]+\b(?!['’](?:t|m|d|ll|re|ve)\b)"
        counts = CountVectorizer(binary=True, stop_words=stop_words, token_pattern=word)
        matrix: Any = counts.fit_transform([*texts, *others])
        found = matrix.toarray()
        inside = found[: len(texts)].mean(0)
        outside = found[len(texts) :].mean(0) if others else 0 * inside
        names = counts.get_feature_names_out()
        return {
            name: float(here - there)
            for name, here, there in zip(names, inside, outside, strict=True)
            if here > 0
        }

    together = " ".join(texts).lower()

    def first(word: str) -> int:
        found = re.search(rf"\b{re.escape(word)}\b", together)
        return found.start() if found else len(together)

    for stop_words in ("english", None):
        try:
            scores = shares(stop_words)
        except ValueError:  # no word is left
            continue
        if scores:
            best = sorted(scores, key=lambda word: (-scores[word], first(word)))
            # A script without spaces makes one word of a sentence.
            return ", ".join(word[:_LONGEST_WORD] for word in best[:_NAME_WORDS])
    return "without words"
