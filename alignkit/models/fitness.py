"""Checks whether alignkit can read a model: its switches, its context, and a test on a few tokens."""

import weakref

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # nats, in float32, for logits up to 10; larger ones are rounded more coarsely
SWITCHES = {"output_router_logits": False, "output_hidden_states": False, "output_attentions": False,
            "return_dict": True, "use_cache": True}
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
_judged: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def set_switches(config) -> None:
    """Set the options in a model's config that change the form of its outputs to the form that alignkit reads."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in SWITCHES.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)


def context_length(model: nn.Module) -> int | None:
    """The model's maximum number of tokens, from its config; None if the config sets no limit."""
    config = model.config
    parts = (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,)
    limits = [getattr(part, name, None) for part in parts for name in CONTEXT]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def judged(model: nn.Module, cache: bool = True) -> None:
    """`judge` a model on its first use; without cache: for a model that only reads existing text."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters keep the architecture
    if _judged.get(model, -1) < cache:
        judge(model, cache)
        _judged[model] = cache


@torch.no_grad()
def judge(model: nn.Module, cache: bool = True) -> None:
    """Test a model on two short rows. The beginning of the padded row is read in a batch with the cache, and the whole
    row alone without it.

    Sets the model's switches. Raises ValueError, with one sentence about the fault, if log-probs (scores, for a
    classifier) differ by more than 1e-4, if the model has no usable cache, or if it cannot be read at all.
    """
    set_switches(model.config)
    name, training = type(model).__name__, [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # with dropout any two forward passes would differ
        with torch.autocast(model.device.type, enabled=False):
            if "SequenceClassification" in name:
                gaps, size = _trial_of_classifier(model)
            else:
                gaps, size = _trial(model, name, cache)
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{name} cannot be read as a model that reads tokens from the left to the right "
                         f"({type(error).__name__}: {str(error)[:200]}); use another architecture") from error
    finally:
        for module, mode in training:
            module.training = mode
    allowed = TOLERANCE * max(1.0, size / 10) if model.dtype == torch.float32 else 0.5
    for what, gap in gaps.items():
        if gap > allowed:  # NaN says nothing here: that weights have diverged is said where they are read
            raise ValueError(f"{name} reads {what} (by {gap:.2g}, expected at most {allowed:.1g}), so what is sampled, "
                             "scored and trained would not be the same; use another architecture")


PADDED = "the beginning of a row in a padded batch otherwise than in the row alone"
CACHED = "with its cache otherwise than without"


def _trial(model: nn.Module, name: str, cached: bool) -> tuple[dict[str, float], float]:
    """The largest gaps between log-probs of the padded row, and the largest logit. Uses three forward passes, or
    two."""
    ids, mask = _rows(model)
    first = ids.shape[1] - int(mask[1].sum())

    def read(ids: Tensor, mask: Tensor, **cache):
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.long().cumsum(1) - 1).clamp(min=0), **cache)

    logits = read(ids[1:, first:], mask[1:, first:], use_cache=False).logits
    alone = logits.float().log_softmax(-1)
    size = float(logits.abs().nan_to_num(0, 0, 0).clamp(max=1e3).max())
    together = read(ids[:, :-1], mask[:, :-1], use_cache=cached)
    gaps = {PADDED: _gap(together.logits[1:, first:].float().log_softmax(-1), alone[:, :-1])}
    if not cached:
        return gaps, size
    cache = getattr(together, "past_key_values", None)
    if cache is None:
        raise ValueError(f"{name} has no cache of keys and values (past_key_values), with which a response is sampled "
                         "token by token; use another architecture")
    last = model(input_ids=ids[:, -1:], attention_mask=mask, position_ids=mask.long().sum(1, keepdim=True) - 1,
                 past_key_values=cache, use_cache=True).logits[1:]
    return gaps | {CACHED: _gap(last.float().log_softmax(-1), alone[:, -1:])}, size


def _trial_of_classifier(model: nn.Module) -> tuple[dict[str, float], float]:
    """The largest gap between scores of tokens, and the largest score; padded on the right, as in scoring replies."""
    ids, mask = (part.flip(1) for part in _rows(model))
    body = getattr(model, model.base_model_prefix)

    def scores(ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return model.score(body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
                           .last_hidden_state).float()

    together, length = scores(ids, mask), int(mask[1].sum())
    alone = scores(ids[1:, :length], mask[1:, :length])
    return {PADDED: _gap(together[1:, :length], alone)}, float(together.abs().max())


def _rows(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Two rows of ordinary tokens, of lengths five and three, padded on the left: ids and mask (2, 5)."""
    config = model.config.get_text_config()
    named = {value for part in (model.config, config) for name, value in part.to_dict().items()
             if "token" in name and isinstance(value, int)}  # those of padding, ends or images mean something
    size = min(config.vocab_size, model.get_input_embeddings().num_embeddings)
    ordinary = [token for token in range(min(size, 64 + len(named))) if token not in named] or [0]
    ids = torch.tensor([ordinary[(7 * place + 3) % len(ordinary)] for place in range(10)]).view(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids.to(model.device), mask.to(model.device)


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest difference; if a probability is 0, differences between two very small log-probs are ignored."""
    return float((one.clamp(min=-100) - other.clamp(min=-100)).abs().max())
