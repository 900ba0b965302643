"""Take directions out of the residual stream, everywhere: the counterpart of steering."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    """Project the span of vectors out of the residual stream, inside the context.

    It is taken out of what block 0 reads and of the stream after every block. Within a block it is
    not: what its attention writes along the span, its MLP still reads.

        with tm.ablated(model, theta):
            print(model.generate("Once upon a time"))

    Contexts nest. Inside `steered`, `ablated` takes a vector out at its own layer; around
    `steered`, after the next block.

    Args:
        vectors: one vector or several; their norms do not matter.

    Raises:
        ValueError: a vector of another width, or without a direction.

    Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction".
    """
    check_model(model)
    theta = checks.directions(as_theta(model, vectors), "vectors").double()
    # Of norm 1 before their rank is asked, which would leave out what is much shorter than others.
    units = theta / theta.norm(dim=-1, keepdim=True)
    _, values, basis = torch.linalg.svd(units, full_matrices=False)
    basis = basis[values > values[0] * torch.finfo(torch.float32).eps]

    def project(module: nn.Module, args: Any, residual: Tensor) -> Tensor:
        onto = basis.to(residual.device, torch.promote_types(residual.dtype, torch.float32))
        wide = residual.to(onto.dtype)
        return (wide - (wide @ onto.T) @ onto).to(residual.dtype)

    with ExitStack() as hooks:
        for layer in range(-1, int(model.cfg.n_layers)):
            point = model.hook_dict[residual_hook_name(layer)]
            hooks.enter_context(point.register_forward_hook(project))
        yield model
