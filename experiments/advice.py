"""Is the adviser right? The regret of following it, beside simple rules, in worlds that no rule was tuned on.

    python -m experiments.advice --seeds 101 102 … 120 --record    # makes alignkit/evaluate/advice.json, docs/advice.md

Each world has its own trouble (`advice_worlds.trouble`) and the same candidates: SFT, three checkpoints of PPO, DPO
from SFT and from each of them. A rule sees evaluations on held-out prompts and takes a candidate; its regret is the
gold of the best one minus that of the one taken, exact on other held-out prompts. The adviser is asked again after
every step, as a person would ask it: it goes on with PPO, tries DPO, freezes or goes back. The second half is claim
C38: how much gold is given away if a checkpoint is chosen by n labels for each, by the proxy, or if the last one is
taken.

What is finished is not run again while sizes and code are the same.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from alignkit.evaluate.advice_record import ADVISERS, FILE, FREEZING, AdviceRecord, load_advice
from alignkit.evaluate.adviser import FAR, RISKY_FAILURES
from alignkit.evaluate.comparison import Comparison
from alignkit.evaluate.decision import DECISION_RULES, DECISIONS, decide
from alignkit.evaluate.evaluation import Evaluation
from alignkit.exact.sweep import source_hashes
from alignkit.formulas.intervals import mean_estimate
from alignkit.storage import content_hash, plain
from experiments import advice_worlds
from experiments.advice_worlds import FLIPS, LABELS, MESSY, PRICES, WHO, Candidate, Ground, Size, candidates
from experiments.claims.lab import run_lab
from experiments.claims.registry import GOLD
from experiments.sweep import kept

SEEDS = tuple(range(101, 121))
BUDGETS, REDRAWS = (4, 16, 64, 256), 1000  # labels for each checkpoint, and redraws of them
TRUTH = ("gold", "behaviour", "phrases")  # columns that only a world with a true reward has


@dataclass(frozen=True)
class Known:
    """What a rule may look at: the candidates by name, the reward model's report, PPO's log."""

    made: Mapping[str, Candidate]
    report: Mapping
    log: Sequence[Mapping]

    @property
    def path(self) -> list[str]:
        """SFT and PPO's checkpoints, in order."""
        return [name for name in self.made if not name.startswith("dpo")]

    def seen(self, name: str, metric: str) -> float:
        """A figure of an evaluation."""
        return self.made[name].seen.metrics[metric].value


# ---- rules: what each takes
def blind(evaluation: Evaluation) -> Evaluation:
    """An evaluation without what only a world with a true reward has."""
    columns = {name: values for name, values in evaluation.columns.items() if name not in TRUTH}
    return replace(evaluation, columns=columns, gold_scale=None)


def walk(known: Known, gold: bool) -> tuple[str, list[tuple[str, str]]]:
    """Follow the adviser from SFT on; what it takes, and its decisions on the way.

    With gold it sees gold and behaviours of the evaluations; without, the proxy and another reward model's score.
    """
    history, said = ["sft"], []
    while True:
        seen = {name: known.made[name].seen for name in history}
        other = None if gold else Comparison({name: blind(known.made[name].other) for name in history})
        comparison = Comparison(seen if gold else {name: blind(each) for name, each in seen.items()})
        answer = decide(comparison, reward=known.report, held_out=other, history={"ppo": known.log})
        said.append((answer.decision, answer.step))
        later = known.path[len(history) :] if history[-1] in known.path else []
        if answer.decision == "stay in PPO" and later:
            history.append(later[0])
        elif answer.decision == "switch to DPO":
            history.append(after(history[-1]))
        else:
            return answer.step, said


def after(name: str) -> str:
    """The candidate that DPO makes of a checkpoint."""
    return name.replace("ppo", "dpo") if name != "sft" else "dpo"


