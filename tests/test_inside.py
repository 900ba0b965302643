"""What a vector does inside: against TransformerLens's own hooks, one run for each number."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.conftest import PROMPT
from tests.reference import inside as slow
from tl_melbo.analysis import effect_by_layer, mechanism, token_divergence, top_tokens
from tl_melbo.analysis._top_tokens import top_tokens_and_kl

SOURCE, TARGET = 1, 4


@pytest.fixture(scope="module")
def found():
    theta = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return tm.SteeringVectors(theta, {"source_layer": SOURCE, "target_layer": TARGET})


@pytest.mark.boundary
def test_top_tokens_are_those_whose_log_probability_changes_most(tiny, found, unchanged):
    unchanged(tiny)
    frame = top_tokens(tiny, PROMPT, found, 4, least_probability=0)
    tokens = tiny.to_tokens(PROMPT)
    _, before = slow.run(tiny, tokens, [], TARGET)
    before = before[-1].log_softmax(-1)
    assert len(frame) == 3 * 2 * 4
    for vector, theta in enumerate(found.vectors):
        _, after = slow.run(tiny, tokens, slow.hooks_of(theta, SOURCE), TARGET)
        after = after[-1].log_softmax(-1)
        change = after - before
        for direction, descending in (("promoted", True), ("suppressed", False)):
            rows = frame[(frame["vector"] == vector) & (frame["direction"] == direction)]
            assert rows["rank"].tolist() == [1, 2, 3, 4]
            expected = change.sort(descending=descending)
            np.testing.assert_allclose(rows["log_prob_change"], expected.values[:4], atol=1e-4)
            numbers = rows["token_id"].tolist()
            np.testing.assert_allclose(change[numbers], expected.values[:4], atol=1e-4)
            np.testing.assert_allclose(rows["probability"], after[numbers].exp(), atol=1e-5)
            np.testing.assert_allclose(
                rows["unsteered_probability"], before[numbers].exp(), atol=1e-5
            )


@pytest.mark.boundary
def test_the_lens_is_the_final_norm_and_unembedding_of_each_layer(tiny, found, unchanged):
    unchanged(tiny)
    frame = top_tokens(tiny, PROMPT, found, 3, by_layer=True, least_probability=0)
    tokens, theta = tiny.to_tokens(PROMPT), found.vectors[1]
    assert set(frame["layer"]) == {*range(SOURCE, 6)}
    for layer in (SOURCE, 3, 5):
        logs = []
        for hooks in ([], slow.hooks_of(theta, SOURCE)):
            stream, _ = slow.run(tiny, tokens, hooks, layer)
            with torch.no_grad():
                logits = tiny.unembed(tiny.ln_final(stream.float()[None]))[0, -1]
            logs.append(logits.double().log_softmax(-1))
        change = (logs[1] - logs[0]).sort(descending=True).values
        rows = frame[(frame["vector"] == 1) & (frame["layer"] == layer)]
        own = rows[rows["direction"] == "promoted"]["log_prob_change"]
        np.testing.assert_allclose(own, change[:3], atol=1e-3)
    last = frame[frame["layer"] == 5].drop(columns="layer").reset_index(drop=True)
    whole = top_tokens(tiny, PROMPT, found, 3, least_probability=0)
    assert last["token_id"].tolist() == whole["token_id"].tolist()
    np.testing.assert_allclose(last["log_prob_change"], whole["log_prob_change"], atol=1e-4)


def test_one_pass_gives_top_tokens_and_divergence(tiny_llama, found):
    options = {"layer": None, "chat": None, "batch_size": 2}
    frame, kl = top_tokens_and_kl(tiny_llama, PROMPT, found, 5, **options)
    pd.testing.assert_frame_equal(frame, top_tokens(tiny_llama, PROMPT, found, 5, batch_size=2))
    torch.testing.assert_close(kl, tm.analysis.kl_divergence(tiny_llama, PROMPT, found))


def test_rare_tokens_are_left_out_and_no_vector_changes_none(tiny_llama, found):
    frame = top_tokens(tiny_llama, PROMPT, found, 500, least_probability=0.05)
    likely = frame[["probability", "unsteered_probability"]].max(axis=1)
    assert likely.min() >= 0.05
    assert (frame["log_prob_change"] > 0).equals(frame["direction"] == "promoted")
    nothing = tm.SteeringVectors.from_tensor(torch.zeros(2, 32), source_layer=1)
    assert top_tokens(tiny_llama, PROMPT, nothing).empty
    assert top_tokens(tiny_llama, PROMPT, nothing, by_layer=True).empty


def test_a_model_that_does_more_after_its_unembedding_has_no_lens(tiny_llama, found):
    point = tiny_llama.unembed.register_forward_hook(
        lambda module, args, logits: logits * (1.0 if logits.shape[1] == 1 else 0.5)
    )
    try:
        with pytest.raises(ValueError, match="by_layer=True: the final norm and unembedding"):
            top_tokens(tiny_llama, PROMPT, found, by_layer=True)
    finally:
        point.remove()


def test_divergence_is_that_of_each_text_read_alone(tiny_llama, found, unchanged):
    unchanged(tiny_llama)
    some, prompts = found[:2], ["Hi!", PROMPT]
    written = tm.generate(tiny_llama, prompts, some, scales=[1.0, -2.0], max_new_tokens=4)
    both = pd.concat([tm.generate(tiny_llama, prompts, max_new_tokens=4), written])
    frame = token_divergence(tiny_llama, both, some, 3, batch_size=5)
    keys = ["vector", "scale", "prompt"]
    for row in written.to_dict("records"):
        own = frame[(frame[keys] == [row[key] for key in keys]).all(axis=1)]
        text = tiny_llama.tokenizer.encode(row["completion"], add_special_tokens=False)
        assert own["token_id"].tolist() == (text if row["completion"].strip() else [])
        assert own["position"].tolist() == [*range(len(own))]
        before = tiny_llama.to_tokens(row["prompt"])[0].tolist()
        steering = slow.hooks_of(row["scale"] * found.vectors[row["vector"]], SOURCE)
        p, q = (
            slow.run(tiny_llama, torch.tensor([before + text]), hooks, TARGET)[1].log_softmax(-1)
            for hooks in (steering, [])
        )
        for at, measured in enumerate(own.itertuples(), len(before) - 1):
            assert measured.kl == pytest.approx(slow.kl(p[at], q[at]), abs=1e-4)
            assert measured.log_prob == pytest.approx(float(p[at, measured.token_id]), abs=1e-4)
            expected = float(q[at, measured.token_id])
            assert measured.unsteered_log_prob == pytest.approx(expected, abs=1e-4)
            for told, logs in ((measured.top, p[at]), (measured.unsteered_top, q[at])):
                best = logs.exp().topk(3).values.tolist()
                assert [value for _, value in told] == pytest.approx(best, abs=1e-4)


def test_no_vector_diverges_nowhere(tiny_llama):
    nothing = tm.SteeringVectors.from_tensor(torch.zeros(1, 32), source_layer=1)
    written = tm.generate(tiny_llama, PROMPT, nothing, max_new_tokens=6)
    assert (token_divergence(tiny_llama, written, nothing)["kl"] == 0).all()


def test_samples_are_told_apart(tiny_llama, found):
    written = tm.generate(tiny_llama, PROMPT, found[0], max_new_tokens=3, n_samples=2)
    frame = token_divergence(tiny_llama, written, found[0])
    assert frame["sample"].nunique() == 3


def test_texts_that_were_read_back_as_missing_are_left_out(tiny_llama, found):
    written = tm.generate(tiny_llama, PROMPT, found[:2], max_new_tokens=3)
    written.loc[0, "completion"] = float("nan")
    assert {*token_divergence(tiny_llama, written, found[:2])["vector"]} == {1}


def test_formats_of_prompts_that_disagree_are_refused(tiny_llama, found):
    chat, raw = (replace(found, story={**found.story, "chat": chat}) for chat in (True, False))
    some = {"own": torch.ones(32), "found": chat}
    ours = effect_by_layer(tiny_llama, PROMPT, some, layer=1)
    theirs = effect_by_layer(tiny_llama, PROMPT, dict(reversed(some.items())), layer=1)
    sums = [frame.groupby("vectors")["effect"].sum().to_dict() for frame in (ours, theirs)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    with pytest.raises(ValueError, match="chat: the vectors were found with both; pass chat=True"):
        effect_by_layer(tiny_llama, PROMPT, {"a": chat, "b": raw})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": pd.DataFrame({"a": [1]})}, "completions: lacks the columns"),
        ({"vector": [-1]}, "completions: no text of a vector"),
        ({"completion": [" "]}, "completions: no text of a vector"),
        ({"vector": [7]}, r"completions: of vectors \[7\], but vectors holds 3"),
        ({"completion": ["a b " * 300]}, "completions: one has"),
        ({"n_top": 0}, "n_top=0"),
    ],
)
def test_divergence_refuses(tiny_llama, found, change, message):
    rows = {"vector": [0], "scale": [1.0], "prompt": ["Hi!"], "completion": ["a b"]}
    columns = {name: value for name, value in change.items() if name in rows}
    given = {"completions": pd.DataFrame(rows | columns), "vectors": found}
    given |= {name: value for name, value in change.items() if name not in rows}
    with pytest.raises(ValueError, match=message):
        token_divergence(tiny_llama, **given)


@pytest.mark.boundary
def test_components_carry_what_one_run_for_each_says(every_tiny, found, unchanged):
    unchanged(every_tiny)
    positions, one, target = slice(-2, None), found[2], 3
    # Batches of four: of heads and MLPs, and of two layers.
    options = {"positions": positions, "batch_size": 4}
    frame = mechanism(every_tiny, PROMPT, one, target, **options)
    assert len(frame) == 2 + 2 * (4 + 1)
    own = {(row.component, row.layer, row.head): (row.share, row.kl) for row in frame.itertuples()}
    tokens, theta = every_tiny.to_tokens(PROMPT), one.vectors[0]
    expected = slow.mechanism(every_tiny, tokens, theta, SOURCE, target, 4, positions)
    assert own.keys() == expected.keys()
    for place, pair in expected.items():
        assert own[place] == pytest.approx(pair, abs=1e-5, rel=1e-5), place
    assert set(mechanism(every_tiny, PROMPT, found[:2], batch_size=50)["vector"]) == {0, 1}


@pytest.mark.boundary
def test_it_works_on_a_hooked_transformer(hooked_and_bridge, found):
    frames = [mechanism(model, PROMPT, found[:1]) for model in hooked_and_bridge]
    np.testing.assert_allclose(frames[0][["share", "kl"]], frames[1][["share", "kl"]], atol=1e-4)
    pd.testing.assert_frame_equal(frames[0].iloc[:, :4], frames[1].iloc[:, :4])
    texts = [top_tokens(model, PROMPT, found, by_layer=True) for model in hooked_and_bridge]
    assert texts[0]["token"].tolist() == texts[1]["token"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer": 1}, "target_layer=1: the vectors are added after layer 1"),
        ({"target_layer": 9}, "target_layer=9"),
        ({"vectors": torch.ones(32), "layer": 1}, "target_layer: not given"),
        ({"vectors": torch.ones(32), "target_layer": 3}, "layer: not given"),
        ({"vectors": torch.zeros(32), "layer": 1, "target_layer": 3}, "one has no effect"),
        ({"positions": slice(90, None)}, "positions=slice"),
    ],
)
def test_mechanism_refuses(tiny_llama, found, change, message):
    with pytest.raises(ValueError, match=message):
        mechanism(tiny_llama, **{"prompt": PROMPT, "vectors": found, **change})


@pytest.mark.boundary
def test_effects_by_layer_are_those_of_two_runs(tiny_llama, found, unchanged):
    unchanged(tiny_llama)
    short = 0.5 * found[:1]
    frame = effect_by_layer(tiny_llama, PROMPT, {"found": found, "short": short})
    assert frame.groupby("vectors").size().to_dict() == {"found": 3 * 5, "short": 5}
    tokens = tiny_llama.to_tokens(PROMPT)
    for row in frame[(frame["vector"] == 0) & (frame["layer"] % 2 == 1)].itertuples():
        theta = {"found": found, "short": short}[row.vectors].vectors[0]
        after, _ = slow.run(tiny_llama, tokens, slow.hooks_of(theta, SOURCE), row.layer)
        before, _ = slow.run(tiny_llama, tokens, [], row.layer)
        expected = (after - before)[-3:].norm(dim=-1).mean()
        assert row.effect == pytest.approx(float(expected), rel=1e-3)
        assert row.norm == pytest.approx(float(theta.norm()))
    last = [effect_by_layer(tiny_llama, PROMPT, found, positions=slice(*each))["effect"]
            for each in ((-3, None), (None, -4, -1))]  # fmt: skip
    assert last[0].to_list() == pytest.approx(last[1].to_list())
    nothing = torch.zeros(2, 32)
    assert (effect_by_layer(tiny_llama, PROMPT, nothing, layer=1)["effect"] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": {}}, "vectors: none given"),
        ({"vectors": {"a": torch.ones(31)}, "layer": 1}, "31 wide"),
        ({"vectors": {"a": torch.ones(32)}}, "layer: not given"),
        ({"positions": slice(90, None)}, "none of the prompt's"),
    ],
)
def test_effect_by_layer_refuses(tiny_llama, found, change, message):
    with pytest.raises(ValueError, match=message):
        effect_by_layer(tiny_llama, **{"prompt": PROMPT, "vectors": found, **change})
