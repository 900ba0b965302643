"""Deep causal transcoding: the effect of all vectors as a sum of a few rank-one factors.

Source: Mack & Turner 2024, "Deep causal transcoding: a framework for mechanistically eliciting
latent behaviors in language models".
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._calibration import Radius, check_radius, chosen_radius
from tl_melbo.discovery._dct_fit import MEASURE, Fit, OnStep, Order, Start
from tl_melbo.discovery._map import EffectMap, own_arithmetic
from tl_melbo.discovery._search import Part, Search, method
from tl_melbo.shapes import shape_checked
from tl_melbo.vectors import SteeringVectors

Orthogonal = Literal["hard", "soft"]

# A step below this share of the objective before it is counted as a fall: above is rounding.
_FALLS = 1 - 1e-6


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
        n_vectors: how many factors; they are found together.
        order: what sigma is: "linear" z, "quadratic" z², "exponential" exp(z) - 1.
        orthogonal: "hard", the source directions are orthonormal at every step; "soft", in the last
            third of the steps only those are pushed apart that share a strong direction. "linear"
            is always hard.
        radius: R, and the L2 norm of the vectors; "auto" takes `calibrate_radius`.
        positions: where the effect is measured, as in `melbo`.
        steps: gradient steps of all factors; published: 10 to 30, and 20 for "quadratic". Of
            "linear", which has a closed form, `steps`, `seed` and `start` change nothing.
        start: "random", or "jacobian", the factors of the linear model.
        on_step: called after each step with its number and the objective.

    Returns:
        The vectors R v, the most important first. Columns: `importance`, alpha, the least-squares
        weight, in the units of the effect; `effect`, <u, mean effect of R v>; `output`, u, and
        `mean_effect`, of R v [vector, d_model]. `history[:, i]` is each factor's part of the
        objective after step i + 1, in squared units of the effect. The objective may fall; the
        metadata tell how often (`falls`). Taken is the last step within 0.1% of the highest, of
        soft factors in the last third; they make one more step from there, the last in the history,
        whose objective may be a few percent lower.

    Raises:
        ValueError: a radius without effect, or an "order" of which the map has no derivative.
        DifferentSearch: `previous` is not this search, or more factors are wanted.
        NotFinite: the effect or its derivative is not finite.

    Source: Mack & Turner 2024, "Deep causal transcoding".
    """
    check_settings(radius, steps, seed)
    radius, calibration = chosen_radius(f, radius, previous, positions)
    linear = order == "linear"
    # What does nothing is not recorded, so that it tells no two searches apart.
    settings = {"order": order, "radius": radius, "positions": positions}
    settings |= {} if linear else {"orthogonal": orthogonal, "steps": steps, "start": start}
    facts: dict[str, Any] = calibration if linear else calibration | {"seed": seed}
    of_jacobian = 1.0 if linear else 0.5 if start == "jacobian" else 0.0

    def after_step(step: int, objective: float) -> None:
        search.show(of_jacobian + (1 - of_jacobian) * min(1.0, step / steps))
        if on_step is not None:
            on_step(step, objective)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        fit = Fit(f, positions, radius, after_step, lambda share: search.show(of_jacobian * share))
        with own_arithmetic(f):
            if order == "linear":
                found, history = fit.linear(n_vectors)
            else:
                start_at = fit.start(start, n_vectors, seed)
                found, history = fit.iterated(order, start_at, steps, orthogonal == "soft")
                objective = history.sum(0)
                search.story["falls"] = int((objective[1:] < _FALLS * objective[:-1]).sum())
        inputs, columns, history = found.ordered(history)
        yield Part(first, inputs * radius, columns, history)

    search = Search(
        "dct", f, n_vectors, settings, find,
        previous=previous,
        needs=("importance", "effect"),
        together=True,
        # Soft factors may outnumber the dimensions; linear ones are orthogonal always.
        orthogonal_to={} if linear or orthogonal == "hard" else None,
        progress=progress,
        measure=MEASURE,
        about="All vectors were found together: the source directions of a sum of factors that "
        f"models the effect ({order} deep causal transcoding).",
        **facts,
    )  # fmt: skip
    return search


@shape_checked
def ranked(
    found: SteeringVectors, by: Literal["importance", "effect"] | Float[Tensor, "d_model"]
) -> SteeringVectors:
    """Sort factors, the first of them the highest.

    Args:
        by: a column, or a direction at the target layer: then by how far each factor moves the mean
            effect along it. `analysis.token_direction` gives that from one token to another.

    Raises:
        ValueError: no such column; a direction of another width, zero or not finite.
    """
    needed = by if isinstance(by, str) else "mean_effect"
    if needed not in found.columns:
        raise ValueError(f"found: lacks the column {needed!r}; pass what dct found")
    scores = found.columns[needed]
    if not isinstance(by, str):
        checks.directions(by[None], "by")
        checks.width(by[None], scores.shape[1], "by", "the target's residual stream")
        scores = scores @ by.detach().to(scores)
    return found[scores.argsort(descending=True)]
