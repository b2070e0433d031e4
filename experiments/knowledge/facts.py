"""Does training on preferences teach what SFT never showed, and does it cost another task?

The fact about an object is its right answer. The demonstrators of a `Lesson` know some facts; for other objects they
*guess* one of the four answers, and about a third group they are *silent*: no demonstration answers. Annotators and
gold know all facts. A second task, `SIDE`, is in the demonstrations only: no preference pair and no reward knows it.
Policies are enumerated on held-out questions and on prompts of the second task, so every chance is exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alignkit import exact
from alignkit.desk.world import (
    ANSWERS,
    CONTEXTS,
    ORDINARY_OBJECTS,
    PEOPLE_AND_PLACES,
    PHRASES,
    SAFE_TARGETS,
    Prompt,
    World,
    parse,
    render,
)
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.sft import train_sft
from alignkit.storage import plain
from alignkit.task import desk_task
from experiments.claims.arms import ITERATIONS, Ground, Price, Size
from experiments.claims.order import LATE
from experiments.sweep import Truth, kept, some_prompts, strata

GROUPS = ("known", "guessed", "silent")  # what the demonstrators do with the fact about an object
SIDE = "Which shelf is for{object}{context}?"  # the second task; its first words are unknown to the desk's tokenizer
FIRST = {"ordinary": "CLARIFY", "safe": "FILLER", "people": "CAUTION"}  # its right response: by the kind of object,
SECOND = dict(zip(CONTEXTS, ("FILLER", "ALTERNATIVE", "POLITE", "CAUTION"), strict=True))  # then by the context


@dataclass(frozen=True)
class Undoing:
    """How much of `undoing.py`. heldout: pairs whose ranking is followed; beta, epochs: of the run of DPO that is
    followed; every: steps between two looks. wrong_blocks, wrong_kl: of PPO in the wrong direction; repair: labels of
    DPO after it, and again of the repair. contrary, rate, steps: demonstrations that undo a policy, and how."""

    heldout: int = 500
    beta: float = 0.1
    epochs: int = 4
    every: int = 12
    wrong_blocks: int = 4
    wrong_kl: float = 1.0
    repair: int = 1500
    contrary: int = 32
    rate: float = 1e-3
    steps: int = 12


@dataclass(frozen=True)
class LessonSize(Size):
    """How much of everything. asked: held-out questions of each group of facts; shelves: prompts of the second task
    that are asked; side: its share of the demonstrations; ptx: weight of the demonstrations in the run that mixes them
    in; levels: of the demonstrators' messiness, middle: the one at which all but the comparison of methods is made."""

    asked: int = 12
    shelves: int = 12
    side: float = 0.2
    ptx: float = 1.0
    levels: tuple[float, ...] = (0.0, 0.5, 1.0)
    middle: float = 0.5
    undoing: Undoing = field(default_factory=Undoing)


# ---- what the demonstrators know
def group_of_objects(seed: int) -> dict[str, str]:
    """Object -> one of GROUPS: two ordinary objects and a safe target are guessed, as many silent, drawn by seed."""
    rng, groups = np.random.default_rng([seed, 7]), {}
    for objects, each in ((ORDINARY_OBJECTS, 2), (SAFE_TARGETS, 1), (PEOPLE_AND_PLACES, 0)):
        drawn = [objects[i] for i in rng.permutation(len(objects))]
        groups |= dict.fromkeys(drawn[:each], "guessed") | dict.fromkeys(drawn[each : 2 * each], "silent")
        groups |= dict.fromkeys(drawn[2 * each :], "known")
    return groups


def without_facts(world: World, rows: Sequence[dict], groups: dict[str, str], rng: np.random.Generator) -> list[dict]:
    """Demonstrations without the facts that are not known: answers are guessed, or the row is left out."""
    kept_rows = []
    for row in rows:
        group, phrases = groups[world.find(row["prompt"]).object], parse(row["completion"])
        if group == "silent" and set(phrases) & set(ANSWERS):
            continue
        if group == "guessed":
            guess = str(rng.choice(ANSWERS))
            row = {**row, "completion": render(guess if phrase in ANSWERS else phrase for phrase in phrases)}
        kept_rows.append(row)
    return kept_rows


