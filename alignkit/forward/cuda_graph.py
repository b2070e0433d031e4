"""Sample on a GPU without waiting for Python: one step (model and draw) is captured in a CUDA graph and replayed.

No value inside the step is a Python number. Column, positions, mask and uniforms are tensors, which the step itself
advances. Keys and values are written into a cache of fixed length. The host checks only every CHECK steps whether every
row has ended. Precision follows `forward.precision.autocast`: products in bf16 on a GPU, the rest in float32.

Supports Llama, Qwen2 and Phi on a GPU, if a small batch gives the model's own results; all other cases use the generic
loop of `sampling`. On a CPU the step can run without capture, as in the tests.
"""

import warnings
import weakref
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PhiForCausalLM, Qwen2ForCausalLM

from alignkit.formulas.randomness import inverse_cdf
from alignkit.forward import cpu
from alignkit.forward.known import as_complex, product_dtype, readable, rotation_order
from alignkit.forward.precision import autocast
from alignkit.forward.rollout import distinct_prompts, each_end, position_ids

DEVICE = "cuda"
SHORTEST = 16  # tokens: for fewer, capturing the step costs more than it saves
CHECK = 16  # steps
WARM_UP = 3  # steps before the capture, which choose kernels and allocate workspaces
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of log-probs, in units of their standard deviation
_agreed: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def usable(policy: nn.Module, max_new_tokens: int) -> bool:
    """Whether `Decoder` gives this policy's own results: tested once per model, with a warning if it does not.

    The model's structure is checked in every call, as in `cpu.reader`.
    """
    if policy.device.type != DEVICE or max_new_tokens < SHORTEST:
        return False
    if type(policy) not in (LlamaForCausalLM, Qwen2ForCausalLM, PhiForCausalLM) or not readable(policy, DEVICE):
        return False
    if policy not in _agreed:
        try:
            error = _error(policy)
            agrees, why = error <= TOLERANCE[_precision(policy)], f"its log-probs are off by {error:.2g} deviations"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as raised:  # raised if a capture is not permitted
            agrees, why = False, str(raised).partition("\n")[0]
        if not agrees:
            warnings.warn(f"{type(policy).__name__} is sampled without a CUDA graph: {why}", stacklevel=3)
        _agreed[policy] = agrees
    return _agreed[policy]


