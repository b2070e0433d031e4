"""The bare loops that alignkit is compared with."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignkit import optim
from alignkit.forward.rollout import encode_prompts, position_ids, right_pad
from alignkit.models.adapters import frozen_copy
from benchmarks.steps.work import BETA, Work, clock


class BarePPO:
    """The same iteration written down plainly for responses of full length: no masks, no checks, no statistics."""

    def __init__(self, work: Work):
        self.sizes, self.tokenizer = work.sizes, work.tokenizer
        self.policy, self.ref = copy.deepcopy(work.sampling_policy), frozen_copy(work.sampling_ref)
        self.reward_model = frozen_copy(work.reward_model)
        self.critic = copy.deepcopy(work.reward_model)
        self.optimizers = [
            optim.adamw([p for p in model.parameters() if p.requires_grad], 1e-5)
            for model in (self.policy, self.critic)
        ]
        self.ids, self.mask = encode_prompts(work.tokenizer, work.prompts)

    def __call__(self) -> dict[str, float]:
        start = clock()
        tokens = self.rollout()
        sampled = clock()
        batch = self.score(tokens)
        scored = clock()
        self.update(batch, [torch.randperm(len(self.ids)) for _ in range(self.sizes.epochs)])
        end = clock()
        return {
            "rollout": sampled - start,
            "scoring": scored - sampled,
            "update": end - scored,
            "iteration": end - start,
        }

    def rollout(self, **options):
        """Prompt and response ids (B, P + T), by `generate`."""
        return self.policy.generate(
            input_ids=self.ids,
            attention_mask=self.mask.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=self.sizes.new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )

    def logprobs(self, model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
        logits = logits[:, self.ids.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, tokens[:, self.ids.shape[1] :, None]).squeeze(-1)

    def values(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.critic.model(
            input_ids=tokens, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
        return self.critic.score(hidden).squeeze(-1)[:, self.ids.shape[1] - 1 : -1]

    @torch.no_grad()
    def score(self, tokens: Tensor) -> dict[str, Tensor]:
        """Old log-probs, values, advantages and returns, (B, T) each."""
        mask = F.pad(self.mask, (0, self.sizes.new_tokens), value=True).long()
        old, ref = (self.logprobs(model, tokens, mask) for model in (self.policy, self.ref))
        values = self.values(tokens, mask)
        ended, with_end = F.pad(tokens, (0, 1), value=self.tokenizer.eos_token_id), F.pad(mask, (0, 1), value=1)
        scores = self.reward_model(
            input_ids=ended, attention_mask=with_end, position_ids=position_ids(with_end), use_cache=False
        ).logits.squeeze(-1)
        rewards = -0.05 * (old - ref)
        rewards[:, -1] += scores
        advantages, following = torch.zeros_like(rewards), 0.0
        for t in reversed(range(rewards.shape[1])):
            next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            following = rewards[:, t] + next_value - values[:, t] + 0.95 * following
            advantages[:, t] = following
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
        return {
            "tokens": tokens,
            "mask": mask,
            "old": old,
            "values": values,
            "advantages": advantages,
            "returns": returns,
        }

    def update(self, batch: dict[str, Tensor], orders: list[Tensor]) -> list[tuple[float, float]]:
        """One step a minibatch; returns the policy's and the critic's loss of each."""
        losses = []
        for order in orders:
            for rows in order.split(len(order) // self.sizes.minibatches):
                part = {name: value[rows] for name, value in batch.items()}
                ratio = torch.exp(self.logprobs(self.policy, part["tokens"], part["mask"]) - part["old"])
                loss = -torch.minimum(ratio * part["advantages"], ratio.clamp(0.8, 1.2) * part["advantages"]).mean()
                values = self.values(part["tokens"], part["mask"])
                near = part["values"] + (values - part["values"]).clamp(-0.2, 0.2)
                critic_loss = (
                    0.5 * torch.maximum((values - part["returns"]).square(), (near - part["returns"]).square()).mean()
                )
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                (loss + critic_loss).backward()
                for model, optimizer in zip((self.policy, self.critic), self.optimizers, strict=True):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                losses.append((loss.item(), critic_loss.item()))
        return losses


class BareDPO:
    """Chosen and rejected rows in one batch, as most scripts have it."""

    def __init__(self, work: Work, precomputed: bool):
        self.policy, self.ref = copy.deepcopy(work.policy), frozen_copy(work.ref)
        self.optimizer = optim.adamw(list(self.policy.parameters()), 1e-5)
        rows = work.encoded("chosen") + work.encoded("rejected")
        self.ids, mask = right_pad(rows, work.tokenizer.pad_token_id)
        self.mask = mask.long()
        start = torch.tensor([len(row) - work.sizes.new_tokens for row in rows])  # of the response
        self.response = mask & (torch.arange(self.ids.shape[1]) >= start[:, None])
        with torch.no_grad():
            self.ref_logps = self.logps(self.ref) if precomputed else None

    def logps(self, model: nn.Module) -> Tensor:
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, self.ids[:, 1:, None]).squeeze(-1)
        return (logprobs * self.response[:, 1:]).sum(1)

    def step(self) -> float:
        if self.ref_logps is None:
            with torch.no_grad():
                ref_logps = self.logps(self.ref)
        else:
            ref_logps = self.ref_logps
        chosen, rejected = (self.logps(self.policy) - ref_logps).chunk(2)
        return _bare_step(-F.logsigmoid(BETA * (chosen - rejected)).mean(), self.policy, self.optimizer)


class BareSFT:
    """Cross-entropy on response tokens, by the labels that the model takes."""

    def __init__(self, work: Work):
        self.policy = copy.deepcopy(work.policy)
        self.optimizer = optim.adamw(list(self.policy.parameters()), 1e-5)
        rows = work.encoded("chosen")
        ids, mask = right_pad(rows, work.tokenizer.pad_token_id)
        start = torch.tensor([len(row) - work.sizes.new_tokens for row in rows])
        labels = torch.where(mask & (torch.arange(ids.shape[1]) >= start[:, None]), ids, -100)
        self.batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def step(self) -> float:
        return _bare_step(self.policy(**self.batch, use_cache=False).loss, self.policy, self.optimizer)


class BareReward:
    """−log σ(r_chosen − r_rejected) on one batch of both."""

    def __init__(self, work: Work):
        self.model = copy.deepcopy(work.reward_model)
        self.optimizer = optim.adamw(list(self.model.parameters()), 1e-5)
        self.ids, mask = right_pad(work.encoded("chosen") + work.encoded("rejected"), work.tokenizer.pad_token_id)
        self.mask = mask.long()

    def step(self) -> float:
        chosen, rejected = (
            self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits.squeeze(-1).chunk(2)
        )
        return _bare_step(-F.logsigmoid(chosen - rejected).mean(), self.model, self.optimizer)


def _bare_step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