def rule_of_thumb(known: Known) -> str:
    """The articles': DPO if the model is not messy; else PPO until risky failures are low, then freeze, then DPO."""
    for name in known.path:
        if known.seen(name, "risky_failure_rate") <= RISKY_FAILURES:
            return after(name)
    return known.path[-1]


def most(known: Known, metric: str) -> str:
    """The candidate with the highest evaluated figure."""
    return max(known.made, key=lambda name: known.seen(name, metric))


SIMPLE: dict[str, tuple[Callable[[Known], str], str]] = {
    "always PPO": (lambda known: known.path[-1], "PPO's last checkpoint"),
    "always DPO": (lambda known: "dpo", "DPO from SFT"),
    "the last checkpoint": (lambda known: after(known.path[-1]), "PPO to the end, then DPO: what the chain made last"),
    "the articles' rule of thumb": (rule_of_thumb, "DPO as soon as risky failures are at most 6 %, PPO until then"),
    "highest proxy": (lambda known: most(known, "proxy_mean"), "of all candidates, by evaluation"),
    "keep SFT": (lambda known: "sft", "no training at all"),
    "train all, most evaluated gold": (lambda known: most(known, "gold_mean"),
                                       "of all candidates, by evaluation with gold; trains everything"),
}
WITH_GOLD = ("the articles' rule of thumb", "train all, most evaluated gold")  # rules that need gold or behaviours
SHOWN = {ADVISERS[0]: "`decide` after every step; evaluations have gold",
         ADVISERS[1]: "`decide` after every step; proxy and a second reward model alone",
         **{name: words for name, (_, words) in SIMPLE.items()}}


# ---- claim C38
def regret_of_labels(gold: Tensor, tables: Sequence[Tensor], n: int, rng, redraws: int = REDRAWS) -> float:
    """Expected regret of choosing the policy with the highest mean gold of `n` responses, to the same prompts for all.

    gold: (prompts, responses). tables: log-probs like it, one for each policy; the mean gold over them is exact. The
    expectation is over `redraws` draws of prompts and responses.
    """
    truth = np.array([float((table.exp() * gold).sum(1).mean()) for table in tables])
    asked, means = rng.integers(len(gold), size=(redraws, n)), np.zeros((len(tables), redraws))
    for place, table in enumerate(tables):
        drawn = np.zeros((redraws, n))
        for prompt in range(len(gold)):
            cells = asked == prompt
            sums = table[prompt].double().exp().cumsum(0).numpy()
            rows = np.searchsorted(sums, rng.random(int(cells.sum())) * sums[-1], side="right")
            drawn[cells] = gold[prompt].numpy()[np.minimum(rows, len(sums) - 1)]
        means[place] = drawn.mean(1)
    return float((truth.max() - truth[means.argmax(0)]).mean())


def ways_to_choose(ground: Ground, known: Known, tables: Mapping[str, Tensor]) -> dict[str, float]:
    """The expected regret of ways to choose among SFT and PPO's checkpoints."""
    path, rng = known.path, np.random.default_rng([ground.seed, 15])
    gold = {name: known.made[name].figures["gold"] for name in path}
    best, proxy = max(gold.values()), max(path, key=lambda name: known.seen(name, "proxy_mean"))
    return {"the last": best - gold[path[-1]], "highest proxy": best - gold[proxy],
            **{f"{n} labels": regret_of_labels(ground.truth.gold, [tables[name] for name in path], n, rng)
               for n in BUDGETS}}


def freezing(record: AdviceRecord) -> dict:
    """Claim C38 as a row of the record of `experiments.claims`."""
    return {"name": "C38", "source": "S0", "original": "这是很多团队会跳过、但非常关键的一步。",
            "english": "To freeze and evaluate before going on is a crucial step that many teams skip.",
            "quantity": "regret of PPO's last checkpoint − of the one that 64 labels each choose, SFT-sd",
            "side": "above", "margin": GOLD, "experiment": "advice",
            "worlds": {str(seed): value for seed, value in record.freezing.items()}}


