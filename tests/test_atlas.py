"""All pairs of layers: against the whole model with hooks, against single pairs, and on disk."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import tl_melbo as tm
from tests.reference import atlas as reference
from tests.test_activation_map import HonestFloat64
from tests.tiny_models import N_LAYERS, tiny_bridge
from tl_melbo.cli import app
from tl_melbo.evaluation import Atlas, atlas
from tl_melbo.fast_blocks import FastBlocks
from tl_melbo.model.bridge import without_bridge
from tl_melbo.plots import atlas_heatmap

PROMPTS = ["Tell me about yourself.", "What is that?", "Tell me about yourself, and of what it is."]
LAST_TWO = slice(-2, None)
QUICK = {"chat": False, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def small(tiny_llama):
    """Two vectors of a few pairs, after two prompts."""
    return atlas(tiny_llama, PROMPTS[:2], [0, 1, 3], [1, 3, 4], n_vectors=2, **QUICK)


def test_all_pairs_are_there(tiny_llama):
    options = {"kl_threshold": 900, "chat": False, "max_new_tokens": 1}
    table = atlas(tiny_llama, PROMPTS[1], **options).table
    pairs = [(s, t) for s in range(N_LAYERS) for t in range(s + 1, N_LAYERS)]
    rows = table[table["sign"].eq(1)]
    assert [*zip(rows["source_layer"], rows["target_layer"], strict=True)] == pairs
    assert len(table) == 2 * len(pairs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_singular_values_are_those_of_the_whole_model(architecture):
    model, options = tiny_bridge(architecture, torch.float64), {"kl_threshold": 900, **QUICK}
    last = slice(-1, None)
    with HonestFloat64():
        found = atlas(model, PROMPTS[:2], [0, 3], n_vectors=3, positions=last, **options)
    for source, target in ((0, 5), (3, 4)):
        with HonestFloat64():
            J = reference.jacobian(model, PROMPTS[:2], source, target, last)
        assert J.shape == (2 * 32, 32)
        _, values, right = torch.linalg.svd(J)
        shares = values**2 / values.square().sum()
        expected = {
            "singular_value": values[:3],
            "share": shares[:3],
            "cumulative_share": shares.cumsum(0)[:3],
        }
        pair = found.vectors(source, target)
        columns = {name: pair.columns[name] for name in expected}
        torch.testing.assert_close(columns, expected, rtol=1e-9, atol=0)
        units = pair.vectors.double() / pair.norms[:, None]
        assert ((units @ right[:3].T).diagonal().abs() > 1 - 1e-6).all()
        assert (units.gather(1, units.abs().argmax(1, keepdim=True)) > 0).all()


def test_derivatives_of_fast_blocks_are_those_of_finite_differences():
    """In float64, between blocks, at some positions of each."""
    model = tiny_bridge("llama", torch.float64)
    f = tm.ActivationMap.from_prompts(model, PROMPTS[0], 0, 4)
    fast = FastBlocks([without_bridge(block) for block in model.blocks[1:5]])
    rotation = fast.rotation(*f._groups[0].calls[0][1]["position_embeddings"])
    places, step = torch.tensor([1, 4]), 1e-5
    with torch.no_grad():
        kept = []
        fast.forward(f.x, rotation, None, kept)
        generator = torch.Generator().manual_seed(0)
        tangent = torch.randn(5, *f.x.shape[1:], generator=generator, dtype=torch.float64)
        found = [*fast.tangents(tangent, rotation, places, kept[1:])]
        everywhere = [*fast.tangents(tangent, rotation, None, kept[1:])]
        rest = FastBlocks.__new__(FastBlocks)
        rest.__dict__ = {**fast.__dict__, "blocks": fast.blocks[1:]}
        ends = []
        for sign in (1, -1):
            after = []
            rest.forward(kept[1].x + sign * step * tangent, rotation, None, after)
            ends.append([*(each.x for each in after[1:])])
            ends[-1].append(rest.forward(kept[1].x + sign * step * tangent, rotation, None, None))
    for some, whole, plus, minus in zip(found, everywhere, *ends, strict=True):
        difference = (plus - minus) / (2 * step)
        torch.testing.assert_close(whole, difference, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(some, whole[:, places], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [LAST_TWO, slice(None)])
def test_a_pair_is_what_jacobian_finds(tiny, positions):
    settings = {"n_vectors": 2, "positions": positions, "kl_threshold": 50}
    found = atlas(tiny, PROMPTS, [0, 2], [1, 3, 5], **settings, **QUICK)
    for source, target in ((0, 1), (0, 5), (2, 3)):
        f = tm.ActivationMap.from_prompts(tiny, PROMPTS, source, target)
        single = tm.jacobian(f, 2, radius=1.0, positions=positions)
        pair = found.vectors(source, target)
        expected = single.columns["singular_value"].double()
        torch.testing.assert_close(pair.columns["singular_value"], expected, rtol=1e-6, atol=0)
        cosines = tm.analysis.cosine_similarity(pair.vectors, single.vectors).diagonal()
        assert (cosines > 1 - 1e-5).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hooks_of_the_user_fire_and_dropout_does_not(architecture):
    model, args = tiny_bridge(architecture), ([PROMPTS[0]], [0, 1], [3])
    quick = {"kl_threshold": 900, "chat": False, "max_new_tokens": 1}
    plain = atlas(model, *args, **quick)
    calls = []
    hook = model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    model.train()
    hooked = atlas(model, *args, **quick)
    assert calls
    assert model.training
    hook.remove()
    double = model.blocks[2].register_forward_hook(lambda module, args, output: output * 2)
    other = atlas(model, *args, **quick)
    double.remove()
    for source in (0, 1):
        values = [
            float(each.vectors(source, 3).columns["singular_value"])
            for each in (plain, hooked, other)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        assert values[2] != pytest.approx(values[0], rel=1e-2)


def test_both_signs_are_tried_out_on_every_prompt(tiny_llama, small):
    table = small.table
    assert list(table.columns) == [
        "source_layer", "target_layer", "vector", "singular_value", "share", "cumulative_share",
        "norm", "prompt", "sign", "kl", "completion",
    ]  # fmt: skip
    # Five pairs with a later target, two vectors, two prompts, two signs.
    keys = ["source_layer", "target_layer", "vector", "prompt", "sign"]
    assert len(table) == len(table[keys].drop_duplicates()) == 6 * 2 * 2 * 2
    assert (
        small.libraries[0].story["unsteered"]
        == tm.generate(tiny_llama, PROMPTS[:2], **QUICK)["completion"].tolist()
    )
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS[:2], 1, 4)
    norm = 0.35 * float(f.x.norm(dim=-1)[f.mask].median())
    vectors = small.vectors(1, 4)
    assert vectors.norms.tolist() == pytest.approx([norm] * 2, rel=1e-5)
    for row in table[table["source_layer"].eq(1) & table["target_layer"].eq(4)].to_dict("records"):
        vector = vectors[row["vector"]] * row["sign"]
        kl = float(tm.analysis.kl_divergence(tiny_llama, row["prompt"], vector))
        assert row["kl"] == pytest.approx(kl, rel=1e-4)
        assert row["norm"] == pytest.approx(norm, rel=1e-5)
        if kl > 0.5:
            written = tm.generate(tiny_llama, row["prompt"], vector, **QUICK)
            assert row["completion"] == written["completion"][0]
        else:
            assert pd.isna(row["completion"])
    assert 0 < table["completion"].notna().sum() < len(table)
    assert (table["completion"].notna() == (table["kl"] > 0.5)).all()


def test_the_threshold_decides_what_is_written(tiny_llama):
    def written(threshold):
        options = {"kl_threshold": threshold, **QUICK}
        return atlas(tiny_llama, PROMPTS[0], [1], [3], **options).table["completion"].notna().all()

    assert written(0)
    assert not written(900)


def test_auto_calibrates_each_pair(tiny_llama):
    found = atlas(tiny_llama, PROMPTS[0], [1], [2, 4], radius="auto", **QUICK)
    for target in (2, 4):
        f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS[0], 1, target)
        norms = found.vectors(1, target).norms.tolist()
        assert norms == pytest.approx([tm.calibrate_radius(f)], rel=1e-6)


class Stopped(Exception):
    pass


def test_an_interrupted_atlas_goes_on(tiny_llama, tmp_path, unchanged):
    unchanged(tiny_llama)
    call = (tiny_llama, PROMPTS[:2])
    whole = atlas(*call, [0, 1, 3], [2, 4], **QUICK)
    counts = []

    def stop(found):
        if len(found.libraries) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        atlas(*call, [0, 1, 3], [2, 4], folder=tmp_path, on_source=stop, **QUICK)
    names = ["source-00.safetensors", "source-01.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    pd.testing.assert_frame_equal(
        Atlas.load(tmp_path).table, whole.table[whole.table["source_layer"] < 3]
    )
    before = {name: (tmp_path / name).read_bytes() for name in names}
    count = lambda *each: counts.append(each)  # noqa: E731
    found = atlas(*call, [0, 1, 3], [2, 4], folder=tmp_path, on_batch=count, **QUICK)
    pd.testing.assert_frame_equal(found.table, whole.table)
    # One block, 32 directions and two prompts were left.
    assert counts[-1] == (32 * 2, 32 * 2)
    assert before == {name: (tmp_path / name).read_bytes() for name in names}
    counts.clear()
    again = atlas(*call, [3], [2, 4], folder=tmp_path, on_batch=count, **QUICK)
    assert not counts
    pd.testing.assert_frame_equal(again.table, Atlas(dict([*whole.libraries.items()][2:])).table)


def test_the_model_is_as_it_was_after_an_exception(unchanged):
    model = tiny_bridge("gpt2")
    unchanged(model)

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        atlas(model, PROMPTS[0], [1], [3], on_batch=stop, **QUICK)


def test_another_atlas_is_refused(tiny_llama, tmp_path):
    call = {"sources": [1], "targets": [2, 3], "folder": tmp_path, **QUICK}
    atlas(tiny_llama, PROMPTS[0], **call)
    for settings, named in (
        ({"n_vectors": 2}, "vectors_per_pair=1"),
        ({"radius": 0.2}, "relative_radius=0.35"),
        ({"positions": LAST_TWO}, "positions="),
        ({"targets": [2, 4]}, "targets="),
        ({"kl_threshold": 0.1}, "kl_threshold=0.5"),
        ({"max_new_tokens": 3}, "max_new_tokens=2"),
        # Another source, which the folder does not hold yet, is of another atlas, too.
        ({"sources": [2], "radius": 0.2}, "relative_radius=0.35"),
        ({"prompts": PROMPTS[1]}, "prompts="),
    ):
        with pytest.raises(tm.errors.DifferentSearch, match=named):
            atlas(tiny_llama, **{"prompts": PROMPTS[0], **call, **settings})


def test_files_that_are_no_atlas_are_damaged(tiny_llama, tmp_path, small):
    path = tmp_path / "source-01.safetensors"
    with pytest.raises(FileNotFoundError, match="no atlas"):
        Atlas.load(tmp_path)
    library = small.libraries[1]
    good = dict(library.story)
    columns = dict(library.columns)
    kl = columns.pop("kl")
    for story, numbers in (
        (good, columns),
        ({**good, "completions": good["completions"][:-1]}, {**columns, "kl": kl}),
        ({**good, "completions": [[[1, 2]] * 2] * 4}, {**columns, "kl": kl}),
        ({**good, "unsteered": None}, {**columns, "kl": kl}),
        ({**good, "prompts": PROMPTS[:1]}, {**columns, "kl": kl}),
        ({**good, "source_layer": None}, {**columns, "kl": kl}),
        (good, {**columns, "kl": kl, "share": kl}),
    ):
        tm.SteeringVectors(library.vectors, story, numbers).save(path)
        with pytest.raises(tm.errors.Damaged, match="source-01") as error:
            Atlas.load(tmp_path)
        assert error.value.path == path
    library.save(path)
    pd.testing.assert_frame_equal(Atlas.load(tmp_path).table, Atlas({1: library}).table)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(tm.errors.Damaged, match="source-01"):
        atlas(tiny_llama, PROMPTS[:2], [1], folder=tmp_path, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": [4], "targets": [2, 4]}, "no target comes after a source"),
        ({"sources": [N_LAYERS - 1]}, "no target comes after a source"),
        ({"sources": [6]}, "sources=6: tiny-llama has 6 layers"),
        ({"targets": [-1]}, "targets=-1"),
        ({"sources": []}, "sources: none given"),
        ({"targets": []}, "targets: none given"),
        ({"positions": slice(90, None)}, "picks no token"),
        ({"n_vectors": 0}, "n_vectors=0"),
        ({"n_vectors": 33}, "n_vectors=33"),
        ({"radius": 0.0}, "radius=0.0: a share"),
        ({"radius": 12.0}, "radius=12.0: a share"),
        ({"radius": float("nan")}, "radius=nan: a share"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"kl_threshold": -0.1}, "kl_threshold=-0.1"),
        ({"kl_threshold": float("inf")}, "kl_threshold=inf"),
        ({"prompts": []}, "prompts: none given"),
        ({"n_vectors": 32, "max_new_tokens": 900}, "keeps 200,000 tokens"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        atlas(tiny_llama, **{"prompts": PROMPTS[0], **QUICK, **arguments})


def test_a_model_that_is_too_wide_is_told(tiny_llama, monkeypatch):
    monkeypatch.setattr("tl_melbo.evaluation._atlas._MOST_WIDTH", 31)
    with pytest.raises(ValueError, match=r"d_model=32.*tm\.jacobian"):
        atlas(tiny_llama, PROMPTS[0], **QUICK)


def test_gram_matrices_are_of_layers_of_the_map(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS[0], 1, 4)
    assert {*f.gram_matrices(2, [3, 4])} == {3, 4}
    for source, targets in ((0, [3]), (2, [2]), (2, [3, 5])):
        with pytest.raises(ValueError, match=f"source_layer={source}, target_layers="):
            f.gram_matrices(source, targets)


def test_derivatives_that_do_not_fit_are_told(tiny_llama, monkeypatch):
    # Four bytes for each of 32 dimensions, 2 positions and 32 dimensions; eight for J'J.
    needed = 3 * 32 * 32 * (2 * 4 + 8)
    settings = {"positions": LAST_TWO, "kl_threshold": 900, **QUICK}
    call = (tiny_llama, PROMPTS[0], [1], [2, 3, 5])
    module = "tl_melbo.evaluation._atlas.free_memory"
    monkeypatch.setattr(module, lambda device: needed)
    assert len(atlas(*call, **settings).libraries[1]) == 3
    monkeypatch.setattr(module, lambda device: needed - 1)
    with pytest.raises(
        ValueError, match=r"positions=slice\(-2, None, None\): .* 3 targets at 2 pos"
    ):
        atlas(*call, **settings)


def test_a_pair_that_is_not_there_is_named(small):
    assert repr(small) == "Atlas(6 pairs of layers, 3 sources)"
    for pair in ((3, 3), (2, 4), (0, 2)):
        with pytest.raises(ValueError, match=f"source_layer={pair[0]}, target_layer={pair[1]}"):
            small.vectors(*pair)


def test_a_heatmap_has_the_source_across_and_the_target_up(small):
    table = small.table
    figure = atlas_heatmap(table, vector=1)
    (heatmap,) = figure.data
    assert ([*heatmap.x], [*heatmap.y]) == ([0, 1, 3], [1, 3, 4])
    assert figure.layout.xaxis.title.text == "source layer"
    assert figure.layout.yaxis.title.text == "target layer"
    assert heatmap.colorbar.title.text == "singular value"
    values = small.vectors(0, 3).columns["singular_value"]
    assert heatmap.z[1][0] == pytest.approx(float(values[1]))
    assert np.isnan(heatmap.z[0][1])
    assert np.isnan(heatmap.z[1][2])
    kl = atlas_heatmap(table, "kl").data[0]
    pair = table[table["source_layer"].eq(1) & table["target_layer"].eq(4) & table["vector"].eq(0)]
    assert kl.z[2][1] == pytest.approx(pair.groupby("sign")["kl"].mean().max())
    assert "layer 1 to 4, vector 0" in kl.customdata[2][1]
    assert "along" in kl.customdata[2][1]
    with pytest.raises(ValueError, match=r"vector=2: the table has \[0, 1\]"):
        atlas_heatmap(table, vector=2)
    with pytest.raises(ValueError, match="lacks the columns"):
        atlas_heatmap(table.drop(columns="kl"))


def command(model_folder: Path, out: Path, *options: str):
    small = ("--max-new-tokens=2", "--no-chat", f"--model={model_folder}", f"--out={out}")
    return CliRunner().invoke(app, ["atlas", *PROMPTS[:2], *small, *options])


@pytest.mark.usefixtures("cached_models")
def test_the_command_leaves_vectors_a_table_and_a_picture(model_folder, tmp_path):
    out = tmp_path / "maps" / "me"
    result = command(model_folder, out, "--sources=0:4:3", "--targets=1,4", "--kl-threshold=0")
    assert result.exit_code == 0, result.output
    names = ["atlas.csv", "atlas.html", "source-00.safetensors", "source-03.safetensors"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == names
    assert result.stdout.splitlines()[-1] == str(out / "atlas.html")
    table = pd.read_csv(out / "atlas.csv")
    pairs = {*zip(table["source_layer"], table["target_layer"], strict=True)}
    assert pairs == {(0, 1), (0, 4), (3, 4)}
    expected = Atlas.load(out).table
    np.testing.assert_allclose(table["singular_value"], expected["singular_value"])
    page = (out / "atlas.html").read_text(encoding="utf-8")
    assert page.count('role="img" aria-label="') == 3
    assert 'aria-label="KL to unsteered (nats) of vector 0 for 3 pairs of layers: ' in page
    assert f"<figcaption>{PROMPTS[0]}</figcaption>" in page
    assert page.count("<blockquote>") == 2
    assert page.count('<script type="application/json">') == 3
    # It loads nothing from elsewhere.
    assert "Content-Security-Policy" in page
    markup = re.sub(r"(?s)(<script.*?>).*?</script>", r"\1", page)
    assert re.findall(r"(?:src|href)=[^ >]*", markup) == ['href="data:,"']
    before = (out / "source-00.safetensors").read_bytes()
    again = command(model_folder, out, "--sources=0:4:3", "--targets=1,4", "--kl-threshold=0")
    assert again.exit_code == 0, again.output
    assert (out / "source-00.safetensors").read_bytes() == before
    other = command(model_folder, out, "--sources=0:4:3", "--targets=1,4", "--radius=0.1")
    assert other.exit_code == 1
    assert "relative_radius=0.35 (here 0.1)" in other.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sources=4,x", "--sources='4,x': expected"),
        ("--targets=1:2:3:4", "--targets='1:2:3:4': expected"),
        ("--targets=::0", "--targets='::0': expected"),
        ("--sources=9", "--sources=9"),
        ("--radius=much", "--radius='much'"),
        ("--positions=a:", "--positions='a:': expected start:stop"),
        ("--positions=1:2:0", "--positions='1:2:0': expected start:stop"),
        ("--kl-threshold=-1", "--kl-threshold=-1"),
        ("--sources=40:50", "--sources=40:50: the model has 6 layers, 0 to 5, and none"),
    ],
)
@pytest.mark.usefixtures("cached_models")
def test_the_command_names_what_is_wrong(model_folder, tmp_path, option, message):
    result = command(model_folder, tmp_path / "out", option)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kl-threshold=-1", "--kl-threshold=-1"),
        ("--n-vectors=0", "--n-vectors=0"),
        ("--radius=12", "--radius=12.0: a share"),
        ("--max-new-tokens=0", "--max-new-tokens=0"),
        ("--positions=a:", "--positions='a:'"),
    ],
)
def test_numbers_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, option, message):
    monkeypatch.setattr(tm, "load_model", lambda *_args, **_options: pytest.fail("was loaded"))
    result = command(tmp_path / "model", tmp_path / "out", option)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.usefixtures("cached_models")
def test_a_command_that_is_stopped_says_what_is_kept(model_folder, tmp_path, monkeypatch):
    import tl_melbo.cli_atlas as module

    def stop(path, table):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_table", stop)
    result = command(model_folder, tmp_path / "out", "--sources=1", "--targets=2")
    assert result.exit_code == 130
    assert "what was finished is kept; the same command" in " ".join(result.stderr.split())
    assert (tmp_path / "out" / "source-01.safetensors").is_file()
