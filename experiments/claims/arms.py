"""Arms: ways to train one SFT policy with the same labels, brought to the same KL to SFT.

An arm is one or two stages. A policy that is stopped on its way has less reward than one that has converged at the same
KL (notebook 07), so no stage is stopped: each has a fixed number of steps and a price that decides its KL. A stage with
PPO is *priced*: it adapts the price of KL to the stage's KL after every block (Ziegler 2019, §2.2). A stage without PPO
is *swept*: it is trained with several values of its own price, and `order.follow` interpolates between them.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.dpo import DPOState, Pairs, dpo, dpo_iteration
from alignkit.dpo import accumulate_gradient as add_dpo_gradient
from alignkit.formulas.losses import adapt_kl_coef
from alignkit.formulas.randomness import seeded
from alignkit.forward.reading import response_logprobs
from alignkit.forward.rollout import encode_rows, to_device
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.optim import adamw, set_learning_rate
from alignkit.ppo import PPOState, collect, ppo_iteration, ppo_step
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.task import desk_task
from experiments.claims.lab import key_of
from experiments.sweep import Truth, kept, scorer_in_sft_sd, some_prompts, strata, train_sft_policy

ITERATIONS, STEPS = 2, 8  # of PPO, and of another method's optimiser, in a block


@dataclass(frozen=True)
class Size:
    """How much of everything. labels: of every arm in all; fresh: those that an arm with fresh pairs keeps for DPO."""

    demonstrations: int = 8000
    labels: int = 6000
    fresh: int = 1500
    normalise: int = 1024  # SFT responses that set the scale of a reward model's score
    keys: int = 2  # held-out questions of each class, with all their paraphrases
    blocks: int = 16  # of PPO in an arm: all in one stage, or half in each of two
    first: float = 0.6  # KL to SFT, nats, of the first of two stages
    last: float = 1.25  # KL to SFT, nats, of the arm
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(kl_coef=0.35))
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(beta=0.3, epochs=2))
    betas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)  # of DPO's stages
    draws: tuple[int, ...] = (2, 4, 8, 16)  # n of best-of-n

    def key(self) -> dict:
        """All settings as plain JSON types."""
        return key_of(self)


class Ground:
    """One world: its SFT policy, its labels, two reward models, and what is exact on held-out prompts.

    pairs: all labels, pairs of SFT's responses. judges: "all" learned from all labels, "part" from those that are left
    when `Size.fresh` labels are kept for fresh pairs. Models are kept in `folder` and made once.
    """

    def __init__(self, seed: int, folder: Path, size: Size):
        self.seed, self.size, self.task = seed, size, desk_task(seed)
        self.folder = folder / f"world-{seed}"
        self._key = {name: value for name, value in size.key().items() if name in (
            "demonstrations", "labels", "fresh", "normalise", "sft", "reward")}
        kept(self.folder / "sft.json", self._key, self._make_sft)
        self.sft, self.tokenizer = load_policy(self.folder / "sft")
        self.pairs = self.task.preference_pairs(self.sft, self.tokenizer, size.labels, seed=seed)
        self.judges = {name: self._judge(name, rows) for name, rows in
                       {"all": self.pairs, "part": self.pairs[: size.labels - size.fresh]}.items()}
        prompts = some_prompts(self.task.world.heldout_prompts, size.keys, seed)
        self.truth = Truth(self.task, prompts, self.sft, self.tokenizer, self.judges["all"], self.folder / "cache")

    def policy(self) -> nn.Module:
        """A copy of the SFT policy to train."""
        return load_policy(self.folder / "sft")[0]

    def fresh_pairs(self, policy: nn.Module) -> list[dict]:
        """`Size.fresh` new labels on responses of `policy`, by the same annotator."""
        return self.task.preference_pairs(policy, self.tokenizer, self.size.fresh, seed=self.seed + 1)

    def training_prompts(self, each: int, stream: int) -> list[str]:
        """`each` training prompts of each class."""
        rng = np.random.default_rng([self.seed, stream])
        return [texts[i] for texts in strata(self.task) for i in rng.integers(len(texts), size=each)]

    def _make_sft(self) -> bool:
        policy, tokenizer = train_sft_policy(self.task, self.size.demonstrations, self.size.sft, self.seed)
        save_model(policy, tokenizer, self.folder / "sft")
        return True

    def _judge(self, name: str, rows: list[dict]) -> RewardScorer:
        def train() -> bool:
            model = reward_model_from(self.sft, seed=self.seed)
            train_reward_model(model, self.tokenizer, rows, replace(self.size.reward, seed=self.seed))
            scorer_in_sft_sd(model, self.sft, self.tokenizer, self.task, self.size.normalise, self.seed).save(
                self.folder / f"judge-{name}")
            return True

        kept(self.folder / f"judge-{name}.json", self._key, train)
        return RewardScorer.load(self.folder / f"judge-{name}")


# ---- priced methods: each trains a policy in place and yields after every block; it is sent the KL to SFT
Blocks = Generator[dict[str, float], float, None]


@dataclass
class Price:
    """PPO's price of KL, changed after every block towards a KL to SFT (nats) by at most a fifth."""

    target: float
    value: float

    def adapt(self, kl: float) -> None:
        """One step of the adaptive controller."""
        self.value = adapt_kl_coef(self.value, kl, self.target, responses=1, horizon=1)


