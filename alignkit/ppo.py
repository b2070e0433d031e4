"""Proximal policy optimisation for language models: one iteration, one step, and the training loop.

The objective is E_π[r(x, y)] − kl_coef · KL(π ‖ π_ref) for each prompt x. `ppo_iteration` has two acts. `collect`
samples responses, scores them, reads log-probs and values of every token, and computes rewards and advantages: a KL
penalty at each token, the score of the whole response at its last token, and advantages by GAE from rewards and the
critic's values. `improve` then takes optimiser steps on the clipped surrogate. RLOO and GRPO are the same two acts
without a critic: `config.advantage` compares the responses to one prompt, and `config.kl_penalty` can put the KL into
the loss. The formulas are in `formulas/losses.py`; the forward passes are in `forward/`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.configs import WITHOUT_CRITIC, PPOConfig
from alignkit.data.ends import end_ids
from alignkit.errors import NonFinite
from alignkit.formulas.kl import ESTIMATORS, k1, k3
from alignkit.formulas.losses import (
    adapt_kl_coef,
    clipped,
    gae,
    grpo_advantages,
    policy_loss,
    rloo_advantages,
    token_rewards,
    value_loss,
)
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import masked_mean, whiten
from alignkit.forward.invariants import check_first_rollout, check_sampler
from alignkit.forward.precision import autocast, checkpointed
from alignkit.forward.reading import read_responses, response_logprobs, token_values
from alignkit.forward.rollout import (
    Rollout,
    decode_responses,
    encode_prompts,
    encode_rows,
    full_ids,
    passes,
    to_device,
    token_ids,
)
from alignkit.forward.sampling import sample
from alignkit.forward.scoring import as_scores, check_reward_ids
from alignkit.killpoints import reached
from alignkit.metrics import stat
from alignkit.models.heads import SharedCritic
from alignkit.optim import all_or_nothing, set_learning_rate, side_by_side, within_memory
from alignkit.ppo_state import PPOState
from alignkit.processes import count, in_shares, own_rows, sum_gradients, summed
from alignkit.shards import take_step


@dataclass(frozen=True)
class PPOStats:
    """Statistics of one PPO iteration. `log()` returns them under TRL's names."""

    iteration: int = stat("iteration", "number of rollouts so far, including this one")
    score: float = stat("objective/scores", "mean score of the responses, as returned by the reward")
    rlhf_reward: float = stat(
        "objective/rlhf_reward",
        "mean over responses of score − kl_coef · KL, the sum of the token rewards if the KL is charged in them",
    )
    kl_to_ref: float = stat("objective/kl", "KL(π ‖ π_ref), k1: nats per response")
    kl_to_ref_k3: float = stat("objective/kl_k3", "the same KL by k3, never negative: nats per response")
    kl_coef: float = stat("objective/kl_coef", "current KL coefficient")
    entropy: float = stat(
        "objective/entropy", "entropy of the next-token distribution, summed over the response: nats per response"
    )
    length: float = stat("objective/length", "tokens per response, EOS included")
    eos_rate: float = stat("val/eos_rate", "share of responses that ended with EOS")
    policy_loss: float = stat(
        "loss/policy_avg", "clipped surrogate loss; about 0 by construction, not a measure of progress"
    )
    value_loss: float = stat("loss/value_avg", "half the clipped squared error of the critic; 0 without a critic")
    ptx_loss: float = stat("loss/ptx_avg", "SFT loss on mixed-in demonstrations: nats per token; 0 without ptx_coef")
    clip_fraction: float = stat(
        "policy/clipfrac_avg", "share of tokens whose policy gradient is exactly 0 because of clipping"
    )
    kl_to_old: float = stat("policy/approxkl_avg", "KL(π_old ‖ π) by k3 at the last step: nats per token")
    ratio_first: float = stat(
        "val/ratio_first", "mean ratio π / π_old at the first step; 1 if sampler and trainer agree"
    )
    ratio_max: float = stat("val/ratio_max", "largest ratio π / π_old")
    explained_variance: float = stat(
        "val/explained_variance",
        "1 − Var(returns − values) / Var(returns), before this iteration's steps; 0 without a critic",
    )
    grad_norm: float = stat("policy/grad_norm", "policy's gradient norm before clipping, mean over steps")
    steps: int = stat("steps", "number of optimiser steps in this iteration")

    def log(self) -> dict[str, float]:
        """The statistics under their plot names, `step` first."""
        return {"step": self.iteration, **{f.metadata["name"]: getattr(self, f.name) for f in fields(self)[1:]}}


