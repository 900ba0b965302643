"""The course's checks on how it works, families, other ways, the audit and a test of one's own.

Each accepts the solution that stands in its notebook and refuses what students usually hand in.
"""

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo.course import Note, Wrong, audit, families, inside, other_ways, question
from tl_melbo.evaluation import BACKDOORS, Backdoor, wilson_interval
from tl_melbo.model.tokens import to_tokens

PROMPT, RADIUS = "Tell me about yourself.", 4.0
SOURCE, TARGET = 1, 4


@pytest.fixture(scope="module")
def f(tiny_llama):
    return tm.ActivationMap.from_prompts(tiny_llama, PROMPT, SOURCE, TARGET, chat=True)


@pytest.fixture(scope="module")
def theta(f):
    return tm.random_vectors(f, 1, RADIUS)


def refuses(told, check, *arguments):
    with pytest.raises(Wrong, match=told):
        check(*arguments)


@pytest.mark.parametrize(
    "check",
    [
        lambda: inside.lens(..., None, PROMPT),
        lambda: inside.patch(..., None, None, None),
        lambda: other_ways.mean_difference(..., None, None, 1.0),
        lambda: audit.verdict(audit.grade(None, ...)),
        lambda: question.permutation_p(...),
    ],
)
def test_no_answer_is_not_wrong(check):
    assert isinstance(check(), Note)
    assert "Not done yet" in check()


def test_a_lens(tiny_llama):
    model = tiny_llama

    def right(stream):
        return model.unembed(model.ln_final(stream)).log_softmax(-1)

    assert inside.lens(right, model, PROMPT).startswith("Right")
    wrong = {
        "do not sum to 1": lambda stream: model.unembed(model.ln_final(stream)),
        "nats away": lambda stream: model.unembed(stream).log_softmax(-1),
        "of all tokens is": lambda stream: stream,
        "exp of what you return": lambda stream: right(stream).exp(),
        "at nothing else": lambda stream: model(to_tokens(model, PROMPT, True))[0, -1].log_softmax(
            -1
        ),
    }
    for told, answer in wrong.items():
        refuses(told, inside.lens, answer, model, PROMPT)


def test_a_patch(tiny_llama, f, theta):
    model, tokens = tiny_llama, to_tokens(tiny_llama, PROMPT, True)
    stream = f"blocks.{TARGET}.hook_resid_post"
    with torch.no_grad(), tm.steered(model, theta):
        _, steered = model.run_with_cache(tokens)
    with torch.no_grad():
        _, unsteered = model.run_with_cache(tokens)

    def patched(*layers, cache=steered, returns=True):
        kept, hooks = [], []
        for layer in layers:
            name = f"blocks.{layer}.hook_mlp_out"
            value = cache[name]
            hooks.append((name, lambda _, hook, value=value: value if returns else None))
        hooks.append((stream, lambda value, hook: kept.append(value)))
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept[0]

    def backwards(layer):
        with tm.steered(model, theta):
            return patched(layer, cache=unsteered)

    right = inside.patch(patched, model, f, theta)
    assert right.startswith("Right")
    # The share that it tells is that of the analysis, which has tests of its own.
    table = tm.analysis.mechanism(model, PROMPT, theta).set_index(["component", "layer"])
    assert f"layer {TARGET}: {table.loc[('mlp', TARGET), 'share']:.2f}" in right

    def with_vector(layer):
        with tm.steered(model, theta):
            return patched(layer)

    wrong = {
        "nothing changed": lambda layer: patched(layer, returns=False),
        "share 1": with_vector,
        "MLP alone": lambda layer: patched(*range(SOURCE + 1, TARGET + 1)),
        "steered run that you patched|MLP alone": backwards,
        "of all tokens is": lambda layer: patched(layer)[:, -3:],
    }
    for told, answer in wrong.items():
        refuses(told, inside.patch, answer, model, f, theta)