def ppo_blocks(ground: Ground, policy: nn.Module, target: float, number: int, blocks: int, *, judge: str = "all",
               samples: int = 1, **options) -> Blocks:
    """PPO on the score of a reward model; the reference is the policy as it is now.

    samples: responses to each prompt; the number of responses of an iteration stays the same. options: of PPOConfig.
    """
    config = replace(ground.size.ppo, seed=ground.seed + 1000 * number, iterations=ITERATIONS * blocks, **options,
                     samples_per_prompt=samples, prompts_per_iteration=ground.size.ppo.prompts_per_iteration // samples)
    state, price = _ppo_state(ground, policy, config, judge), Price(target, config.kl_coef)
    for _ in range(blocks):
        price.adapt((yield _ppo_block(state, replace(config, kl_coef=price.value))))


def summed_blocks(ground: Ground, policy: nn.Module, target: float, number: int, blocks: int, *, weight: float
                  ) -> Blocks:
    """The sum of PPO's loss and `weight` times DPO's, each on its own minibatch, at every optimiser step.

    Yields the mean cosine of the two gradients over the block's steps.
    """
    ppo, dpo = replace(ground.size.ppo, seed=ground.seed, iterations=ITERATIONS * blocks), ground.size.dpo
    state, price = _ppo_state(ground, policy, ppo, "all"), Price(target, ppo.kl_coef)
    pairs = DPOState.start(policy, ground.tokenizer, ground.pairs, dpo).pairs
    for _ in range(blocks):
        cosines = [cosine for _ in range(ITERATIONS)
                   for cosine in _summed_iteration(state, pairs, replace(ppo, kl_coef=price.value), dpo, weight)]
        price.adapt((yield {"cosine": float(np.mean(cosines))}))


def _summed_iteration(state: PPOState, pairs: Pairs, ppo: PPOConfig, dpo: DPOConfig, weight: float) -> Iterator[float]:
    """One PPO iteration with DPO's gradient added at every step; the cosine of the two gradients at each."""
    batch, _ = collect(state, ppo)
    decay = 1 - (state.iteration - 1) / ppo.iterations
    set_learning_rate(state.policy_optimizer, ppo.learning_rate * decay)
    set_learning_rate(state.critic_optimizer, ppo.critic_learning_rate * decay)
    for epoch in range(ppo.epochs):
        order = torch.randperm(len(batch.rollout), generator=seeded(ppo.seed, state.iteration, epoch, 1))
        for place, rows in enumerate(order.split(ppo.minibatch_size)):
            ppo_step(state, batch[rows], ppo, train_policy=False)  # leaves PPO's gradient in the policy
            of_ppo = _gradient(state.policy)
            generator = seeded(ppo.seed, state.iteration, epoch, place, 4)
            drawn = torch.randint(len(pairs), (dpo.batch_size,), generator=generator)
            add_dpo_gradient(state.policy, pairs[drawn], weight, dpo)
            yield float(torch.cosine_similarity(of_ppo, _gradient(state.policy) - of_ppo, dim=0))
            torch.nn.utils.clip_grad_norm_(state.policy.parameters(), ppo.max_grad_norm)
            state.policy_optimizer.step()


def alternating_blocks(ground: Ground, policy: nn.Module, target: float, number: int, blocks: int, *, period: int
                       ) -> Blocks:
    """`period` blocks of PPO, `period` blocks of DPO, and so on, half of `blocks` each; both keep SFT as reference and
    their own optimiser."""
    ppo = replace(ground.size.ppo, seed=ground.seed, iterations=ITERATIONS * blocks // 2)
    dpo = replace(ground.size.dpo, seed=ground.seed, warmup=0.0)
    state, price = _ppo_state(ground, policy, ppo, "all"), Price(target, ppo.kl_coef)
    pairs = DPOState.start(policy, ground.tokenizer, ground.pairs, dpo, ref_policy=ground.sft)
    for block in range(blocks):
        if block // period % 2 == 0:
            price.adapt((yield _ppo_block(state, replace(ppo, kl_coef=price.value))))
        else:
            price.adapt((yield [dpo_iteration(pairs, dpo) for _ in range(STEPS)][-1].log()))


# ---- swept methods: each trains a policy in place with one value of its price, and returns what it logged
def train_dpo(ground: Ground, policy: nn.Module, number: int, beta: float, *, fresh: bool = False,
              epochs: int | None = None) -> dict[str, float]:
    """DPO on all labels, or on fresh pairs of the policy as it is now, which is the reference.

    epochs: passes over them; None: as `Size.dpo` says.
    """
    rows, start = ground.fresh_pairs(policy) if fresh else ground.pairs, ground.size.dpo
    config = replace(start, seed=ground.seed + 1000 * number, beta=beta, epochs=epochs or start.epochs)
    steps = list(dpo(policy, ground.tokenizer, rows, config))
    return {"chosen_shift": float(np.mean([step.chosen_shift for step in steps[-STEPS:]]))}


def distil(ground: Ground, policy: nn.Module, number: int, n: float, *, prompts: int = 512) -> dict[str, float]:
    """Likelihood training on the best of `n` responses by proxy, drawn from the policy as it is now for `prompts`
    prompts of each class (best-of-n distillation)."""
    asked, n, config = ground.training_prompts(prompts, 5), int(n), ground.size.dpo
    drawn = generate_texts(policy, ground.tokenizer, asked, max_new_tokens=ground.task.max_new_tokens, samples=n,
                           seed=ground.seed + 5)
    scores = ground.judges["all"]([prompt for prompt in asked for _ in range(n)],
                                  [text for texts in drawn for text in texts])
    best = np.asarray(scores).reshape(-1, n).argmax(1)
    rows = [{"prompt": prompt, "completion": texts[place]}
            for prompt, texts, place in zip(asked, drawn, best, strict=True)]
    data = to_device(encode_rows(ground.tokenizer, rows, "completion", ground.task.max_new_tokens), policy.device)
    optimizer = adamw(policy.parameters(), ground.size.ppo.learning_rate)
    for epoch in range(3 * config.epochs):
        for part in torch.randperm(len(data), generator=seeded(ground.seed, epoch, 5)).split(config.batch_size):
            loss = -response_logprobs(policy, data[part]).sum() / data[part].response_mask.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
    return {}


def _ppo_block(state: PPOState, config: PPOConfig) -> dict[str, float]:
    return [ppo_iteration(state, config) for _ in range(ITERATIONS)][-1].log()


def _ppo_state(ground: Ground, policy: nn.Module, config: PPOConfig, judge: str) -> PPOState:
    return PPOState.start(policy, ground.tokenizer, ground.judges[judge], strata(ground.task), config)


def _gradient(policy: nn.Module) -> Tensor:
    """The policy's gradient as one vector."""
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


# ---- arms
@dataclass(frozen=True)
class Stage:
    """One method and its options. method: a priced or a swept one; price: the field of Size that a swept one goes
    through, None for a priced one."""

    method: Callable
    options: dict = field(default_factory=dict)
    price: str | None = None


PPO, DPO = Stage(ppo_blocks), Stage(train_dpo, price="betas")
LONG = replace(DPO, options={"epochs": 6})
ARMS: dict[str, tuple[Stage, ...]] = {
    "PPO": (PPO,),
    "DPO": (DPO,),
    "DPO, six epochs": (LONG,),
    "PPO, then PPO": (PPO, PPO),
    "PPO, then DPO": (PPO, DPO),
    "PPO, then DPO, six epochs": (PPO, LONG),
    "PPO, then DPO on fresh pairs": (replace(PPO, options={"judge": "part"}), replace(DPO, options={"fresh": True})),
    "DPO, then PPO": (DPO, PPO),
    "PPO + DPO": (Stage(summed_blocks, {"weight": 1.0}),),
    "PPO + 4 DPO": (Stage(summed_blocks, {"weight": 4.0}),),
    "alternating, each block": (Stage(alternating_blocks, {"period": 1}),),
    "alternating, four blocks": (Stage(alternating_blocks, {"period": 4}),),
    "best of n, distilled": (Stage(distil, price="draws"),),
    "RLOO": (replace(PPO, options={"samples": 4, "advantage": "rloo"}),),
    "GRPO": (replace(PPO, options={"samples": 4, "advantage": "grpo", "kl_penalty": "k3"}),),
    **{f"RLOO, {name} in the loss": (replace(PPO, options={"samples": 4, "advantage": "rloo", "kl_penalty": name}),)
       for name in ("k1", "k2", "k3")},
}
