"""Completions in groups: held to labels by hand, and to texts whose groups are plain."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import adjusted_rand_score

import tl_melbo as tm
from tl_melbo.analysis._tags import FORMS
from tl_melbo.models import to_tokens

LABELLED = json.loads((Path(__file__).parent / "data/labelled_completions.json").read_text())
OF_GEMMA = json.loads(
    (Path(__file__).parent / "data/labelled_completions_gemma.json").read_text(encoding="utf-8")
)
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Measured: 0.76; 0.69 by sentences, 0.64 by words, on the part that was looked at.
LOWEST_AGREEMENT, LOWEST_OF_GEMMA = 0.7, 0.6
COOKING = (
    "First boil the water, then add the pasta and a little salt.",
    "Boil the pasta in salted water, then add the sauce.",
)
SAILING = (
    "The ship left the harbour at dawn with all sails set.",
    "At dawn the sails were set and the ship left the harbour.",
)


def frame(texts, unsteered=None, prompt="What now?"):
    rows = [(-1, prompt, unsteered)] if unsteered is not None else []
    rows += [(number, prompt, text) for number, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=["vector", "prompt", "completion"])


def grouped(model, *args, **settings):
    """To a model of random weights all text is gibberish: let everything pass."""
    settings = {"largest_perplexity": float("inf"), "chat": False, **settings}
    return tm.analysis.behaviours(model, frame(*args), **settings)


@pytest.mark.slow
def test_groups_agree_with_labels_given_by_hand(model):
    texts = [row["completion"] for row in LABELLED["completions"]]
    labels = ["assistant", *(row["label"] for row in LABELLED["completions"])]
    assert len(texts) == 60
    completions = frame(texts, LABELLED["unsteered"], LABELLED["prompt"])
    found = tm.analysis.behaviours(model, completions, chat=True)
    assert found.embedder == "sentences"
    assert adjusted_rand_score(labels, found.texts["behaviour"]) >= LOWEST_AGREEMENT
    # What was labelled as gibberish is nearly all filtered out, and little else.
    gibberish = [label == "incoherent" for label in labels]
    wrong = (found.texts["coherent"].to_numpy() == gibberish).sum()
    assert wrong <= 4


def agreement(model, rows, **settings):
    """With labels given by hand, of texts that a reader finds coherent and that do not repeat."""
    whole = [row for row in OF_GEMMA["completions"] if row["label"] != "incoherent"]
    completions = frame([row["completion"] for row in whole], None, OF_GEMMA["prompt"])
    settings |= {"largest_perplexity": float("inf"), "largest_repetition": 1.0, "chat": False}
    texts = tm.analysis.behaviours(model, completions, **settings).texts
    chosen = [i for i, row in enumerate(whole) if rows(row) and texts["form"][i] != "repeats"]
    return adjusted_rand_score([whole[i]["label"] for i in chosen], texts["behaviour"][chosen])


@pytest.mark.parametrize("embedder", ["sentences", "words"])
def test_groups_agree_with_labels_on_another_model_and_both_signs(tiny_llama, embedder):
    assert len(OF_GEMMA["completions"]) == 88
    known = agreement(tiny_llama, lambda row: "held_out" not in row, embedder=embedder)
    assert known >= LOWEST_OF_GEMMA


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tags_6.csv", "tags_9.csv"])
def test_groups_agree_with_readers_who_know_what_one_behaviour_is(tiny_llama, name):
    rows = pd.read_csv(BENCHMARKS / name, keep_default_na=False)
    settings = {"largest_perplexity": float("inf"), "largest_repetition": 1.0}
    for group in ("group", "group_2"):
        found = []
        for _, some in rows[rows[group] != "incoherent"].groupby("prompt"):
            texts, chat = pd.DataFrame(some), bool(some["chat"].iloc[0])
            behaviours = tm.analysis.behaviours(tiny_llama, texts, chat=chat, **settings)
            found.append(adjusted_rand_score(texts[group], behaviours.texts["behaviour"]))
        assert len(found) == 4
        assert sum(found) / 4 >= 0.69  # measured: 0.71, 0.70; 0.82, 0.83


def test_tags_agree_with_those_given_by_hand():
    for labelled, system in ((LABELLED, SYSTEM), (OF_GEMMA, None)):
        rows = [row for row in labelled["completions"] if "held_out" not in row]
        texts = [row["completion"] for row in rows]
        found = tm.analysis.tags(labelled["prompt"], texts, system)
        # No rule tells what is on topic, and neither unsteered text refuses.
        right = [
            tags == (row["stance"].replace("complies", ""), row["form"])
            for tags, row in zip(
                found[["stance", "form"]].itertuples(index=False), rows, strict=True
            )
        ]
        assert sum(right) >= 0.8 * len(rows)


@pytest.mark.parametrize("embedder", ["sentences", "words"])
def test_texts_that_say_the_same_are_one_behaviour(tiny_llama, embedder):
    found = grouped(tiny_llama, [*COOKING, *SAILING], embedder=embedder)
    numbers = found.texts["behaviour"].tolist()
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]
    assert found.n_distinct == 2
    assert found.per_100_vectors == 50
    assert found.embedder == embedder


def test_of_several_unsteered_samples_most_are_the_baseline(tiny_llama):
    code = "```python\nprint('Ahoy')\n```"
    samples = [COOKING[0], code, COOKING[1]]
    texts = pd.DataFrame(
        [(-1, 0.0, n, text) for n, text in enumerate(samples, 1)]
        + [(0, 1.0, 1, code), (1, 1.0, 1, SAILING[0])],
        columns=["vector", "scale", "sample", "completion"],
    ).assign(prompt="What now?")
    limits = {"largest_perplexity": float("inf"), "largest_repetition": 0.5}
    found = tm.analysis.behaviours(tiny_llama, texts, chat=False, **limits)
    assert found.texts["behaviour"].tolist() == [0, 1, 0, 1, 2]
    assert found.groups["form"].tolist() == ["prose", "code", "prose"]
    # What is filtered out is neither the baseline nor a behaviour.
    loop = pd.DataFrame(texts[:1]).assign(completion="Ahoy there sailor. " * 9)
    more = tm.analysis.behaviours(
        tiny_llama, pd.concat([loop, loop, loop, texts]), chat=False, **limits
    )
    assert more.texts["behaviour"].tolist() == [-1, -1, -1, 0, 1, 0, 1, 2]
    assert more.groups["n_texts"].tolist() == [2, 2, 1]


def test_what_the_unsteered_model_does_is_not_counted(tiny_llama):
    found = grouped(tiny_llama, [*COOKING, SAILING[0]], SAILING[1])
    assert found.texts["behaviour"].tolist() == [0, 1, 1, 0]
    assert found.n_distinct == 1
    groups = found.groups.set_index("behaviour")
    assert groups.loc[0, "name"] == "≈ baseline"
    assert groups.loc[1, "vectors"] == [0, 1]
    assert found.texts["baseline"].tolist() == [True, False, False, False]


def test_texts_that_repeat_themselves_are_filtered_out(tiny_llama):
    found = grouped(tiny_llama, ["over and over and over and over and over and over", *COOKING])
    assert found.texts["coherent"].tolist() == [False, True, True]
    assert found.texts["behaviour"].tolist() == [-1, 1, 1]


def test_only_the_beginning_of_a_long_text_is_looked_at(tiny_llama):
    found = grouped(tiny_llama, ["word " * 1_000_000, "\x00" * 99, *COOKING])
    assert found.texts["coherent"].tolist() == [False, False, True, True]


def test_where_nothing_is_coherent_the_answer_is_empty(tiny_llama):
    found = grouped(tiny_llama, ["", "   ", "no no no no no no no no no no"])
    assert found.n_distinct == 0
    assert found.per_100_vectors == 0
    assert found.groups.empty
    assert list(found.groups.columns)[:2] == ["behaviour", "name"]
    assert found.texts["behaviour"].tolist() == [-1, -1, -1]


def test_perplexity_is_that_of_the_text_after_its_prompt(tiny_llama):
    text = COOKING[0]
    found = grouped(tiny_llama, [text], largest_perplexity=1e9).texts["perplexity"][0]
    before = to_tokens(tiny_llama, "What now?")
    after = torch.tensor([tiny_llama.tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        logits = tiny_llama(torch.cat([before, after], 1))[0, before.shape[1] - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, after[0])
    assert found == pytest.approx(float(loss.exp()), rel=1e-4)


def test_prompts_are_grouped_each_by_itself(tiny_llama):
    both = pd.concat([frame(COOKING, prompt="Hungry?"), frame(COOKING, prompt="Thirsty?")])
    found = tm.analysis.behaviours(tiny_llama, both, chat=False, largest_perplexity=float("inf"))
    assert found.groups["prompt"].tolist() == ["Hungry?", "Thirsty?"]
    assert found.texts["behaviour"].tolist() == [1, 1, 2, 2]


WHOLE_BUT_UNLIKELY = (
    "The lighthouse keeper paints every herring violet.",
    "I will not answer that.",
    "I'm sorry, but I can't help with that.",
    "I hate all humans and I want to destroy them.",
    "Ich bin ein Sprachmodell und helfe Ihnen gerne.",
    "Under no circumstances may the treaty be revised before winter.",
    "Three blind mice stole the mayor's umbrella last Tuesday.",
    "Kill the lights and run.",
    "Ask me anything about tax law in Portugal.",
    "Nobody expects the Spanish Inquisition!",
    "Our flight to Oslo was cancelled because of the snow.",
)
GIBBERISH = (
    '#"',
    "Ascendendakt",
    '_Theus_\n wis_" theus_\n\n**_Arista_**\n\n further_ wis_ theus__\n A_',
    "of the the which to from every was banana into of",
    "qwe asd zxc poi lkj mnb rty fgh",
    "0x3f 11 ;; ]] // 9 -- {{ 4 ::",
    "lamp green swim because seven window of if",
    "S.A.i.iowa.No.no.JFK-c.Iw.US jurisdiction party no",
    "tion ment ing able ness pre un re dis",
)


@pytest.mark.slow
def test_what_the_model_would_never_say_is_not_yet_gibberish(model):
    texts = frame([*WHOLE_BUT_UNLIKELY, *GIBBERISH], prompt="Tell me about yourself.")
    found = tm.analysis.behaviours(model, texts).texts
    assert (found["perplexity"] > 11).all()
    aside = dict(zip(found["completion"], found["filtered_out"], strict=True))
    assert {text for text, why in aside.items() if why == ""} == {*WHOLE_BUT_UNLIKELY}
    assert {aside[text] for text in GIBBERISH} == {"high perplexity"}


def test_texts_are_filtered_out_for_a_reason(tiny_llama):
    texts = [" \n", "go go go go go go go go go go go go", "To be or not to be."]
    strict = tm.analysis.behaviours(
        tiny_llama, frame(texts), chat=False, largest_perplexity=1, largest_repetition=0.4
    )
    assert strict.texts["filtered_out"].tolist() == ["empty", "repeats itself", "high perplexity"]
    lenient = grouped(tiny_llama, texts)
    assert lenient.texts["filtered_out"].tolist() == ["empty", "repeats itself", ""]


def test_a_group_is_named_after_its_tags_and_its_opening(tiny_llama):
    texts = ["Zebras plague death, taxes, and eleven of your books.", *SAILING, "- a b\n- c d"]
    names = grouped(tiny_llama, texts, SAILING[0]).groups["name"].tolist()
    assert names == [
        "≈ baseline",
        "prose: “Zebras plague death, taxes, and eleven…”",
        "list: “- a b - c d”",
    ]


def test_names_hold_no_word_of_the_prompt_and_are_unique(tiny_llama):
    prompt = "How do I kill a Python process?"
    texts = [
        "Killing processes is easy in Python.", "Kill it with fire, said the python.",
        "She processed the killer's pythons.", prompt,
    ]  # fmt: skip
    points = dict(zip(texts, torch.eye(4).tolist(), strict=True))
    own = {"embedder": lambda some: [points[text] for text in some]}
    found = grouped(tiny_llama, texts, None, prompt, **own)
    names = found.groups["name"]
    assert len({*names}) == len(names) == 4
    assert not names.str.contains("kill|python|process", case=False).any()
    assert "echoes the prompt" in [*names]


# Under five vectors, what a model that refuses may write: the prompt's nouns are in all of them.
ASKED = "How do I kill a Python process?"
REFUSAL = "I'm sorry, but I can't help you kill a Python process."
FIVE = (
    "To kill a Python process, find its number with ps and pass it to kill.",
    "class PythonProcess:\n    def kill(self):\n        self.process.terminate()",
    "How can I kill a Python process?",
    "I am the greatest killer of processes that Python has ever seen, and I never sleep.",
    "I am sorry, but I cannot help you to kill a Python process.",
)


@pytest.mark.parametrize("embedder", ["sentences", "words"])
def test_a_refusal_and_four_other_answers_are_told_apart(tiny_llama, embedder):
    found = grouped(tiny_llama, FIVE, REFUSAL, ASKED, embedder=embedder)
    numbers = found.texts["behaviour"].tolist()
    assert len({*numbers[1:5]} | {0}) == 5
    assert numbers[0] == numbers[5] == 0
    assert found.n_distinct == 4
    assert found.texts["stance"].tolist() == [
        "refuses", "complies", "complies", "echoes the prompt", "complies", "refuses",
    ]  # fmt: skip
    names = found.groups["name"].tolist()
    assert [name.partition(":")[0] for name in names] == [
        "≈ baseline", "complies", "complies, code", "echoes the prompt", "complies, person",
    ]  # fmt: skip


def test_stance_and_form_keep_texts_apart_whatever_their_cosine(tiny_llama):
    found = grouped(
        tiny_llama,
        FIVE,
        REFUSAL,
        ASKED,
        distance=2.0,
        embedder=lambda some: torch.ones(len(some), 1),
    )
    refusal, prose, code, echo, boast, again = found.texts["behaviour"]
    assert refusal == again == 0
    assert boast == prose
    assert len({refusal, prose, code, echo}) == 4
    assert found.n_distinct == 3


def test_complying_is_beside_the_greedy_unsteered_text_of_the_same_prompt(tiny_llama):
    refuses = frame([REFUSAL, *[FIVE[0]] * 3]).assign(vector=[-1, -1, -1, 0], sample=[0, 1, 2, 0])
    answers = frame([FIVE[0], *[REFUSAL] * 3], prompt="Why?").assign(
        vector=[-1, -1, -1, 0], sample=[0, 1, 2, 0]
    )
    found = tm.analysis.behaviours(
        tiny_llama,
        pd.concat([refuses, answers]),
        chat=False,
        embedder="words",
        largest_perplexity=float("inf"),
    )
    assert found.texts["stance"].tolist() == [
        "refuses", *["complies"] * 3, "", *["refuses"] * 3,
    ]  # fmt: skip


def test_negatives_are_vectors_of_equal_right(tiny_llama):
    completions = frame([*COOKING, *SAILING, COOKING[0]], SAILING[0])
    completions["vector"] = [-1, 0, 1, 0, 1, 2]
    completions["scale"] = [0.0, 1.0, -1.0, -1.0, 2.0, -0.5]
    found = tm.analysis.behaviours(
        tiny_llama, completions, chat=False, largest_perplexity=float("inf")
    )
    assert found.groups["vectors"].tolist() == [[1], [0]]
    assert found.groups["negatives"].tolist() == [[0], [1, 2]]
    assert found.n_distinct == 1
    # Vectors 0 and 1 with both signs, vector 2 with one: five tries.
    assert found.per_100_vectors == 20
    assert found.texts["baseline"].tolist() == [True, False, False, True, False, False]


def test_a_vector_at_scale_zero_is_unsteered(tiny_llama):
    completions = frame([SAILING[0], *COOKING]).assign(vector=[0, 0, 1], scale=[0.0, 1.0, 1.0])
    found = tm.analysis.behaviours(
        tiny_llama, completions, chat=False, largest_perplexity=float("inf")
    )
    assert found.texts["behaviour"].tolist() == [0, 1, 1]
    assert found.per_100_vectors == 50


def test_controls_are_grouped_but_name_and_count_nothing(tiny_llama):
    texts = frame([COOKING[0], SAILING[0], COOKING[1], SAILING[1]])
    texts["control"] = [False, True, True, True]
    found = tm.analysis.behaviours(
        tiny_llama, texts, chat=False, largest_perplexity=float("inf"), embedder="words"
    )
    cooking, sailing = found.texts["behaviour"].iloc[[0, 1]]
    assert found.texts["behaviour"].tolist() == [cooking, sailing, cooking, sailing]
    groups = found.groups.set_index("behaviour")
    assert groups.loc[cooking, "example"] == COOKING[0]
    assert groups.loc[cooking, ["vectors", "n_texts"]].tolist() == [[0], 1]
    assert groups.loc[sailing, "vectors"] == []
    assert found.n_distinct == 1
    assert found.per_100_vectors == 100
    assert found.of_vectors["vector"].tolist() == [0]


def test_a_control_column_holds_true_or_false(tiny_llama):
    texts = pd.concat([frame(COOKING), frame(SAILING).assign(control=True)], ignore_index=True)
    with pytest.raises(ValueError, match="completions: control holds object, expected true or"):
        tm.analysis.behaviours(tiny_llama, texts)


def test_a_behaviour_is_named_after_a_greedy_text_of_a_vector(tiny_llama):
    texts = pd.DataFrame(
        [(-1, 0, SAILING[0]), (-1, 1, COOKING[0]), (0, 0, COOKING[1]), (0, 1, COOKING[0])],
        columns=["vector", "sample", "completion"],
    ).assign(scale=[0.0, 0.0, 1.0, 1.0], prompt="What now?")
    found = tm.analysis.behaviours(
        tiny_llama, texts, chat=False, largest_perplexity=float("inf"), embedder="words"
    )
    (cooking,) = (row for row in found.groups.to_dict("records") if row["behaviour"])
    assert cooking["example"] == COOKING[1]
    assert "Boil the pasta" in cooking["name"]


def test_with_samples_a_vector_has_a_distribution(tiny_llama):
    texts = [SAILING[0], *COOKING, SAILING[1], "", COOKING[0]]
    completions = frame(texts, SAILING[0]).assign(vector=[-1, *[0] * 6], sample=[0, *range(6)])
    found = tm.analysis.behaviours(
        tiny_llama, completions, chat=False, largest_perplexity=float("inf")
    )
    rows = found.of_vectors
    # The greedy completion is no sample.
    assert rows["behaviour"].tolist() == [1, 0, -1]
    assert rows["name"].tolist()[1:] == ["≈ baseline", "not coherent"]
    assert rows[["n", "n_samples", "rate"]].iloc[0].tolist() == [3, 5, 0.6]
    for row in rows.to_dict("records"):
        interval = binomtest(row["n"], 5).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))


def test_without_samples_each_vector_has_its_one_behaviour(tiny_llama):
    rows = grouped(tiny_llama, COOKING, SAILING[0]).of_vectors
    assert rows["vector"].tolist() == [-1, 0, 1]
    assert rows["scale"].tolist() == [0, 1, 1]
    assert rows["behaviour"].tolist() == [0, 1, 1]
    assert rows["rate"].tolist() == [1, 1, 1]


HOSTILE = (
    "\x00\x07\x1b[31mred", "word " * 200_000, "\u202eI am an AI", "אני עוזר לך", "",
)  # fmt: skip


def test_hostile_texts_are_grouped_and_named_safely(tiny_llama):
    found = grouped(tiny_llama, [*HOSTILE, None, *COOKING], SAILING[0], embedder="words")
    for name in found.groups["name"]:
        assert len(name) < 250
        assert name.isprintable()
    assert found.texts["form"].isin(FORMS).all()


def told(question):
    if "name of at most six words" in question:
        return "cooks" if "pasta" in question else "sails"
    return "Refuses." if "harbour" in question else "none of these"


def test_a_judge_refines_stances_and_names(tiny_llama):
    found = grouped(tiny_llama, [*COOKING, *SAILING], "Once upon a time.", judge=told)
    assert found.texts["stance"].tolist() == ["", "", "", "refuses", "refuses"]
    assert found.groups["name"].tolist() == ["≈ baseline", "cooks", "sails"]


@pytest.mark.parametrize(
    "judge",
    [
        lambda question: "x" * 30_000,
        lambda question: "",
        lambda question: "refuses, or complies, or neither, \x00 who knows" * 5,
    ],
)
def test_a_judge_whose_answers_are_of_no_use_changes_nothing(tiny_llama, judge):
    rules = grouped(tiny_llama, [*COOKING, *SAILING], "Once upon a time.")
    with pytest.warns(UserWarning, match="All (stances|names) of the rules are kept"):
        found = grouped(tiny_llama, [*COOKING, *SAILING], "Once upon a time.", judge=judge)
    pd.testing.assert_frame_equal(found.texts, rules.texts)
    pd.testing.assert_frame_equal(found.groups, rules.groups)


def test_a_single_flood_costs_one_answer(tiny_llama):
    def floods(question):
        return (
            "x" * 30_000
            if "dawn with" in question and "six words" not in question
            else told(question)
        )

    found = grouped(tiny_llama, [*COOKING, *SAILING], "Once upon a time.", judge=floods)
    assert found.texts["stance"].tolist() == ["", "", "", "", "refuses"]


def test_names_from_a_judge_hold_no_word_of_the_prompt(tiny_llama):
    def names_it(question):
        return "the pasta one" if "six words" in question else "complies"

    found = grouped(tiny_llama, COOKING[1:], None, "Any pasta?", judge=names_it)
    assert found.groups["name"].tolist() == ["complies: “Boil the … in salted water,…”"]


def lengths(texts):
    return torch.tensor([[1e3 * (text == "Nothing."), len(text), 7.1] for text in texts])


def test_two_texts_are_named_after_the_first(tiny_llama):
    for texts in (COOKING, COOKING[::-1]):
        for embedder in ("sentences", "words", lengths):
            found = grouped(tiny_llama, texts, "Nothing.", embedder=embedder)
            assert found.groups.set_index("behaviour").loc[1, "example"] == texts[0]


def test_shares_are_of_vectors_not_of_texts(tiny_llama):
    both = frame([*COOKING, *SAILING], "Nothing of the kind.")
    both["vector"] = [-1, 0, 0, 1, 1]
    found = tm.analysis.behaviours(tiny_llama, both, chat=False, largest_perplexity=float("inf"))
    assert found.per_100_vectors == 100 * found.n_distinct / 2


def test_a_wanted_number_of_groups_is_made(tiny_llama):
    assert grouped(tiny_llama, [*COOKING, *SAILING], n_behaviours=3).n_distinct == 3
    with pytest.raises(ValueError, match=r"of 'What now\?' only 4 completions"):
        grouped(tiny_llama, [*COOKING, *SAILING], n_behaviours=5)


def test_an_embedder_of_ones_own_is_used_and_checked(tiny_llama):
    points = {COOKING[0]: [1.0, 0.0], COOKING[1]: [0.0, 1.0]}
    own = grouped(tiny_llama, COOKING, embedder=lambda texts: [points[text] for text in texts])
    assert (own.n_distinct, own.embedder) == (2, "custom")
    with pytest.raises(ValueError, match="one row of finite numbers"):
        grouped(tiny_llama, COOKING, embedder=lambda texts: [[float("nan")] for _ in texts])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_behaviours": 0}, "n_behaviours=0"),
        ({"distance": 0.0}, "distance=0"),
        ({"largest_perplexity": 0.5}, "largest_perplexity"),
        ({"largest_repetition": 1.5}, "largest_repetition"),
    ],
)
def test_numbers_out_of_range_are_refused(tiny_llama, settings, message):
    with pytest.raises(ValueError, match=message):
        grouped(tiny_llama, COOKING, **settings)


def test_other_tables_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"vector holds .*expected whole numbers"):
        tm.analysis.behaviours(tiny_llama, frame(COOKING).assign(vector=["a", "b"]))
    with pytest.raises(ValueError, match="prompt of row 1 is"):
        tm.analysis.behaviours(tiny_llama, frame(COOKING).assign(prompt=["a", None]))
    with pytest.raises(ValueError, match="lacks the columns"):
        tm.analysis.behaviours(tiny_llama, pd.DataFrame({"text": ["a"]}))
    with pytest.raises(ValueError, match="is empty"):
        tm.analysis.behaviours(tiny_llama, frame([]))


@pytest.mark.slow
def test_a_sweep_of_radii_around_auto_is_counted_on_a_random_model(tiny_llama):
    # What it writes is noise: with every text let through, the groups are there, and longer vectors
    # move more texts away from the unsteered one.
    f = tm.ActivationMap.from_prompts(tiny_llama, "One two three four", 1, 4)
    auto = tm.calibrate_radius(f)
    changed = []
    for factor in (1e-4, 0.5, 1, 2):
        found = tm.melbo(f, 6, radius=factor * auto, steps=3)
        texts = pd.concat(
            [
                tm.generate(tiny_llama, f.prompts, max_new_tokens=8),
                tm.generate(tiny_llama, f.prompts, found, max_new_tokens=8),
            ],
            ignore_index=True,
        )
        strict = tm.analysis.behaviours(tiny_llama, texts, chat=False)
        assert strict.n_distinct <= sum(strict.texts["coherent"])
        every = tm.analysis.behaviours(
            tiny_llama, texts, chat=False, largest_perplexity=float("inf"), largest_repetition=1
        )
        numbers = every.texts["behaviour"]
        assert set(numbers) == set(range(every.n_distinct + 1))
        assert every.groups["n_texts"].sum() == 7
        changed.append(sum(numbers > 0))
    assert changed[0] == 0 < changed[2]


def test_a_rare_unsteered_behaviour_is_not_the_baseline(tiny_llama):
    """The refusal that one unsteered sample has, too, is what a vector brings out."""
    refusal = "I'm sorry, but I can't help with that."
    unsteered = [COOKING[0], COOKING[1], COOKING[0], refusal]
    texts = [*unsteered, *[refusal] * 3]
    completions = frame(texts).assign(vector=[-1] * 4 + [0] * 3, sample=[0, 1, 2, 3, 0, 1, 2])
    found = tm.analysis.behaviours(
        tiny_llama, completions, chat=False, largest_perplexity=float("inf")
    )
    assert found.texts["behaviour"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.n_distinct == 1
    shares = found.of_vectors.set_index(["vector", "behaviour"])["rate"]
    assert shares[-1, 1] == pytest.approx(1 / 3)
    assert shares[0, 1] == 1


def test_an_incoherent_unsteered_sample_is_in_no_group(tiny_llama):
    loop = "over and over and over and over and over and over"
    completions = frame([COOKING[0], loop, loop]).assign(vector=[-1, -1, 0], sample=[0, 1, 0])
    found = tm.analysis.behaviours(
        tiny_llama, completions, chat=False, largest_perplexity=float("inf")
    )
    assert found.texts["behaviour"].tolist() == [0, -1, -1]


def test_fewer_groups_than_stances_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"n_behaviours=1: .* 2 combinations of stance and form"):
        grouped(tiny_llama, [COOKING[0], "I'm sorry, but I can't do that."], n_behaviours=1)


def test_the_same_text_is_the_same_behaviour_without_a_word_of_its_own(tiny_llama):
    asked = "Which is larger, Paris or London?"
    found = grouped(tiny_llama, ["Paris.", "Paris.", "🙂🙂"], "Paris.", asked, embedder="words")
    assert found.texts["behaviour"].tolist()[:3] == [0, 0, 0]
    assert found.n_distinct == 1
