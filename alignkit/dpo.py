"""Direct preference optimisation, Bradley–Terry on β log(π / π_ref): pairs, one step, and the training loop.

DPO has no KL term on samples. The reference enters only through the implicit reward, so nothing limits how far the
policy moves on responses outside the pairs. Chosen and rejected log-probs are therefore logged separately.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from alignkit.configs import DPOConfig
from alignkit.data.ends import list_ends
from alignkit.errors import InvariantError, NonFinite
from alignkit.formulas.losses import dpo_loss, implicit_reward
from alignkit.formulas.randomness import seeded
from alignkit.forward.precision import autocast, checkpointed
from alignkit.forward.reading import response_logps
from alignkit.forward.rollout import Rollout, encode_rows, full_ids, groups, passes, to_device, token_ids, trimmed
from alignkit.forward.scoring import check_lengths
from alignkit.killpoints import reached
from alignkit.metrics import stat
from alignkit.models.adapters import reference_policy
from alignkit.models.identity import tensors_hash, weights_hash
from alignkit.optim import (
    adamw,
    all_or_nothing,
    check_weights,
    copy_weights,
    set_learning_rate,
    trained_weights,
    within_memory,
)
from alignkit.processes import in_shares, own_rows, sum_gradients, summed
from alignkit.shards import take_step
from alignkit.storage import data_hash


@dataclass(frozen=True)
class DPOStats:
    """Statistics of one DPO step, measured before the step. `log()` returns them under TRL's names."""

    step: int = stat("step", "number of optimiser steps so far, including this one")
    loss: float = stat("loss", "mean DPO loss; ln 2 at step 0 for the sigmoid")
    chosen_reward: float = stat("rewards/chosen", "mean implicit reward β log(π / π_ref) of the chosen responses")
    rejected_reward: float = stat("rewards/rejected", "the same for the rejected responses")
    accuracy: float = stat("rewards/accuracies", "share of pairs whose chosen response has the larger implicit reward")
    margin: float = stat("rewards/margins", "mean implicit reward, chosen minus rejected")
    chosen_logps: float = stat("logps/chosen", "mean log π of the chosen responses, nats per response")
    rejected_logps: float = stat("logps/rejected", "the same for the rejected responses")
    chosen_shift: float = stat(
        "logps/chosen_shift", "mean log π − log π_ref of the chosen responses: below 0 they became less likely"
    )
    rejected_shift: float = stat("logps/rejected_shift", "the same for the rejected responses")
    grad_norm: float = stat("grad_norm", "gradient norm before clipping")
    learning_rate: float = stat("learning_rate", "learning rate at this step")

    def log(self) -> dict[str, float]:
        """The statistics under their plot names."""
        return {f.metadata["name"]: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Pairs:
    """B preference pairs: two Rollouts with the same prompts, and the reference's log-probs (B,) or None."""

    chosen: Rollout
    rejected: Rollout
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows) -> "Pairs":
        return Pairs(
            self.chosen[rows],
            self.rejected[rows],
            *(None if logps is None else logps[rows] for logps in (self.ref_chosen_logps, self.ref_rejected_logps)),
        )

    def parts(self, tokens_per_pass: int | None) -> list["Pairs"]:
        """Split the pairs into parts whose chosen (or rejected) side fits one forward pass.

        tokens_per_pass: maximum number of tokens of one side of a part, padding included; None makes one part.
        """
        if tokens_per_pass is None:
            return [self]
        longest = torch.maximum(*(side.response_mask.sum(1) for side in (self.chosen, self.rejected)))
        parts = [self[rows] for rows in groups(self.chosen.prompt_mask.sum(1), longest, tokens_per_pass)]
        return [replace(pairs, chosen=trimmed(pairs.chosen), rejected=trimmed(pairs.rejected)) for pairs in parts]