class Decoder:
    """Samples `room` tokens for each of `rows` prompts of `width` columns, with the policy's current weights.

    Usage: `start`, then `run`. Results: tokens, logprobs and real (rows, room); alive (rows,): not ended yet; finite:
    False if a logit was NaN or infinite; logits (rows, V) float32: of the next token. No gradients.
    """

    @torch.no_grad()
    def __init__(self, policy: nn.Module, rows: int, width: int, room: int, *, eos_token_id: int | Collection[int],
                 pad_token_id: int, temperature: float = 1.0):
        self.policy, self.width, self.rows = policy, width, rows
        self.ends, self.pad_token_id, self.temperature = each_end(eos_token_id), pad_token_id, temperature
        self.reader = reader = cpu.Reader(policy)
        dtype, device, length = _precision(policy), policy.device, -(-(width + room) // 8) * 8  # as attention aligns it
        unchanged = torch.arange(len(reader.order), (reader.heads + 2 * reader.groups) * reader.width, device=device)
        order = torch.cat([reader.order, unchanged])
        self.layers = [_Layer.of(layer, reader.gated, order, dtype) for layer in reader.body.layers]
        self.norm = reader.body.norm if reader.gated else reader.body.final_layernorm
        self.head = stacked_weights([policy.lm_head], dtype)
        self.rope = reader.rope(length)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.cache = [zeros(rows, 2 * reader.groups, length, reader.width, dtype=dtype) for _ in self.layers]
        self.mask = zeros(rows, 1, 1, length, dtype=dtype)  # 0, or −inf at empty positions
        self.logits = zeros(rows, policy.config.vocab_size)
        self.uniform = zeros(room, rows, dtype=torch.float64)
        self.turn, self.place = zeros(1, dtype=torch.long), zeros(1, dtype=torch.long)  # columns of response and cache
        self.position = zeros(rows, dtype=torch.long)
        self.tokens, self.logprobs = zeros(rows, room, dtype=torch.long), zeros(rows, room)
        self.real, self.alive = zeros(rows, room, dtype=torch.bool), zeros(rows, dtype=torch.bool)
        self.finite = zeros(dtype=torch.bool)
        self.graph = None

    @torch.no_grad()
    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, uniform: Tensor) -> None:
        """Read prompts (rows, width), left-padded, with the policy itself; each distinct prompt once.

        uniform (room, rows): float64 in [0, 1), used to draw the tokens.
        """
        if self.mask.device.type == "cuda" and self.graph is None:
            self._capture()  # start overwrites what the warm-up steps write
        ids, mask, which = distinct_prompts(prompt_ids, prompt_mask)
        with autocast(ids.device):
            output = self.policy(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
                                 use_cache=True, logits_to_keep=1)
        within = rotation_order(1, self.reader.width, self.reader.turned, ids.device)
        for cache, layer in zip(self.cache, output.past_key_values.layers, strict=True):
            cache[:, :, : self.width] = torch.cat([layer.keys[..., within], layer.values], 1)[which]
        self.logits.copy_(output.logits[:, -1][which])
        self.mask.fill_(-torch.inf)
        self.mask[:, 0, 0, : self.width].masked_fill_(prompt_mask.bool(), 0.0)
        self.position.copy_(prompt_mask.sum(1))
        self.uniform.copy_(uniform)
        self.turn.zero_(), self.place.fill_(self.width), self.alive.fill_(True), self.finite.fill_(True)
        self.tokens.fill_(self.pad_token_id), self.logprobs.zero_(), self.real.zero_()

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample until every row has ended: tokens, mask and log-probs (rows, T), with T ≤ room the longest
        response."""
        for turn in range(1, len(self.uniform) + 1):
            self.advance()
            if turn % CHECK == 0 and not (self.alive.any() & self.finite):  # the host waits only here
                break
        length = int(self.real.any(0).sum())
        return self.tokens[:, :length], self.real[:, :length], self.logprobs[:, :length]

    def advance(self) -> None:
        """One step: the captured one on a GPU."""
        self.step() if self.graph is None else self.graph.replay()

    @torch.no_grad()
    def step(self) -> None:
        """Draw one token per row from `logits`, store it, and read it. No operation here waits for the device."""
        with torch.autocast(self.mask.device.type, enabled=False):
            self._read(self._draw())

    def _draw(self) -> Tensor:
        uniform, ended = self.uniform.index_select(0, self.turn).t(), self.alive.logical_not()
        token, logprob = inverse_cdf(self.logits / self.temperature, uniform)
        self.finite.logical_and_(logprob.isfinite().all())
        token = token.masked_fill(ended, self.pad_token_id)
        self.tokens.index_copy_(1, self.turn, token.unsqueeze(1))
        self.logprobs.index_copy_(1, self.turn, logprob.masked_fill(ended, 0.0).unsqueeze(1))
        self.real.index_copy_(1, self.turn, self.alive.unsqueeze(1))
        seen = torch.zeros_like(ended, dtype=self.mask.dtype).masked_fill_(ended, -torch.inf)
        self.mask.index_copy_(3, self.place, seen.view(-1, 1, 1, 1))
        for end in self.ends:
            self.alive.logical_and_(token != end)
        return token

    def _read(self, token: Tensor) -> None:
        reader, dtype = self.reader, self.mask.dtype
        x = F.embedding(token, reader.body.embed_tokens.weight)
        rope = self.rope.index_select(0, self.position).unsqueeze(1)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            y = _norm(x, layer.norm)
            heads = _linear(y, layer.qkv).float().view(self.rows, -1, reader.width)
            as_complex(heads.narrow(1, 0, reader.heads + reader.groups)).mul_(rope)
            q, new = heads.to(dtype).split((reader.heads, 2 * reader.groups), 1)
            cache.index_copy_(2, self.place, new.unsqueeze(2))
            keys, values = cache.chunk(2, 1)
            q = q.reshape(self.rows, reader.groups, -1, reader.width)  # heads that share keys are queries of one head
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).reshape(self.rows, -1)
            x = x + _linear(mixed, layer.out)
            if reader.gated:
                gate, up = _linear(_norm(x, layer.norm_after), layer.inner).chunk(2, -1)
                inner = F.silu(gate) * up
            else:
                inner = layer.activation(_linear(y, layer.inner))
            x = x + _linear(inner, layer.down)
        self.logits.copy_(_linear(_norm(x, self.norm), self.head))
        for counter in (self.turn, self.place, self.position):
            counter.add_(1)

    def _capture(self) -> None:
        """As in PyTorch's notes on CUDA graphs: some steps on a side stream, then the capture."""
        with torch.cuda.device(self.mask.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        self.graph = graph


Linear = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass(frozen=True)
class _Layer:
    """A layer's weights in the decoder's precision: q, k, v in one matrix, gate and up too."""

    qkv: Linear
    out: Linear
    inner: Linear
    down: Linear
    norm: nn.Module
    norm_after: nn.Module | None
    activation: nn.Module | None

    @classmethod
    def of(cls, layer: nn.Module, gated: bool, order: Tensor, dtype: torch.dtype) -> "_Layer":
        """order: of the rows of q, k and v, so that dimensions that are rotated together lie side by side."""
        attention, mlp = layer.self_attn, layer.mlp
        weight, bias = stacked_weights([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        qkv = weight.index_select(0, order), None if bias is None else bias.index_select(0, order)
        if gated:
            groups = [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
            after, activation = layer.post_attention_layernorm, None
        else:
            groups = [attention.dense], [mlp.fc1], [mlp.fc2]
            after, activation = None, mlp.activation_fn
        return cls(qkv, *(stacked_weights(group, dtype) for group in groups), layer.input_layernorm, after, activation)


def stacked_weights(modules: list[nn.Linear], dtype: torch.dtype) -> Linear:
    """Stack weights and biases of linear layers with the same input, so that one product computes all of them."""
    weights, biases = ([getattr(module, name) for module in modules] for name in ("weight", "bias"))
    return tuple(None if parts[0] is None else torch.cat(parts).to(dtype) for parts in (weights, biases))


def _linear(x: Tensor, linear: Linear) -> Tensor:
    weight, bias = linear
    return F.linear(x.to(weight.dtype), weight, bias)


def _norm(x: Tensor, module: nn.Module) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return module(x)
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)  # one kernel


def _precision(policy: nn.Module) -> torch.dtype:
    """The dtype in which `forward.precision.autocast` multiplies."""
    return torch.bfloat16 if policy.device.type == "cuda" else product_dtype() or torch.float32


@torch.no_grad()
def _error(policy: nn.Module) -> float:
    """Difference between log-probs computed step by step and those of the model's own forward pass over the same
    tokens.

    Root mean square over all words with non-zero probability, in units of their standard deviation. One row is padded.
    """
    device, width, room = policy.device, 6, 8
    ids = (7919 * torch.arange(2 * width) + 3).remainder(policy.config.vocab_size).view(2, width).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    decoder = Decoder(policy, 2, width, room, eos_token_id=-1, pad_token_id=0)
    decoder.start(ids, mask, torch.linspace(0.05, 0.95, 2 * room, dtype=torch.float64).view(room, 2))
    drawn_from = []
    for _ in range(room):
        drawn_from.append(decoder.logits.clone())
        decoder.advance()
    ids, mask = torch.cat([ids, decoder.tokens], 1), F.pad(mask, (0, room), value=True)
    with autocast(device):
        own = policy(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    expected = own[:, width - 1 : -1].float().log_softmax(-1)
    possible = expected > -20
    apart = (torch.stack(drawn_from, 1).log_softmax(-1) - expected)[possible]
    return float(apart.square().mean().sqrt() / expected[possible].std(correction=0).clamp(min=1e-3))
