"""Checks of the notebook 00_melbo_from_scratch."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.course._note import Note, Wrong, look_up, number, tensor, unfinished, vector
from tl_melbo.discovery import random_vectors
from tl_melbo.model.tokens import to_tokens
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

LAST = slice(-3, None)
_LETTERS = "ABCDEFGH"
# Of the largest value: two ways to compute the same differ by less.
_CLOSE = 2e-3
# Of what the package reaches, how much a search of one's own should.
_ENOUGH = 0.9


def hook(steered_logits: Callable[[Tensor], Any], f: ActivationMap) -> Note:
    """Exercise 1: logits of the prompt with theta added after the source block."""
    theta, before = _drawn(f), _logits(f)
    # A copy: what is done to it in place must not change what is expected.
    told = steered_logits(theta.clone())
    if note := unfinished(told):
        return note
    expected = _logits(f, lambda x: x + theta)
    told = _by_token(told, expected, "the logits")
    if not _close(_logits(f), before):
        raise Wrong(
            "After your function returned, the model is still steered, and it stays so: call "
            "model.reset_hooks() now. A hook that was added for good stays; run_with_hooks takes "
            "it away again."
        )
    if _close(told, expected):
        return Note("Right: these are the logits that tm.steered gives, too.")
    if _close(told, expected.log_softmax(-1)):
        raise Wrong("These are log-probabilities. The logits come before the softmax.")
    block, add = f.source_layer, lambda x: x + theta
    mistakes = {
        "These are the unsteered logits: what your hook computed did not reach the model. Does it "
        "give something back, and does it have the right name?": [lambda x: x],
        "Only the last token is steered. The vector belongs to every position.": [
            lambda x: torch.cat([x[:, :-1], x[:, -1:] + theta], 1)
        ],
        "The vector has the wrong sign.": [lambda x: x - theta],
        "The vector takes the place of the residual stream; it should be added.": [
            lambda x: 0 * x + theta
        ],
        "The vector is added one block too early: before the source block, not after.": [
            add, f"blocks.{block}.hook_resid_pre",
        ],
        "The vector is added one block too late.": [add, f"blocks.{block + 1}.hook_resid_post"],
    }  # fmt: skip
    look_up(mistakes, lambda change: _close(told, _logits(f, *change)))
    raise Wrong(
        "These are other logits. Which hook point does your hook sit at, and what does it add?"
    )


def effect(delta: Callable[[Tensor, Tensor], Any], f: ActivationMap) -> Note:
    """Exercise 2: the change of the residual stream after the target block, for any tokens."""
    theta, own = _drawn(f), to_tokens(f.model, f.prompts[0], f.chat)
    tokens = own.flip(1)  # which no map was made for
    told = delta(theta.clone(), tokens.clone())
    if note := unfinished(told):
        return note
    y, steered, *others = (
        _run(f, some, lambda x, by=by: x + by * theta)[1] for some in (tokens, own) for by in (0, 1)
    )
    expected = steered - y
    told = _by_token(told, expected, "the effect")
    if _close(told, expected):
        return Note("Right: for these tokens, too, which are those of the prompt in reverse.")
    mistakes = {
        "Other way round: this is what the vector takes away.": -expected,
        "That is the steered residual stream. How far is it from the unsteered one?": y + expected,
        "That is the change at the source layer, where it is the vector itself.": theta + 0 * y,
        "That is nothing at all: both runs gave the same. Is one of them steered?": 0 * expected,
        "That is the effect on the notebook's prompt. The check gives other tokens: does your "
        "function run the model on those that it is given?": others[1] - others[0],
    }
    look_up(mistakes, lambda value: _close(told, value))
    raise Wrong(
        "Another change. Do you read the residual stream after the target block, in both runs?"
    )


def quiz(texts: Sequence[str]) -> Table:
    """The texts in another order, with a letter each."""
    order = _order(len(texts))
    return Table({"text": [*_LETTERS[: len(texts)]], "completion": [texts[i] for i in order]})


def guess(letter: Any, texts: Sequence[str]) -> Note:
    """Exercise 3: which letter of `quiz` is the first of the texts."""
    if note := unfinished(letter):
        return note
    letters = _LETTERS[: len(texts)]
    if letter not in [*letters]:
        raise Wrong(f"{letter!r} is none of the letters {', '.join(letters)}.")
    if letters[_order(len(texts)).index(0)] != letter:
        raise Wrong(
            "No, a random vector wrote that one. Which text would you least expect from this model?"
        )
    return Note("Right. The next exercises are about how such a vector is found.")


def objective(measure: Callable[[Tensor], Any], f: ActivationMap) -> Note:
    """Exercise 4, first half: the size of the effect at the last three tokens, differentiable."""
    theta = _drawn(f).requires_grad_()
    told = measure(theta)
    if note := unfinished(told):
        return note
    told = tensor(told, None, "the objective")
    if told.numel() != 1:
        raise Wrong(
            f"One number is expected; these are {told.numel()}. What is still to be summed?"
        )
    with torch.no_grad():
        everywhere = f.delta(theta[None]).double()[0, 0][f.mask[0]]
    sizes = everywhere.norm(dim=-1)
    expected = sizes[LAST].square().sum().sqrt()
    mistakes = {
        "All tokens count here, the first among them. Only the last three should.": sizes.norm(),
        "Only the last token counts here.": sizes[-1],
        "Nearly: the formula has an exponent 1/2 outside the sum.": expected.square(),
        "That is the sum of the norms. The formula squares them first.": sizes[LAST].sum(),
        "That is the mean; the formula has a sum.": sizes[LAST].square().mean().sqrt(),
    }
    if not _close(told, expected):
        look_up(mistakes, lambda value: _close(told, value))
        raise Wrong("Another number. Compare your code with the formula, from the inside out.")
    if not told.requires_grad:
        raise Wrong(
            "The number is right, but no gradient comes back: torch.no_grad, .item() or detach?"
        )
    (slope,) = torch.autograd.grad(told.sum(), theta, allow_unused=True)
    (expected,) = torch.autograd.grad(f.delta(theta[None], LAST).norm(), theta)
    if slope is None or not _close(slope, expected):
        raise Wrong(
            "The number is right, but its gradient is not. Does every step from theta to the "
            "number keep it: no detach, no .item(), no new tensor on the way?"
        )
    return Note("Right. MELBO does nothing but make this number large.")


def climbed(
    answer: Any,
    f: ActivationMap,
    radius: float,
    reference: SteeringVectors,
    n_gradients: int,
    enough: float = 0.9,
    search: Callable[[Tensor, int], Any] | None = None,
) -> Note:
    """Exercises 4 and 5: a vector on the sphere, and the objective on the way to it.

    Args:
        enough: the share of the objective of tm.melbo's first vector that it is to reach.
        search: the function that gave the answer; it is tried from another start, for two steps.
    """
    if note := unfinished(answer):
        return note
    theta, history = _two(answer, "the vector", "the list of objectives")
    _check_vector(theta, f, radius, reference)
    history = _objectives(history)
    if len(history) > n_gradients + 1:
        raise Wrong(f"{len(history)} objectives: at most {n_gradients} gradients are allowed.")
    if search is not None:
        _begins_where_told(search, f, radius)
    size, best = _size(f, theta), max(history)
    share = size / _size(f, reference.vectors[0])
    if share < enough:
        begun = _size(f, _drawn(f, radius)) / _size(f, reference.vectors[0])
        advice = (
            "That is no more than a random vector has: does the step go uphill?"
            if share < 1.2 * begun
            else "It climbs. Are the steps large enough, and is each taken from the last point?"
        )
        raise Wrong(f"Your vector reaches {share:.0%} of tm.melbo's objective. {advice}")
    if best > 1.01 * size:
        raise Wrong(
            f"Your vector's objective is {size:.4g}, but on the way there was {best:.4g}: return "
            "the best vector, not the last."
        )
    if best < 0.99 * size:
        raise Wrong(
            f"Your vector's objective is {size:.4g}, and the largest of your list is {best:.4g}. "
            "Does the list have the objective at the start and after every step, the last one too?"
        )
    more = "" if share < 1.05 else " More than 100% is no error: its own search is short."
    return Note(
        f"Right: {share:.0%} of what tm.melbo reaches, with {len(history) - 1} gradients.{more}"
    )


def top_direction(answer: Callable[..., Any], f: ActivationMap, linear: SteeringVectors) -> Note:
    """Exercise 6: the top right singular vector of J and its singular value, for any function."""
    if not callable(answer):
        raise Wrong("Pass the function itself; the check calls it.")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(f.d_model, 8, generator=generator)).Q.to(f.x.device)
    stretch = 3 * 0.5 ** torch.arange(8, device=f.x.device)
    value = float(linear.columns["singular_value"][0])
    for name, g, top, expected in (
        ("a function whose J is known", lambda v: (stretch * (v @ basis)).sin(), basis[:, 0], 3.0),
        ("f", lambda v: f.delta(v[None], LAST)[0, 0], linear.vectors[0], value),
    ):
        told = answer(g)
        if note := unfinished(told):
            return note
        direction, found = _two(told, "the direction", "its singular value")
        _on_sphere(direction, f, 1.0)
        cosine = abs(float(torch.cosine_similarity(direction.detach().cpu(), top.cpu(), 0)))
        if cosine < 0.9:
            raise Wrong(
                f"For {name}, its |cosine| with the top singular vector is {cosine:.2f}. Do you "
                "apply J and its transpose in turn, of the function given, and often enough?"
            )
        found = number(found, "the singular value")
        if abs(found - expected) < 0.03 * expected:
            continue
        if abs(found - expected**2) < 0.06 * expected**2:
            raise Wrong("The direction is right. The value is that of J'J: the square of J's own.")
        raise Wrong(f"For {name} the direction is right, but J does not stretch it by {found:.3g}.")
    return Note(f"Right: J stretches this direction by {value:.3g}, more than any other.")


def second(theta: Any, first: Tensor, f: ActivationMap, reference: SteeringVectors) -> Note:
    """Exercise 7: a second vector, orthogonal to the first, of a large objective."""
    if note := unfinished(theta):
        return note
    _check_vector(theta, f, float(reference.norms[0]), reference)
    cosine = float(torch.cosine_similarity(theta, first.detach(), 0))
    if abs(cosine) > 1e-3:
        raise Wrong(
            f"Its cosine with the first is {cosine:.3f}. The gradient leads back to the first: "
            "what has to be taken away from the point, after each step?"
        )
    share = _size(f, theta) / _size(f, reference.vectors[1])
    if share < _ENOUGH:
        raise Wrong(
            f"Orthogonal, but it reaches {share:.0%} of the objective of tm.melbo's second."
        )
    return Note(f"Right: orthogonal, and {share:.0%} of the objective of tm.melbo's second vector.")


def sink(place: Any, share: Any, f: ActivationMap, trapped: SteeringVectors) -> Note:
    """Exercise 8: which token has the largest residual, and its share of an effect, squared."""
    if note := unfinished(place) or unfinished(share):
        return note
    own = f.mask[0]
    norms = f.x[0][own].norm(dim=-1)
    place, share = number(place, "the position of a token"), number(share, "the share")
    if place != int(place) or not -len(norms) <= place < len(norms):
        raise Wrong(f"{place:g} is not the position of a token: there are {len(norms)}.")
    place = int(place) % len(norms)
    if place != int(norms.argmax()):
        raise Wrong(f"The residual stream of token {place} is not the longest: look at f.x again.")
    with torch.no_grad():
        sizes = f.delta(trapped.vectors[:1])[0, 0][own].double().norm(dim=-1)
    expected = float(sizes[place].square() / sizes.square().sum())
    # A share near 1 is told by what it leaves to the other tokens: 1.0 leaves them nothing.
    rest = min(expected, 1 - expected)
    if abs(share - expected) < min(0.01, 0.05 * rest):
        return Note(f"Right: {expected:.2%} of the objective is this one token.")
    if not 0 <= share <= 1:
        raise Wrong(f"A share is between 0 and 1; this is {share:.3g}.")
    if abs(share - expected) < 0.01:
        raise Wrong(
            f"With {share:g} the other tokens have {1 - share:.2g} of the objective together. They "
            "have another share. Compute it, and do not round it."
        )
    if abs(share - float(sizes[place] / sizes.sum())) < 0.01:
        raise Wrong("That is its share of the norms. In the objective they are squared.")
    raise Wrong(
        f"{share:.3f} is another share. Is it that of the vector that was found at all tokens?"
    )


def _drawn(f: ActivationMap, radius: float | None = None) -> Tensor:
    typical = 0.1 * float(f.x[0][f.mask[0]].norm(dim=-1).median())
    return random_vectors(f, 1, radius=radius or typical, seed=7).vectors[0].to(f.x.device)


def _logits(f: ActivationMap, *change: Any) -> Tensor:
    return _run(f, to_tokens(f.model, f.prompts[0], f.chat), *change)[0]


def _run(
    f: ActivationMap,
    tokens: Tensor,
    change: Callable[[Tensor], Tensor] = lambda x: x,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Logits, and the stream after the target layer: no code of this package adds anything here."""
    kept: list[Tensor] = []
    hooks = [
        (name or f"blocks.{f.source_layer}.hook_resid_post", lambda resid, hook: change(resid)),
        (f"blocks.{f.target_layer}.hook_resid_post", lambda resid, hook: kept.append(resid[0])),
    ]
    with torch.no_grad():
        return f.model.run_with_hooks(tokens, fwd_hooks=hooks)[0].float(), kept[0]


