"""Vectors for other programs: llama.cpp and repeng, the steering-vectors package, a model hub."""

import json
import re
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
HUB_PAGE = "report.html"
_CONTROL_VECTOR = "controlvector"
_TAGS = ("steering-vectors", "transformer-lens", "tl_melbo")
_MOST_CARD_ROWS = 40
COMPLETION = ["vector", "scale", "prompt", "completion"]


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
        lines.insert(3, f"[The page]({HUB_PAGE}) {told}")
    if len(table) > _MOST_CARD_ROWS:
        lines.append(f"The first {_MOST_CARD_ROWS} of {len(table)}; the file holds all of them.")
    if completions is not None:
        # Vectors go by the numbers that the table has.
        numbers = {-1: -1, **dict(enumerate(table["index"]))}
        shown = completions.head(_MOST_CARD_ROWS)
        places: list[Any] = [numbers.get(row) for row in shown["vector"]]
        numbered = shown.assign(vector=places)
        lines += ["## What the model writes", "Vector −1 is the model without one."]
        lines.append(_markdown_table(COMPLETION, numbered[COMPLETION].itertuples(index=False)))
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