@dataclass(frozen=True)
class PPOBatch:
    """A scored rollout, the data of the optimiser steps. All fields except `rollout` are (B, T), 0 outside the
    response.

    old_values, returns: 0 without a critic. ref_logprobs: the reference's; None only if the KL is not in the loss.
    """

    rollout: Rollout
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    ref_logprobs: Tensor | None = None

    def __getitem__(self, rows) -> "PPOBatch":
        return PPOBatch(**{name: value[rows] for name, value in vars(self).items() if value is not None})

    def parts(self, tokens_per_pass: int | None) -> list[tuple["PPOBatch", float]]:
        """Split this process's rows into parts that fit one forward pass, each with its share of the batch's response
        tokens.

        tokens_per_pass: maximum number of tokens of a part, padding included; None makes one part.
        """
        if tokens_per_pass is None and count() == 1:
            return [(self, 1.0)]
        own, weight = own_rows(len(self.rollout))
        parts, mine, tokens = [], self[own], self.rollout.response_mask.sum()
        for rows, rollout in passes(mine.rollout, tokens_per_pass, len(mine.rollout)):
            width = rollout.response_mask.shape[1]
            rest = {name: value[rows][:, :width] for name, value in vars(mine).items()
                    if name != "rollout" and value is not None}
            share = float(rollout.response_mask.sum() / tokens.clamp(min=1))
            parts.append((PPOBatch(rollout, **rest), weight * share))
        return parts


def ppo_step(state: PPOState, batch: PPOBatch, config: PPOConfig, *, demonstrations: Rollout | None = None,
             train_policy: bool = True) -> dict[str, float]:
    """One optimiser step of policy and critic, if there is one, on a minibatch; returns its statistics.

    If a loss or gradient is not finite, NonFinite is raised and nothing is changed. The loss of a separate critic does
    not affect the policy; the loss of a critic with a shared trunk trains the policy's body, weighted by value_coef.
    Raises ValueError if kl_penalty puts the KL into the loss and the batch has no ref_logprobs.
    """
    if config.kl_penalty != "reward" and batch.ref_logprobs is None:
        raise ValueError(f"batch.ref_logprobs is None, expected the reference's log-probs of "
                         f"{tuple(batch.old_logprobs.shape)} with kl_penalty {config.kl_penalty!r}")
    for _, optimizer in state.trained().values():
        optimizer.zero_grad(set_to_none=True)
    # Gradients: the policy's and the critic's, in parallel if the machine has two cores.
    recompute = config.gradient_checkpointing
    with checkpointed(state.policy, recompute), checkpointed(state.critic, recompute and state.critic is not None):
        of_policy, of_critic = side_by_side(
            lambda: _policy_gradient(state, batch, config, demonstrations),
            lambda: _critic_gradient(state, batch, config),
            state.policy.device,
        )
    # Add up what the processes have found, each on its own rows.
    measured = summed(of_policy | of_critic, largest="ratio_max")
    sum_gradients(state.policy, state.critic)
    # Clip the gradient norms, and stop if they are not finite.
    norm = torch.nn.utils.clip_grad_norm_(
        [p for p in state.policy.parameters() if p.grad is not None], config.max_grad_norm
    )
    critic_norm = torch.nn.utils.clip_grad_norm_(
        [] if state.critic is None else state.critic.parameters(), config.max_grad_norm
    )
    loss, critic_loss = measured.pop("loss"), measured["value_loss"]
    measured["grad_norm"] = norm
    if not torch.isfinite(norm + critic_norm + loss + critic_loss):
        raise NonFinite(f"a PPO step has loss {float(loss):.3g}, critic loss {float(critic_loss):.3g}, gradient norms "
                        f"{float(norm):.3g} and {float(critic_norm):.3g}; the weights were left as they were",
                        state.iteration, token_ids(batch.rollout))
    # Step.
    if train_policy:
        take_step(state.policy_optimizer)
    reached("ppo.half_step")
    if state.critic is not None:
        take_step(state.critic_optimizer)
    return dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True))  # read from the device once


