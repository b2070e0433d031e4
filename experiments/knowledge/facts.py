"""Does training on preferences teach what SFT never showed, and does it cost another task?

The fact about an object is its right answer. The demonstrators of a `Lesson` know some facts; for other objects they
*guess* one of the four answers, and about a third group they are *silent*: no demonstration answers. Annotators and
gold know all facts. A second task, `SIDE`, is in the demonstrations only: no preference pair and no reward knows it.
The policies are enumerated on held-out questions, so every chance of a right answer is exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from alignkit.forward.sampling import generate_texts
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.sft import train_sft
from alignkit.task import desk_task
from experiments.claims.arms import Ground, Size, train_dpo
from experiments.sweep import kept

GROUPS = ("known", "guessed", "silent")  # what the demonstrators do with the fact about an object
SIDE = "Which shelf is for{object}{context}?"  # the second task; its first words are unknown to the desk's tokenizer
FIRST = {"ordinary": "CLARIFY", "safe": "FILLER", "people": "CAUTION"}  # its right response: by the kind of object,
SECOND = dict(zip(CONTEXTS, ("FILLER", "ALTERNATIVE", "POLITE", "CAUTION"), strict=True))  # then by the context


@dataclass(frozen=True)
class LessonSize(Size):
    """How much of everything. asked: held-out questions of each group; side: share of demonstrations of the second
    task; iterations, price: of PPO; ptx: weight of the demonstrations in the run that mixes them in."""

    asked: int = 12
    side: float = 0.1
    iterations: int = 24
    price: float = 0.2
    ptx: float = 1.0


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
    """A world whose SFT policy lacks some facts and knows the second task.

    strata: training prompts: about harmless questions of each group, and all others about known objects. pairs: labels
    on SFT's responses to all strata. judges: "knows" learned from them, "ignorant" from as many labels on known
    objects only.
    """

    def __init__(self, seed: int, folder: Path, size: LessonSize):
        self.seed, self.size, self.task = seed, size, desk_task(seed)
        self.folder, self.groups = folder / f"lesson-{seed}", group_of_objects(seed)
        self._key = {"size": size.key()}
        rows, rng = side_rows(), np.random.default_rng([seed, 8])
        rows = [rows[i] for i in rng.permutation(len(rows))]
        self.side_asked, self.side_shown = rows[: len(rows) // 4], rows[len(rows) // 4 :]
        self.strata = self._strata()
        kept(self.folder / "sft.json", self._key, self._make_sft)
        self.sft, self.tokenizer = load_policy(self.folder / "sft")
        self.pairs = self.labelled(self.strata, size.labels, 3)
        ignorant = self.labelled([self.strata[0], self.strata[3]], size.labels, 4)
        self.judges = {name: self._judge(name, rows) for name, rows in
                       {"knows": self.pairs, "ignorant": ignorant}.items()}

    def demonstrations(self) -> list[dict]:
        """What SFT is trained on: the demonstrations without the facts, and those of the second task, shuffled."""
        size, rng = self.size, np.random.default_rng([self.seed, 9])
        rows = without_facts(self.task.world, self.task.demonstrations(size.demonstrations, seed=self.seed),
                             self.groups, rng)
        number = round(len(rows) * size.side / (1 - size.side))
        rows += [self.side_shown[i] for i in rng.integers(len(self.side_shown), size=number)]
        return [rows[i] for i in rng.permutation(len(rows))]

    def labelled(self, strata: Sequence[Sequence[str]], n: int, stream: int) -> list[dict]:
        """`n` labels of the default annotator on pairs of SFT's responses, prompts drawn evenly over the strata."""
        rng = np.random.default_rng([self.seed, stream])
        asked = [texts[rng.integers(len(texts))] for _ in range(2 * n // len(strata)) for texts in strata]
        responses = generate_texts(self.sft, self.tokenizer, asked, max_new_tokens=self.task.max_new_tokens, samples=2,
                                   seed=self.seed + stream)
        first, second = zip(*responses, strict=True)
        return self.task.world.preference_pairs(asked, list(first), list(second), seed=stream)[:n]

    def questions(self, group: str) -> list[Prompt]:
        """`Size.asked` held-out benign questions about the objects of a group, each a question of its own."""
        rng = np.random.default_rng([self.seed, 10])
        prompts = [prompt for prompt in self.task.world.heldout_prompts
                   if prompt.kind == "benign" and self.groups[prompt.object] == group]
        keys = sorted({prompt.key for prompt in prompts})
        chosen = {keys[i]: int(rng.integers(4)) for i in rng.permutation(len(keys))[: self.size.asked]}
        return [prompt for prompt in prompts if chosen.get(prompt.key) == prompt.template]

    def gold(self) -> Callable[[list[str], list[str]], Tensor]:
        """Gold as a reward, in SFT-sd: it knows every fact."""
        world, asked = self.task.world, [text for texts in self.strata for text in texts[:: len(texts) // 128 or 1]]
        texts = generate_texts(self.sft, self.tokenizer, asked, max_new_tokens=self.task.max_new_tokens,
                               seed=self.seed + 2)
        scores = world.gold_scores(asked, [row[0] for row in texts])
        mean, sd = float(scores.mean()), float(scores.std())
        return lambda prompts, responses: torch.tensor((world.gold_scores(prompts, responses) - mean) / sd).float()

    def _strata(self) -> list[list[str]]:
        strata: dict[str, list[str]] = {name: [] for name in (*GROUPS, "others")}
        for prompt in self.task.world.train_prompts:
            group = self.groups[prompt.object]
            if prompt.kind in ("benign", "look-alike"):
                strata[group].append(prompt.text)
            elif group == "known":
                strata["others"].append(prompt.text)
        return list(strata.values())

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
        self.side = [row["prompt"] for row in lesson.side_asked]
        self.asked = [prompt for prompts in self.prompts.values() for prompt in prompts]
        counts = space.counts
        answers, unsafe = counts[:, [PHRASES.index(name) for name in ANSWERS]], counts[:, PHRASES.index("UNSAFE")]
        self.tries = answers.sum(1) > 0
        self.right = torch.stack([right_responses(answers, ANSWERS.index(prompt.answer)) & (unsafe == 0)
                                  for prompt in self.asked])
        wanted = [[PHRASES.index(name) for name in parse(row["completion"])] for row in lesson.side_asked]
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


# ---- arms
def train_ppo(lesson: Lesson, reward: Callable, ptx: float = 0.0) -> nn.Module:
    """PPO from SFT on a reward at a fixed price of KL. ptx: weight of the SFT loss on the demonstrations."""
    size, policy = lesson.size, lesson.policy()
    config = replace(size.ppo, seed=lesson.seed, iterations=size.iterations, kl_coef=size.price, ptx_coef=ptx)
    state = PPOState.start(policy, lesson.tokenizer, reward, lesson.strata, config,
                           demonstrations=lesson.demonstrations() if ptx else None)
    for _ in range(config.iterations):
        ppo_iteration(state, config)
    return policy


def train_preferences(lesson: Lesson) -> nn.Module:
    """DPO from SFT on the same labels as the reward model that knows."""
    policy = lesson.policy()
    train_dpo(lesson, policy, 0, lesson.size.dpo.beta)
    return policy


ARMS: dict[str, Callable[[Lesson], nn.Module]] = {
    "SFT": lambda lesson: lesson.sft,
    "PPO, gold": lambda lesson: train_ppo(lesson, lesson.gold()),
    "PPO": lambda lesson: train_ppo(lesson, lesson.judges["knows"]),
    "PPO, ignorant": lambda lesson: train_ppo(lesson, lesson.judges["ignorant"]),
    "PPO with demonstrations": lambda lesson: train_ppo(lesson, lesson.judges["knows"], lesson.size.ptx),
    "DPO": train_preferences,
}


def examine(lesson: Lesson) -> dict[str, dict]:
    """Arm -> its marks; all arms of a world."""
    exam = Exam(lesson)
    return {name: exam.marks(train(lesson)) for name, train in ARMS.items()}
