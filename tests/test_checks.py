import ast
import math
import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tl_melbo import checks


def test_texts_come_as_a_list() -> None:
    assert checks.as_texts("one") == ["one"]
    assert checks.as_texts(("one", "two")) == ["one", "two"]


def test_vectors_come_as_a_matrix() -> None:
    library = tm.SteeringVectors.from_tensor(torch.ones(2, 4))
    assert torch.equal(checks.as_matrix(library), torch.ones(2, 4))
    assert torch.equal(checks.as_matrix(torch.ones(4, dtype=torch.float64)), torch.ones(1, 4))
    assert torch.equal(checks.one_vector(library[1], "vector"), torch.ones(1, 4))


@pytest.mark.parametrize("number", [0, 2**63 - 1])
def test_every_seed_that_torch_takes_is_allowed(number: int) -> None:
    checks.seed(number)
    torch.Generator().manual_seed(number)


def test_nothing_said_is_nothing_wrong() -> None:
    checks.at_least(1, batch_size=None)
    checks.at_least(1, steps=None, n_vectors=1)
    checks.between(0, 1, "a share", low=0, high=1)
    checks.positive(radius=1e-9)
    checks.columns(pd.DataFrame({"a": [1.0]}), ["a"], "frame", "pass one", numbers=True)
    checks.width(torch.ones(2, 3), 3, "theta")


def test_an_extra_that_is_asked_for_has_the_library() -> None:
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def within(extra: str) -> set[str]:
        names: set[str] = set()
        for needed in extras[extra]:
            name, _, others = re.match(r"([\w.-]+)(\[([\w,]+)\])?", needed).groups()
            own = name == project["name"]
            names |= set().union(*map(within, others.split(","))) if own else {name.lower()}
        return names

    sources = [path.read_text(encoding="utf-8") for path in (root / "tl_melbo").rglob("*.py")]
    owner, asked = {"sklearn": "scikit-learn", "yaml": "pyyaml"}, []
    for source in sources:
        for call in ast.walk(ast.parse(source if "checks.installed(" in source else "")):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "checks.installed":
                module, _, *extra = [getattr(each, "value", None) for each in call.args]
                if isinstance(module, str):
                    name = module.partition(".")[0].replace("_", "-")
                    asked.append((owner.get(name, name), *(extra or ["evaluation"])))
    assert {("ray", "ray"), ("scipy", "evaluation"), ("openai", "judges")} <= {*asked}
    for name, extra in asked:
        assert name in within(extra), f"{name} is not in {extra}"


MATRIX = torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.nan, 1.0]])
FRAME = pd.DataFrame({"word": ["a"]})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: checks.as_texts([], "texts"), "texts: none given; pass one text"),
        (lambda: checks.as_texts(["a", " \n"]), r"prompts\[1\]=' \\n': .*visible character"),
        (lambda: checks.as_text("\ud800"), r"prompt='\\ud800': holds half a character"),
        (lambda: checks.as_matrix(torch.empty(0, 2)), "vectors: none given"),
        (lambda: checks.as_matrix(MATRIX), r"vectors \[2\] hold values that are not finite"),
        (lambda: checks.one_vector(MATRIX[:2], "a"), "a: 2 vectors, expected exactly one"),
        (lambda: checks.one_vector(MATRIX[1], "a"), "a: zero, so it has no direction"),
        (lambda: checks.directions(MATRIX, "a"), r"a: vectors \[1, 2\] are zero or not finite"),
        (lambda: checks.width(MATRIX, 3, "a"), "a: 2 wide, but the residual stream has d_model=3"),
        (lambda: checks.columns(FRAME, ["b"], "a", "do c"), r"a: lacks the columns \['b'\]; do c"),
        (lambda: checks.columns(FRAME[:0], ["word"], "a", "do c"), "a: has no rows.*empty; do c"),
        (
            lambda: checks.columns(FRAME, ["word"], "a", "do c", numbers=True),
            r"a: lacks the columns \['word'\], or holds no numbers there; do c",
        ),
        (lambda: checks.seed(-1), r"seed=-1: from 0 to 2\*\*63 - 1"),
        (lambda: checks.seed(2**63), "seed=9223372036854775808"),
        (lambda: checks.at_least(1, batch_size=0), "batch_size=0: at least 1"),
        (lambda: checks.at_least(2, a=2, b=1), "b=1: at least 2"),
        (lambda: checks.between(0, 1, "a share", a=math.nan), "a=nan: a share, from 0 to 1"),
        (lambda: checks.positive(a=math.inf), "a=inf: a positive finite number"),
    ],
)
def test_what_is_wrong_is_named(wrong, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrong()
