"""The course's checks take right answers, and say what is wrong with typical wrong ones."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tl_melbo.course import Note, Wrong, first_vectors, from_scratch, is_it_real, lines, unfinished
from tl_melbo.course._note import unfinished as same
from tl_melbo.model.tokens import to_tokens

SOURCE, TARGET, RADIUS = 1, 3, 2.0
LAST = slice(-3, None)
PROMPTS = ["Tell me about yourself.", "A bridge over the river."]


@pytest.fixture(scope="module")
def tiny_map(_tiny_bridges):
    return tm.ActivationMap.from_prompts(_tiny_bridges("llama"), PROMPTS[0], SOURCE, TARGET)


@pytest.fixture(scope="module")
def found(tiny_map):
    return tm.melbo(tiny_map, 2, RADIUS, steps=5)


@pytest.fixture(scope="module")
def steered(tiny_map):
    """Logits of the prompt with a change of the residual stream at a hook point."""
    model = tiny_map.model
    tokens = to_tokens(model, PROMPTS[0])

    def run(change=lambda x: x, place=f"blocks.{SOURCE}.hook_resid_post"):
        hooks = [(place, lambda resid, hook: change(resid))]
        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=hooks)

    return run


def last_alone(theta):
    return lambda x: torch.cat([x[:, :-1], x[:, -1:] + theta], 1)


def told(message, check, *arguments, **more):
    with pytest.raises(Wrong, match=message):
        check(*arguments, **more)


def test_a_note_shows_as_its_text():
    assert repr(Note("Right: 3 of 4.")) == "Right: 3 of 4."
    assert unfinished is same
    assert unfinished(1, None) is None
    assert "replace the ..." in unfinished(...)
    assert "earlier ones" in unfinished(1, ...)


def test_hook(tiny_map, steered, unchanged):
    unchanged(tiny_map.model)
    check = from_scratch.hook
    assert "Not done yet" in check(lambda theta: ..., tiny_map)
    assert "Right" in check(lambda theta: steered(lambda x: x + theta), tiny_map)
    assert "Right" in check(lambda theta: steered(lambda x: x + theta)[0], tiny_map)
    told("unsteered logits", check, lambda theta: steered(), tiny_map)
    told("Only the last token", check, lambda theta: steered(last_alone(theta)), tiny_map)
    told("wrong sign", check, lambda theta: steered(lambda x: x - theta), tiny_map)
    told("takes the place", check, lambda theta: steered(lambda x: 0 * x + theta), tiny_map)
    early = f"blocks.{SOURCE}.hook_resid_pre"
    told("too early", check, lambda theta: steered(lambda x: x + theta, early), tiny_map)
    late = f"blocks.{SOURCE + 1}.hook_resid_post"
    told("too late", check, lambda theta: steered(lambda x: x + theta, late), tiny_map)
    told(
        "log-probabilities",
        check,
        lambda theta: steered(lambda x: x + theta).log_softmax(-1),
        tiny_map,
    )
    told("other logits", check, lambda theta: steered(lambda x: x + 2 * theta), tiny_map)
    told("shape", check, lambda theta: steered()[:, -1], tiny_map)
    told("unsteered logits", check, lambda theta: steered(lambda x: x + theta.zero_()), tiny_map)
    told("Expected a tensor", check, lambda theta: None, tiny_map)


def test_effect(tiny_map):
    check = from_scratch.effect

    def streams(theta, tokens):
        """After the target block, unsteered and steered, from caches."""
        model, place = tiny_map.model, f"blocks.{SOURCE}.hook_resid_post"
        for hooks in ([], [(place, lambda resid, hook: resid + theta)]):
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                yield model.run_with_cache(tokens)[1][f"blocks.{TARGET}.hook_resid_post"]

    def delta(theta, tokens):
        unsteered, steered = streams(theta, tokens)
        return steered - unsteered

    assert "Not done yet" in check(lambda theta, tokens: ..., tiny_map)
    assert "Right" in check(delta, tiny_map)
    assert "Right" in check(lambda *given: delta(*given)[0], tiny_map)
    told("Other way round", check, lambda *given: -delta(*given), tiny_map)
    told("How far", check, lambda *given: [*streams(*given)][1], tiny_map)
    told("source layer", check, lambda theta, tokens: theta.expand_as(tiny_map.x[0]), tiny_map)
    told("nothing at all", check, lambda *given: 0 * delta(*given), tiny_map)
    told("Another change", check, lambda *given: 1.5 * delta(*given), tiny_map)
    told("shape", check, lambda *given: delta(*given)[0, -1], tiny_map)
    told("Is there a return", check, lambda *given: None, tiny_map)
    # The package's own answer is for the prompt of its map.
    told("other tokens", check, lambda theta, tokens: tiny_map.delta(theta[None])[0, 0], tiny_map)


def test_quiz():
    texts = ["found", "one", "two", "three"]
    shown = from_scratch.quiz(texts)
    letters = dict(zip(shown["completion"], shown["text"], strict=True))
    assert sorted(letters) == sorted(texts)
    assert "Right" in from_scratch.guess(letters["found"], texts)
    assert "Not done yet" in from_scratch.guess(..., texts)
    told("random vector wrote", from_scratch.guess, letters["two"], texts)
    told("none of the letters", from_scratch.guess, "E", texts)


def objective(tiny_map, theta):
    return tiny_map.delta(theta[None], positions=LAST)[0, 0].square().sum().sqrt()


def test_objective(tiny_map):
    def check(how):
        return from_scratch.objective(how, tiny_map)

    def sizes(theta):
        return tiny_map.delta(theta[None])[0, 0].norm(dim=-1)

    assert "Right" in check(lambda theta: objective(tiny_map, theta))
    told("All tokens", check, lambda theta: sizes(theta).norm())
    told("Only the last token", check, lambda theta: sizes(theta)[-1])
    told("exponent", check, lambda theta: sizes(theta)[LAST].square().sum())
    told("sum of the norms", check, lambda theta: sizes(theta)[LAST].sum())
    told("the mean", check, lambda theta: sizes(theta)[LAST].square().mean().sqrt())
    told("no gradient", check, lambda theta: objective(tiny_map, theta).detach())
    told("One number", check, sizes)
    told("gradient is not", check, lambda theta: objective(tiny_map, theta.detach()) + 0 * theta[0])


def test_climbed(tiny_map, found):
    # Not the library's own bits, which the check refuses.
    best, start = 1.0001 * found.vectors[0], tm.random_vectors(tiny_map, 1, RADIUS).vectors[0]

    def check(answer, **more):
        return from_scratch.climbed(answer, tiny_map, RADIUS, found, 5, **more)

    with torch.no_grad():
        size = float(objective(tiny_map, best))
    assert "100%" in check((best, [0.5 * size, size]))
    assert "Not done yet" in check(...)
    told("the last one too", check, (best, [0.0, 0.5 * size]))
    told("on the way", check, (best, [0.5 * size, 2 * size]))
    told("tm.melbo's own vector", check, (found.vectors[0], [0.5 * size, size]))
    for history in (None, [], [math.nan, size], [0.5 * size, math.inf]):
        told("list of finite numbers", check, (best, history))
    told("Its norm", check, (2 * best, [1.0]))
    told("at most 5", check, (best, [1.0] * 9))
    told("reaches", check, (0.1 * start / start.norm() * RADIUS * 10, [1.0]), enough=2.0)
    told("Return two things", check, best[:3])
    told("finite", check, (best * math.nan, [1.0]))


def test_a_search_is_tried_from_another_start(tiny_map, found):
    def search(theta, n_steps):
        """Power iteration, of which the best is kept."""
        tried = []
        for step in range(n_steps + 1):
            theta = theta.detach().requires_grad_()
            value = objective(tiny_map, theta)
            tried.append((float(value.detach()), theta.detach()))
            if step < n_steps:
                (slope,) = torch.autograd.grad(value, theta)
                theta = RADIUS * slope / slope.norm()
        return max(tried, key=lambda pair: pair[0])[1], [value for value, _ in tried]

    answer = search(tm.random_vectors(tiny_map, 1, RADIUS).vectors[0], 5)

    def check(search):
        return from_scratch.climbed(answer, tiny_map, RADIUS, found, 5, enough=0.5, search=search)

    assert "Right" in check(search)
    told("another start", check, lambda theta, n_steps: answer)
    told("depend on the start", check, lambda theta, n: (answer[0], search(theta, n)[1]))
    told("Its norm", check, lambda theta, n: (2 * answer[0], search(theta, n)[1]))


def test_top_direction(tiny_map):
    linear = tm.jacobian(tiny_map, 2, RADIUS)

    def check(change):
        """The singular vectors by a whole Jacobian, and what is made of them."""

        def answer(g):
            zero = torch.zeros(tiny_map.d_model)
            jacobian = torch.autograd.functional.jacobian(g, zero).reshape(-1, len(zero))
            _, values, rows = torch.linalg.svd(jacobian)
            return change(rows[0], rows[1], values[0])

        return from_scratch.top_direction(answer, tiny_map, linear)

    assert "Not done yet" in check(lambda one, two, value: ...)
    assert "Right" in check(lambda one, two, value: (-one, value))
    told("cosine", check, lambda one, two, value: (two, value))
    told("J'J", check, lambda one, two, value: (one, value**2))
    told("does not stretch", check, lambda one, two, value: (one, 0.5 * value))
    told("Expected one number", check, lambda one, two, value: (one, one))
    told("not a finite number", check, lambda one, two, value: (one, math.nan))
    told("Its norm", check, lambda one, two, value: (3 * one, value))
    # The package's own answer is for its map, and its functions search no plain function.
    own = linear.vectors[0] / linear.norms[0], linear.columns["singular_value"][0]
    told("J is known", from_scratch.top_direction, lambda g: own, tiny_map, linear)
    with pytest.raises(Exception, match="an activation map"):
        from_scratch.top_direction(lambda g: tm.jacobian(g, 1), tiny_map, linear)


def test_second(tiny_map, found):
    def check(theta):
        return from_scratch.second(theta, found.vectors[0], tiny_map, found)

    # Not the library's own bits, which the check refuses.
    assert "Right" in check(1.0001 * found.vectors[1])
    told("tm.melbo's own vector", check, found.vectors[1])
    told("Its cosine with the first", check, 1.0001 * found.vectors[0])
    told("Its norm", check, 0.5 * found.vectors[1])


def test_sink(tiny_map, found):
    place = int(tiny_map.x[0].norm(dim=-1).argmax())
    with torch.no_grad():
        sizes = tiny_map.delta(found.vectors[:1])[0, 0].norm(dim=-1)
    share = float(sizes[place].square() / sizes.square().sum())
    assert "Right" in from_scratch.sink(place, share, tiny_map, found)
    told("not the longest", from_scratch.sink, place - 1, share, tiny_map, found)
    norms = float(sizes[place] / sizes.sum())
    told("squared", from_scratch.sink, place, norms, tiny_map, found)
    told("between 0 and 1", from_scratch.sink, place, 100 * share + 2, tiny_map, found)
    told("the position of a token", from_scratch.sink, "first", share, tiny_map, found)


def test_a_sink_is_not_all_of_the_effect():
    """Where one token has nearly all, a constant is near its share, too."""
    x = torch.tensor([[[100.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    f = SimpleNamespace(x=x, mask=torch.ones(1, 4, dtype=torch.bool), delta=lambda v: x[None])
    library = SimpleNamespace(vectors=torch.ones(1, 2))

    def check(place, share):
        return from_scratch.sink(place, share, f, library)

    assert "99.97%" in check(0, 10000 / 10003)
    assert "99.97%" in check(torch.tensor(-4), torch.tensor(0.9997))
    for constant in (1, 1.0, 0.999, 0.99999):
        told("do not round", check, 0, constant)
    told("squared", check, 0, 100 / 103)
    told("not the position", check, 4, 0.9997)
    told("not the position", check, 0.5, 0.9997)
    told("not a finite number", check, 0, math.nan)


def test_predicted():
    texts = pd.DataFrame({"completion": ["a", "b", "a", "c"]})
    assert "2 of 4" in first_vectors.predicted(0.9, "a", texts)
    told("between 0 and 1", first_vectors.predicted, 90, "a", texts)
    told("one number for the share", first_vectors.predicted, "most", "a", texts)


def test_divergences():
    generator = torch.Generator().manual_seed(0)
    steered = torch.randn(5, 30, generator=generator).log_softmax(-1)
    unsteered = torch.randn(1, 30, generator=generator).log_softmax(-1)

    def check(answer):
        return first_vectors.divergences(answer, steered, unsteered)

    target = unsteered.expand_as(steered)
    assert "Right" in check(torch.nn.functional.kl_div(target, steered, log_target=True,
                                                       reduction="none").sum(-1))  # fmt: skip
    difference = steered - unsteered
    told("unsteered distribution from", check, -(unsteered.exp() * difference).sum(-1))
    told("never negative", check, -(steered.exp() * difference).sum(-1))
    told("not weighed", check, difference.sum(-1))
    told("an entropy", check, -(steered.exp() * steered).sum(-1))
    told("has a sum", check, (steered.exp() * difference).mean(-1))
    told("shape", check, difference)
    told("other numbers", check, difference.square().sum(-1))


def test_coherent_up_to():
    kept = {0.5: 1.0, 1.0: 0.8, 2.0: 0.4, 3.0: 0.8}
    rows = [(s, i < 10 * share) for s, share in kept.items() for i in range(10)]
    swept = pd.DataFrame(rows, columns=["scale", "coherent"])
    assert "80%" in first_vectors.coherent_up_to(1.0, swept)
    told("no larger scale", first_vectors.coherent_up_to, 0.5, swept)
    told("only 40%", first_vectors.coherent_up_to, 2.0, swept)
    told("at a smaller scale", first_vectors.coherent_up_to, 3.0, swept)
    told("none of the scales", first_vectors.coherent_up_to, 0.8, swept)


def test_correlation():
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.randn(2, 7, 5, generator=generator)).unbind()
    effects, texts = one @ one.T, (two @ two.T).exp()
    effects.fill_diagonal_(9.0)
    texts.fill_diagonal_(99.0)
    pairs = np.triu_indices(7, 1)
    frame = pd.DataFrame({"a": effects.numpy()[pairs], "b": texts.numpy()[pairs]})

    def check(answer):
        return first_vectors.correlation(answer, effects, texts)

    assert "Right" in check(frame.corr("spearman").iloc[0, 1])
    told("not of their ranks", check, frame.corr().iloc[0, 1])
    for places in (np.triu_indices(7), tuple(np.indices((7, 7)).reshape(2, -1))):
        every = pd.DataFrame({"a": effects.numpy()[places], "b": texts.numpy()[places]})
        told("diagonal is in it", check, every.corr("spearman").iloc[0, 1])
        told("diagonal is in it", check, every.corr().iloc[0, 1])
    told("between -1 and 1", check, 3)
    told("not a finite number", check, math.nan)


def test_a_choice():
    frame = pd.DataFrame({
        "vector": [-1, 0, 1, 2], "scale": [0.0, 1.0, 1.0, 1.0], "behaviour": [0, 0, 1, -1],
        "coherent": [True, True, True, False], "filtered_out": ["", "", "", "repetition"],
        "completion": ["I help.", "I help!", "I fly.", "na na"],
    })  # fmt: skip
    assert "I fly." in first_vectors.chosen(1, frame)
    told("own group", first_vectors.chosen, 0, frame)
    told("repetition", first_vectors.chosen, 2, frame)
    told("no vector 7", first_vectors.chosen, 7, frame)
    assert "another radius" in first_vectors.chosen(0, frame[frame["vector"] != 1])


def test_choosing_on_one_set():
    table = pd.DataFrame({"steering": ["vector"] * 3, "vector": [0, 1, 2], "rate": [0.1, 0.9, 0.9]})
    assert "not what to report" in is_it_real.chosen(2, table)
    told("not the highest", is_it_real.chosen, 0, table)
    told("none of the vectors", is_it_real.chosen, 5, table)


def wald(hits, n):
    half = 1.96 * (hits / n * (1 - hits / n) / n) ** 0.5
    return hits / n - half, hits / n + half


def test_wilson():
    check = is_it_real.wilson
    assert "Right" in check(tm.evaluation.wilson_interval)
    assert "Not done yet" in check(lambda hits, n: ...)
    told("normal", check, wald)
    told("above the upper", check, lambda hits, n: tm.evaluation.wilson_interval(hits, n)[::-1])
    told("outside 0 to 1", check, lambda hits, n: (-0.1, 1.1))
    told("not within", check, lambda hits, n: (0.4, 0.5))
    told("too", check, lambda hits, n: tm.evaluation.wilson_interval(hits, n, 0.5))
    told("two numbers", check, lambda hits, n: 0.5)


def test_direction(tiny_map):
    pairs = ([text, f"{text} And more."] for text in PROMPTS)
    maps = [tm.ActivationMap.from_prompts(tiny_map.model, pair, SOURCE, TARGET) for pair in pairs]
    here, there = (each.x[:, -1].mean(0) for each in maps)

    def check(answer):
        return is_it_real.direction(answer, *maps)

    assert "Right" in check(2 * (here - there))
    told("points from", check, there - here)
    told("in common", check, here)
    told("shape", check, here[None])
    told("Its cosine", check, torch.ones_like(here))


def test_share():
    def by_basis(vector, rows):
        return (torch.linalg.qr(rows.T).Q.T @ vector).square().sum() / vector.square().sum()

    def cosines(vector, rows):
        units = torch.nn.functional.normalize(rows, dim=-1)
        return (units @ vector).square() / vector.square().sum()

    def check(how):
        return is_it_real.share(how, 32)

    assert "Right" in check(by_basis)
    told("root", check, lambda v, rows: by_basis(v, rows).sqrt())
    told("squared cosines", check, lambda v, rows: cosines(v, rows).sum())
    told("largest", check, lambda v, rows: cosines(v, rows).max())
    told("not divided", check, lambda v, rows: by_basis(v, rows) * v.square().sum())
    told("another number", check, lambda v, rows: 0.123)
    told("one number", check, lambda v, rows: None)


def test_lines_say_what_they_show():
    figure = lines({"a": ([1, 2], [0.5, 4.0]), "b": ([1, 2], [1, 1])}, "Two", "R", "KL", log="y",
                   mark={"calibrated": 1.5})  # fmt: skip
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.annotations[0].x == 1.5
    marked = lines({"a": ([1, 10], [1, 1])}, "One", "R", "KL", log="x", mark={"ten": 10.0})
    assert (marked.layout.annotations[0].x, marked.layout.shapes[0].x0) == (1.0, 10.0)
    assert figure.layout.xaxis.type is None
    assert (figure.layout.yaxis.tickformat, figure.layout.yaxis.dtick) == ("~g", "D2")
    assert lines({"a": ([1, 2], [1e-5, 1])}, "", "R", "KL", log="y").layout.yaxis.dtick == 1
    assert figure.layout.meta["alt"] == (
        "KL. a: 0.5 to 4, for R of 1 to 2; b: 1, for R of 1 to 2; calibrated is marked at 1.5."
    )
