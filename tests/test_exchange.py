"""Vectors for other programs, read back by those programs."""

import html
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge
from tl_melbo import exchange

PROMPT = "Tell me about yourself."


@pytest.fixture(scope="module")
def found():
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, PROMPT, 1, 4)
    return tm.melbo(f, 3, 2.0, steps=2)


def logits_of(hugging_face, tokens):
    with torch.no_grad():
        return hugging_face(tokens).logits


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_steering_vectors_package_does_what_we_do(architecture):
    model = tiny_bridge(architecture)
    theta = 3 * torch.nn.functional.normalize(torch.randn(1, 32, generator=torch.Generator()))
    one = tm.SteeringVectors.from_tensor(theta, source_layer=2)
    tokens = model.to_tokens(PROMPT)
    with tm.steered(model, one), torch.no_grad():
        ours = model(tokens)
    from tl_melbo.model.bridge import without_bridge

    hugging_face = without_bridge(model.original_model)
    plain = logits_of(hugging_face, tokens)
    with one.to_steering_vectors().apply(hugging_face):
        theirs = logits_of(hugging_face, tokens)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert float((theirs - plain).abs().max()) > 1e-2
    assert torch.equal(logits_of(hugging_face, tokens), plain)


def test_gguf_reads_a_control_vector_back(found, tmp_path):
    from gguf import GGUFReader

    path = tmp_path / "one.gguf"
    (0.5 * found[1]).to_repeng_gguf(path)
    reader = GGUFReader(path)
    assert str(reader.get_field("general.architecture").contents()) == "controlvector"
    assert str(reader.get_field("controlvector.model_hint").contents()) == "llama"
    assert int(reader.get_field("controlvector.layer_count").contents()) == 1
    (tensor,) = reader.tensors
    # What llama.cpp asks of it: its name, float32, one dimension.
    assert tensor.name == "direction.1"
    assert tensor.tensor_type.name == "F32"
    assert tensor.data.shape == (32,)
    assert np.array_equal(tensor.data, 0.5 * found.vectors[1].numpy())
    found[2].to_repeng_gguf(path, layer=4, model_type="qwen2")
    (tensor,) = GGUFReader(path).tensors
    assert tensor.name == "direction.4"