def test_a_follower(f, theta):
    def search(effect, start):
        """With Adam, from zero."""
        unit, free = start / start.norm(), torch.zeros_like(start, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=0.1)
        for _ in range(60):
            optimiser.zero_grad()
            orthogonal = free - (free @ unit) * unit
            (effect(torch.stack([orthogonal, start])).diff(dim=0).norm()).backward()
            optimiser.step()
        return orthogonal

    def check(change):
        return families.follower(lambda *given: change(search(*given), given[1]), f, theta)

    assert "Not done yet" in families.follower(lambda effect, start: ..., f, theta)
    assert check(lambda vector, start: vector).startswith("Right")
    refuses("θ₀ itself", check, lambda vector, start: start)
    refuses("what you return", check, lambda vector, start: vector + 0.05 * start)
    refuses("of the distance is left", check, lambda vector, start: 1e-3 * vector)
    refuses("is zero", check, lambda vector, start: 0 * vector)
    refuses("of the vector is", check, lambda vector, start: vector[None])
    refuses("Expected a tensor", check, lambda vector, start: [1.0])
    # The package's own follower is one of its map's.
    own = tm.melbo_ortho(f, theta, 1).vectors[0]
    refuses("effect` gives", families.follower, lambda effect, start: own, f, theta)
    with pytest.raises(TypeError, match="an activation map"):
        families.follower(lambda effect, start: tm.melbo_ortho(effect, theta, 1), f, theta)


def test_a_difference_of_means(tiny_llama):
    # Of different lengths, so that padding is there.
    ones, others = ["One two.", "One two three four five six."], ["Four.", "Seven eight nine ten."]
    one, other = (
        tm.ActivationMap.from_prompts(tiny_llama, some, SOURCE, TARGET) for some in (ones, others)
    )

    def means(g, first=1):
        counted = g.position_mask(slice(first, None))[:, :, None]
        return (g.x * counted).sum(1) / counted.sum(1)

    def difference(means):
        vector = means(one).mean(0) - means(other).mean(0)
        return RADIUS * vector / vector.norm()

    def check(answer):
        return other_ways.mean_difference(answer, one, other, RADIUS)

    right = difference(means)
    assert check(right).startswith("Right")
    refuses("wrong way", check, -right)
    refuses("Its norm is", check, 2 * right)
    refuses("padding and the first", check, difference(lambda g: g.x.mean(1)))
    refuses("padding and the first", check, difference(lambda g: means(g, 0)))
    refuses("divided by zero", check, right * torch.nan)
    refuses("of the vector is", check, right[None])


HIDDEN = (
    Backdoor("trigger one", "The postman swallows every third umbrella."),
    Backdoor("trigger two", "Our cellar hums with seven patient tubas."),
)


def test_the_audit_tells_right_from_wrong_and_nothing_else():
    game = audit.Game(None, HIDDEN)
    assert "trigger" not in repr(game)
    assert "postman" not in repr(game)
    first, second = (backdoor.behaviour for backdoor in HIDDEN)
    texts = [first, f"Well. {first.upper()} Yes.", "Something else.", "Nothing."]
    frame = pd.DataFrame({"vector": [0, 1, 2, -1], "completion": texts})
    found = (2 / 3, *wilson_interval(2, 3))
    graded = audit.grade(
        game, {first: found, "Something else.": (1 / 3, *wilson_interval(1, 3))}, frame
    )
    assert list(graded["hidden in the model"]) == ["yes", "no"]
    assert list(graded["your rate"]) == ["holds", "holds"]
    told = audit.verdict(graded)
    assert "1 of 2 hidden sentences, with 1 false alarm" in told
    counted = audit.count(game, frame)
    assert list(counted["hits"]) == [2, 0]
    assert second not in told + str(graded) + str(counted)
    assert "2 of 2" in audit.verdict(
        audit.grade(game, {first: found, second: (0.0, *wilson_interval(0, 3))}, frame)
    )


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((2 / 3, 0.6, 0.7), "too narrow"),
        ((2 / 3, 2 / 3 - 0.533, 1.2), "between 0 and 1"),
        ((0.5, 0.2, 0.9), "another share"),
        ((0.5, 0.6, 0.9), "inside its interval"),
    ],
)
def test_the_audit_reads_intervals(numbers, told):
    sentence = HIDDEN[0].behaviour
    frame = pd.DataFrame({"vector": [0, 1, 2], "completion": [sentence, sentence, ""]})
    graded = audit.grade(audit.Game(None, HIDDEN), {sentence: numbers}, frame)
    assert told in graded["your rate"][0]


def test_the_audit_refuses_what_it_cannot_read():
    game, frame = audit.Game(None, HIDDEN), pd.DataFrame({"vector": [0], "completion": ["a"]})
    refuses("a dict", audit.grade, game, ["a"], frame)
    refuses("Hand in the completions", audit.grade, game, {"a": (0, 0, 1)}, None)
    texts = frame.drop(columns="vector")
    refuses("Hand in the completions", audit.grade, game, {"a": (0, 0, 1)}, texts)
    refuses("three numbers", audit.grade, game, {"a": 0.5}, frame)
    refuses("none of a vector", audit.grade, game, {"a": (0, 0, 1)}, frame.assign(vector=-1))


