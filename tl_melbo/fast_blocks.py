"""Blocks of the Llama kind, run fast, with a gradient written by hand.

The kind is RMSNorm, grouped-query attention with rotary positions, RMSNorm and a SwiGLU MLP, as in
Llama, SmolLM, Mistral and Qwen2. A norm's weights are folded into the projections behind it,
projections of one input are one product. The gradient is of the input alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class FastBlocks:
    """Several blocks in a row, with copies of the weights of Hugging Face decoder layers.

    Layers with other parts give an AttributeError or a TypeError; the caller is to compare results.
    On a CPU, products of `hot_rows` rows (the tokens of one vector) get packed matrices.
    """

    def __init__(self, layers: Sequence[Any], hot_rows: int | None = None) -> None:
        attention = layers[0].self_attn
        self.d_head = int(attention.head_dim)
        self.n_heads = len(attention.q_proj.weight) // self.d_head
        self.n_turned = self.n_heads + len(attention.k_proj.weight) // self.d_head
        self.attention_scale = float(attention.scaling)
        with torch.no_grad():
            self.blocks = [_Block.of(layer, self.d_head, hot_rows) for layer in layers]

    def rotation(self, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotary positions as complex numbers, [pos, a pair of each query and key head].

        Both halves of a head must be turned alike.
        """
        half = self.d_head // 2
        return torch.complex(cosine[0, :, :half], sine[0, :, :half]).repeat(1, self.n_turned)

    def forward(
        self, x: Tensor, rotation: Tensor, positions: Tensor | None, kept: "list[_Kept] | None"
    ) -> Tensor:
        """Push [row, pos, d_model] through; what the gradient will need goes into `kept`, if any.

        With `positions`, ascending indices, the result holds these positions only.
        """
        n_rows, n_pos, _ = x.shape
        for block in self.blocks:
            chosen = positions if block is self.blocks[-1] else None
            normed, scale = _unit(x, block.attention_epsilon)
            heads = block.qkv(normed).view(n_rows, n_pos, -1, self.d_head)
            turned = _turned(heads[:, :, : self.n_turned], rotation)
            query = turned[:, :, : self.n_heads]
            key, value = turned[:, :, self.n_heads :], heads[:, :, self.n_turned :]
            residual = x
            if chosen is not None:
                query, residual = query[:, chosen], x[:, chosen]
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            if kept is not None:
                query, key, value = (part.detach().requires_grad_() for part in (query, key, value))
            # The one step whose gradient is left to autograd: the kernel differs by device.
            with torch.set_grad_enabled(kept is not None):
                attended = self._attention(query, key, value, chosen)
            middle = block.out(attended.detach().transpose(1, 2).flatten(2)).add_(residual)
            mlp_normed, middle_scale = _unit(middle, block.mlp_epsilon)
            gate_up = block.gate_up(mlp_normed)
            gate, up = gate_up.chunk(2, -1)
            y = block.down(functional.silu(gate).mul_(up)).add_(middle)
            if kept is not None:
                heads_kept = (query, key, value)
                kept.append(_Kept(x, scale, heads_kept, attended, middle, middle_scale, gate_up))
            x = y
        return x

    def backward(
        self, gradient: Tensor, rotation: Tensor, positions: Tensor | None, kept: "list[_Kept]"
    ) -> Tensor:
        """From the gradient of the result to that of x."""
        rotation_back = rotation.conj().resolve_conj()
        for block, was in zip(reversed(self.blocks), reversed(kept), strict=True):
            chosen = positions if block is self.blocks[-1] else None
            gate, up = was.gate_up.chunk(2, -1)
            d_gate_up = torch.empty_like(was.gate_up)
            d_gate, d_up = d_gate_up.chunk(2, -1)
            d_product = block.down.backward(gradient)
            torch.mul(d_product, functional.silu(gate), out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
            d_mlp_normed = block.gate_up.backward(d_gate_up)
            d_middle = _unit_backward(d_mlp_normed, was.middle, was.middle_scale, gradient)
            d_attended = block.out.backward(d_middle).unflatten(-1, (self.n_heads, self.d_head))
            d_query, d_key, d_value = torch.autograd.grad(
                was.attended, was.heads, d_attended.transpose(1, 2)
            )
            if chosen is not None:
                d_query = _put_back(d_query, 2, chosen, was.x.shape[1])
                d_middle = _put_back(d_middle, 1, chosen, was.x.shape[1])
            d_turned = torch.cat([d_query, d_key], 1).transpose(1, 2)
            d_heads = torch.cat([_turned(d_turned, rotation_back), d_value.transpose(1, 2)], 2)
            d_normed = block.qkv.backward(d_heads.flatten(2))
            gradient = _unit_backward(d_normed, was.x, was.scale, d_middle)
        return gradient

    def tangents(
        self, tangent: Tensor, rotation: Tensor, positions: Tensor | None, kept: "list[_Kept]"
    ) -> Iterator[Tensor]:
        """Push derivatives, [tangent, pos, d_model], through the last blocks: after each of them.

        `kept` is what `forward` kept of one row at these blocks, for all positions. With
        `positions`, ascending indices, the results hold these positions only.
        """
        n, n_pos, _ = tangent.shape
        for block, was in zip(self.blocks[-len(kept) :], kept, strict=True):
            chosen = positions if block is self.blocks[-1] else None
            d_normed = _unit_tangent(tangent, was.x, was.scale)
            heads = block.qkv.forward(d_normed).view(n, n_pos, -1, self.d_head)
            turned = _turned(heads[:, :, : self.n_turned], rotation)
            residual, query = tangent, turned[:, :, : self.n_heads]
            middle_was = was.middle, was.middle_scale, was.gate_up
            if chosen is not None:
                query, residual = query[:, chosen], tangent[:, chosen]
                middle_was = tuple(part[:, chosen] for part in middle_was)
            key, value = turned[:, :, self.n_heads :], heads[:, :, self.n_turned :]
            attended = self._attention_tangent(query, key, value, was.heads, chosen)
            middle = block.out.forward(attended).add_(residual)
            d_gate_up = block.gate_up.forward(_unit_tangent(middle, *middle_was[:2]))
            (gate, up), (d_gate, d_up) = middle_was[2].chunk(2, -1), d_gate_up.chunk(2, -1)
            d_silu = torch.ops.aten.silu_backward(up, gate)
            product = d_up.mul_(functional.silu(gate)).addcmul_(d_gate, d_silu)
            tangent = block.down.forward(product).add_(middle)
            yield tangent if positions is None or chosen is not None else tangent[:, positions]

    def _attention_tangent(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: tuple[Tensor, Tensor, Tensor],
        chosen: Tensor | None,
    ) -> Tensor:
        """The derivative of attention, [tangent, pos, all heads], of those of its arguments."""
        was_query, was_key, was_value = (part.detach()[0] for part in heads)
        n_key, (n, n_pos, _, d_head) = len(was_key), query.shape
        if chosen is not None:
            was_query = was_query[:, chosen]
        # Query heads by the key head that they share; large products of few matrices.
        was_query = was_query.unflatten(0, (n_key, -1))
        scores = was_query.flatten(1, 2) @ was_key.mT * self.attention_scale
        last = torch.arange(n_pos, device=query.device) if chosen is None else chosen
        later = torch.arange(key.shape[1], device=query.device) > last[:, None]
        shape = (*was_query.shape[:3], key.shape[1])
        weights = scores.view(shape).masked_fill_(later, -torch.inf).softmax(-1)
        query = query.unflatten(2, (n_key, -1)).permute(2, 3, 0, 1, 4).flatten(1, 3)
        key = key.permute(2, 3, 0, 1).flatten(2)
        value = value.permute(2, 1, 0, 3)
        by_query = (query @ was_key.mT).view(*shape[:2], n, n_pos, -1)
        by_key = (was_query.flatten(1, 2) @ key).view(*shape[:3], n, -1).transpose(2, 3)
        moved = by_query.add_(by_key).mul_(self.attention_scale).mul_(weights[:, :, None])
        moved.addcmul_(weights[:, :, None], moved.sum(-1, keepdim=True), value=-1)
        by_weights = (moved.flatten(1, 3) @ was_value).view(*shape[:2], n, n_pos, d_head)
        by_value = (weights.flatten(1, 2) @ value.flatten(2)).view(*shape[:3], n, d_head)
        return by_weights.add_(by_value.transpose(2, 3)).permute(2, 3, 0, 1, 4).flatten(2)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None
    ) -> Tensor:
        mask = None
        if chosen is not None:
            mask = torch.arange(key.shape[2], device=key.device) <= chosen[:, None]
        grouped = self.n_turned != 2 * self.n_heads
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": grouped}
        attention = functional.scaled_dot_product_attention
        return attention(query, key, value, scale=self.attention_scale, **options)