@torch.no_grad()
def with_reference(ref_policy: nn.Module, pairs: Pairs, *, batch_size: int = 256, precision: str = "fp32",
                   tokens_per_pass: int | None = None) -> Pairs:
    """The same pairs with the reference's log-probs, computed once. precision, tokens_per_pass: as in training, see
    DPOConfig; batch_size: rows per pass if tokens_per_pass is None."""
    device = pairs.chosen.prompt_ids.device

    def logps(own: slice) -> Iterator[Tensor]:
        for side in (pairs.chosen[own], pairs.rejected[own]):
            read, numbers = passes(side, tokens_per_pass, batch_size), torch.arange(len(side), device=device)
            place = torch.cat([numbers[rows] for rows, _ in read]).argsort()  # back into the order of the pairs
            yield torch.cat([response_logps(ref_policy, part) for _, part in read])[place]

    with autocast(device, precision):
        return Pairs(pairs.chosen, pairs.rejected, *in_shares(logps, len(pairs)))


def dpo_step(
    policy: nn.Module, optimizer: torch.optim.Optimizer, pairs: Pairs, config: DPOConfig, step: int = 1
) -> DPOStats:
    """One optimiser step on a batch of pairs with reference log-probs. Returns the statistics from before the step.

    Raises ValueError if the reference's log-probs are missing, NonFinite (weights unchanged) if loss or gradient is not
    finite.
    """
    if pairs.ref_chosen_logps is None:
        raise ValueError("pairs carry no reference log-probs; call with_reference(ref_policy, pairs) first")
    # Gradients: one part of the batch at a time, of this process's pairs.
    optimizer.zero_grad(set_to_none=True)
    (own, weight), loss, read = own_rows(len(pairs)), 0.0, []
    with checkpointed(policy, config.gradient_checkpointing):
        for part in pairs[own].parts(config.tokens_per_pass):
            of_part, *logps = accumulate_gradient(policy, part, weight * len(part) / len(pairs), config)
            loss = loss + of_part
            read.append([*logps, part.ref_chosen_logps, part.ref_rejected_logps])
    # Add up what the processes have found.
    sum_gradients(policy)
    loss = summed({"loss": loss})["loss"]
    chosen_logps, rejected_logps, *refs = in_shares(lambda _: map(torch.cat, zip(*read, strict=True)), len(pairs))
    logps = [chosen_logps, rejected_logps]
    # Clip the gradient norm, stop if it is not finite, and step.
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.grad is not None], config.max_grad_norm)
    if not torch.isfinite(norm + loss):
        raise NonFinite(
            f"DPO step {step} has loss {float(loss):.3g} and gradient norm {float(norm):.3g}; the weights were left "
            "as they were", step, {"chosen": token_ids(pairs.chosen), "rejected": token_ids(pairs.rejected)}
        )
    take_step(optimizer)
    with torch.no_grad():
        chosen, rejected = (implicit_reward(own, ref, config.beta) for own, ref in zip(logps, refs, strict=True))
        shifts = [float((own - ref).mean()) for own, ref in zip(logps, refs, strict=True)]
        return DPOStats(
            step=step, loss=float(loss), chosen_reward=float(chosen.mean()), rejected_reward=float(rejected.mean()),
            accuracy=float((chosen > rejected).float().mean()), margin=float((chosen - rejected).mean()),
            chosen_logps=float(logps[0].mean()), rejected_logps=float(logps[1].mean()), chosen_shift=shifts[0],
            rejected_shift=shifts[1], grad_norm=float(norm), learning_rate=optimizer.param_groups[0]["lr"],
        )