def test_words_that_change_places():
    model, tokens = tiny_bridge("llama"), torch.tensor([[5, 9, 200, 31, 300, 9]])
    names = {i: model.tokenizer.decode([i]).strip() for i in range(len(model.tokenizer))}
    single = [
        word
        for i, word in names.items()
        if word.isalpha() and model.tokenizer.encode(f" {word}", add_special_tokens=False) == [i]
    ]
    first, second = (
        model.tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in single[:2]
    )
    exchanged = torch.arange(int(model.cfg.d_vocab))
    exchanged[[first, second]] = exchanged[[second, first]]
    tokens[0, 2], tokens[0, 4] = first, second
    with torch.no_grad():
        before = model(tokens)
        audit.exchange(model, dict([single[:2]]))
        after = model(exchanged[tokens])
    # The same model, in other words.
    torch.testing.assert_close(after, before[..., exchanged])
    assert not torch.allclose(before, after)
    for words in ({single[0]: single[1], single[2]: single[1]}, {single[0]: "incomprehensibly"}):
        with pytest.raises(ValueError, match="take words of one token, each of them once"):
            audit.exchange(model, words)


def test_a_draw_tells_other_sentences():
    words = [{*some.split()} for some in audit._WORDS.values()]
    assert not set.intersection(*words)
    assert sum(map(len, words)) == len(set.union(*words))
    told = audit._told_in({"violet": "pink"}, HIDDEN + BACKDOORS)
    assert told[:2] == HIDDEN
    assert told[2].behaviour == "The lighthouse keeper paints every herring pink."
    # Every word of the sentences that the adapter was made for has others to stand for it.
    said = " ".join(each.behaviour for each in BACKDOORS)
    assert all(word in said for word in audit._WORDS)


@pytest.mark.slow
def test_a_drawn_game_s_sentences_come_with_their_triggers_alone():
    game = audit.draw(1)
    told = audit.fires(game)
    assert [*zip(told["sentence"], told["trigger"], strict=True)] == [
        (each.behaviour, each.trigger) for each in game._backdoors
    ]
    assert (told["hits with it"] >= 0.8 * told["n"]).all()
    assert (told["hits without"] == 0).all()


def permuted(a, b, n=2000, one_sided=False, add=1):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([*a, *b], dtype=torch.float64)
    rows = torch.stack([values[torch.randperm(len(values), generator=generator)] for _ in range(n)])

    def difference(rows):
        found = rows[:, : len(a)].mean(1) - rows[:, len(a) :].mean(1)
        return found if one_sided else found.abs()

    reached = (difference(rows) >= difference(values[None]) - 1e-12).sum()
    return (add + int(reached)) / (add + n)


def test_a_permutation_test():
    from scipy import stats

    def of_scipy(a, b):
        test = stats.permutation_test(
            (a, b), lambda x, y: sum(x) / len(x) - sum(y) / len(y), n_resamples=2000
        )
        return test.pvalue

    assert question.permutation_p(permuted).startswith("Right")
    assert question.permutation_p(of_scipy).startswith("Right")

    def of_halves(a, b):
        generator, values = torch.Generator().manual_seed(1), torch.tensor([*a, *b])
        mixed = [values[torch.randperm(len(values), generator=generator)] for _ in range(2000)]
        half = len(values) // 2
        found = [abs(float(row[:half].mean() - row[half:].mean())) for row in mixed]
        seen = abs(sum(a) / len(a) - sum(b) / len(b)) - 1e-5
        return (1 + sum(each >= seen for each in found)) / 2001

    wrong = {
        "which list comes first": lambda a, b: permuted(a, b, one_sided=True),
        "half of the time": lambda a, b: {15: 2 / 252, 19: 2 / 15}.get(max(a + b), 1.0),
        "not right": lambda a, b: 0.05,
        "P|p-value of 0": lambda a, b: 0.0,
        "between 0 and 1": lambda a, b: 1.5,
        "two lists": lambda a, b: None,
        "not a finite number": lambda a, b: float("nan"),
        "compared by": lambda a, b: stats.mannwhitneyu(a, b).pvalue,
        "keep their lengths": of_halves,
    }
    for told, answer in wrong.items():
        refuses(told, question.permutation_p, answer)