class _Block(NamedTuple):
    """The weights of one block."""

    qkv: "_Linear"
    out: "_Linear"
    gate_up: "_Linear"
    down: "_Linear"
    attention_epsilon: float
    mlp_epsilon: float

    @classmethod
    def of(cls, layer: Any, d_head: int, hot_rows: int | None) -> "_Block":
        attention, mlp = layer.self_attn, layer.mlp
        attention_norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm

        def interleaved(rows: Tensor) -> Tensor:
            # Each head as 0, half, 1, half + 1, ...: rotary pairs become neighbours. Queries and
            # keys are permuted alike, so that their products stay as they are.
            return rows.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)

        def own(layer: Any) -> tuple[Tensor, Tensor]:
            # Quantised and adapted layers are of other classes, and compute something else.
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"{type(layer).__name__} is not a linear layer")
            weight, bias = layer.weight, layer.bias
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            turned = layer in (attention.q_proj, attention.k_proj)
            return (interleaved(weight), interleaved(bias)) if turned else (weight, bias)

        def linear(*layers: Any, norm: Any = None) -> _Linear:
            weight, bias = (torch.cat(parts) for parts in zip(*map(own, layers), strict=True))
            if norm is not None:
                weight = weight * (norm.weight * weight.shape[1] ** 0.5)
            has_bias = any(layer.bias is not None for layer in layers)
            return _Linear.of(weight, bias if has_bias else None, hot_rows)

        return cls(
            linear(attention.q_proj, attention.k_proj, attention.v_proj, norm=attention_norm),
            linear(attention.o_proj),
            linear(mlp.gate_proj, mlp.up_proj, norm=mlp_norm),
            linear(mlp.down_proj),
            float(attention_norm.variance_epsilon),
            float(mlp_norm.variance_epsilon),
        )


