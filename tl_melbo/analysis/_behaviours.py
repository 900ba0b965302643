"""How many different effects have the vectors? Completions grouped into behaviours."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from tl_melbo import checks
from tl_melbo.analysis._coherence import DEFAULT_PERPLEXITY, DEFAULT_REPETITION, judged
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.text import printable, quoted

# Average-linkage clusters are cut where two are this far apart (one minus the mean cosine). These
# numbers are where the hand-labelled completions of the tests agree best; neighbours do nearly so.
DEFAULT_DISTANCES = {"sentences": 0.65, "words": 0.85}
_DISTANCE_OF_OTHERS = 0.5
_INCOHERENT, _UNSTEERED = -1, 0
_NAME_WORDS, _LONGEST_WORD = 3, 24
# A word of a name. Not "i'm", "don't" or "you're": they are no topics.
_WORD = r"(?u)(?<!['’])\b[^\W\d_][\w-]+\b(?!['’](?:t|m|d|ll|re|ve)\b)"
# Of a longer text, its beginning is looked at.
_MOST_CHARACTERS = 2_000
_GROUP_COLUMNS = ["behaviour", "name", "prompt", "n_texts", "vectors", "example"]


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Completions in groups, each group one behaviour; see `behaviours`.

    Attributes:
        texts: the completions, and for each: perplexity; repetition; coherent; filtered_out, why it
            is not coherent: "empty", "repeats itself" or "high perplexity", else ""; behaviour, the
            number of its group: 0 for the baseline's, -1 where it is not coherent.
        groups: one row a behaviour, the baseline's first, then the largest: behaviour, name,
            prompt, n_texts, vectors, example.
        embedder: what made points of the texts: "sentences", "words", or "custom".
    """

    texts: pd.DataFrame
    groups: pd.DataFrame
    embedder: str

    @property
    def n_distinct(self) -> int:
        """How many behaviours are coherent and differ from the baseline, over all prompts."""
        return sum(number > _UNSTEERED for number in self.groups["behaviour"])

    @property
    def per_100_vectors(self) -> float:
        """The same for every hundred vectors and prompts, to compare libraries of one size by."""
        steered = self.texts[self.texts["vector"] >= 0]
        n_tried = len({*zip(steered["vector"], steered["prompt"], strict=True)})
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

    Filtered out are completions that repeat themselves, and those of high perplexity under the
    unsteered model after the prompt. Of these, one of up to 25 tokens stays if the order of its
    words makes sense to the model: shuffled, they cost 1 nat a token more, and it is at most 55
    nats in all beyond the limit. A single word, or a long text in a language that the model hardly
    knows, may be filtered out wrongly.

    The others are clustered for each prompt by itself (average linkage; with the embedder
    "sentences" over the mean of two cosines, the sentences' and the words'). Adding one completion
    can change the clustering. A group is named after the words that set it apart.

    Args:
        model: the model that wrote them; it is not steered here.
        completions: the columns vector (-1 for unsteered), prompt, completion, as `generate`
            returns them. Of a long one, the first 2,000 characters count.
        chat: None goes by what `generate` noted in the frame, or else takes the prompts as raw.
        n_behaviours: groups for each prompt, the baseline's included; None lets `distance` decide.
        distance: two groups stay apart if one minus the mean cosine between them is more; None
            takes 0.65 for sentences, 0.85 for words.
        largest_perplexity: of a completion that is coherent anyway.
        largest_repetition: of a coherent completion, see `repetition`.

    Raises:
        ValueError: no completions or without those columns; a number out of its range; fewer
            coherent completions than `n_behaviours`.
        ModuleNotFoundError: scikit-learn, or what the embedder needs, is not installed.
    """
    check_model(model)
    chosen: Embedder = default_embedder() if embedder is None else embedder
    label = "custom" if callable(chosen) else chosen
    if distance is None:
        distance = DEFAULT_DISTANCES.get(label, _DISTANCE_OF_OTHERS)
    _check(completions)
    checks.at_least(1, n_behaviours=n_behaviours, batch_size=batch_size)
    if not 0 < distance <= 2:
        raise ValueError(f"distance={distance}: above 0, and at most 2, which is opposite")
    if not largest_perplexity >= 1:
        raise ValueError(f"largest_perplexity={largest_perplexity}: at least 1")
    checks.between(0, 1, "a share", largest_repetition=largest_repetition)
    chat = bool(completions.attrs.get("chat")) if chat is None else chat
    texts = Table(completions).reset_index(drop=True)
    # Not the completions, which may be long or hold what cannot be shown.
    said = texts["completion"].fillna("").astype(str).str[:_MOST_CHARACTERS].map(printable)
    pairs = list(zip(texts["prompt"], said, strict=True))
    measured = judged(model, pairs, chat, largest_perplexity, largest_repetition, batch_size)
    texts[[*measured.columns]] = measured
    texts["coherent"] = texts["filtered_out"] == ""
    texts["behaviour"] = _INCOHERENT
    groups: list[dict[str, Any]] = []
    inside = texts.assign(said=said)[texts["coherent"] | (texts["vector"] < 0)]
    for prompt, rows in inside.groupby("prompt", sort=False):
        first = 1 + max([_UNSTEERED, *(group["behaviour"] for group in groups)])
        clusters = _clusters(str(prompt), rows["said"].tolist(), n_behaviours, distance, chosen)
        # The unsteered completion's cluster is 0; of the others, the largest comes first.
        own = {*itertools.compress(clusters, rows["vector"] < 0)}
        others = [each for each, _ in Counter(clusters).most_common() if each not in own]
        number_of = dict.fromkeys(own, _UNSTEERED) | dict(zip(others, itertools.count(first)))
        numbers = [number_of[cluster] for cluster in clusters]
        texts.loc[rows.index, "behaviour"] = numbers
        groups += _groups(str(prompt), rows.assign(behaviour=numbers))
    return Behaviours(texts, Table(groups, columns=_GROUP_COLUMNS), label)


def _check(completions: pd.DataFrame) -> None:
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


def _clusters(
    prompt: str, texts: Sequence[str], n_behaviours: int | None, distance: float, embedder: Embedder
) -> list[int]:
    cluster = checks.installed("sklearn.cluster", "behaviours")
    if n_behaviours is not None and len(texts) < n_behaviours:
        raise ValueError(
            f"n_behaviours={n_behaviours}: of {quoted(printable(prompt))} only {len(texts)} "
            "completions are coherent or unsteered; ask for fewer, or for None"
        )
    if len(texts) == 1:
        return [0]
    # What is said counts, and how: meaning alone throws all that an assistant says together.
    points = [embeddings(texts, embedder).double()]
    if embedder == "sentences":
        points.append(embeddings(texts, "words").double())
    cosines = torch.stack([some @ some.T for some in points]).mean(0)
    clustering = cluster.AgglomerativeClustering(
        n_clusters=n_behaviours,
        distance_threshold=distance if n_behaviours is None else None,
        metric="precomputed",
        linkage="average",
    )
    return clustering.fit_predict((1 - cosines).clamp_min(0).numpy()).tolist()


def _groups(prompt: str, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """What is told of the groups of one prompt."""
    groups = []
    for number in sorted(set(rows["behaviour"])):
        is_member = rows["behaviour"] == number
        members, others = rows[is_member], rows["said"][~is_member].tolist()
        texts, perplexities = members["said"].tolist(), members["perplexity"].tolist()
        groups.append(
            {
                "behaviour": number,
                "name": "≈ baseline" if number == _UNSTEERED else _name(texts, others),
                "prompt": prompt,
                "n_texts": len(texts),
                "vectors": sorted({int(vector) for vector in members["vector"] if vector >= 0}),
                "example": texts[perplexities.index(min(perplexities))],
            }
        )
    return groups


def _name(texts: Sequence[str], others: Sequence[str]) -> str:
    """Words of these texts that most of them have and few of the others, as they come up."""
    text = checks.installed("sklearn.feature_extraction.text", "behaviours")
    for stop_words in ("english", None):
        counts = text.CountVectorizer(binary=True, stop_words=stop_words, token_pattern=_WORD)
        words = [*dict.fromkeys(counts.build_analyzer()(" ".join(texts)))]
        if words:
            found = counts.fit_transform([*texts, *others])
            scores = found[: len(texts)].toarray().mean(0)
            if others:
                scores -= found[len(texts) :].toarray().mean(0)
            best = sorted(words, key=lambda word: -scores[counts.vocabulary_[word]])
            # A script without spaces makes one word of a sentence.
            return ", ".join(word[:_LONGEST_WORD] for word in best[:_NAME_WORDS])
    return "without words"
