"""A model in this process as a judge."""

from tl_melbo import checks
from tl_melbo.engines import Engine
from tl_melbo.generation import generate
from tl_melbo.judges._asking import Judge
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.shapes import shape_checked


@shape_checked
def local(model: Model, max_new_tokens: int = 64, engine: Engine | None = None) -> Judge:
    """A judge that answers with the likeliest tokens of a model, in its chat template.

    Ask it outside of `steered(model, ...)`, or it judges under the vector.

    Args:
        engine: what writes instead of the model, as in `tm.generate`.

    Raises:
        ValueError: when asked, for a question that leaves no room for an answer.
    """
    check_model(model)
    checks.at_least(1, max_new_tokens=max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "chat": True, "engine": engine}
    return lambda text: generate(model, text, **options)["completion"][0]