def accumulate_gradient(
    policy: nn.Module, pairs: Pairs, share: float, config: DPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradient of one part of a batch to the policy's gradients.

    share: the part's share of the batch's pairs, which weights its loss. Returns the part's contribution to the loss,
    and the log-probs of its chosen and of its rejected responses, (B,) each.
    """
    sides = (pairs.chosen, pairs.rejected)
    with autocast(pairs.chosen.prompt_ids.device, config.precision):
        logps = [response_logps(policy, side) for side in sides]
    tokens = [side.response_mask.sum(1).clamp(min=1) if config.length_normalised else 1 for side in sides]
    values = zip([*logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps], tokens * 2, strict=True)
    loss = share * dpo_loss(
        *(value / count for value, count in values),
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
    ).mean()
    loss.backward()
    return loss.detach(), *(values.detach() for values in logps)


@dataclass
class DPOState:
    """The state that a DPO run changes, and its training pairs. `start` makes one.

    pairs: with the reference's log-probs; without them, ref_policy computes them at each step. from_reference: whether
    the policy was identical to the reference when the run started.
    """

    policy: nn.Module
    pairs: Pairs
    optimizer: torch.optim.Optimizer
    ref_policy: nn.Module | None = None
    from_reference: bool = True
    reference: str = "the policy"  # or a hash of the reference's weights
    done: int = 0  # steps made so far
    whole: bool = field(default=True, repr=False)  # False while a step is being made, or if optimiser states are lost
    pass_limit: int | None = field(default=None, repr=False)  # tokens a pass that fit, once memory ran out

    @classmethod
    def start(cls, policy: nn.Module, tokenizer, rows: list[dict], config: DPOConfig, *,
              ref_policy: nn.Module | None = None) -> "DPOState":
        """The state of a run before its first step, on rows prompt / chosen / rejected (texts).

        ref_policy: by default the current policy. Raises ValueError if there are no rows, or if one is longer than the
        model's context.
        """
        if not rows:
            raise ValueError("rows is empty, expected at least one preference pair")
        list_ends(policy, tokenizer)
        from_reference = ref_policy is None
        ref_policy = reference_policy(policy) if ref_policy is None else ref_policy
        pairs = Pairs(
            *(
                to_device(encode_rows(tokenizer, rows, side, config.max_new_tokens), policy.device)
                for side in ("chosen", "rejected")
            )
        )
        for side in (pairs.chosen, pairs.rejected):
            check_lengths(policy, side.prompt_mask.sum(1) + side.response_mask.sum(1))
        if config.precompute_reference:
            pairs = with_reference(ref_policy, pairs, batch_size=2 * config.batch_size, precision=config.precision,
                                   tokens_per_pass=config.tokens_per_pass)
        optimizer = adamw([p for p in policy.parameters() if p.requires_grad], config.learning_rate)
        return cls(policy, pairs, optimizer, None if config.precompute_reference else ref_policy, from_reference,
                   "the policy" if from_reference else tensors_hash(ref_policy.state_dict()))

    @property
    def step(self) -> int:
        """Number of completed steps, as Checkpoints counts them; -1 if the state is not whole."""
        return self.done if self.whole else -1

    def steps(self, config: DPOConfig) -> int:
        """Total number of steps of the run."""
        return math.ceil(len(self.pairs) / config.batch_size) * config.epochs

    def facts(self) -> dict:
        """Hashes of the initial policy and of the pairs' tokens: what the run depends on besides its config."""
        sides = (self.pairs.chosen, self.pairs.rejected)
        return {"policy": weights_hash(self.policy), "reference": self.reference,
                "pairs": data_hash([row.tolist() for side in sides for row in full_ids(side)[0]])}

    def trained(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """The model that training changes, with its optimiser: "policy"."""
        return {"policy": (self.policy, self.optimizer)}

    def state_dict(self) -> dict:
        """Everything that training changes: trained weights, optimizer, steps. The tensors are not copied."""
        return {"policy": trained_weights(self.policy), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def load_state_dict(self, saved: Mapping) -> None:
        """Continue from `state_dict`. Raises ValueError, and changes nothing, if the weights do not fit."""
        weights = trained_weights(self.policy)
        check_weights(weights, saved["policy"], "saved['policy']")
        copy_weights(weights, saved["policy"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done, self.whole = saved["done"], True


def dpo_iteration(state: DPOState, config: DPOConfig) -> DPOStats:
    """Do the next step of a run; changes `state` and returns the statistics from before the step.

    The order of pairs is drawn from (seed, epoch), so repeating a step on the same state gives exactly the same result.
    A step that fails leaves `state` unchanged. If the policy is its own reference, the first step must have margin 0
    (and loss ln 2 for sigmoid). Raises InvariantError otherwise, NonFinite, OutOfMemory.
    """
    def whole() -> tuple[int, int]:
        longest = max(int((side.prompt_mask.sum(1) + side.response_mask.sum(1)).max())
                      for side in (state.pairs.chosen, state.pairs.rejected))
        return longest * min(config.batch_size, len(state.pairs)), longest

    return within_memory(lambda config: _step(state, config), state, config, whole)


def _step(state: DPOState, config: DPOConfig) -> DPOStats:
    step = state.done + 1
    # Batch: a new order of the pairs in each epoch.
    steps_per_epoch = math.ceil(len(state.pairs) / config.batch_size)
    epoch, place = divmod(state.done, steps_per_epoch)
    order = torch.randperm(len(state.pairs), generator=seeded(config.seed, epoch, 4))
    rows = order[place * config.batch_size : (place + 1) * config.batch_size]
    batch = state.pairs[rows.to(state.policy.device)]
    if batch.ref_chosen_logps is None:
        batch = with_reference(state.ref_policy, batch, precision=config.precision,
                               tokens_per_pass=config.tokens_per_pass)
    # Learning rate: warm up.
    warmup_steps = config.warmup * steps_per_epoch * config.epochs
    set_learning_rate(state.optimizer, config.learning_rate * (min(step / warmup_steps, 1.0) if warmup_steps else 1.0))
    # The step; the first one is checked after it, and taken back if something is wrong.
    first = step == 1 and state.from_reference
    state.whole = False
    try:
        with all_or_nothing(state) if first else contextlib.nullcontext():
            stats = dpo_step(state.policy, state.optimizer, batch, config, step)
            if first:
                in_bf16 = state.policy.device.type == "cuda" or config.precision == "bf16"
                check_first_step(stats, config, 0.1 if in_bf16 else 1e-4)
    except Exception:  # raised before the optimiser's step; an interrupt may have come in its middle
        state.whole = True
        raise
    state.done, state.whole = step, True
    reached("dpo.step")
    return stats


def dpo(
    policy: nn.Module, tokenizer, rows: list[dict], config: DPOConfig, *, ref_policy: nn.Module | None = None
) -> Iterator[DPOStats]:
    """Train on rows prompt / chosen / rejected (texts), with `dpo_iteration` to the end; yields each step's statistics.

    ref_policy: by default the current policy. Raises as `DPOState.start` and `dpo_iteration` do.
    """
    state = DPOState.start(policy, tokenizer, rows, config, ref_policy=ref_policy)
    while state.done < state.steps(config):
        yield dpo_iteration(state, config)


def check_first_step(stats: DPOStats, config: DPOConfig, tolerance: float = 1e-4) -> None:
    """Check that policy and reference are identical at the first step: margin 0, loss ln 2 (sigmoid, robust).

    Raises InvariantError otherwise. tolerance: larger in bf16, where log-probs of the same pairs depend on the batch
    size.
    """
    expected = {"ipo": 1 / (4 * config.beta**2), "hinge": 1.0}.get(config.loss_type, math.log(2))
    for name, value, wanted in (("margin", stats.margin, 0.0), ("loss", stats.loss, expected)):
        if not abs(value - wanted) <= tolerance * max(1.0, abs(wanted)):
            raise InvariantError(
                f"step 0: DPO's {name} is {value:.5f}, expected {wanted:.5f} ± {tolerance:g}. The reference is "
                "not the policy that training starts from: check which checkpoint it is, and "
                "whether an adapter is switched off"
            )
