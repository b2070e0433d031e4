"""What one step costs: rollout, scoring, PPO update, whole iteration, DPO, SFT and reward-model step, beside baselines.

    python -m benchmarks.steps --json steps.json [--quick] [--threads 2] [--rounds 8] [--growth]
                               [--trl-ppo runs/trl-ppo]

Each row is measured three ways, in turn, round by round: alignkit; a bare torch + transformers loop that does the same
work (head at every position, no statistics, `generate` with top_k=0); and the trainer of the installed TRL, given one
batch over and over (its collator, data loader and logging are not timed). All in fp32 with the same fused AdamW,
without gradient checkpointing. Before anything is timed, the sides must give the same numbers on the same weights and
tokens; if they do not, there is no benchmark. With one thread all seconds are CPU time of the process, so that a busy
machine can be used; with more they are wall time.

The installed TRL has no PPO: with --trl-ppo the last one that had it is measured too, in a process of its own that
waits while the others run, from an environment in that folder that is made on demand. Its sampling is its own, so it
must agree in the number of optimiser steps and in the KL that it finds.

alignkit's PPO parts are timed inside `ppo_iteration` itself: rollout is `sample`, update is all of `ppo_step`, scoring
is everything else (drawing and tokenising prompts, decoding, the reward, old and reference log-probs, values, GAE,
statistics). Its SFT and reward training are TRL's trainers with alignkit's settings, so there the two can differ by no
more than noise and the trainer's bookkeeping round a step.

A second row has alignkit's best settings: a trunk that policy and critic share, and bf16 where this machine multiplies
bf16 faster than fp32 (tried at the model's own shapes). The shared trunk is another algorithm, so the row compares what
an iteration costs, not the same numbers. With --growth a second table shows how the cost of a default iteration grows.
"""

import argparse
import copy
import logging
import multiprocessing
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import trl
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from alignkit import ppo
from alignkit.data import encode_pairs
from alignkit.dpo import DPOConfig, Pairs, dpo_step, encode_rows, with_reference
from alignkit.models import frozen_copy, position_ids, reward_model_from
from alignkit.records import versions, write_json
from alignkit.reward import RewardConfig, RewardScorer, train_reward_model
from alignkit.sampling import encode_prompts, response_logits, right_pad, rollout_from_ids, seeded
from alignkit.sft import SFTConfig, train_sft
from alignkit.tokens import token_logprobs
from benchmarks.exact import resident
from benchmarks.trl_ppo import VERSION, Worker

TOLERANCE = 1e-4
BETA = 0.1
NOT_MEASURED = {
    "TRL PPO": f"trl {trl.__version__} has no PPO; {VERSION}, the last that had it, is measured with --trl-ppo FOLDER"
}
ROWS = {
    "rollout": "PPO: rollout",
    "scoring": "PPO: scoring",
    "update": "PPO: update",
    "iteration": "PPO: whole iteration",
    "dpo": "DPO step",
    "dpo_precomputed": "DPO step, reference precomputed",
    "sft": "SFT step",
    "reward": "reward-model step",
}
PPO_PARTS = ("rollout", "scoring", "update", "iteration")
PROCESSES = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if PROCESSES.get_start_method() == "forkserver":  # what is imported there, every measured process has at once
    PROCESSES.set_forkserver_preload(
        [f"trl.trainer.{name}_trainer" for name in ("dpo", "sft", "reward")] + ["alignkit.dpo", "alignkit.reward"]
    )
PATIENCE = 180  # seconds that one measurement of memory may take


def clock() -> float:
    """Seconds: on one thread CPU time of this process, which other work hardly changes; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Different(RuntimeError):
    """Two sides of a row do not compute the same thing."""


@dataclass(frozen=True)
class Sizes:
    """The model, a tied Llama, and the work.

    prompt_tokens: of the longest prompt; they are ragged down to half. new_tokens: of every response. pairs: rows of a
    DPO, SFT and reward-model step. epochs, minibatches: of a PPO iteration.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 344
    vocabulary: int = 1024
    prompts: int = 128
    prompt_tokens: int = 24
    new_tokens: int = 32
    pairs: int = 32
    epochs: int = 4
    minibatches: int = 4


QUICK = Sizes(
    hidden=32,
    layers=2,
    heads=2,
    intermediate=64,
    vocabulary=64,
    prompts=8,
    prompt_tokens=6,
    new_tokens=5,
    pairs=4,
    epochs=2,
    minibatches=2,
)


