"""Fast CPU forward passes of Llama, Qwen2 and Phi with the model's own weights, without redundant work of the generic
pass.

Padding is skipped: real tokens are packed, and only attention separates rows. The last layer is computed only at the
requested positions. A norm, a rotation and a gated product are one operation each, forward and backward. A decoder
keeps one matrix per layer for q, k and v, and writes keys and values into a preallocated cache.

`reader` returns None unless the result is known to equal the model's own; callers then use the generic path. It
supports only a CPU, without LoRA, quantised weights, dropout, scaled rotary embeddings and sliding windows.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignkit.forward.known import GATED, PARALLEL, as_complex, product_dtype, readable, rotation_order

SHORT = 16  # columns: up to this number plain products are faster than the fused attention
TOLERANCE = 1e-4  # of a logit, compared with the model itself
_agreed: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def reader(model: nn.Module) -> "Reader | None":
    """A Reader of this model if it can be read exactly, otherwise None.

    The model's structure is checked in every call (an adapter, a hook or dropout may have been added). The numbers are
    checked once per model: logits or scores of a small padded batch, read at once and decoded, must be within 1e-4 of
    the model's own.
    """
    if type(model) not in GATED + PARALLEL or not readable(model):
        return None
    if model not in _agreed:
        _agreed[model] = _agrees(model)
    return Reader(model) if _agreed[model] else None


class Reader:
    """Computes hidden states of a Llama, Qwen2 or Phi model with its current weights. Made by `reader`.

    In torch.autocast the products use its dtype; residual stream, attention and heads stay in the dtype of the weights.
    """

    def __init__(self, model: nn.Module):
        config, attention = model.config, model.model.layers[0].self_attn
        self.model, self.body = model, model.model
        self.head = model.lm_head if hasattr(model, "lm_head") else model.score
        self.gated = isinstance(model, GATED)
        self.width, self.heads, self.groups = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.turned = getattr(attention, "rotary_ndims", self.width)
        device = self.body.embed_tokens.weight.device
        self.order = rotation_order(self.heads + self.groups, self.width, self.turned, device)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> Tensor:
        """Last hidden states (n, H) of the n positions where `wanted` (B, L) is True, row by row. Differentiable.

        input_ids, attention_mask: (B, L); positions count only real tokens. wanted is ignored outside the mask.
        """
        real = attention_mask.bool()
        wanted, used = wanted & real, real.any(0)
        if not used.all():  # columns that are padding in every row
            input_ids, real, wanted = input_ids[:, used], real[:, used], wanted[:, used]
        if not wanted.any():
            return self.body.embed_tokens.weight.new_zeros(0, self.model.config.hidden_size)
        dtype = product_dtype()
        with torch.autocast("cpu", enabled=False):
            return self._read(input_ids, self._places(real, wanted), dtype, None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the model's head (LM head or score head) for hidden states (…, H)."""
        with torch.autocast("cpu", enabled=False):
            return self.head(hidden)

    def rope(self, length: int) -> Tensor:
        """Rotations (length, width / 2), complex, of the first positions; 1 for dimensions that are not rotated."""
        weight = self.body.embed_tokens.weight
        cos, sin = self.body.rotary_emb(weight, torch.arange(length, device=weight.device)[None])
        half, rest = self.turned // 2, (self.width - self.turned) // 2
        return torch.complex(F.pad(cos[0, :, :half], (0, rest), value=1.0), F.pad(sin[0, :, :half], (0, rest)))

    def _places(self, real: Tensor, wanted: Tensor) -> "_Places":
        rows, length = real.shape
        first = int(wanted.any(0).long().argmax())
        whole = bool(real.all())
        packed = None if whole else real.flatten().nonzero().squeeze(1)
        asked = wanted.flatten() if whole else wanted.flatten()[packed]
        queries = wanted[:, first:].flatten()
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & real[: 1 if whole else rows, None]
        seen = seen | torch.eye(length, dtype=torch.bool)  # padding attends to itself, so no softmax is 0 / 0
        mask = torch.zeros(seen.shape, dtype=self.body.embed_tokens.weight.dtype).masked_fill_(~seen, -torch.inf)
        positions = (real.long().cumsum(1) - 1).clamp(min=0).flatten()
        return _Places(
            rows,
            length,
            first,
            packed,
            None if asked.all() else asked.nonzero().squeeze(1),
            None if queries.all() else queries.nonzero().squeeze(1),
            mask[:, None],
            self.rope(length)[positions if whole else positions[packed]][:, None],
        )

    def _read(self, ids: Tensor, at: "_Places", dtype: torch.dtype | None, states: list | None) -> Tensor:
        """states: gets each layer's keys and values, (B, groups, L, width)."""
        ids = ids.flatten() if at.packed is None else ids.flatten()[at.packed]
        x = self.body.embed_tokens(ids)
        layers = self.body.layers
        for layer in layers:
            last = layer is layers[-1]
            attention = layer.self_attn
            y = _norm(x, layer.input_layernorm)
            keys = (attention.k_proj, attention.v_proj)
            if not last:
                q, k, v = self._heads(y, at.packed, (at.rows, at.length), at.rope, dtype, attention.q_proj, *keys)
            else:
                k, v = self._heads(y, at.packed, (at.rows, at.length), at.rope, dtype, *keys)
                if at.wanted is not None:
                    x, y = x.index_select(0, at.wanted), y.index_select(0, at.wanted)
                rope = at.rope if at.wanted is None else at.rope[at.wanted]
                (q,) = self._heads(y, at.queries, (at.rows, at.length - at.first), rope, dtype, attention.q_proj)
            if states is not None:
                states.append((k, v))
            mask = at.mask[:, :, -q.shape[2] :]
            if at.length <= SHORT and self.groups == self.heads:
                mixed = _Attention.apply(q, k, v, mask)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.groups < self.heads)
            mixed = mixed.transpose(1, 2).reshape(-1, self.heads * self.width)
            place = at.queries if last else at.packed
            if place is not None:
                mixed = mixed.index_select(0, place)
            if self.gated:
                x = _plus(x, mixed, attention.o_proj, dtype)
                y = _norm(x, layer.post_attention_layernorm)
                inner = _Gated.apply(y, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, dtype)
                x = _plus(x, inner, layer.mlp.down_proj, dtype)
            else:
                inner = layer.mlp.activation_fn(_linear(y, layer.mlp.fc1, dtype))
                x = _plus(_plus(x, mixed, attention.dense, dtype), inner, layer.mlp.fc2, dtype)
        return _norm(x, self.body.norm if self.gated else self.body.final_layernorm)

    def _heads(
        self,
        y: Tensor,
        place: Tensor | None,
        shape: tuple[int, int],
        rope: Tensor,
        dtype: torch.dtype | None,
        *linear: nn.Linear,
    ) -> tuple[Tensor, ...]:
        """q, or k and v, or all three: (rows, heads, columns, width) each."""
        sizes = tuple(module.out_features // self.width for module in linear)
        turned = sizes[0] + (sizes[1] if len(sizes) == 3 else 0)
        return _Heads.apply(
            y,
            rope,
            place,
            shape,
            sizes,
            self.order[: turned * self.width],
            dtype,
            *(module.weight for module in linear),
            *(module.bias for module in linear),
        )


class Decoder:
    """Reads prompts, then one token per row at a time, with a cache of fixed size. No gradients.

    prompt_ids, prompt_mask: (B, P), left-padded (each ends with a real token). room: maximum number of further tokens.
    logits: (B, V), of the next token.
    """

    selectable = True

    @torch.no_grad()
    def __init__(self, reader: Reader, prompt_ids: Tensor, prompt_mask: Tensor, room: int):
        self.reader, self.dtype = reader, product_dtype()
        real, states = prompt_mask.bool(), []
        last = torch.zeros_like(real)
        last[:, -1] = True
        with torch.autocast("cpu", enabled=False):
            hidden = reader._read(prompt_ids, reader._places(real, last), self.dtype, states)
            self.layers = [_Layer.of(reader, layer, self.dtype) for layer in reader.body.layers]
        rows, self.length = real.shape
        self.cache = hidden.new_empty(len(states), 2, rows, reader.groups, self.length + room, reader.width)
        for layer, state in zip(self.cache, states, strict=True):
            for place, value in zip(layer, state, strict=True):
                place[:, :, : self.length] = value
        self.mask = hidden.new_zeros(rows, 1, 1, self.length + room)
        self.mask[:, 0, 0, : self.length].masked_fill_(~real, -torch.inf)
        self.rope, self.position = reader.rope(self.length + room), real.sum(1)
        self.logits = reader.logits(hidden)

    @torch.no_grad()
    def step(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) per row; real (B,): False at padding.

        Raises IndexError when the room is used up.
        """
        reader, end = self.reader, self.length + 1
        if end > self.cache.shape[4]:
            raise IndexError(f"a decoder with room for {self.cache.shape[4]} tokens has no place for one more")
        with torch.autocast("cpu", enabled=False):
            self.mask[:, 0, 0, self.length].masked_fill_(~real, -torch.inf)
            x, rope = reader.body.embed_tokens(tokens), self.rope[self.position][:, None]
            for number, layer in enumerate(self.layers):
                y = _scaled(x, layer.eps) if reader.gated else _norm(x, layer.norm)
                heads = _product(y, layer.qkv, layer.qkv_bias, self.dtype).view(len(x), -1, reader.width)
                as_complex(heads[:, : reader.heads + reader.groups]).mul_(rope)
                q, k, v = heads.split((reader.heads, reader.groups, reader.groups), 1)
                keys, values = self.cache[number]
                keys[:, :, self.length], values[:, :, self.length] = k, v
                q = q.reshape(len(x), reader.groups, -1, reader.width)  # heads that share keys are queries of one head
                chance = (
                    torch.matmul(q, keys[:, :, :end].transpose(2, 3))
                    .mul_(reader.width**-0.5)
                    .add_(self.mask[..., :end])
                )
                mixed = torch.matmul(chance.softmax(-1), values[:, :, :end]).view(len(x), -1)
                x = layer.out(x, mixed, self.dtype)
                if reader.gated:
                    gate, up = _product(_scaled(x, layer.eps_after), layer.inner, None, self.dtype).chunk(2, -1)
                    inner = F.silu(gate).mul_(up)
                else:
                    inner = layer.activation(_product(y, layer.inner, layer.inner_bias, self.dtype))
                x = layer.down(x, inner, self.dtype)
            self.length, self.position = end, self.position + 1
            hidden = _norm(x, reader.body.norm if reader.gated else reader.body.final_layernorm)
        return reader.logits(hidden)

    def select(self, rows: Tensor) -> None:
        """Continue with only these rows (R,)."""
        self.cache, self.mask, self.position = self.cache[:, :, rows], self.mask[rows], self.position[rows]


@dataclass(frozen=True)
class _Places:
    """Positions of the tokens of a batch. Indices are None if they would select everything in order.

    packed (N,): real tokens among the B · L. wanted (n,): the wanted ones among the N. queries (n,): the same, among
    the columns from `first` on. mask (B or 1, 1, L, L): 0, or −inf if a token is not attended to. rope (N, 1, width /
    2).
    """

    rows: int
    length: int
    first: int
    packed: Tensor | None
    wanted: Tensor | None
    queries: Tensor | None
    mask: Tensor
    rope: Tensor


@dataclass(frozen=True)
class _Layer:
    """A layer's weights for the decoder: q, k, v in one matrix, gate and up too, RMS norms folded in."""

    qkv: Tensor
    qkv_bias: Tensor | None
    inner: Tensor
    inner_bias: Tensor | None
    ends: tuple[tuple[Tensor, Tensor | None], ...]
    norm: nn.Module
    activation: nn.Module | None
    eps: float
    eps_after: float

    @classmethod
    def of(cls, reader: Reader, layer: nn.Module, dtype: torch.dtype | None) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        linear = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = _ordered(torch.cat([module.weight for module in linear]), reader.order)
        bias = None if linear[0].bias is None else _ordered(torch.cat([module.bias for module in linear]), reader.order)
        if reader.gated:
            after = layer.post_attention_layernorm
            qkv = qkv * layer.input_layernorm.weight
            inner, inner_bias = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * after.weight, None
            ends, activation = (attention.o_proj, mlp.down_proj), None
            eps, eps_after = layer.input_layernorm.variance_epsilon, after.variance_epsilon
        else:
            inner, inner_bias = mlp.fc1.weight, mlp.fc1.bias
            ends, activation, eps, eps_after = (attention.dense, mlp.fc2), mlp.activation_fn, 0.0, 0.0
        if dtype is not None:
            qkv, inner = qkv.to(dtype), inner.to(dtype)
        ends = tuple((end.weight if dtype is None else end.weight.to(dtype), end.bias) for end in ends)
        return cls(qkv, bias, inner, inner_bias, ends, layer.input_layernorm, activation, eps, eps_after)

    def out(self, x: Tensor, mixed: Tensor, dtype: torch.dtype | None) -> Tensor:
        return _added(x, mixed, *self.ends[0], dtype)

    def down(self, x: Tensor, inner: Tensor, dtype: torch.dtype | None) -> Tensor:
        return _added(x, inner, *self.ends[1], dtype)


class _RMSNorm(torch.autograd.Function):
    """x / √(mean x² + eps) · weight over the last dimension of (N, H)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = _inverse_rms(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        along = grad * unit
        radial = torch.mv(along, weight).div_(unit.shape[-1])[:, None]  # a step along x does not change the result
        return torch.addcmul(grad * weight, unit, radial, value=-1).mul_(scale), along.sum(0), None


class _Heads(torch.autograd.Function):
    """Tokens (N, H) to heads, the first of which are rotated: (rows, heads, columns, width) for each of the weights.

    place (N,): positions of the tokens among rows · columns; padding is filled with an arbitrary token, which nothing
    attends to. order: of the rotated rows of the weights, pair by pair.
    """

    @staticmethod
    def forward(ctx, x, rope, place, shape, sizes, order, dtype, *linear):
        weights, biases = linear[: len(sizes)], linear[len(sizes) :]
        weight = _ordered(torch.cat(weights), order)
        bias = None if biases[0] is None else _ordered(torch.cat(biases), order)
        width = len(weight) // sum(sizes)
        heads = _product(x, weight, bias, dtype)
        as_complex(heads.view(len(x), -1, width)[:, : len(order) // width]).mul_(rope)
        if place is not None:
            heads = heads.index_select(0, _sources(place, shape[0] * shape[1]))
        ctx.save_for_backward(x, weight, rope, place, order)
        ctx.sizes, ctx.dtype, ctx.biased = sizes, dtype, bias is not None
        return heads.view(*shape, -1, width).transpose(1, 2).split(sizes, 1)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, rope, place, order = ctx.saved_tensors
        width = grads[0].shape[-1]
        grad = torch.cat([part.transpose(1, 2) for part in grads], 2).view(-1, len(weight))
        if place is not None:
            grad = grad.index_select(0, place)
        as_complex(grad.view(len(grad), -1, width)[:, : len(order) // width]).mul_(rope.conj())
        rows = [size * width for size in ctx.sizes]
        of_weight = _unordered(_product(grad.t(), x.t(), None, ctx.dtype), order).split(rows)
        of_bias = _unordered(grad.sum(0), order).split(rows) if ctx.biased else [None] * len(rows)
        return (_product(grad, weight.t(), None, ctx.dtype), *[None] * 6, *of_weight, *of_bias)


class _Attention(torch.autograd.Function):
    """softmax(q · kᵀ / √width + mask) · v for short rows, (rows, heads, columns, width), for which the fused kernel is
    slow."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        rows, heads, queries, width = q.shape
        ctx.shape, ctx.scale = (rows, heads, -1, width), width**-0.5
        q, k, v = (part.reshape(rows * heads, -1, width) for part in (q, k, v))
        mask = mask.expand(rows, heads, queries, -1).reshape(rows * heads, queries, -1)
        chance = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
        ctx.save_for_backward(q, k, v, chance)
        return torch.bmm(chance, v).view(ctx.shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, chance = ctx.saved_tensors
        grad = grad.reshape(len(q), -1, q.shape[-1])
        of_chance = torch.bmm(grad, v.transpose(1, 2))
        of_score = torch._softmax_backward_data(of_chance, chance, -1, chance.dtype).mul_(ctx.scale)
        return (
            *(
                part.view(ctx.shape)
                for part in (
                    torch.bmm(of_score, k),
                    torch.bmm(of_score.transpose(1, 2), q),
                    torch.bmm(chance.transpose(1, 2), grad),
                )
            ),
            None,
        )


class _Gated(torch.autograd.Function):
    """silu(x · gateᵀ) ⊙ (x · upᵀ) for x (N, H)."""

    @staticmethod
    def forward(ctx, x, gate, up, dtype):
        opened, passed = _product(x, gate, None, dtype), _product(x, up, None, dtype)
        ctx.save_for_backward(x, gate, up, opened, passed)
        ctx.dtype = dtype
        return F.silu(opened).mul_(passed)

    @staticmethod
    def backward(ctx, grad):
        x, gate, up, opened, passed = ctx.saved_tensors
        of_passed = F.silu(opened).mul_(grad)
        of_opened = torch.ops.aten.silu_backward(grad * passed, opened)
        of_x = _added(_product(of_opened, gate.t(), None, ctx.dtype), of_passed, up.t(), None, ctx.dtype)
        return of_x, *(_product(part.t(), x.t(), None, ctx.dtype) for part in (of_opened, of_passed)), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x · weightᵀ + bias, multiplied in `dtype` and returned in x's dtype."""
    if dtype is None:
        return F.linear(x, weight, bias)
    product = F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return product if bias is None else product.add_(bias)


def _added(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """total + x · weightᵀ + bias, in place."""
    total = total.addmm_(x, weight.t()) if dtype is None else total.add_(_product(x, weight, None, dtype))
    return total if bias is None else total.add_(bias)


def _linear(x: Tensor, module: nn.Linear, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return F.linear(x, module.weight, module.bias)
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(x.to(dtype), module.weight.to(dtype), bias).to(x.dtype)


def _plus(total: Tensor, x: Tensor, module: nn.Linear, dtype: torch.dtype | None) -> Tensor:
    """total + module(x), a new tensor."""
    if dtype is not None:
        return total + _linear(x, module, dtype)
    total = total if module.bias is None else total + module.bias
    return torch.addmm(total, x, module.weight.t())


def _norm(x: Tensor, module: nn.Module) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return module(x)
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, eps: float) -> Tensor:
    return x * _inverse_rms(x, eps)


def _sources(place: Tensor, size: int) -> Tensor:
    """Number of the token at each of `size` positions, given the positions of the tokens; 0 where there is none."""
    return place.new_zeros(size).index_copy_(0, place, torch.arange(len(place)))


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    """The first rows in this order, the other rows unchanged."""
    return torch.cat([rows[order], rows[len(order) :]]) if len(order) else rows


def _unordered(rows: Tensor, order: Tensor) -> Tensor:
    back = rows.clone()
    back[order] = rows[: len(order)]
    return back


@torch.no_grad()
def _agrees(model: nn.Module) -> bool:
    """Whether a small batch with one padded row gives the model's own logits or scores."""
    reader, length = Reader(model), 6
    ids = (7919 * torch.arange(2 * length) + 3).remainder(model.config.vocab_size).view(2, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    with torch.autocast("cpu", enabled=False):
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.long().cumsum(1) - 1).clamp(min=0), use_cache=False
        ).last_hidden_state
        expected = reader.head(hidden)
        read = reader.logits(reader(ids, mask, mask))
        decoder = Decoder(reader, ids[:, :4], mask[:, :4], 2)
        decoded = torch.stack([decoder.logits, *(decoder.step(ids[:, t], mask[:, t]) for t in (4, 5))], 1)
    return torch.allclose(read, expected[mask], rtol=1e-5, atol=TOLERANCE) and torch.allclose(
        decoded, expected[:, 3:], rtol=1e-5, atol=TOLERANCE
    )
