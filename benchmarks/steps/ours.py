"""alignkit's side of the benchmark."""

import copy
from unittest.mock import patch

from transformers import TrainerCallback

from alignkit import configs, optim, ppo
from alignkit.configs import DPOConfig, RewardConfig, SFTConfig
from alignkit.dpo import Pairs, dpo_step, with_reference
from alignkit.forward.rollout import encode_rows
from alignkit.models.adapters import frozen_copy
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.sft import train_sft
from benchmarks.steps.work import BETA, Work, _timed, clock


# PPO
class AlignkitPPO:
    """`ppo_iteration`, with the time that its parts take. options: of PPOConfig."""

    def __init__(self, work: Work, **options):
        sizes = work.sizes
        self.config = configs.PPOConfig(
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


# DPO
class AlignkitDPO:
    """`dpo_step` on one batch, scored by the reference at every step or once."""

    def __init__(self, work: Work, precomputed: bool, precision: str = "fp32"):
        self.policy, self.ref, self.precomputed = copy.deepcopy(work.policy), frozen_copy(work.ref), precomputed
        self.config = DPOConfig(beta=BETA, max_new_tokens=work.sizes.new_tokens, precision=precision)
        self.optimizer = optim.adamw(list(self.policy.parameters()), 1e-5)
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
