"""A model in this process as a judge."""

from tl_melbo import checks
from tl_melbo.engines import Engine
from tl_melbo.generation import written
from tl_melbo.model.bridge import Model, check_model, model_name
from tl_melbo.model.tokens import to_tokens
from tl_melbo.shapes import shape_checked


@shape_checked
def local(
    model: Model,
    max_new_tokens: int = 64,
    system: str | None = None,
    engine: Engine | None = None,
) -> "LocalJudge":
    """A judge that answers with the likeliest tokens of a model, in its chat template.

    Ask it outside of `steered(model, ...)`, or it judges under the vector.

    Args:
        system: a system prompt; put before the question where the template knows none.
        engine: what writes instead of the model, as in `tm.generate`.

    Raises:
        ValueError: when asked, for a question that leaves no room for an answer.
    """
    check_model(model)
    checks.at_least(1, max_new_tokens=max_new_tokens)
    if system is not None:
        checks.as_text(system, "system")
    return LocalJudge(model, max_new_tokens, system, engine)


class LocalJudge:
    """What `local` gives: from a text to a text.

    Attributes:
        calls: how many questions were answered.
        tokens: how many tokens they and their answers had.
    """

    def __init__(
        self, model: Model, max_new_tokens: int, system: str | None, engine: Engine | None
    ) -> None:
        self.engine = engine
        self.model, self.max_new_tokens, self.system = model, max_new_tokens, system
        self.calls = self.tokens = 0

    def __call__(self, text: str) -> str:
        """The answer."""
        tokens = to_tokens(self.model, text, chat=True, system=self.system)
        answer = written(self.model, tokens, self.max_new_tokens, self.engine)
        self.calls += 1
        new = self.model.tokenizer.encode(answer, add_special_tokens=False)
        self.tokens += tokens.shape[1] + len(new)
        return answer

    def __repr__(self) -> str:
        return f"judges.local({model_name(self.model)!r}, max_new_tokens={self.max_new_tokens})"
