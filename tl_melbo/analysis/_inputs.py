"""What the analyses take: checks that they share."""

from collections.abc import Sequence

from tl_melbo.activation_map import ActivationMap
from tl_melbo.model.bridge import Model, check_model, model_name
from tl_melbo.steering import Vectors
from tl_melbo.vectors import SteeringVectors


def as_library(vectors: Vectors) -> SteeringVectors:
    """The vectors as a library with at least one vector in it.

    Raises:
        ValueError: there is none, or values are not finite.
    """
    known = isinstance(vectors, SteeringVectors)
    library = vectors if known else SteeringVectors.from_tensor(vectors)
    if not len(library):
        raise ValueError("vectors: a library without vectors; pass at least one")
    return library


def one_vector(vectors: Vectors, argument: str) -> SteeringVectors:
    """A library of one vector that has a direction.

    Raises:
        ValueError: there are none or several, or it is zero or not finite.
    """
    known = isinstance(vectors, SteeringVectors)
    library = vectors if known else SteeringVectors.from_tensor(vectors)
    if len(library) != 1:
        raise ValueError(f"{argument}: {len(library)} vectors, expected exactly one, as found[5]")
    if not 0 < float(library.norms[0]) < float("inf"):
        raise ValueError(f"{argument}: zero or not finite; pass a vector that has a direction")
    return library


def check_place(model: Model, f: ActivationMap, library: SteeringVectors, argument: str) -> None:
    """Make sure that vectors belong where an activation map adds them, in the model it is of.

    Raises:
        ValueError: the map is of another model, or the vectors were found at another layer.
    """
    check_model(model)
    if model_name(model) != model_name(f.model):
        raise ValueError(
            f"f: made from {model_name(f.model)}, but model is {model_name(model)}; make it with "
            "ActivationMap.from_prompts(model, ...)"
        )
    if library.source_layer not in (None, f.source_layer):
        raise ValueError(
            f"{argument}: found at layer {library.source_layer}, but f starts at layer "
            f"{f.source_layer}; make f with source_layer={library.source_layer}"
        )


def as_texts(texts: str | Sequence[str], argument: str) -> list[str]:
    """The texts as a list, none of them empty.

    Raises:
        ValueError: there are none, or one has no visible character.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise ValueError(f"{argument}: none given; pass one text or a list of texts")
    for position, text in enumerate(listed):
        if not text.strip():
            raise ValueError(
                f"{argument}[{position}]={text!r}: a text needs at least one visible character; "
                "leave it out"
            )
    return listed