def _policy_gradient(
    state: PPOState, batch: PPOBatch, config: PPOConfig, demonstrations: Rollout | None
) -> dict[str, Tensor]:
    """Accumulate the gradients of the policy, and of a critic that shares its trunk, over a minibatch.

    Returns the statistics, and as "loss" the policy's loss including the demonstrations.
    """
    measured = [accumulate_gradient(state, part, share, config) for part, share in batch.parts(config.tokens_per_pass)]
    total = {name: sum(each[name] for each in measured) for name in measured[0]}
    total["ratio_max"] = torch.stack([each["ratio_max"] for each in measured]).max()
    total["ptx_loss"] = total["loss"].new_zeros(())
    if demonstrations is not None:
        tokens, (own, weight) = demonstrations.response_mask.sum().clamp(min=1), own_rows(len(demonstrations))
        for _, part in passes(demonstrations[own], config.tokens_per_pass, len(demonstrations)):
            with autocast(tokens.device, config.precision):
                logprobs = response_logprobs(state.policy, part)
            ptx = -weight * logprobs.sum() / tokens
            (config.ptx_coef * ptx).backward()
            total["ptx_loss"] = total["ptx_loss"] + ptx.detach()
    return {**total, "loss": total["loss"] + config.ptx_coef * total["ptx_loss"]}


def accumulate_gradient(state: PPOState, batch: PPOBatch, share: float, config: PPOConfig) -> dict[str, Tensor]:
    """Add the gradient of one part of a minibatch to the policy's gradients.

    share: the part's share of the minibatch's response tokens, which weights its loss. Returns the part's contribution
    to the policy's loss and to each mean; `ratio_max` is the part's own maximum.
    """
    rollout, mask = batch.rollout, batch.rollout.response_mask
    logprobs, entropies, values = _read_policy(state, rollout, config, config.entropy_coef > 0)
    surrogate = masked_mean(policy_loss(logprobs, batch.old_logprobs, batch.advantages, config.clip_range), mask)
    loss = surrogate
    if config.kl_penalty != "reward":
        penalty = ESTIMATORS[config.kl_penalty](logprobs, batch.ref_logprobs)
        loss = loss + _kl_coef(state, config) * masked_mean(penalty, mask)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * masked_mean(entropies, mask)
    measured = {"loss": loss.detach(), "policy_loss": surrogate.detach()}
    if values is not None:
        critic_loss = _critic_loss(values, batch, config)
        loss = loss + config.value_coef * critic_loss
        measured["value_loss"] = critic_loss.detach()
    (share * loss).backward()
    with torch.no_grad():
        ratio = torch.exp(logprobs - batch.old_logprobs)
        outside = clipped(logprobs, batch.old_logprobs, batch.advantages, config.clip_range)
        measured |= {
            "clip_fraction": masked_mean(outside.float(), mask),
            "kl_to_old": masked_mean(k3(batch.old_logprobs, logprobs), mask),
            "ratio": masked_mean(ratio, mask),
        }
        return {name: share * value for name, value in measured.items()} | {
            "ratio_max": torch.where(mask, ratio, 0.0).max()}


def _critic_gradient(state: PPOState, batch: PPOBatch, config: PPOConfig) -> dict[str, Tensor]:
    """Accumulate the gradients of a separate critic; returns its loss.

    Does nothing for a critic that shares the policy's trunk, whose gradient comes from `accumulate_gradient`, and
    without a critic, when the loss is 0.
    """
    if isinstance(state.critic, SharedCritic):
        return {}
    if state.critic is None:
        return {"value_loss": batch.advantages.new_zeros(())}
    total = 0.0
    for part, share in batch.parts(config.tokens_per_pass):
        loss = share * _critic_loss(_read_critic(state, part.rollout, config), part, config)
        (config.value_coef * loss).backward()
        total = total + loss.detach()
    return {"value_loss": total}


def _critic_loss(values: Tensor, batch: PPOBatch, config: PPOConfig) -> Tensor:
    losses = value_loss(values, batch.old_values, batch.returns, config.value_clip_range)
    return masked_mean(losses, batch.rollout.response_mask)


