"""Take directions out of the residual stream, everywhere: the counterpart of steering."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_melbo import checks
from tl_melbo.model.bridge import Model, check_model, residual_hook_name
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors, as_theta


@contextmanager
@shape_checked
def ablated(model: Model, vectors: Vectors) -> Iterator[Model]:
    """Project the span of vectors out of the residual stream after every block, inside the context.

        with tm.ablated(model, theta):
            print(model.generate("Once upon a time"))

    Contexts nest, also with `steered`; the hooks are gone at the end, whatever happens inside.

    Args:
        model: a TransformerLens model.
        vectors: one vector or several; their norms do not matter.

    Raises:
        TypeError: `model` is not a TransformerLens model, or `vectors` are not vectors.
        ValueError: a vector of another width, or without a direction.

    Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction".
    """
    check_model(model)
    theta = checks.directions(as_theta(model, vectors), "vectors")
    _, values, basis = torch.linalg.svd(theta.double(), full_matrices=False)
    basis = basis[values > values[0] * torch.finfo(torch.float32).eps]

    def project(module: nn.Module, args: Any, residual: Tensor) -> Tensor:
        onto = basis.to(residual.device, torch.promote_types(residual.dtype, torch.float32))
        wide = residual.to(onto.dtype)
        return (wide - (wide @ onto.T) @ onto).to(residual.dtype)

    handles = [
        model.hook_dict[residual_hook_name(layer)].register_forward_hook(project)
        for layer in range(int(model.cfg.n_layers))
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