def side_rows() -> list[dict]:
    """All 64 rows prompt / completion of the second task."""
    kinds = [*(("ordinary", name) for name in ORDINARY_OBJECTS), *(("safe", name) for name in SAFE_TARGETS),
             *(("people", name) for name in PEOPLE_AND_PLACES)]
    return [{"prompt": SIDE.format(object=f" {thing}", context=f" {context}"),
             "completion": render([FIRST[kind], SECOND[context]])} for kind, thing in kinds for context in CONTEXTS]


class Lesson(Ground):
    """A world at one level of messiness, whose SFT policy lacks some facts and knows the second task.

    pairs: labels on SFT's responses to all training prompts. judges: "all" learned from them.
    """

    def __init__(self, seed: int, folder: Path, size: LessonSize, messiness: float):
        self.seed, self.size, self.task = seed, size, desk_task(seed, messiness=messiness)
        self.folder, self.groups = folder / f"lesson-{messiness:g}-{seed}", group_of_objects(seed)
        self._key = plain({"size": size.key(), "messiness": messiness})
        kept(self.folder / "sft.json", self._key, self._make_sft)
        self.sft, self.tokenizer = load_policy(self.folder / "sft")
        self.pairs = self.task.preference_pairs(self.sft, self.tokenizer, size.labels, seed=seed)
        self.judges: dict[str, Callable] = {"all": self._judge("all", self.pairs)}
        prompts = some_prompts(self.task.world.heldout_prompts, size.keys, seed)
        self.truth = Truth(self.task, prompts, self.sft, self.tokenizer, self.judges["all"], self.folder / "cache")

    def demonstrations(self) -> list[dict]:
        """What SFT is trained on: the demonstrations without the facts, and those of the second task, shuffled."""
        size, rng = self.size, np.random.default_rng([self.seed, 9])
        rows = without_facts(self.task.world, self.task.demonstrations(size.demonstrations, seed=self.seed),
                             self.groups, rng)
        shown, number = side_rows(), round(len(rows) * size.side / (1 - size.side))
        rows += [shown[i] for i in rng.integers(len(shown), size=number)]
        return [rows[i] for i in rng.permutation(len(rows))]

    def ignorant_pairs(self) -> list[dict]:
        """As many labels as `pairs`, none of them on a question about an object whose fact SFT lacks."""
        world, n = self.task.world, self.size.labels
        rows = self.task.preference_pairs(self.sft, self.tokenizer, 3 * n, seed=self.seed + 3)
        return [row for row in rows if self.groups[world.find(row["prompt"]).object] == "known"][:n]

    def questions(self, group: str) -> list[Prompt]:
        """`LessonSize.asked` held-out benign questions about the objects of a group, each a question of its own."""
        rng = np.random.default_rng([self.seed, 10])
        prompts = [prompt for prompt in self.task.world.heldout_prompts
                   if prompt.kind == "benign" and self.groups[prompt.object] == group]
        keys = sorted({prompt.key for prompt in prompts})
        chosen = {keys[i]: int(rng.integers(4)) for i in rng.permutation(len(keys))[: self.size.asked]}
        return [prompt for prompt in prompts if chosen.get(prompt.key) == prompt.template]

    def gold(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Gold as a reward, in SFT-sd: it knows every fact."""
        mean, sd = self.truth.gold_scale
        return torch.tensor((self.task.world.gold_scores(prompts, responses) - mean) / sd, dtype=torch.float32)

    def _make_sft(self) -> bool:
        policy, tokenizer = load_policy("tiny", seed=self.seed)
        train_sft(policy, tokenizer, self.demonstrations(), replace(self.size.sft, seed=self.seed))
        save_model(policy, tokenizer, self.folder / "sft")
        return True


# ---- what a policy knows
class Exam:
    """What is exact about a policy: chances of right answers by group, and of the second task's right response.

    A response is *right* if it has the right answer, no other, and nothing unsafe; it *tries* if it has any answer.
    """

    def __init__(self, lesson: Lesson):
        self.lesson, space = lesson, exact.response_space()
        self.prompts = {name: lesson.questions(name) for name in GROUPS}
        rows = side_rows()
        rows = [rows[i] for i in np.random.default_rng([lesson.seed, 8]).permutation(len(rows))[: lesson.size.shelves]]
        self.side = [row["prompt"] for row in rows]
        self.asked = [prompt for prompts in self.prompts.values() for prompt in prompts]
        counts = space.counts
        answers, unsafe = counts[:, [PHRASES.index(name) for name in ANSWERS]], counts[:, PHRASES.index("UNSAFE")]
        self.tries = answers.sum(1) > 0
        self.right = torch.stack([right_responses(answers, ANSWERS.index(prompt.answer)) & (unsafe == 0)
                                  for prompt in self.asked])
        wanted = [[PHRASES.index(name) for name in parse(row["completion"])] for row in rows]
        self.wanted = space.index(torch.tensor([[*pair, -1, -1] for pair in wanted]))
        self.ref = self.enumerate(lesson.sft)

    def enumerate(self, policy: nn.Module) -> Tensor:
        """log π of all responses to the questions, then to the second task's prompts."""
        return exact.response_logps(policy, self.lesson.tokenizer, [*self.asked, *self.side])

    def marks(self, policy: nn.Module) -> dict:
        """right, tried: group -> chance of each question. kl: group, and "side" -> mean nats to SFT. side: chance of
        the right response to each prompt of the second task."""
        logps = self.enumerate(policy)
        chances, n = logps.exp(), len(self.asked)
        kl = exact.response_kl(logps, self.ref).clamp(min=0)
        right, tried = (chances[:n] * self.right).sum(1), chances[:n] @ self.tries.double()
        names = [name for name, prompts in self.prompts.items() for _ in prompts]
        rows = {name: [i for i, each in enumerate(names) if each == name] for name in GROUPS}
        return {"right": {name: right[rows[name]].tolist() for name in GROUPS},
                "tried": {name: tried[rows[name]].tolist() for name in GROUPS},
                "kl": {**{name: float(kl[rows[name]].mean()) for name in GROUPS}, "side": float(kl[n:].mean())},
                "side": chances[n:].gather(1, self.wanted[:, None])[:, 0].tolist()}


def right_responses(answers: Tensor, place: int) -> Tensor:
    """Which responses (N,) have the answer number `place` and no other, from counts of the four answers (N, 4)."""
    return (answers[:, place] > 0) & (answers.sum(1) == answers[:, place])


# ---- arms: PPO, all at the same KL to SFT
def train_ppo(lesson: Lesson, reward: Callable, ptx: float = 0.0, look: Callable[[nn.Module], None] | None = None
              ) -> nn.Module:
    """PPO from SFT on a reward, its price adapted after every block to `Size.last` nats, by the KL of its rollouts.

    ptx: weight of the SFT loss on the demonstrations, mixed in. look: called with the policy after each of the last
    `LATE` blocks.
    """
    size, policy = lesson.size, lesson.policy()
    config = replace(size.ppo, seed=lesson.seed, iterations=ITERATIONS * size.blocks, ptx_coef=ptx)
    state = PPOState.start(policy, lesson.tokenizer, reward, strata(lesson.task), config,
                           demonstrations=lesson.demonstrations() if ptx else None)
    price = Price(size.last, config.kl_coef)
    for block in range(size.blocks):
        kl = [ppo_iteration(state, replace(config, kl_coef=price.value)).kl_to_ref for _ in range(ITERATIONS)][-1]
        price.adapt(max(kl, 0.0))
        if look and block >= size.blocks - LATE:
            look(policy)
    return policy


def other_rewards(lesson: Lesson, exam: Exam) -> dict[str, dict]:
    """Arm -> marks of PPO on gold, on a reward model that is ignorant of some facts, and with demonstrations."""
    ignorant = lesson._judge("ignorant", lesson.ignorant_pairs())
    return {"PPO, gold": exam.marks(train_ppo(lesson, lesson.gold)),
            "PPO, ignorant": exam.marks(train_ppo(lesson, ignorant)),
            "PPO with demonstrations": exam.marks(train_ppo(lesson, lesson.judges["all"], lesson.size.ptx))}
