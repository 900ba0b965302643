"""Vectors for other programs: llama.cpp and repeng, the steering-vectors package, a model hub."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from tl_melbo import checks
from tl_melbo.files import replacing
from tl_melbo.story import about_of
from tl_melbo.text import printable

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

    from tl_melbo.vectors import SteeringVectors

HUB_FILE = "vectors.safetensors"
_HUB_PAGE = "report.html"
_CONTROL_VECTOR = "controlvector"
_TAGS = ("steering-vectors", "transformer-lens", "tl_melbo")
_MOST_CARD_ROWS = 40
_COMPLETION = ["vector", "scale", "prompt", "completion"]


def write_control_vector(
    path: str | Path, directions: Mapping[int, Tensor], model_type: str | None
) -> None:
    """Write a GGUF file that llama.cpp and repeng read: `direction.N` is added after block N.

    Source: llama.cpp, common_control_vector_load and llama_adapter_cvec; repeng 0.4,
    ControlVector.export_gguf.
    """
    if not model_type:
        raise ValueError("model_type: not given, nor known; pass one, such as model_type='llama'")
    if min(directions) < 1:
        raise ValueError(
            f"layer={min(directions)}: llama.cpp adds control vectors after blocks 1 on, never "
            "after block 0"
        )
    with gguf_writer(path, _CONTROL_VECTOR) as writer:
        writer.add_string(f"{_CONTROL_VECTOR}.model_hint", model_type)
        writer.add_uint32(f"{_CONTROL_VECTOR}.layer_count", len(directions))
        for layer, theta in directions.items():
            writer.add_tensor(f"direction.{layer}", theta.contiguous().numpy())


@contextmanager
def gguf_writer(path: str | Path, architecture: str, **options: Any) -> Iterator[Any]:
    """What writes a GGUF file, which is there when the block succeeds."""
    import gguf

    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture, **options)
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def as_steering_vector(directions: Mapping[int, Tensor]) -> "SteeringVector":
    """An object of the steering-vectors package, of one vector a block."""
    try:
        from steering_vectors import SteeringVector
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_steering_vectors needs the package steering-vectors, which asks for an older "
            "transformers than it needs: pip install --no-deps steering-vectors scikit-learn"
        ) from error
    vectors = {layer: theta.clone() for layer, theta in directions.items()}
    return SteeringVector(layer_activations=vectors, layer_type="decoder_block")


def direction(library: "SteeringVectors", layer: int | None, function: str) -> dict[int, Tensor]:
    """The one vector of a library, by the block after which it is added."""
    checks.exactly_one(library, function, f"pick one, as found[3].{function}(...)")
    layer = library.source_layer if layer is None else layer
    if layer is None:
        raise ValueError("layer: not given, nor known from the story; pass one, such as layer=8")
    checks.at_least(0, layer=layer)
    return {layer: library.vectors[0]}


def upload(
    library: "SteeringVectors",
    repo_id: str,
    private: bool,
    completions: pd.DataFrame | None,
    page: str | Path | None,
    token: str | None,
) -> str:
    """Put a library, with a card, into a repository of the Hugging Face hub; gives its address."""
    from huggingface_hub import HfApi

    if not len(library):
        raise ValueError("the library holds no vectors; there is nothing to push")
    if completions is not None:
        checks.columns(completions, _COMPLETION, "completions", "pass what tm.generate returns")
    if page is not None and not Path(page).expanduser().is_file():
        raise FileNotFoundError(
            f"page={str(page)!r}: no such file; tl_melbo.report.write makes one"
        )
    card = model_card(repo_id, library.story, library.table(), completions, page is not None)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        library.save(Path(folder) / HUB_FILE)
        if page is not None:
            shutil.copyfile(Path(page).expanduser(), Path(folder) / _HUB_PAGE)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8", newline="\n")
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Steering vectors"
            )
        except (OSError, ValueError):  # the hub's own, and bad names
            raise
        except Exception as error:  # of the HTTP library that huggingface_hub has
            raise OSError(
                f"repo_id={repo_id!r}: the hub cannot be reached ({error}); look at the network, "
                "or keep a file with SteeringVectors.save"
            ) from error
    return str(address)


def download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """Fetch the vectors of a repository of the Hugging Face hub, or find them in its cache."""
    import huggingface_hub
    from huggingface_hub import errors

    place = f"repo_id={repo_id!r}" + ("" if revision is None else f" at revision {revision!r}")
    try:
        fetched = huggingface_hub.hf_hub_download(repo_id, HUB_FILE, revision=revision, token=token)
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{place}: the hub cannot be reached, and {HUB_FILE} is not in its cache; look at the "
            "network, or load a file with SteeringVectors.load"
        ) from error
    except (
        errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError,
    ) as error:  # fmt: skip
        raise FileNotFoundError(
            f"{place}: the hub has no {HUB_FILE} there, or it is private; check the name, or log "
            "in with `hf auth login`"
        ) from error
    return Path(fetched)


def model_card(
    repo_id: str,
    story: Mapping[str, Any],
    table: pd.DataFrame,
    completions: pd.DataFrame | None,
    has_page: bool = False,
) -> str:
    """The README of a repository: what the vectors are, how they were found, how to use them."""
    from huggingface_hub import ModelCardData

    # Of a folder, its name: where it lies is nobody's business.
    model = str(story.get("model") or "an unnamed model")
    model = model if _is_repository(model) else Path(model).name
    data = ModelCardData(
        library_name="tl_melbo",
        tags=[*_TAGS, *([story["method"]] if story.get("method") else [])],
        # The hub takes ids for this, and refuses the whole card for anything else.
        base_model=model if _is_repository(model) else None,
    )
    facts = {"model": model, **_told(story)}
    facts |= {f"part {n}": _told(part) for n, part in enumerate(story.get("parts", []))}
    layer = story.get("source_layer")
    place = "after a block that is not told" if layer is None else f"after block {layer}"
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# Steering vectors of {_cell(model)}",
        f"{len(table)} direction{'' if len(table) == 1 else 's'} in the residual stream {place}"
        ": added while the model writes, one can make it write something else. "
        f"{about_of(story)} Read what each does before you trust it.",
        f'```python\nimport tl_melbo as tm\n\nfound = tm.SteeringVectors.from_hub("{repo_id}")\n'
        f"with tm.steered(model, found[0]{', layer=...' if layer is None else ''}):"
        "  # a TransformerLens model\n"
        '    print(model.generate("Hello"))\n```',
        "## How they were found",
        _markdown_table(["", ""], facts.items()),
        "## The vectors",
        _markdown_table(table.columns, table.head(_MOST_CARD_ROWS).itertuples(index=False)),
    ]
    if has_page:
        told = "shows what the model writes under each: download it, and open it in a browser."
        lines.insert(3, f"[The page]({_HUB_PAGE}) {told}")
    if len(table) > _MOST_CARD_ROWS:
        lines.append(f"The first {_MOST_CARD_ROWS} of {len(table)}; the file holds all of them.")
    if completions is not None:
        # Vectors go by the numbers that the table has.
        numbers = {-1: -1, **dict(enumerate(table["index"]))}
        shown = completions.head(_MOST_CARD_ROWS)
        places: list[Any] = [numbers.get(row) for row in shown["vector"]]
        numbered = shown.assign(vector=places)
        lines += ["## What the model writes", "Vector −1 is the model without one."]
        lines.append(_markdown_table(_COMPLETION, numbered[_COMPLETION].itertuples(index=False)))
    return "\n\n".join(lines) + "\n"


def _told(story: Mapping[str, Any]) -> dict[str, Any]:
    """What a card tells of a story: no paths, nor what is told elsewhere."""
    kept = {k: v for k, v in story.items() if k not in ("categories", "parts", "model")}
    return {k: _told(v) if isinstance(v, Mapping) else v for k, v in kept.items()}


def _markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    names = [*map(_cell, header)]
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _is_repository(name: str) -> bool:
    """Whether it can be the id of a model on the hub: user/name."""
    looks_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None
    return looks_so and not Path(name).exists()


def _cell(value: Any) -> str:
    """Text for a Markdown table: untrusted, on one line, and nothing in it is markup or a link."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(printable(text).split())
    text = re.sub(r"[^\w\s.,'?()-]", lambda found: f"&#{ord(found[0])};", text)
    # A full stop before a letter can make a link of what is around it.
    return re.sub(r"\.(?=\w)", "&#46;", text).replace("_", "&#95;")