def _size(f: ActivationMap, theta: Tensor) -> float:
    with torch.no_grad():
        return float(f.delta(theta.detach()[None].to(f.x), LAST).double().norm())


def _check_vector(
    theta: Tensor, f: ActivationMap, radius: float, reference: SteeringVectors
) -> None:
    _on_sphere(theta, f, radius)
    # Bit for bit: a search of one's own can come to the same place, but hardly to its rounding.
    theta = theta.detach().cpu().to(reference.vectors.dtype)
    if any(torch.equal(theta, each) for each in reference.vectors.cpu()):
        raise Wrong("That is tm.melbo's own vector. Hand in what your search comes to.")


def _objectives(history: Any) -> list[float]:
    try:
        history = [float(value) for value in history]
    except (TypeError, ValueError, RuntimeError):
        history = []
    if not history or not all(map(math.isfinite, history)):
        raise Wrong("The second thing to return is a list of finite numbers, the objectives.")
    return history


def _begins_where_told(
    search: Callable[[Tensor, int], Any], f: ActivationMap, radius: float
) -> None:
    """Two steps from a start that the search has not seen, so that it cannot know the answer."""
    start = _drawn(f, radius)
    theta, history = _two(search(start.clone(), 2), "the vector", "the list of objectives")
    begun, history = _size(f, start), _objectives(history)
    _on_sphere(theta, f, radius)
    if abs(history[0] - begun) > 0.01 * begun:
        raise Wrong(
            f"From another start, whose objective is {begun:.4g}, your list begins with "
            f"{history[0]:.4g}. Does your function begin at the vector that it is given?"
        )
    if abs(_size(f, theta) - max(history)) > 0.01 * max(history):
        raise Wrong(
            "From another start and with 2 steps, the vector that comes back does not have the "
            "largest objective of the list. Does it depend on the start and the steps?"
        )