def collect(state: PPOState, config: PPOConfig) -> tuple[PPOBatch, dict[str, float]]:
    """First act of an iteration: sample responses, score and read them, and compute rewards and advantages.

    Returns the batch for `improve`, and its statistics under the names of PPOStats. Increments the iteration; changes
    no weights. At the first iteration `check_first_rollout` must pass (InvariantError). Raises ValueError if the reward
    returns a wrong number of scores or the run has a critic that config.advantage does not use, or none that it needs;
    NonFinite if a score is NaN or infinite.
    """
    state.check_critic(config)
    state.iteration += 1
    state.kl_coef = _kl_coef(state, config)
    charged = state.kl_coef if config.kl_penalty == "reward" else 0.0

    # Sample: draw prompts, and sample the policy's response to each.
    reached("ppo.begun")
    texts, rollout = _sample(state, config)
    mask = rollout.response_mask
    reached("ppo.sampled")

    # Score and read: the reward scores whole responses; policy, reference and critic read every token.
    scores, (ref_logprobs, old_logprobs, values, token_entropy) = side_by_side(
        lambda: _scores(state, texts, rollout),
        lambda: in_shares(lambda rows: _read(state, rollout[rows], config), len(rollout)),
        state.policy.device,
    )
    with torch.no_grad():
        # Rewards: the KL penalty at every token if it is charged there, the score at the last, and the advantages.
        shaped = (scores - config.missing_eos_penalty * (~rollout.finished).float()).clamp(
            -config.score_clip, config.score_clip
        )
        rewards = token_rewards(shaped, old_logprobs, ref_logprobs, mask, charged)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = _advantages(rewards, values, mask, config)

        # Measure: KL to the reference, and how well the critic predicted the returns.
        kl = torch.where(mask, k1(old_logprobs, ref_logprobs), 0.0).sum(1)
        explained = 0.0 if state.critic is None else _explained(values, returns, mask)

    # Check: sampler and trainer agree, and before the first step the policy equals the reference.
    bf16 = config.precision == "bf16" or state.policy.device.type == "cuda"
    if state.iteration == 1:
        check_first_rollout(rollout, old_logprobs, ref_logprobs, rewards if not config.whiten_rewards else None, shaped,
                            charged, bf16=bf16)
    else:
        check_sampler(rollout, old_logprobs, iteration=state.iteration, bf16=bf16)

    reached("ppo.scored")
    state.last_rollout, state.last_scores = rollout, scores
    in_rewards = config.kl_penalty == "reward" and not config.whiten_rewards
    rewarded = rewards.sum(1) if in_rewards else shaped - state.kl_coef * kl
    return PPOBatch(rollout, old_logprobs, values, advantages, returns, ref_logprobs), {
        "score": float(scores.mean()), "kl_to_ref": float(kl.mean()), "explained_variance": float(explained),
        "rlhf_reward": float(rewarded.mean()),
        "kl_to_ref_k3": float(torch.where(mask, k3(old_logprobs, ref_logprobs), 0.0).sum(1).mean()),
        "entropy": float(token_entropy.sum(1).mean()), "length": float(mask.sum(1).float().mean()),
        "eos_rate": float(rollout.finished.float().mean()),
    }


def improve(state: PPOState, batch: PPOBatch, config: PPOConfig) -> dict[str, float]:
    """Second act of an iteration: epochs × minibatches optimiser steps on a collected batch.

    Returns the statistics of the steps under the names of PPOStats. With max_step_kl the remaining epochs are skipped
    when the policy has moved too far from the policy that sampled. Raises NonFinite as `ppo_step` does.
    """
    # Learning rates: with lr_decay both fall linearly to 0 over the run.
    decay = max(1 - (state.iteration - 1) / config.iterations, 0.0) if config.lr_decay else 1.0
    set_learning_rate(state.policy_optimizer, config.learning_rate * decay)
    if state.critic is not None:
        set_learning_rate(state.critic_optimizer, config.critic_learning_rate * decay)

    # Steps: every epoch reads all responses, in minibatches of a new order.
    measured = []
    for epoch in range(config.epochs):
        reached("ppo.epoch")
        order = torch.randperm(len(batch.rollout), generator=seeded(config.seed, state.iteration, epoch, 1))
        for start in range(0, len(order), config.minibatch_size):
            rows = order[start : start + config.minibatch_size].to(batch.old_logprobs.device)
            measured.append(
                ppo_step(
                    state,
                    batch[rows],
                    config,
                    demonstrations=_demonstrations(state, config, len(measured)),
                    train_policy=state.iteration > config.critic_warmup,
                )
            )
        if config.max_step_kl is not None and measured[-1]["kl_to_old"] > config.max_step_kl:
            break

    # Measure: last or extreme values of some statistics, means over the steps of the others.
    means = {name: sum(step[name] for step in measured) / len(measured)
             for name in ("policy_loss", "value_loss", "ptx_loss", "clip_fraction", "grad_norm")}
    return {"kl_to_old": measured[-1]["kl_to_old"], "ratio_first": measured[0]["ratio"],
            "ratio_max": max(step["ratio_max"] for step in measured), "steps": len(measured), **means}