def test_repeng_reads_a_control_vector_and_steers_the_same_with_it(found, tmp_path, monkeypatch):
    # repeng 0.4 names a type that NumPy 2 dropped.
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    from repeng import ControlModel, ControlVector

    from tests.tiny_models import tiny_hf

    path = tmp_path / "one.gguf"
    found[1].to_repeng_gguf(path)
    read = ControlVector.import_gguf(path)
    assert read.model_type == "llama"
    assert np.array_equal(read.directions[1], found.vectors[1].numpy())
    model = tiny_bridge("llama")
    tokens = model.to_tokens(PROMPT)
    with tm.steered(model, found[1]), torch.no_grad():
        ours = model(tokens)
    controlled = ControlModel(tiny_hf("llama"), [1])
    controlled.set_control(read)
    with torch.no_grad():
        theirs = controlled(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, p: v.to_repeng_gguf(p), "3 vectors, expected exactly one; pick one, as"),
        (lambda v, p: v[1].to_repeng_gguf(p, layer=0), "layer=0: llama.cpp adds control vectors"),
        (lambda v, p: v[1].to_repeng_gguf(p, layer=-1), "layer=-1: at least 0"),
        (lambda v, p: v.to_steering_vectors(), r"found\[3\].to_steering_vectors"),
        (lambda v, p: v[:0].push_to_hub("me/none"), "holds no vectors"),
    ],
)
def test_bad_input_is_named(found, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(found, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_vectors_from_nowhere_need_a_layer_and_a_model(tmp_path):
    one = tm.SteeringVectors.from_tensor(torch.ones(8))
    with pytest.raises(ValueError, match="layer: not given"):
        one.to_steering_vectors()
    with pytest.raises(ValueError, match="model_type: not given"):
        one.to_repeng_gguf(tmp_path / "x.gguf", layer=3)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: what is asked of huggingface_hub ends here."""
    import huggingface_hub

    root = tmp_path / "hub"

    def create_repo(api, repo_id, *, private, exist_ok):
        assert private
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.test/{repo_id}"

    def upload_folder(api, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def fetch(repo_id, name, *, revision, token):
        return str(root / repo_id / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return root


def test_the_card_leads_to_the_page(found, hub, tmp_path):
    page = tmp_path / "report.html"
    with pytest.raises(FileNotFoundError, match=r"page='.*report.html': no such file"):
        found.push_to_hub("me/vectors", page=page)
    assert not hub.exists() or not list(hub.iterdir())
    page.write_text("<p>All of it</p>")
    found.push_to_hub("me/vectors", page=page)
    there = hub / "me/vectors"
    assert (there / "report.html").read_text() == "<p>All of it</p>"
    assert "[The page](report.html) shows" in (there / "README.md").read_text(encoding="utf-8")


def test_the_hub_gives_back_what_it_got(found, hub):
    completions = tm.generate(tiny_bridge("llama"), PROMPT, found, max_new_tokens=3)
    hostile = (
        "I'm | <script>alert(1)</script>\n![x](http://x.test) www.x.test a@x.test `a` $b$ \u202e"
    )
    completions.loc[1, "completion"] = hostile
    address = found.push_to_hub("me/vectors", completions=completions)
    assert address == "https://hub.test/me/vectors"
    assert sorted(p.name for p in (hub / "me/vectors").iterdir()) == [
        "README.md", "vectors.safetensors",
    ]  # fmt: skip
    back = tm.SteeringVectors.from_hub("me/vectors")
    assert torch.equal(back.vectors, found.vectors)
    assert back.story == found.story
    card = (hub / "me/vectors" / "README.md").read_text(encoding="utf-8")
    from huggingface_hub import ModelCard

    read = ModelCard(card)
    assert read.data.library_name == "tl_melbo"
    assert "steering-vectors" in read.data.tags
    assert read.data.base_model is None  # tiny-llama is no repository
    assert 'tm.SteeringVectors.from_hub("me/vectors")' in card
    assert "Tell me about yourself." in card
    for markup in ("<script>", "![x]", "\u202e", "`a`", "http:", "www.x", "a@x", "$b$"):
        assert markup not in card
    rows = [line for line in card.splitlines() if line.startswith("| 1 | 1 |")]
    assert len(rows) == 1
    assert rows[0].count("|") == 5
    # And yet it reads as it was.
    shown = html.unescape(rows[0].split("|")[4].strip())
    assert shown == " ".join(hostile.replace("\u202e", "[U+202E]").split())


def test_cards_tell_what_is_known(hub):
    one = tm.SteeringVectors.from_tensor(torch.ones(8), model="/home/somebody/models/mine")
    card = exchange.model_card("me/one", one.story, one.table(), None)
    assert "1 direction in the residual stream after a block that is not told: " in card
    assert "somebody" not in card
    assert "layer=..." in card
    other = tm.SteeringVectors.from_tensor(torch.eye(8)[:2], source_layer=3, model="org/name")
    both = tm.concatenate([other, 2.0 * other])
    card = exchange.model_card("me/both", both.story, both.table(), None)
    assert "base_model: org/name" in card
    assert "part 1" in card
    assert "without labels" not in card
    for name in ("/models", "./model", "a/b/c", "mine"):
        assert "base_model" not in exchange.model_card("me/x", {"model": name}, one.table(), None)
    assert "base_model: null" not in card


def test_completions_are_numbered_as_the_vectors(found):
    some = found[[2, 0]]
    frame = tm.generate(tiny_bridge("llama"), PROMPT, some, max_new_tokens=2)
    card = exchange.model_card("me/some", some.story, some.table(), frame)
    written = card.partition("## What the model writes")[2].splitlines()
    numbers = [line.split("|")[1].strip() for line in written if line.startswith("| ")]
    assert numbers == ["vector", "---", "2", "0"]


def test_a_hub_that_cannot_be_reached_is_named():
    # Tests run with HF_HUB_OFFLINE.
    with pytest.raises(OSError, match=r"repo_id='me/none': the hub cannot be reached"):
        tm.SteeringVectors.from_hub("me/none")
    with pytest.raises(ValueError, match="Repo id"):
        tm.SteeringVectors.from_hub("no such name!")


def test_a_file_that_is_not_ours_is_refused(hub):
    folder = hub / "me/other"
    folder.mkdir(parents=True)
    Path(folder / "vectors.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        tm.SteeringVectors.from_hub("me/other")
