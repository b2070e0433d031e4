"""What is asked of a run, what is tried on both sides, and what is changed on alignkit's. Written before any of it ran.

Both sides get the same four tries on the seeds `TUNING`; the try that is soonest there is evaluated on the seeds
`EVALUATION`. Then single changes of alignkit's try, and the best of them together, are tried on the seeds `VARIED`;
what is soonest there is evaluated beside the other two, as a row of its own: it had more tries than TRL.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from alignkit.configs import PPOConfig

PRICE = 0.35  # kl_coef: fixed, as part of the question; the exact optimum at this price lies at about 1.1 nats
SHARE = 0.95  # of what the exact optimum at the run's own KL gains in proxy
MOST_KL = 2.0  # nats: a policy beyond has not reached it
GOLD = 0.9  # of the gold that the exact optimum at PRICE gains
EVERY = 2  # iterations between two measurements
TUNING = (10, 11)  # world seeds of the tries
VARIED = (10, 11)  # of the changes
EVALUATION = (0, 1, 2, 3, 4)
LATE = 1.5  # a change is ended when it has taken so many times what the try without it took
WORTH = 1.05  # a single change that is as many times sooner on the seeds VARIED is tried together with others


@dataclass(frozen=True)
class Setting:
    """What both sides can be told. minibatch: responses per optimiser step. The critic's rate is twice the policy's;
    both fall linearly to 0 over the iterations."""

    iterations: int = 40
    prompts: int = 512
    minibatch: int = 128
    epochs: int = 2
    learning_rate: float = 1e-3

    def config(self, seed: int, **changes) -> PPOConfig:
        """alignkit's settings, with `changes` of PPOConfig's fields."""
        return replace(PPOConfig(iterations=self.iterations, prompts_per_iteration=self.prompts, epochs=self.epochs,
                                 minibatch_size=self.minibatch, learning_rate=self.learning_rate,
                                 critic_learning_rate=2 * self.learning_rate, kl_coef=PRICE, seed=seed), **changes)


TRIES = {
    "as in the course": Setting(),
    "half the iterations": Setting(iterations=20),
    "half the iterations, twice the rate": Setting(iterations=20, learning_rate=2e-3),
    "half the iterations, twice the epochs": Setting(iterations=20, epochs=4),
}
TINY = Setting(iterations=2, prompts=32, minibatch=16)  # does it run?


def changes(setting: Setting) -> dict[str, dict[str, dict]]:
    """Group -> name -> fields of PPOConfig that differ from the setting's: one change each. Of a group one is taken."""
    prompts, iterations = setting.prompts, setting.iterations
    epochs, rate = setting.epochs, setting.learning_rate
    return {
        "batch": {
            "half the prompts, twice the iterations": {"prompts_per_iteration": prompts // 2,
                                                       "iterations": 2 * iterations},
        },
        "steps": {
            "half the epochs": {"epochs": epochs // 2},
            "twice the epochs": {"epochs": 2 * epochs},
        },
        "critic": {
            "critic trained alone in the first iteration": {"critic_warmup": 1},
            "shared trunk": {"shared_trunk": True},
            "no critic (RLOO, 4 samples a prompt)": {"advantage": "rloo", "samples_per_prompt": 4,
                                                     "prompts_per_iteration": prompts // 4},
        },
        "schedule": {
            "constant learning rate": {"lr_decay": False},
            "half the iterations": {"iterations": iterations // 2},
            "twice the rate": {"learning_rate": 2 * rate, "critic_learning_rate": 4 * rate},
        },
        "stopping": {"epochs stop at a KL of 0.02 to the sampler": {"max_step_kl": 0.02}},
    }


def together(setting: Setting, groups: Mapping[str, Mapping[str, dict]], ratios: Mapping[str, float]
             ) -> dict[str, dict]:
    """What is tried together: the best of each group that is worth it, most first, two, three and more of them at once.

    groups: as `changes` returns them. ratios: name of a single change -> how many times sooner it is, on the seeds
    VARIED. Returns name -> fields.
    """
    best = {}
    for names in groups.values():
        name = max(names, key=lambda name: ratios.get(name, 0.0))
        if ratios.get(name, 0.0) >= WORTH:
            best[name] = names[name]
    order = sorted(best, key=lambda name: -ratios[name])
    joined = {}
    for count in range(2, len(order) + 1):
        fields: dict = {}
        for name in order[:count]:
            clash = fields.keys() & best[name].keys()
            fields |= {field: _both(asdict(setting.config(0)), fields[field], best[name][field], field)
                       if field in clash else best[name][field] for field in best[name]}
        joined["; ".join(order[:count])] = fields
    return joined


def _both(base: dict, one, other, field: str):
    """Two changes of one number, as factors of what it was, both applied."""
    return type(base[field])(one * other / base[field])