# ---- a world, and the record
def world_row(seed: int, size: Size) -> dict:
    """The fields of `AdvisedWorld`."""
    ground = Ground(seed, size)
    made, tables, log = candidates(ground)
    known = Known({each.name: each for each in made}, ground.report, log)
    walks = {name: walk(known, gold) for name, gold in zip(ADVISERS, (True, False), strict=True)}
    picks = {**{name: pick for name, (pick, _) in walks.items()},
             **{name: rule(known) for name, (rule, _) in SIMPLE.items()}}
    rows = {name: {**each.figures, "seconds": each.seconds, "seen_gold": known.seen(name, "gold_mean"),
                   "seen_proxy": known.seen(name, "proxy_mean")} for name, each in known.made.items()}
    accuracy = [ground.report["accuracy_labels"], *ground.report["accuracy_labels_ci95"]]
    return plain({"seed": seed, "trouble": asdict(ground.trouble), "accuracy": accuracy, "candidates": rows,
                  "picks": picks, "walks": {name: said for name, (_, said) in walks.items()},
                  "choosing": ways_to_choose(ground, known, tables)})


def run(seeds: Sequence[int], folder: Path, size: Size) -> dict:
    """Make the worlds that are not there yet; returns what goes into the record."""
    asked = (walk, rule_of_thumb, most, regret_of_labels, ways_to_choose, world_row)
    code = [source_hashes(("evaluate/decision.py",)), Path(advice_worlds.__file__).read_text(encoding="utf-8"),
            *map(inspect.getsource, asked)]
    key = {"size": size.key(), "code": content_hash(code)}
    worlds = []
    for seed in seeds:
        worlds.append(kept(folder / f"{seed}.json", key, lambda: world_row(seed, size)))  # noqa: B023
        gold = {name: figures["gold"] for name, figures in worlds[-1]["candidates"].items()}
        picks = "  ".join(f"{rule}: {pick} {max(gold.values()) - gold[pick]:.2f}"
                          for rule, pick in worlds[-1]["picks"].items())
        print(f"world {seed}  {worlds[-1]['trouble']}  {picks}", flush=True)
    return {"settings": size.key(), "rules": SHOWN, "worlds": worlds}


def page(record: AdviceRecord) -> str:
    """docs/advice.md: the rules, their regret, and how a checkpoint is best chosen."""
    worlds, choices = len(record.worlds), record.settings["ppo"]["iterations"] // record.settings["every"]
    judged, asked = (4 * record.settings[name] for name in ("judged", "questions"))
    lines = [f"| {rule} | {what} | {record.regret(rule):.3f} | "
             f"{' | '.join('–' if rule == one else f'{record.difference(one, rule):+.3f}' for one in ADVISERS)} |"
             for rule, what in record.rules.items()]
    answers = Counter((one, said) for world in record.worlds for one in ADVISERS for said, _ in world.walks[one])
    rules = [f"{number}. *{rule.__name__.replace('_', ' ')}*: {' '.join((rule.__doc__ or '').split())}"
             for number, rule in enumerate(DECISION_RULES, 1)]
    return "\n".join([
        "# The adviser, and the regret of following it", "", f"Made by `{record.command}`.", "",
        "## The rules", "", "`alignkit advise RUN` and `alignkit.decide` ask these in order; the first that applies "
        "decides.", "", *rules, "",
        "## Regret", "", f"{worlds} worlds (seeds {record.worlds[0].seed} to {record.worlds[-1].seed}"
        f"{f'; of {len(SEEDS)}, when time ended the run' * (worlds < len(SEEDS))}) that no rule "
        "was tuned on; rules and design were committed before the first was made. Trouble drawn from the seed: labels "
        f"({', '.join(map(str, LABELS))}; a quarter as many held out), flipped labels ({', '.join(map(str, FLIPS))}), "
        f"annotator ({', '.join(WHO)}), price of KL ({', '.join(map(str, PRICES))}), messiness of the demonstrators "
        f"({', '.join(map(str, MESSY))}). Candidates: SFT, {choices} checkpoints of PPO, DPO from SFT and from each of "
        f"them. Regret is in SFT-sd of gold, exact on {judged} held-out prompts; a rule sees evaluations on {asked} "
        f"other questions, {record.settings['samples']} responses to each of their four phrasings. Brackets: 95 % "
        "intervals over worlds. A difference below 0 is in favour of the adviser.", "",
        f"| rule | takes | mean regret | {' | '.join(f'{one} − it' for one in ADVISERS)} |", "|---" * 5 + "|", *lines,
        "", *(verdict_of(record, one) for one in ADVISERS), "",
        f"These are {2 * len(record.simple)} comparisons, not corrected for their number: if no rule differed, about "
        f"{0.05 * 2 * len(record.simple):.1f} intervals would exclude 0 by chance.", "",
        "What the advisers said, in all worlds: " + "; ".join(
            f"{one}: " + ", ".join(f"{said} {answers[one, said]}" for said in DECISIONS if answers[one, said])
            for one in ADVISERS) + ".", "",
        far_of(record), "",
        "## How many labels does it take to choose a checkpoint? (C38)", "",
        f"Among SFT and PPO's {choices} checkpoints; *n labels* chooses the highest mean gold of n responses of each, "
        f"to the same prompts, and its regret is the mean over {REDRAWS:,} draws.", "",
        "| way to choose | expected regret, SFT-sd |", "|---|---|",
        *(f"| {way} | {record.choosing(way):.3f} |" for way in record.worlds[0].choosing), "",
        f"The last checkpoint's regret minus that of {FREEZING}: "
        f"{mean_estimate(list(record.freezing.values())):+.3f} SFT-sd.", ""])


