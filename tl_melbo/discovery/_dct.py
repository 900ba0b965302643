"""Deep causal transcoding: the effect of all vectors as a sum of a few rank-one factors.

Source: Mack & Turner 2024, "Deep causal transcoding: a framework for mechanistically eliciting
latent behaviors in language models".
"""

import functools
from collections.abc import Iterator
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._dct_fit import Fit, OnStep, Order, Start
from tl_melbo.discovery._map import EffectMap, own_arithmetic
from tl_melbo.discovery._search import Part, Search, method
from tl_melbo.errors import DifferentSearch
from tl_melbo.shapes import shape_checked
from tl_melbo.story import measure
from tl_melbo.vectors import SteeringVectors

Orthogonal = Literal["hard", "soft"]


def check_settings(radius: Radius, steps: int, seed: int) -> None:
    """Check the settings of which no model is needed."""
    check_radius(radius)
    checks.at_least(1, steps=steps)
    checks.seed(seed)


@functools.partial(method, check=check_settings)
def dct(
    f: EffectMap,
    n_vectors: int = 64,
    order: Order = "exponential",
    orthogonal: Orthogonal = "hard",
    radius: Radius = "auto",
    positions: slice = slice(-3, None),
    steps: int = 30,
    seed: int = 0,
    *,
    start: Start = "random",
    previous: SteeringVectors | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Search:
    """Find the factors of the effect: pairs of a direction at the source and one at the target.

    The mean effect of theta, over prompts and positions, is modelled on the ball of the radius R as
    a sum over factors of alpha sigma(<v, theta> / R) u, with unit vectors v and u. MELBO finds one
    factor of the exponential model; at a small radius all orders find the Jacobian's directions.

    Args:
        f: the activation map.
        n_vectors: how many factors; they are found together.
        order: what sigma is: "linear" z, "quadratic" z², "exponential" exp(z) - 1.
        orthogonal: "hard", the source directions are orthonormal at every step; "soft", only those
            are pushed apart that share a strong direction. "linear" is always hard.
        radius: R, and the L2 norm of the vectors; "auto" takes `calibrate_radius`.
        positions: where the effect is measured, counted on each prompt's own tokens.
        steps: gradient steps of all factors; published: 10 to 30, and 20 for "quadratic".
        seed: of the random start.
        start: "random", or "jacobian", the factors of the linear model.
        previous: nothing, or all factors of the same search.
        progress: show a progress bar.
        on_step: called after each step with its number and the objective.

    Returns:
        The vectors R v, the most important first. Columns: `importance`, alpha; `effect`,
        <u, mean effect of R v>; `output`, u [vector, d_model]. Alpha is the least-squares weight,
        in the units of the effect. `history[:, i]` is each factor's part of the objective after
        step i; the factors of the best step are returned.

    Raises:
        ValueError: a number out of its range; more factors than dimensions where they must be
            orthogonal; positions that some prompt does not have.
        DifferentSearch: `previous` is not this search, or holds a part of its factors.
        NotFinite: the effect or its derivative is not finite.

    Source: Mack & Turner 2024, "Deep causal transcoding".
    """
    check_settings(radius, steps, seed)
    if previous is not None and len(previous) and n_vectors:
        raise DifferentSearch(
            f"previous: holds {len(previous)} factors, and {n_vectors} more are wanted, but all "
            "factors are found together; begin anew with the number that you want",
            [],
            "all factors of which are found together",
        )
    radius, calibration = chosen_radius(f, radius, previous, positions)
    # Soft factors may outnumber the dimensions.
    hard = orthogonal == "hard" or order == "linear"
    settings = {
        "order": order, "orthogonal": orthogonal, "radius": radius, "positions": positions,
        "steps": steps, "start": start,
    }  # fmt: skip

    def after_step(step: int, objective: float) -> None:
        search.show(step / steps)
        if on_step is not None:
            on_step(step, objective)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        fit = Fit(f, positions, float(radius), after_step)
        with own_arithmetic(f):
            if order == "linear":
                found, history = fit.linear(n_vectors)
            else:
                found, history = fit.iterated(
                    order, fit.start(start, n_vectors, seed), steps, orthogonal == "soft"
                )
        by_size = found.importance.argsort(descending=True)
        inputs, *others = (part[by_size].float() for part in found)
        output, importance, effect = others
        columns = {"importance": importance, "effect": effect, "output": output}
        yield Part(first, inputs * radius, columns, history[by_size])

    search = Search(
        "dct", f, n_vectors, settings, find,
        previous=previous,
        needs=("importance", "effect"),
        orthogonal_to={} if hard else None,
        progress=progress,
        seed=seed,
        measure=measure("importance", "importance α", "residual-stream units", "steps"),
        about="All vectors were found together: the source directions of a sum of factors that "
        f"models the effect ({order} deep causal transcoding).",
        **calibration,
    )  # fmt: skip
    return search


@shape_checked
def ranked(
    found: SteeringVectors, by: Literal["importance", "effect"] | Float[Tensor, "d_model"]
) -> SteeringVectors:
    """Sort factors, the first of them the highest.

    Args:
        found: what `dct` found.
        by: a column, or a direction at the target layer: then by how far each factor moves the mean
            effect along it. `analysis.token_direction` gives that from one token to another.

    Raises:
        ValueError: the library lacks the columns, or the direction has another width.
    """
    needed = {by} if isinstance(by, str) else {"effect", "output"}
    missing = sorted(needed - set(found.columns))
    if missing:
        raise ValueError(f"found: lacks the columns {missing}; pass what dct found")
    if isinstance(by, str):
        scores = found.columns[by]
    else:
        outputs = found.columns["output"]
        checks.width(by[None], outputs.shape[1], "by", "the target's residual stream")
        scores = found.columns["effect"] * (outputs @ by.detach().to(outputs))
    return found[scores.argsort(descending=True)]