class Work:
    """What all sides start from: tokenizer, models, texts. Sides copy the models before they train them.

    precision: of alignkit's best settings. policy, ref: two different policies, so that nothing that should be
    compared is 0. sampling_policy, sampling_ref: the same weights with a head that can say no special token, so
    that every response has full length.
    """

    def __init__(self, sizes: Sizes, seed: int = 0, precision: str = "fp32"):
        self.sizes, self.precision = sizes, precision
        self.tokenizer = word_tokenizer(sizes.vocabulary)
        self.policy, self.ref = (tied_llama(sizes, self.tokenizer, seed=seed + number) for number in (0, 1))
        self.sampling_policy, self.sampling_ref = (
            without_specials(model, self.tokenizer) for model in (self.policy, self.ref)
        )
        self.reward_model = reward_model_from(self.ref, seed)
        generator = seeded(seed, sizes.prompts)
        shortest = sizes.prompt_tokens // 2
        lengths = [
            sizes.prompt_tokens - number % (sizes.prompt_tokens - shortest + 1) for number in range(sizes.prompts)
        ]
        self.prompts = [self._text(length, generator) for length in lengths]
        self.pairs = [
            {
                "prompt": prompt,
                "chosen": self._text(sizes.new_tokens - 1, generator),
                "rejected": self._text(sizes.new_tokens - 1, generator),
            }
            for prompt in self.prompts[: sizes.pairs]
        ]
        self.demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in self.pairs]

    def _text(self, tokens: int, generator: torch.Generator) -> str:
        return "".join(
            f" w{number}" for number in torch.randint(3, self.sizes.vocabulary, (tokens,), generator=generator).tolist()
        )

    def encoded(self, side: str) -> list[list[int]]:
        """Token ids of prompt, response ("chosen" or "rejected") and EOS, a list a row."""
        pairs, _ = encode_pairs(
            self.tokenizer, [row["prompt"] for row in self.pairs], [row[side] for row in self.pairs]
        )
        return [[*prompt, *response, self.tokenizer.eos_token_id] for prompt, response in pairs]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` tokens: pad, EOS, unk, and words " w3", " w4" … that are one token each."""
    tokens = ["<pad>", "<eos>", "<unk>", *(f" w{number}" for number in range(3, vocabulary))]
    fast = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" w\d+"), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tied_llama(sizes: Sizes, tokenizer, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2 * (sizes.prompt_tokens + sizes.new_tokens),
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def without_specials(policy: LlamaForCausalLM, tokenizer) -> LlamaForCausalLM:
    """A copy whose head has a fixed bias of −1e4 at pad, EOS and unk: what it samples always has full length."""
    policy = copy.deepcopy(policy)
    head = nn.Linear(policy.config.hidden_size, policy.config.vocab_size)
    head.weight = policy.get_input_embeddings().weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[tokenizer.all_special_ids] = -1e4
    head.bias.requires_grad_(False)
    policy.lm_head = head
    return policy


# PPO


class AlignkitPPO:
    """`ppo_iteration`, with the time that its parts take. options: of PPOConfig."""

    def __init__(self, work: Work, **options):
        sizes = work.sizes
        self.config = ppo.PPOConfig(
            iterations=10**6,
            prompts_per_iteration=sizes.prompts,
            max_new_tokens=sizes.new_tokens,
            kl_coef=0.05,
            epochs=sizes.epochs,
            minibatch_size=sizes.prompts // sizes.minibatches,
            learning_rate=1e-5,
            critic_learning_rate=1e-5,
            lr_decay=False,
            **options,
        )
        scorer = RewardScorer(copy.deepcopy(work.reward_model), work.tokenizer)
        strata = [[prompt] for prompt in work.prompts]  # one prompt a stratum: every prompt once an iteration, in order
        self.state = ppo.PPOState.start(
            copy.deepcopy(work.sampling_policy),
            work.tokenizer,
            scorer,
            strata,
            self.config,
            ref_policy=frozen_copy(work.sampling_ref),
        )
        self.state.iteration = 1  # the first one insists on the policy being the reference

    def __call__(self) -> dict[str, float]:
        spent = {"rollout": 0.0, "update": 0.0}
        with (
            patch.object(ppo, "sample", _timed(ppo.sample, spent, "rollout")),
            patch.object(ppo, "ppo_step", _timed(ppo.ppo_step, spent, "update")),
        ):
            start = clock()
            self.stats = ppo.ppo_iteration(self.state, self.config)
            whole = clock() - start
        return spent | {"scoring": whole - spent["rollout"] - spent["update"], "iteration": whole}

    def observed(self) -> list[tuple["ppo.PPOBatch", dict[str, float]]]:
        """One iteration's minibatches, and what each step measured."""
        seen = []

        def step(state, batch, *rest, **options):
            measured = original(state, batch, *rest, **options)
            seen.append((batch, measured))
            return measured

        original = ppo.ppo_step
        with patch.object(ppo, "ppo_step", step):
            ppo.ppo_iteration(self.state, self.config)
        return seen


class BarePPO:
    """The same iteration written down plainly for responses of full length: no masks, no checks, no statistics."""

    def __init__(self, work: Work):
        self.sizes, self.tokenizer = work.sizes, work.tokenizer
        self.policy, self.ref = copy.deepcopy(work.sampling_policy), frozen_copy(work.sampling_ref)
        self.reward_model = frozen_copy(work.reward_model)
        self.critic = copy.deepcopy(work.reward_model)
        self.optimizers = [
            ppo.adamw([p for p in model.parameters() if p.requires_grad], 1e-5) for model in (self.policy, self.critic)
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


# DPO


class AlignkitDPO:
    """`dpo_step` on one batch, scored by the reference at every step or once."""

    def __init__(self, work: Work, precomputed: bool, precision: str = "fp32"):
        self.policy, self.ref, self.precomputed = copy.deepcopy(work.policy), frozen_copy(work.ref), precomputed
        self.config = DPOConfig(beta=BETA, max_new_tokens=work.sizes.new_tokens, precision=precision)
        self.optimizer = ppo.adamw(list(self.policy.parameters()), 1e-5)
        self.pairs = Pairs(
            *(encode_rows(work.tokenizer, work.pairs, side, work.sizes.new_tokens) for side in ("chosen", "rejected"))
        )
        if precomputed:
            self.pairs = self.scored()

    def scored(self) -> Pairs:
        return with_reference(self.ref, self.pairs, precision=self.config.precision)

    def step(self) -> float:
        pairs = self.pairs if self.precomputed else self.scored()
        return dpo_step(self.policy, self.optimizer, pairs, self.config).loss


class BareDPO:
    """Chosen and rejected rows in one batch, as most scripts have it."""

    def __init__(self, work: Work, precomputed: bool):
        self.policy, self.ref = copy.deepcopy(work.policy), frozen_copy(work.ref)
        self.optimizer = ppo.adamw(list(self.policy.parameters()), 1e-5)
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


# SFT and reward model


class AlignkitTraining:
    """The second step of `train_sft` or `train_reward_model` on two batches, as a callback sees it begin and end."""

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = clock()

        def on_step_end(self, *_, **__):
            self.seconds = clock() - self.start

    def __init__(self, work: Work, what: str):
        if what == "sft":
            self.model, self.rows, self.train = copy.deepcopy(work.policy), work.demonstrations, train_sft
            self.config = SFTConfig(epochs=1, batch_size=len(self.rows), learning_rate=1e-5)
        else:
            self.model, self.rows, self.train = copy.deepcopy(work.reward_model), work.pairs, train_reward_model
            self.config = RewardConfig(epochs=1, batch_size=len(self.rows), learning_rate=1e-5, centre=0.0)
        self.tokenizer = work.tokenizer

    def __call__(self) -> float:
        clock = self.Clock()
        self.train(self.model, self.tokenizer, self.rows * 2, self.config, callbacks=[clock])
        return clock.seconds

    def step(self) -> float:
        return self.train(self.model, self.tokenizer, self.rows, self.config)[0]["loss"]


class BareSFT:
    """Cross-entropy on response tokens, by the labels that the model takes."""

    def __init__(self, work: Work):
        self.policy = copy.deepcopy(work.policy)
        self.optimizer = ppo.adamw(list(self.policy.parameters()), 1e-5)
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
        self.optimizer = ppo.adamw(list(self.model.parameters()), 1e-5)
        self.ids, mask = right_pad(work.encoded("chosen") + work.encoded("rejected"), work.tokenizer.pad_token_id)
        self.mask = mask.long()

    def step(self) -> float:
        chosen, rejected = (
            self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits.squeeze(-1).chunk(2)
        )
        return _bare_step(-F.logsigmoid(chosen - rejected).mean(), self.model, self.optimizer)


class TRL:
    """A TRL trainer's `training_step`, clip and optimiser step, on the batch that its data loader made of our rows."""

    def __init__(self, work: Work, what: str):
        common = {
            "output_dir": os.fspath(Path(os.environ.get("TMPDIR", "/tmp")) / "alignkit-benchmark"),
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "max_grad_norm": 1.0,
            "per_device_train_batch_size": len(work.pairs),
            "max_length": 512,
        }
        options = {"processing_class": work.tokenizer}
        if what == "sft":
            model, trainer, config = (
                copy.deepcopy(work.policy),
                trl.SFTTrainer,
                trl.SFTConfig(**common, completion_only_loss=True),
            )
            rows = [
                {
                    "input_ids": ids,
                    "completion_mask": [0] * (len(ids) - work.sizes.new_tokens) + [1] * work.sizes.new_tokens,
                }
                for ids in work.encoded("chosen")
            ]
        elif what == "reward":
            model, trainer, config = copy.deepcopy(work.reward_model), trl.RewardTrainer, trl.RewardConfig(**common)
            rows = [
                {"chosen_ids": chosen, "rejected_ids": rejected}
                for chosen, rejected in zip(work.encoded("chosen"), work.encoded("rejected"), strict=True)
            ]
        else:
            model, trainer, rows = copy.deepcopy(work.policy), trl.DPOTrainer, work.pairs
            config = trl.DPOConfig(**common, beta=BETA, precompute_ref_log_probs=what == "dpo_precomputed")
            options["ref_model"] = frozen_copy(work.ref)
        self.trainer = trainer(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            optimizers=(ppo.adamw(list(model.parameters()), 1e-5), None),
            **options,
        )
        self.trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.items = (self.batch["labels"] != -100).sum() if what == "sft" else None

    def step(self) -> float:
        trainer = self.trainer
        loss = trainer.training_step(trainer.model, dict(self.batch), self.items)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()


def sides(work: Work) -> dict[str, dict[str, Callable[[], object]]]:
    """job -> side -> what makes it. A side is called, and returns its seconds; or has `step()`, which is timed.

    "best" is alignkit with its best settings, where these are others than the default ones.
    """
    jobs = {
        "ppo": {
            "alignkit": lambda: AlignkitPPO(work),
            "best": lambda: AlignkitPPO(work, shared_trunk=True, precision=work.precision),
            "bare": lambda: BarePPO(work),
        }
    }
    for name, precomputed in (("dpo", False), ("dpo_precomputed", True)):
        jobs[name] = {
            "alignkit": lambda precomputed=precomputed: AlignkitDPO(work, precomputed),
            "bare": lambda precomputed=precomputed: BareDPO(work, precomputed),
            "trl": lambda name=name: TRL(work, name),
        }
        if work.precision != "fp32":
            jobs[name]["best"] = lambda precomputed=precomputed: AlignkitDPO(work, precomputed, work.precision)
    for name, bare in (("sft", BareSFT), ("reward", BareReward)):
        jobs[name] = {
            "alignkit": lambda name=name: AlignkitTraining(work, name),
            "bare": lambda bare=bare: bare(work),
            "trl": lambda name=name: TRL(work, name),
        }
    return jobs


def seconds(name: str, side) -> dict[str, float]:
    """One measurement of a side: row -> seconds."""
    if not callable(side):
        start = clock()
        side.step()
        return {name: clock() - start}
    taken = side()
    return taken if isinstance(taken, dict) else {name: taken}


# the same numbers


def compare(work: Work) -> list[dict]:
    """What the sides give on the same weights and tokens: rows of job, quantity, sides, largest difference.

    A difference counts relative to the larger of 1 and the values' size. Raises Different if one exceeds TOLERANCE.
    """
    found = list(_compare_ppo(work))
    for name, job in sides(work).items():
        if name != "ppo":
            made = {side: make() for side, make in job.items() if side != "best"}
            steps = 1 if name in ("sft", "reward") else 3  # alignkit's come with a learning-rate schedule
            losses = {side: torch.tensor([side_made.step() for _ in range(steps)]) for side, side_made in made.items()}
            found += [
                _difference(name, f"loss, {steps} step(s)", ("alignkit", other), losses["alignkit"], losses[other])
                for other in losses
                if other != "alignkit"
            ]
    worst = max(found, key=lambda row: row["difference"])
    if not worst["difference"] <= TOLERANCE:
        raise Different(
            f"{worst['job']}: {worst['quantity']} of {' and '.join(worst['sides'])} differ by "
            f"{worst['difference']:.2g}, expected at most {TOLERANCE:g}"
        )
    return found


def _compare_ppo(work: Work) -> Iterator[dict]:
    own, bare = AlignkitPPO(work), BarePPO(work)
    both = ("alignkit", "bare")
    made = bare.rollout(output_logits=True, return_dict_in_generate=True)
    responses = [row.tolist() for row in made.sequences[:, bare.ids.shape[1] :]]
    prompts = [ids[mask].tolist() for ids, mask in zip(bare.ids, bare.mask, strict=True)]
    same = rollout_from_ids(
        prompts, responses, eos_token_id=work.tokenizer.eos_token_id, pad_token_id=work.tokenizer.pad_token_id
    )
    with torch.no_grad():
        scored = token_logprobs(response_logits(own.state.policy, same), same.response_ids)
    yield _difference(
        "rollout",
        "log-probs of the tokens that generate drew",
        both,
        scored,
        token_logprobs(torch.stack(made.logits, 1), same.response_ids),
    )
    steps = own.observed()
    drawn = own.state.last_rollout
    tokens = torch.cat([drawn.prompt_ids, drawn.response_ids], 1)
    batch = bare.score(tokens)
    yield _difference("rollout", "log-probs of the tokens that sample drew", both, drawn.logprobs, batch["old"])
    orders = [
        torch.randperm(len(tokens), generator=seeded(own.config.seed, own.state.iteration, epoch, 1))
        for epoch in range(work.sizes.epochs)
    ]
    rows = [part for order in orders for part in order.split(own.config.minibatch_size)]
    for quantity, mine, theirs in (
        ("old log-probs", "old_logprobs", "old"),
        ("values", "old_values", "values"),
        ("advantages", "advantages", "advantages"),
        ("returns", "returns", "returns"),
    ):
        yield _difference(
            "scoring",
            quantity,
            both,
            torch.cat([getattr(part, mine) for part, _ in steps]),
            batch[theirs][torch.cat(rows)],
        )
    losses = bare.update(batch, orders)
    yield _difference(
        "update",
        f"policy and critic loss, {len(losses)} steps",
        both,
        torch.tensor([(measured["policy_loss"], measured["value_loss"]) for _, measured in steps]),
        torch.tensor(losses),
    )


def _difference(job: str, quantity: str, pair: tuple[str, str], mine: Tensor, theirs: Tensor) -> dict:
    size = max(1.0, float(theirs.abs().max()))
    return {
        "job": job,
        "quantity": quantity,
        "sides": list(pair),
        "difference": float((mine - theirs).abs().max()) / size,
    }


# the machine's limit


@dataclass(frozen=True)
class Cost:
    """The least that a row must do. tokens: what tokens/s counts. phases: (FLOPs, bytes) of parts in sequence."""

    tokens: int
    phases: tuple[tuple[float, float], ...]

    def limit(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds at the measured matmul rate and bandwidth, whichever takes longer in each phase."""
        return sum(max(flops / flops_per_second, moved / bytes_per_second) for flops, moved in self.phases)


def costs(work: Work, shared_trunk: bool = False) -> dict[str, Cost]:
    """Each row's cost: 2 FLOPs a weight and token forward, 6 with backward.

    A critic that shares the policy's trunk costs nothing of its own.

    Padding is not counted, and the head only where a token is scored. Attention's own FLOPs, activations and everything
    elementwise are left out. Decoding reads all weights and the KV cache at every token; an optimiser step reads or
    writes 7 numbers a weight.
    """
    sizes = work.sizes
    head = sizes.vocabulary * sizes.hidden
    body = sum(parameter.numel() for parameter in work.policy.parameters()) - head
    kv_bytes = 2 * sizes.layers * sizes.hidden * 4  # a token
    prompt, new, batch = sum(text.count(" w") for text in work.prompts), sizes.new_tokens, sizes.prompts
    whole = prompt + batch * new
    policy, value = 2 * (body * whole + head * batch * new), 0 if shared_trunk else 2 * body * whole
    decode = tuple(
        (2 * (body + head) * batch, 4 * (body + head) + kv_bytes * (prompt + batch * step)) for step in range(1, new)
    )
    rollout = ((2 * (body * prompt + head * batch), 4 * (body + head)), *decode)
    scoring = ((2 * policy + value + 2 * body * (whole + batch), 4 * ((3 if shared_trunk else 4) * body + 2 * head)),)
    moved = 7 * 4 * ((1 if shared_trunk else 2) * body + head)
    update = ((sizes.epochs * 3 * (policy + value), sizes.epochs * sizes.minibatches * moved),)
    rows = sum(text["prompt"].count(" w") for text in work.pairs) + sizes.pairs * new
    forward = 2 * (body * rows + head * sizes.pairs * new)  # of one side of the pairs
    step = 7 * 4 * (body + head)
    return {
        "rollout": Cost(batch * new, rollout),
        "scoring": Cost(whole, scoring),
        "update": Cost(sizes.epochs * whole, update),
        "iteration": Cost(batch * new, rollout + scoring + update),
        "dpo": Cost(2 * rows, ((8 * forward, step),)),
        "dpo_precomputed": Cost(2 * rows, ((6 * forward, step),)),
        "sft": Cost(rows, ((3 * forward, step),)),
        "reward": Cost(2 * rows, ((6 * 2 * body * rows, step),)),
    }


def probe(quick: bool) -> tuple[float, float]:
    """This machine now: fp32 matmul FLOP/s, and bytes/s read plus written by a copy."""
    size, length = (256, 2**20) if quick else (2048, 2**26)
    left, right, product = (torch.ones(size, size) for _ in range(3))
    source, target = torch.ones(length), torch.ones(length)
    fastest = []
    for job in (lambda: torch.mm(left, right, out=product), lambda: target.copy_(source)):
        job()
        taken = []
        for _ in range(3):
            start = clock()
            job()
            taken.append(clock() - start)
        fastest.append(min(taken))
    return 2 * size**3 / fastest[0], 8 * length / fastest[1]


def bf16_rates(quick: bool) -> dict[str, float]:
    """FLOP/s of a product as the models make them (1792 tokens, 128 to 688), in fp32 and in bf16."""
    rows, rates = (64 if quick else 1792), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(rows, 128, dtype=dtype), torch.ones(688, 128, dtype=dtype)
        taken = []
        for _ in range(5):
            start = clock()
            F.linear(left, right)
            taken.append(max(clock() - start, 1e-6))
        rates[name] = 2 * rows * 128 * 688 / min(taken)
    return rates


GROWTH = {  # what changes -> its values; all else is as in Sizes
    "prompts": (32, 512),
    "new_tokens": (8, 128),
    "hidden": (64, 256),
    "layers": (2, 8),
    "minibatches": (1, 16),
}


def growth(sizes: Sizes, values: dict[str, tuple[int, ...]]) -> list[dict]:
    """Seconds of alignkit's second PPO iteration and second DPO step, as one size at a time changes."""
    rows = []
    for name, value in [(None, None), *((name, value) for name, some in values.items() for value in some)]:
        _say(f"growth: {name} {value}" if name else "growth: the sizes above")
        changed = replace(sizes, **{name: value}) if name else sizes
        if name == "hidden":
            changed = replace(changed, intermediate=sizes.intermediate * value // sizes.hidden)
        work = Work(changed)
        iteration, step = AlignkitPPO(work), AlignkitDPO(work, True)
        iteration(), step.step()
        rows.append(
            {
                "changed": name,
                "value": value,
                "parameters": sum(parameter.numel() for parameter in work.policy.parameters()),
                "iteration": iteration()["iteration"],
                "iteration_tokens": changed.prompts * changed.new_tokens,
                "dpo": seconds("dpo", step)["dpo"],
            }
        )
    return rows


# measure


def measure_all(
    sizes: Sizes, rounds: int, *, quick: bool = False, grow: bool = False, trl_ppo: Path | None = None
) -> dict:
    """Compare, measure memory, then time: a dict as the JSON has it. trl_ppo: where TRL's PPO lives."""
    rates = bf16_rates(quick)
    work = Work(sizes, precision="bf16" if rates["bf16"] > 1.5 * rates["fp32"] else "fp32")
    jobs = sides(work)
    peaks = _peaks(work, jobs)
    _say("the same numbers on all sides")
    checks = compare(work)
    if trl_ppo is not None:
        worker = Worker(trl_ppo, sizes, torch.get_num_threads())
        jobs["ppo"]["trl"] = lambda: worker
    load = [os.getloadavg()]
    made = {(job, side): make() for job, table in jobs.items() for side, make in table.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    probes, observed = [], []
    for number in range(-1, rounds):  # the first warms up
        _say(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        probes.append(probe(quick))
        for job, table in jobs.items():
            order = list(table)
            shift = number % len(order)
            for side in order[shift:] + order[:shift]:
                for row, value in seconds(job, made[job, side]).items():
                    if number >= 0:
                        taken.setdefault((row, side), []).append(value)
        if trl_ppo is not None:
            own = made["ppo", "alignkit"].stats
            observed.append((own.steps, worker.observed["steps"], own.kl_to_ref, worker.observed["kl"]))
    load.append(os.getloadavg())
    if trl_ppo is not None:
        alike = _same_ppo(sizes, observed)
        peaks["ppo"]["trl"] = worker.peak_mb
        worker.close()
    grown = growth(sizes, {"prompts": (2,), "new_tokens": (3,)} if quick else GROWTH) if grow else []
    flops, bandwidth = (statistics.median(rate) for rate in zip(*probes, strict=True))
    cost, cheaper = costs(work), costs(work, shared_trunk=True)
    faster = flops * max(1.0, rates[work.precision] / rates["fp32"])  # of the best settings
    rows = []
    for name in ROWS:
        job = "ppo" if name in PPO_PARTS else name
        limit = cost[name].limit(flops, bandwidth)
        limits = dict.fromkeys(jobs[job], limit) | {"best": cheaper[name].limit(faster, bandwidth)}
        measured = {
            side: _spread(taken[name, side])
            | {
                "seconds": taken[name, side],
                "tokens_per_second": cost[name].tokens / statistics.median(taken[name, side]),
                "limit_seconds": limits[side],
                "share_of_limit": limits[side] / statistics.median(taken[name, side]),
                "peak_mb": peaks[job][side],
            }
            for side in jobs[job]
            if (name, side) in taken
        }
        ratios, best_ratios = (
            {
                side: _spread([theirs / mine for theirs, mine in zip(taken[name, side], taken[name, own], strict=True)])
                for side in measured
                if side != own and own in measured
            }
            for own in ("alignkit", "best")
        )
        rows.append(
            {
                "name": name,
                "what": ROWS[name],
                "tokens": cost[name].tokens,
                "flops": sum(phase[0] for phase in cost[name].phases),
                "bytes": sum(phase[1] for phase in cost[name].phases),
                "limit_seconds": limit,
                "sides": measured,
                "ratios": ratios,
                "best_ratios": best_ratios,
            }
        )
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if torch.get_num_threads() == 1 else "wall time",
        "load_before": load[0],
        "load_after": load[1],
        "matmul_flops_per_second": flops,
        "matmul_best": max(rate for rate, _ in probes),
        "bytes_per_second": bandwidth,
        "bytes_best": max(rate for _, rate in probes),
    }
    return {
        "versions": versions(),
        "machine": machine,
        "sizes": asdict(sizes),
        "precision": "float32",
        "best": {"shared_trunk": True, "precision": work.precision, "flops_per_second": rates},
        "growth": grown,
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in work.policy.parameters()),
        "rows": rows,
        "checks": checks,
        "trl_ppo": None if trl_ppo is None else alike | {"versions": worker.versions},
        "not_measured": NOT_MEASURED if trl_ppo is None else {},
    }


def _same_ppo(sizes: Sizes, observed: list[tuple[int, int, float, float]]) -> dict:
    """What alignkit's and TRL's PPO must agree in: steps, and the KL of what they sampled.

    observed: steps of alignkit and of TRL, KL of alignkit and of TRL, a row a round. Raises Different if the steps
    are not the same, or the mean KL differs by more than a quarter (the samples are not the same).
    """
    steps = sizes.epochs * sizes.minibatches
    made = {count for row in observed for count in row[:2]}
    if made != {steps}:
        raise Different(f"alignkit's and TRL's PPO made {sorted(made)} optimiser steps an iteration, expected {steps}")
    kl, kl_trl = (statistics.mean(values) for values in list(zip(*observed, strict=True))[2:])
    if sizes != QUICK and not abs(kl_trl / kl - 1) < 0.25:  # the quick sizes sample too little to tell
        raise Different(f"the KL of a rollout is {kl:.3g} nats, in TRL {kl_trl:.3g}, expected within 25 %")
    return {"steps": steps, "kl": kl, "kl_trl": kl_trl}


def _peaks(work: Work, jobs: dict) -> dict[str, dict[str, float | None]]:
    """Peak memory of making a side and taking one step on one thread, MB over what was there.

    Each has a process, started by a server that has the imports and nothing else: a fork of this one would inherit
    locks of threads that it does not have. None where it took longer than PATIENCE.
    """
    peaks: dict[str, dict[str, float | None]] = {}
    for job, made in jobs.items():
        for side in made:
            _say(f"memory: {job}, {side}")
            receiver, sender = PROCESSES.Pipe(duplex=False)
            process = PROCESSES.Process(target=_peak, args=(asdict(work.sizes), work.precision, job, side, sender))
            process.start()
            sender.close()
            try:
                peaks.setdefault(job, {})[side] = receiver.recv() if receiver.poll(PATIENCE) else None
            except EOFError as error:
                raise RuntimeError(f"measuring the memory of {job}, {side} ended without a result") from error
            finally:
                process.join(10)
                process.kill()
    return peaks


def _peak(sizes: dict, precision: str, job: str, side: str, sender) -> None:
    torch.set_num_threads(1)
    with _quiet():
        make = sides(Work(Sizes(**sizes), precision=precision))[job][side]
        before = resident()
        seconds(job, make())
    sender.send(max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before))


def table(results: dict) -> str:
    """The results as Markdown."""
    machine, sizes = results["machine"], results["sizes"]
    lines = [
        f"{results['parameters'] / 1e6:.2f} M parameters, fp32, {machine['threads']} of {machine['cores']} cores, load "
        f"{machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after (one-minute averages). "
        f"Measured limit: {machine['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s (medians; best {machine['matmul_best'] / 1e9:.0f} and "
        f"{machine['bytes_best'] / 1e9:.1f}). {sizes['prompts']} prompts of at most {sizes['prompt_tokens']} tokens, "
        f"{sizes['new_tokens']} new tokens; {sizes['pairs']} rows or pairs a DPO, SFT or reward step.",
        "",
        f"Seconds of {machine['clock']}: median of {results['rounds']} interleaved rounds (min–max). "
        "Ratio: theirs / alignkit's, median of the rounds' ratios (min–max). "
        "Limit: the time that the FLOPs or bytes would take at the measured rate, as a "
        "share of alignkit's. Peak: MB over the imports, alignkit / bare / TRL.",
        "",
        "| step | alignkit, s | tokens/s | limit | bare, s | bare / alignkit | TRL, s | TRL / alignkit | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        for mine, ratios, what in (("alignkit", row["ratios"], ""), ("best", row["best_ratios"], ", best settings")):
            if mine not in row["sides"]:
                continue
            own = row["sides"][mine]
            cells = [
                row["what"] + what,
                _range(own),
                f"{own['tokens_per_second']:,.0f}".replace(",", " "),
                f"{own['share_of_limit']:.0%}",
            ]
            for side in ("bare", "trl"):
                cells += (
                    [_range(row["sides"][side]), _range(ratios[side], 2)]
                    if side in row["sides"]
                    else ["not measured"] * 2
                )
            peaks = [row["sides"].get(side, {}).get("peak_mb") for side in (mine, "bare", "trl")]
            cells.append(" / ".join("–" if peak is None else f"{peak:.0f}" for peak in peaks))
            lines.append(f"| {' | '.join(cells)} |")
    worst = max(row["difference"] for row in results["checks"])
    rates = results["best"]["flops_per_second"]
    lines += [
        "",
        f'Best settings: `shared_trunk=True`, `precision="{results["best"]["precision"]}"` (a product of the model\'s '
        f"shapes runs at {rates['fp32'] / 1e9:.0f} GFLOP/s in fp32 and at {rates['bf16'] / 1e9:.0f} in bf16 here; DPO "
        "and rollout have no other setting that makes them faster).",
        f"Same numbers on all sides: {len(results['checks'])} comparisons, largest difference {worst:.1g}.",
    ]
    if results["trl_ppo"]:
        alike = results["trl_ppo"]
        lines += [
            f"TRL's PPO is that of trl {alike['versions']['trl']}, in a process of its own: {alike['steps']} optimiser "
            f"steps as alignkit's, KL of its rollout {alike['kl_trl']:.1f} nats (alignkit's {alike['kl']:.1f}). "
            "It does not clip gradients."
        ]
    lines += [f"Not measured: {what}: {why}." for what, why in results["not_measured"].items()]
    lines += [
        "alignkit's SFT and reward training are TRL's trainers with batches from lists; collators and data loaders are "
        "timed on no side.",
    ]
    if not results["growth"]:
        return "\n".join(lines)
    lines += [
        "",
        "How the cost grows, one size at a time (alignkit, default settings; the second run of each, so only "
        "differences of a fifth and more mean something):",
        "",
        "| changed | parameters | PPO iteration, s | new tokens/s | DPO step, s |",
        "|---|---|---|---|---|",
    ]
    for row in results["growth"]:
        changed = "nothing" if row["changed"] is None else f"{row['changed'].replace('_', ' ')}: {row['value']}"
        rate = f"{row['iteration_tokens'] / row['iteration']:,.0f}".replace(",", " ")
        lines.append(
            f"| {changed} | {row['parameters'] / 1e6:.2f} M | {row['iteration']:.2f} | {rate} | {row['dpo']:.3f} |"
        )
    return "\n".join(lines)


def write_page(page: Path, name: str, made: str) -> None:
    """Put the table of the results in file `name` between its marks in a Markdown page; ValueError if it has none."""
    text, mark = page.read_text(encoding="utf-8"), f"<!-- {name} -->\n"
    try:
        before, rest = text.split(mark)
        after = rest.split("<!-- end -->\n", 1)[1]
    except (ValueError, IndexError):
        raise ValueError(
            f"{page} has no place for the table, expected {mark.strip()} and <!-- end --> on their lines"
        ) from None
    page.write_text(f"{before}{mark}{made}\n<!-- end -->\n{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict:
    """Run, print the table, write the JSON and the table's place in a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--page", type=Path, help="put the table into this Markdown page, where it names that file")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows with sizes, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 8; 2 with --quick)")
    parser.add_argument(
        "--trl-ppo", type=Path, metavar="FOLDER", help=f"measure the PPO of trl {VERSION} from an environment here"
    )
    given = parser.parse_args(arguments)
    rounds = (2 if given.quick else 8) if given.rounds is None else given.rounds
    if rounds < 1:
        parser.error(f"--rounds is {rounds}, expected at least 1")
    if given.page and not given.json:
        parser.error("--page needs --json: the page names the file that its table is made from")
    if given.threads < 1:
        parser.error(f"--threads is {given.threads}, expected at least 1")
    with _quiet(), _threads(given.threads):
        results = measure_all(QUICK if given.quick else Sizes(), rounds, quick=given.quick, grow=given.growth,
                              trl_ppo=given.trl_ppo)
    print(table(results))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.json, results)
    if given.page:
        write_page(given.page, given.json.name, table(results))
    return results


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet():
    """Without progress bars, and without the warnings that a loop would repeat hundreds of times."""
    level, bars = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _bare_step(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _timed(function: Callable, spent: dict[str, float], name: str) -> Callable:
    def timed(*arguments, **options):
        start = clock()
        result = function(*arguments, **options)
        spent[name] += clock() - start
        return result

    return timed


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _range(spread: dict[str, float], digits: int = 3) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}–{spread['max']:.{digits}f})"


if __name__ == "__main__":
    main()