def far_of(record: AdviceRecord) -> str:
    """In how many worlds PPO had gone too far at its first checkpoint: a limit of the design."""
    first = next(name for name in record.worlds[0].candidates if name.startswith("ppo"))
    count = sum(world.candidates[first]["kl"] > FAR for world in record.worlds)
    return (f"At PPO's first checkpoint KL to SFT was above {FAR:g} nats in {count} of {len(record.worlds)} worlds. "
            "There it is too late to stop PPO in time, and rules differ in little but whether they take PPO at all.")


def verdict_of(record: AdviceRecord, one: str) -> str:
    """In one sentence: which simple rules an adviser beats, and which to use where it does not."""
    apart = {rule: record.difference(one, rule) for rule in record.simple}
    beaten = [rule for rule, change in apart.items() if change.excludes_zero and change.value < 0]
    better = [rule for rule, change in apart.items() if change.excludes_zero and change.value > 0]
    open_ = [rule for rule in apart if rule not in beaten + better]
    usable = [rule for rule in record.simple if one == ADVISERS[0] or rule not in WITH_GOLD]
    least = min(usable, key=lambda rule: record.regret(rule).value)
    words = [f"has less regret than {', '.join(beaten)}" if beaten else "has less regret than no simple rule",
             f"cannot be told from {', '.join(open_)}" if open_ else "", f"has more than {', '.join(better)}" if better
             else ""]
    use = ""
    if len(beaten) < len(apart):
        use = (f" It is not better than every simple rule: of those that see what it sees, *{least}* has the least "
               "mean regret"
               + (", and is the one to use." if record.regret(least).value < record.regret(one).value else
                  ", more than the adviser's; the interval does not exclude that this is chance."))
    return f"**{one[0].upper()}{one[1:]}** {'; '.join(filter(None, words))}.{use}"


def main(arguments: list[str] | None = None) -> None:
    """Run the worlds, write the record and the page."""
    run_lab("advice", __doc__.split("\n")[0], arguments, seeds=SEEDS, folder=Path("runs/advice"), file=FILE,
            make=lambda given: run(given.seeds, given.folder, Size()), page=lambda path: page(load_advice(path)))


if __name__ == "__main__":
    main()
