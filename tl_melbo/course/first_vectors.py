"""Checks of the notebook 01_first_vectors."""

from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from tl_melbo.course._note import Note, Wrong, look_up, number, tensor, unfinished

# Of the largest value: two ways to compute the same differ by less.
_CLOSE = 5e-3


def predicted(share: Any, unsteered: str, completions: pd.DataFrame) -> Note:
    """Exercise 1: of random vectors, the share whose completion differs from the unsteered one."""
    if note := unfinished(share):
        return note
    share = number(share, "the share")
    if not 0 <= share <= 1:
        raise Wrong(f"A share is between 0 and 1; this is {share:g}.")
    changed = [text != unsteered for text in completions["completion"]]
    return Note(
        f"You said {share:.0%}. {sum(changed)} of {len(changed)} texts differ. Whether a text "
        "differs says little: how much the distribution of the next token moves says more."
    )


def divergences(answer: Any, steered: Tensor, unsteered: Tensor) -> Note:
    """Exercise 2: KL(steered || unsteered) of each row, from log-probabilities."""
    if note := unfinished(answer):
        return note
    told = tensor(answer, steered.shape[:1], "the divergences").detach().double().cpu()
    ours, theirs = steered.double().cpu(), unsteered.double().cpu().reshape(1, -1)
    terms = ours.exp() * (ours - theirs)
    kl = terms.sum(-1)

    def is_told(value: Tensor) -> bool:
        return bool((told - value).abs().max() <= _CLOSE * value.abs().max())

    if is_told(kl):
        return Note("Right. 0 is the same distribution; unlike a text, it has degrees.")
    mistakes = {
        "That is the divergence of the unsteered distribution from the steered one. Whose "
        "probabilities weigh the differences?": (theirs.exp() * (theirs - ours)).sum(-1),
        "A divergence is never negative. Which of the two is subtracted from which?": -kl,
        "The log-probabilities are subtracted, but not weighed by probabilities.": (
            ours - theirs
        ).sum(-1),
        "That is an entropy: the unsteered distribution is not in it.": (
            -(ours.exp() * ours).sum(-1)
        ),
        "That is a mean over the vocabulary; the definition has a sum.": terms.mean(-1),
    }
    look_up(mistakes, is_told)
    raise Wrong("These are other numbers. Write the definition down, then compare term by term.")


def coherent_up_to(answer: Any, swept: pd.DataFrame, least: float = 0.8) -> Note:
    """Exercise 3: the largest scale up to which so large a share of the completions is coherent."""
    if note := unfinished(answer):
        return note
    shares: Any = swept["coherent"].astype(bool).groupby(swept["scale"]).mean()
    answer = number(answer, "the scale")
    if answer not in shares:
        scales = ", ".join(f"{each:g}" for each in shares.index)
        raise Wrong(f"{answer:g} is none of the scales {scales}.")
    expected = shares.index[shares.cummin() >= least]
    if not len(expected):
        return Note("No scale has so many coherent completions here: the radius is too large.")
    if answer == expected[-1]:
        return Note(
            f"Right: {shares[answer]:.0%} at {answer:g} times the radius. It is a limit for this "
            "library on this prompt, not a constant of the model."
        )
    if shares[answer] < least:
        raise Wrong(f"At {answer:g} only {shares[answer]:.0%} of the completions are coherent.")
    if answer > expected[-1]:
        raise Wrong(f"At {answer:g} they are, but at a smaller scale they are not.")
    raise Wrong(f"At {answer:g} they are coherent; is there no larger scale where they still are?")


def correlation(answer: Any, effects: Tensor, texts: Tensor) -> Note:
    """Exercise 4: rank correlation, over pairs, of two matrices of similarities."""
    if note := unfinished(answer):
        return note
    one, other = (matrix.detach().double().cpu().numpy() for matrix in (effects, texts))
    pairs = np.triu_indices(len(one), 1)
    if not (np.ptp(one[pairs]) and np.ptp(other[pairs])):
        return Note("All pairs are equally alike here, so there are no ranks to correlate.")
    answer = number(answer, "the correlation")
    if not abs(answer) <= 1:
        raise Wrong(f"A correlation is between -1 and 1; this is {answer:g}.")

    def near(method: Literal["pearson", "spearman"], places: Any = pairs) -> bool:
        ours, theirs = pd.Series(one[places]), pd.Series(other[places])
        return abs(answer - ours.corr(theirs, method=method)) < 0.005

    if near("spearman"):
        return Note(
            f"Right: {answer:.2f}. With {len(pairs[0])} pairs of {len(one)} vectors it is a rough "
            "number: pairs that share a vector are not independent."
        )
    for places in (np.triu_indices(len(one)), tuple(np.indices(one.shape).reshape(2, -1))):
        if near("spearman", places) or near("pearson", places):
            raise Wrong(
                "The diagonal is in it: each vector compared with itself, which always fits."
            )
    if near("pearson"):
        raise Wrong("That is the correlation of the values, not of their ranks.")
    raise Wrong(
        f"{answer:.3f} is another number. Do both lists have the same pairs in the same order?"
    )


def chosen(number: Any, completions: pd.DataFrame) -> Note:
    """Exercise 5: a vector whose greedy completion is coherent and not the baseline's behaviour."""
    if note := unfinished(number):
        return note
    steered = pd.DataFrame(completions[(completions["vector"] >= 0) & (completions["scale"] == 1)])
    if not any(steered["coherent"].astype(bool) & (steered["behaviour"] > 0)):
        return Note("No coherent completion here differs from unsteered: try another radius.")
    own = pd.DataFrame(steered[steered["vector"] == number])
    if not len(own):
        count = max(completions["vector"])
        raise Wrong(f"There is no vector {number!r}; they are numbered from 0 to {count}.")
    row: Any = own.iloc[0]
    if not row["coherent"]:
        raise Wrong(
            f"Its completion is filtered out ({row['filtered_out']}): {row['completion']!r}"
        )
    if row["behaviour"] == 0:
        raise Wrong(
            "Its completion is in the unsteered model's own group. Choose one that differs."
        )
    alike = completions["behaviour"] == row["behaviour"]
    n_alike = len(completions[alike & (completions["vector"] >= 0)])
    return Note(
        f"Vector {number}: {row['completion']!r} It is one of {n_alike} completions in its group. "
        "That is one greedy text: the next notebook asks how much of it is real."
    )