def _two(answer: Any, first: str, second: str) -> tuple[Tensor, Any]:
    try:
        found, other = answer
    except (TypeError, ValueError):
        raise Wrong(f"Return two things: {first}, and {second}.") from None
    return tensor(found, None, first), other


def _by_token(told: Any, expected: Tensor, what: str) -> Tensor:
    return tensor(tensor(told, None, what).squeeze(0), expected.shape, what)


def _on_sphere(theta: Any, f: ActivationMap, radius: float) -> None:
    norm = float(vector(theta, f.d_model).norm())
    if abs(norm - radius) > 1e-3 * radius:
        raise Wrong(f"Its norm is {norm:.4g}; expected {radius:g}. Which step leaves the sphere?")


def _close(told: Tensor, expected: Tensor) -> bool:
    """Token by token, so that a token with huge numbers does not hide the others."""
    told, expected = told.detach().double().cpu(), expected.detach().double().cpu()
    if told.dim() < 2:
        return bool((told - expected).abs().max() <= _CLOSE * expected.abs().max())
    difference = (told - expected).norm(dim=-1)
    return bool((difference <= _CLOSE * (1e-2 + expected.norm(dim=-1))).all())


def _order(count: int) -> list[int]:
    order = list(range(count))
    random.Random(count).shuffle(order)
    return order