def ppo_iteration(state: PPOState, config: PPOConfig) -> PPOStats:
    """One iteration: `collect` a batch, `improve` the policy on it. Changes `state`, returns the statistics of both.

    The rollout is drawn from (seed, iteration) and the minibatch order from (seed, iteration, epoch), so repeating an
    iteration on the same state gives exactly the same result. `config` may differ between calls, so a run can be
    steered. The first iteration checks that KL to the reference is 0 and the ratio is 1 (InvariantError). If an
    iteration fails or is interrupted, `state` is unchanged.
    Raises ValueError if the reward returns a wrong number of scores, NonFinite if a score, loss or gradient is NaN or
    infinite, InvariantError if sampler and trainer do not agree, OutOfMemory.
    """
    def whole() -> tuple[int, int]:
        texts = [prompt for stratum in state.prompts for prompt in stratum]
        longest = encode_prompts(state.tokenizer, texts)[0].shape[1] + config.max_new_tokens
        return longest * min(config.minibatch_size, config.prompts_per_iteration * config.samples_per_prompt), longest

    return within_memory(lambda config: _iteration(state, config), state, config, whole)


def _iteration(state: PPOState, config: PPOConfig) -> PPOStats:
    rollout, scores = state.last_rollout, state.last_scores
    try:
        with all_or_nothing(state):
            batch, collected = collect(state, config)
            improved = improve(state, batch, config)
            stats = PPOStats(iteration=state.iteration, kl_coef=state.kl_coef, **collected, **improved)
            # KL coefficient of the next iteration: raised if the KL exceeds target_kl, lowered if it is below.
            if config.target_kl is not None:
                state.kl_coef = adapt_kl_coef(state.kl_coef, stats.kl_to_ref, config.target_kl, len(batch.rollout),
                                              config.kl_horizon)
            reached("ppo.done")
            return stats
    except BaseException:
        state.last_rollout, state.last_scores = rollout, scores
        raise


def ppo(state: PPOState, config: PPOConfig) -> Iterator[PPOStats]:
    """Iterate until `config.iterations` or until `ran_away`; yields each iteration's statistics."""
    while state.iteration < config.iterations:
        stats = ppo_iteration(state, config)
        yield stats
        if ran_away(stats, config):
            return


def ran_away(stats: PPOStats, config: PPOConfig) -> str:
    """The reason to stop after this iteration, with advice, if KL exceeds `config.kl_limit`; otherwise ""."""
    if stats.kl_to_ref <= config.kl_limit:
        return ""
    return (f"KL to the reference is {stats.kl_to_ref:.1f} nats a response at iteration {stats.iteration}, above the "
            f"limit of {config.kl_limit:g} (max_kl): the policy ran away. Raise kl_coef or lower learning_rate; "
            "max_kl=inf lets it go on")


def _sample(state: PPOState, config: PPOConfig) -> tuple[list[str], Rollout]:
    """Draw the iteration's prompts, each samples_per_prompt times, and sample a response to each."""
    texts = _draw_prompts(state.prompts, config.prompts_per_iteration, seeded(config.seed, state.iteration, 2))
    texts = [text for text in texts for _ in range(config.samples_per_prompt)]
    ids, mask = encode_prompts(state.tokenizer, texts)

    def sampled(own: slice) -> Iterable[Tensor]:
        return vars(sample(state.policy, ids, mask, max_new_tokens=config.max_new_tokens,
                           eos_token_id=end_ids(state.tokenizer, state.policy),
                           pad_token_id=state.tokenizer.pad_token_id, generator=seeded(config.seed, state.iteration),
                           temperature=config.temperature, own=own)).values()

    with autocast(state.policy.device, config.precision):
        return texts, Rollout(*in_shares(sampled, len(texts)))


def _scores(state: PPOState, texts: list[str], rollout: Rollout) -> Tensor:
    """The reward's score of each response: (B,), checked for shape and finite numbers."""
    responses = decode_responses(state.tokenizer, rollout)
    if state.iteration == 1:
        check_reward_ids(rollout, state.tokenizer, state.reward, texts, responses)

    def scored(rows: slice) -> list[Tensor]:
        return [as_scores(state.reward(texts[rows], responses[rows]), len(texts[rows])).to(rollout.prompt_ids.device)]

    scores, = in_shares(scored, len(texts))
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise NonFinite(
            f"reward returned {float(scores[row])} for response {row} of iteration {state.iteration}; nothing was "
            "changed", state.iteration, {"prompts": texts, "responses": responses}
        )
    return scores


def _kl_coef(state: PPOState, config: PPOConfig) -> float:
    """The price of a nat in this iteration: the config's, or with target_kl the adaptive controller's."""
    return config.kl_coef if state.kl_coef is None or config.target_kl is None else state.kl_coef