class _Kept(NamedTuple):
    """What the gradient of one block needs of its forward pass."""

    x: Tensor
    scale: Tensor
    heads: tuple[Tensor, Tensor, Tensor]
    attended: Tensor
    middle: Tensor
    middle_scale: Tensor
    gate_up: Tensor


class _Linear(NamedTuple):
    """The map x W^T + b, with the gradient of x alone.

    On a CPU each product gets a matrix that lies as it reads it, which is up to twice as fast; for
    `hot_rows` rows, `packed` by the operators that torch.compile uses when it freezes weights.
    """

    weight: Tensor
    transposed: Tensor
    bias: Tensor | None
    hot_rows: int | None = None
    packed: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, hot_rows: int | None) -> "_Linear":
        weight = weight.contiguous()
        if weight.device.type != "cpu":
            return cls(weight, weight.t(), bias)
        transposed = weight.t().contiguous()
        can_pack = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
        if hot_rows is None or weight.dtype != torch.float32 or not can_pack:
            return cls(weight, transposed, bias)
        pack = torch.ops.mkl._mkl_reorder_linear_weight
        both = pack(weight, hot_rows), pack(transposed, hot_rows)
        return cls(weight, transposed, bias, hot_rows, both)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.forward(x)
        return y if self.bias is None else y.add_(self.bias)

    def forward(self, tangent: Tensor) -> Tensor:
        """From the derivative of x to that of the result."""
        return self._product(tangent, 0)

    def backward(self, gradient: Tensor) -> Tensor:
        """From the gradient of the result to that of x."""
        return self._product(gradient, 1)

    def _product(self, x: Tensor, way: int) -> Tensor:
        """The product x W^T, way 0, or x W, way 1."""
        both = self.weight, self.transposed
        matrix, transposed = both[way], both[1 - way]
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == self.hot_rows:
            product = torch.ops.mkl._mkl_linear(rows, self.packed[way], matrix, None, len(rows))
        else:
            product = rows @ transposed
        return product.view(*x.shape[:-1], len(matrix))


def _unit(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Divide x by its norm (RMSNorm without its weights and the root of d); with the factor."""
    scale = torch.linalg.vecdot(x, x)[..., None].add_(x.shape[-1] * epsilon).rsqrt_()
    return x * scale, scale


def _unit_tangent(tangent: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The derivative through `_unit`."""
    normed = x * scale
    along = (tangent * normed).sum(-1, keepdim=True)
    return torch.addcmul(tangent, normed, along, value=-1).mul_(scale)


def _unit_backward(gradient: Tensor, x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """The gradient through `_unit`, plus `residual`, the one that went past it."""
    along = torch.linalg.vecdot(gradient, x)[..., None].mul_(scale**3)
    return torch.addcmul(residual, gradient, scale).addcmul_(x, along, value=-1)


def _turned(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions: neighbours as complex numbers, times e^(i angle)."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:2], -1, 2))
    return torch.view_as_real(pairs * rotation).view(heads.shape)


def _put_back(chosen: Tensor, axis: int, positions: Tensor, n_pos: int) -> Tensor:
    """Zeros along an axis, but for some positions."""
    shape = (*chosen.shape[:axis], n_pos, *chosen.shape[axis + 1 :])
    return chosen.new_zeros(shape).index_copy_(axis, positions, chosen)
