"""MELBO: vectors at an early layer that change a later layer as much as possible.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from tl_melbo import checks
from tl_melbo.discovery._calibration import (
    Radius,
    calibrate_radius,
    check_radius,
    chosen_radius,
)
from tl_melbo.discovery._melbo_optimisers import Climb, OnStep, Optimiser
from tl_melbo.discovery._objective import Norm, check_powers
from tl_melbo.discovery._protocol import EffectMap, typical_norm
from tl_melbo.discovery._search import (
    Part,
    Search,
    check_count,
    join,
    method,
)
from tl_melbo.geometry import numbered_sphere
from tl_melbo.shapes import shape_checked
from tl_melbo.story import about_of, measure_of
from tl_melbo.vectors import SteeringVectors

DEFAULT_STEPS = {"ascent": 10, "adamw": 300}


@shape_checked
def check_settings(
    n_vectors: int,
    radius: Radius,
    p: float,
    q: float | None,
    steps: int | None,
    seed: int,
    typical: float | None = None,
) -> None:
    """Check what can be checked of a search without a model, so before one is loaded.

    The arguments are those of `melbo`, and the typical norm of a residual at the source layer, for
    the error to name.

    Raises:
        ValueError: a number is out of its range.
    """
    check_radius(radius, typical)
    check_count(n_vectors)
    checks.at_least(1, steps=steps)
    checks.seed(seed)
    check_powers(p, q)


@partial(method, check=check_settings)
def melbo(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = "auto",
    p: float = 2,
    q: float | None = None,
    positions: slice = slice(-3, None),
    orthogonal: bool = True,
    seed: int = 0,
    optimiser: Optimiser = "ascent",
    steps: int | None = None,
    *,
    norm: Norm = "l2",
    previous: SteeringVectors | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Search:
    """Find vectors of a given length that change the target layer as much as possible.

    Args:
        f: the activation map, see `ActivationMap.from_prompts`.
        n_vectors: how many; at most d_model if orthogonal.
        radius: their L2 norm, in the units of the residual stream. The critical choice: too small
            changes nothing, too large gives gibberish. "auto" takes `calibrate_radius`, which
            costs some seconds.
        p: power of the norm in `melbo_objective`.
        q: root of each prompt's sum in `melbo_objective`; None takes p.
        positions: where the effect is measured, counted on each prompt's own tokens. The default
            is the last three, where the next tokens are made. With all positions the first token
            takes over in most models: its residual is hundreds of times longer than the others',
            and every vector ends up rescaling it (a warning says so).
        orthogonal: find them one after another, each orthogonal to all before it; the order is
            that of the search: vector k is what climbs highest in what vectors 0 to k-1 leave.
            Otherwise optimise all at once, each from its own start; several may then coincide.
        seed: of the random starts, which are uniform on the sphere. Start k depends on the
            seed and k alone.
        optimiser: "ascent", fast, its objective never falls; or "adamw", as published.
        steps: gradient evaluations for each vector at most, the start's included ("ascent",
            10 by default), or gradient steps ("adamw", 300 by default).
        norm: over d_model, "l2" or "lp".
        previous: vectors 0 to k-1 of the same search, all of them: it goes on at vector k, finds
            what it would have found without a break, and gives the new ones. `n_vectors` counts
            from there.
        progress: show a progress bar.
        on_step: called after every step of the search.

    Returns:
        The vectors in the order above. `table()` tells each one's objective, how many gradients it
        took, `gain`, by how much of itself its last step raised the objective (the last tenth of
        the steps, for "adamw"), and whether it `converged`: it gained less than 1%, or points as
        its gradient does. `history[:, i]` is the objective after i steps, and `story` tells
        everything set here.

    Raises:
        ValueError: a number out of its range, more orthogonal vectors than d_model, positions
            that some prompt does not have, a radius too small to have any effect.
        DifferentSearch: `previous` is not the beginning of this search.
        NotFinite: the objective or its gradient is not finite for any vector.

    Warns:
        UserWarning: one position makes nearly all of the objective; or some vectors were lost to
            numbers that are not finite.

    Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models".
    """
    steps = DEFAULT_STEPS[optimiser] if steps is None else steps
    wanted = n_vectors if previous is None else max(1, n_vectors)
    check_settings(wanted, radius, p, q, steps, seed, typical_norm(f))
    check_count(n_vectors, f if orthogonal else None, previous)
    f.position_mask(positions)  # refuses what some prompt does not have; the slow check last
    radius, calibration = chosen_radius(
        radius, previous, lambda: calibrate_radius(f, positions=positions)
    )
    chosen = {
        "radius": radius, "p": p, "q": p if q is None else q, "norm": norm, "positions": positions,
        "orthogonal": orthogonal, "optimiser": optimiser, "steps": steps,
    }  # fmt: skip
    climb = Climb(f, on_step, **chosen)

    def find(earlier: Tensor, first: int) -> Iterator[Part]:
        return climb.parts(
            numbered_sphere(first + n_vectors, int(f.x.shape[-1]), seed), earlier, first
        )

    found = {"method": "melbo", "hyperparameters": chosen}
    return Search(
        "melbo", f, n_vectors, chosen, find,
        previous=previous,
        needs=("objective", "evaluations"),
        orthogonal_to={} if orthogonal else None,
        progress=progress,
        seed=seed,
        measure=measure_of(found),
        about=about_of(found),
        categories={"converged": ["no", "yes"]},
        **calibration,
    )  # fmt: skip


iter_melbo = melbo.parts
join_library = join