def _advantages(rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the tokens, (B, T) each, 0 outside the response, by `config.advantage`.

    Without a critic, all tokens of a response have the same advantage, that of its total reward; returns are 0.
    """
    if config.advantage in WITHOUT_CRITIC:
        of_group = {"rloo": rloo_advantages, "grpo": grpo_advantages}[config.advantage]
        advantages = of_group(rewards.sum(1), config.samples_per_prompt)
        return torch.where(mask, advantages[:, None], 0.0), torch.zeros_like(rewards)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    return whiten(advantages, mask) if config.whiten_advantages else advantages, returns


def _draw_prompts(strata: list[list[str]], n: int, generator: torch.Generator) -> list[str]:
    """n prompts, drawn from the strata in turn, with replacement within each stratum."""
    which = torch.arange(n) % len(strata)
    picks = torch.rand(n, generator=generator)
    return [strata[s][int(u * len(strata[s]))] for s, u in zip(which.tolist(), picks.tolist(), strict=True)]


@torch.no_grad()
def _read(state: PPOState, rollout: Rollout, config: PPOConfig) -> list[Tensor]:
    """Read a rollout with all models: log-probs of reference and policy, values (0 without a critic), the policy's
    entropy.

    Each is (B, T), 0 outside the response. The rollout is read in parts of the size of a minibatch or of
    tokens_per_pass, so reading needs no more memory than a step.
    """
    parts, length = [], rollout.logprobs.shape[1]
    numbers = torch.arange(len(rollout), device=rollout.response_mask.device)
    read = passes(rollout, config.tokens_per_pass, config.minibatch_size)
    for _, part in read:
        with autocast(part.response_mask.device, config.precision):
            ref_logprobs = response_logprobs(state.ref_policy, part, config.temperature)
        logprobs, entropies, values = _read_policy(state, part, config, True)
        if values is None:
            values = torch.zeros_like(logprobs) if state.critic is None else _read_critic(state, part, config)
        parts.append([F.pad(each, (0, length - each.shape[1])) for each in (ref_logprobs, logprobs, values, entropies)])
    place = torch.cat([numbers[rows] for rows, _ in read]).argsort()  # back into the rollout's order
    return [torch.cat(part)[place] for part in zip(*parts, strict=True)]


def _read_policy(state: PPOState, rollout: Rollout, config: PPOConfig, with_entropy: bool
                 ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Read a rollout with the policy: log-probs at config.temperature, the entropy on request, and the values of a
    critic that shares its trunk; None for values that are not computed. (B, T) each, 0 outside the response."""
    mask, shared = rollout.response_mask, isinstance(state.critic, SharedCritic)
    with autocast(mask.device, config.precision):
        logprobs, entropies, hidden = read_responses(state.policy, rollout, config.temperature,
                                                     with_entropy=with_entropy, with_states=shared)
    if not shared:
        return logprobs, entropies, None
    score = state.critic.score
    values = score(hidden.to(score.weight.dtype)).squeeze(-1).float()
    return logprobs, entropies, torch.where(mask, values, 0.0)


def _read_critic(state: PPOState, rollout: Rollout, config: PPOConfig) -> Tensor:
    """V(prompt, tokens before t) by a separate critic, read one position before the token: (B, T), 0 outside the
    response."""
    mask = rollout.response_mask
    with autocast(mask.device, config.precision):
        return torch.where(mask, token_values(state.critic, *full_ids(rollout), mask.shape[1]), 0.0)


def _demonstrations(state: PPOState, config: PPOConfig, step: int) -> Rollout | None:
    """The demonstrations mixed into a step, drawn from (seed, iteration, step); None without ptx_coef."""
    if not config.ptx_coef:
        return None
    picks = torch.randint(
        len(state.demonstrations), (config.minibatch_size,), generator=seeded(config.seed, state.iteration, step, 3)
    )
    rows = [state.demonstrations[i] for i in picks.tolist()]
    return to_device(encode_rows(state.tokenizer, rows, "completion", config.max_new_tokens), state.policy.device)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """The critic's explained variance: 1 − Var(returns − values) / Var(returns) over the response tokens."""
    residual = torch.where(mask, returns - values, 0.0)
    return float(1 - _variance(residual, mask) / _variance(returns, mask).clamp(min=1e-8))


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    """Variance of `values` over the response tokens."""
    mean = masked_mean(values, mask)
    return masked_mean((values - mean).square(), mask)
