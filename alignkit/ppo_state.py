"""The state of a PPO run: its models, optimisers, reward and prompts; how it starts, what is saved, how it goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alignkit.configs import ADVANTAGES, WITHOUT_CRITIC, PPOConfig
from alignkit.forward.rollout import Rollout
from alignkit.forward.scoring import check_reward_reads, check_room
from alignkit.models.adapters import reference_policy
from alignkit.models.heads import SharedCritic, value_model_from
from alignkit.models.identity import function_hash, tensors_hash, weights_hash
from alignkit.models.loading import same_vocabulary
from alignkit.optim import adamw, check_weights, copy_weights, trained_weights
from alignkit.storage import data_hash

Reward = Callable[[list[str], list[str]], Sequence[float]]


@dataclass
class PPOState:
    """The state that a PPO run changes. `start` makes one.

    reward: callable (prompts, responses) -> scores. prompts: texts to draw from, one list per stratum (prompt classes
    are drawn evenly). demonstrations: rows prompt / completion for ptx, or None. critic and critic_optimizer: None with
    advantage "rloo" or "grpo".
    """

    policy: nn.Module
    ref_policy: nn.Module
    critic: nn.Module | None
    tokenizer: object
    reward: Reward
    prompts: list[list[str]]
    policy_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    demonstrations: list[dict] | None = None
    kl_coef: float | None = None  # the adaptive controller's; None before the first iteration
    iteration: int = 0
    last_rollout: Rollout | None = field(default=None, repr=False)
    last_scores: Tensor | None = field(default=None, repr=False)
    whole: bool = field(default=True, repr=False)  # False if optimiser states are lost that other processes kept
    pass_limit: int | None = field(default=None, repr=False)  # tokens a pass that fit, once memory ran out

    @property
    def step(self) -> int:
        """Number of completed iterations, as Checkpoints counts them; -1 if the state is not whole."""
        return self.iteration if self.whole else -1

    @classmethod
    def start(
        cls,
        policy: nn.Module,
        tokenizer,
        reward: Reward,
        prompts: Sequence,
        config: PPOConfig,
        *,
        critic: nn.Module | None = None,
        ref_policy: nn.Module | None = None,
        demonstrations: list[dict] | None = None,
    ) -> "PPOState":
        """The state of a run before its first iteration.

        prompts: texts, or lists of texts (strata, drawn evenly). critic: by default a copy of the reward model if it
        uses the policy's tokens, otherwise the policy's body with a zero head; with shared_trunk a head on the policy's
        own body; with advantage "rloo" or "grpo" there is none. ref_policy: by default the current policy. Raises
        ValueError if there are no prompts or one is too long, for ptx_coef > 0 without demonstrations, for a critic
        with shared_trunk or without need, or if the reward model cannot read the prompts.
        """
        # Prompts: one stratum, or several strata that are drawn evenly.
        strata = [list(s) for s in prompts] if prompts and not isinstance(prompts[0], str) else [list(prompts)]
        strata = [stratum for stratum in strata if stratum]
        if not strata:
            raise ValueError("prompts is empty, expected at least one prompt")
        if config.ptx_coef > 0 and not demonstrations:
            raise ValueError(f"ptx_coef is {config.ptx_coef} but there are no demonstrations to mix in")
        texts = [prompt for stratum in strata for prompt in stratum]
        check_reward_reads(reward, tokenizer, texts)
        check_room(policy, tokenizer, texts, config.max_new_tokens)
        critic = _critic(critic, policy, tokenizer, reward, config)
        # Reference: the current policy, frozen.
        ref_policy = reference_policy(policy) if ref_policy is None else ref_policy
        trainable = [p for p in policy.parameters() if p.requires_grad]
        return cls(
            policy,
            ref_policy,
            critic,
            tokenizer,
            reward,
            strata,
            adamw(trainable, config.learning_rate),
            None if critic is None else adamw(list(critic.parameters()), config.critic_learning_rate),
            demonstrations,
        )

    def check_critic(self, config: PPOConfig) -> None:
        """Raise ValueError if the run has a critic and `config.advantage` uses none, or the other way round."""
        fitting = [name for name in ADVANTAGES if (name in WITHOUT_CRITIC) == (self.critic is None)]
        if config.advantage not in fitting:
            raise ValueError(f"advantage is {config.advantage!r}, expected {' or '.join(map(repr, fitting))} in a run "
                             f"that was started {'without' if self.critic is None else 'with'} a critic")

    def facts(self) -> dict:
        """Hashes of the initial models and texts: what the run depends on besides its config."""
        return {"policy": weights_hash(self.policy),
                "critic": None if self.critic is None else tensors_hash(self.critic.state_dict()),
                "reference": tensors_hash(self.ref_policy.state_dict()), "reward": function_hash(self.reward),
                "prompts": data_hash([prompt for stratum in self.prompts for prompt in stratum]),
                "demonstrations": data_hash(self.demonstrations or [])}

    def trained(self) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """The models that training changes, each with its optimiser: "policy" and, if there is one, "critic"."""
        models = {"policy": (self.policy, self.policy_optimizer)}
        return models if self.critic is None else models | {"critic": (self.critic, self.critic_optimizer)}

    def state_dict(self) -> dict:
        """Everything that training changes: trained weights and optimizers, iteration, kl_coef. The tensors are not
        copied.

        The next iteration depends on nothing else, because its random numbers come from (seed, iteration).
        """
        saved = {}
        for name, (model, optimizer) in self.trained().items():
            saved |= {name: trained_weights(model), f"{name}_optimizer": optimizer.state_dict()}
        return {**saved, "iteration": self.iteration, "kl_coef": self.kl_coef}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping) -> None:
        """Continue from `state_dict`; the optimizers take over its tensors, as PyTorch's do.

        Raises ValueError, and changes nothing, if the weights have other names or shapes, or if one of the two runs has
        a critic and the other has none.
        """
        if ("critic" in saved) != (self.critic is not None):
            runs = ("with", "without") if "critic" in saved else ("without", "with")
            raise ValueError(f"saved is of a run {runs[0]} a critic, expected that of a run {runs[1]} one: `advantage` "
                             "differs")
        models = self.trained()
        for name, (model, _) in models.items():
            check_weights(trained_weights(model), saved[name], f"saved[{name!r}]")
        for name, (model, optimizer) in models.items():
            copy_weights(trained_weights(model), saved[name])
            optimizer.load_state_dict(saved[f"{name}_optimizer"])
        self.iteration, self.kl_coef, self.whole = saved["iteration"], saved["kl_coef"], True
        self.last_rollout = self.last_scores = None


def _critic(critic: nn.Module | None, policy: nn.Module, tokenizer, reward: Reward, config: PPOConfig
            ) -> nn.Module | None:
    """The critic of a new run on the policy's device: the given one, or that of `PPOState.start`; None without one."""
    if critic is not None and (config.shared_trunk or config.advantage in WITHOUT_CRITIC):
        why = "shared_trunk, which makes its own" if config.shared_trunk else f"advantage {config.advantage!r}"
        raise ValueError(f"critic is a {type(critic).__name__}, expected None with {why}")
    if config.advantage in WITHOUT_CRITIC:
        return None
    if config.shared_trunk:
        critic = SharedCritic(policy)
    if critic is None:
        reads_same = hasattr(reward, "model") and same_vocabulary(tokenizer, getattr(reward, "tokenizer", None))
        critic = value_model_from(reward.model if reads_same else policy)
    if critic is policy:
        raise ValueError("critic is the policy itself, expected a model of its own")
    return critic.to(policy.device)
