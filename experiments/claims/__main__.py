"""Measure the claims of the articles and give each its verdict.

    python -m experiments.claims --record
    python -m experiments.claims --all --record   # from nothing: the readings and the other labs first
    python -m experiments.claims --quick          # two worlds in small, in minutes: a trial of the arms

Runs the arms of `arms.py` in every world, takes the readings of `experiments.readings` from their record, and applies
the rules of `registry.py`, which were committed before the results. The claims of the other labs are taken from their
records. What is finished is not run again. `--record` writes `alignkit/evaluate/claims.json` and `docs/claims.md`.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.evaluate import dials, knowledge, unpacking
from alignkit.evaluate.advice_record import load_advice
from alignkit.evaluate.claims import FILE, Claims, load_claims
from alignkit.evaluate.dials import Dials, load_dials
from alignkit.evaluate.readings import RECORD
from alignkit.formulas.intervals import mean_estimate
from alignkit.storage import read_json
from experiments.advice import freezing
from experiments.claims.arms import ARMS, LONG, Size
from experiments.claims.lab import MEANING, WORKERS, claim_cells, claim_row, claims_table, counted, run_lab
from experiments.claims.order import run_world
from experiments.claims.registry import AGAIN, LONGER, RULES, UNMEASURED, Rule, longer

SEEDS = (31, 32, 33, 39, 40, 34, 35, 36, 37, 38)
FEW = 5  # worlds in which all arms are run; in the others only those that claims on order, sum and alternation compare
EVERYWHERE = ("PPO", "DPO", "PPO, then DPO", "DPO, then PPO", "PPO + DPO", "alternating, four blocks",
              LONGER["DPO"])
ARTICLES = ("S0 is *Can PPO and DPO be used together?*, S1 *PPO or DPO?*, S2 a summary of *Unpacking DPO and PPO* "
            "(Ivison and others 2024), S3 *What PPO fine-tuning is*, S4 *PPO and DPO in LLM training*.")
LABS = {"dials": dials.FILE, "knowledge": knowledge.FILE, "unpacking": unpacking.FILE}  # lab -> its record
QUICK = Size(demonstrations=1600, labels=800, fresh=200, normalise=128, keys=1, blocks=8, first=0.5, last=0.8,
             sft=SFTConfig(epochs=2), reward=RewardConfig(epochs=2),
             ppo=PPOConfig(kl_coef=0.8, prompts_per_iteration=256, minibatch_size=64),
             dpo=DPOConfig(beta=0.3, epochs=2, batch_size=32, learning_rate=1e-3))
METRICS = {"kl": "KL, nats", "gold": "gold", "proxy": "proxy", "share": "share of the most proxy at this KL",
           "seconds": "CPU seconds", "risky_failures": "risky failures",
           "over_refusal": "over-refusal", "paraphrase_agreement": "paraphrase agreement", "detour": "detour"}


def run(seeds: Sequence[int], folder: Path, size: Size, workers: int) -> dict[int, dict[str, dict]]:
    """World seed -> arm -> the record of `order.follow`; the arms of EVERYWHERE alone after FEW worlds."""
    arms = [[arm for arm in ARMS if place < FEW or arm in EVERYWHERE] for place in range(len(seeds))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        n = len(seeds)
        worlds = pool.map(run_world, seeds, [folder] * n, [size] * n, arms)
        return {seed: {row["arm"]: row for row in rows} for seed, rows in zip(seeds, worlds, strict=True)}


def measured(rule: Rule, worlds: Mapping[int, Mapping[str, Mapping]], readings: Mapping[str, Mapping]) -> dict:
    """A claim as a row of the record."""
    if isinstance(rule.statistic, str):
        values = {seed: row[0] for seed, row in readings.get(rule.statistic, {"seeds": {}})["seeds"].items()}
    else:
        values = {str(seed): rule.statistic(rows) for seed, rows in worlds.items()}
    return claim_row(rule, rule.experiment, values)


def of_labs() -> list[dict]:
    """The claims of the other labs as rows of the record, in the order of their numbers."""
    rows = [row for path in LABS.values() for row in read_json(path)["claims"]] + [freezing(load_advice())]
    return sorted(rows, key=lambda row: (int(re.match(r"[A-Z](\d+)", row["name"]).group(1)), row["name"]))


def page(record: Claims) -> str:
    """docs/claims.md: the verdicts, then the arms."""
    again = {long.name: long.verdict for short, long in record.both if long.verdict != short.verdict}
    lines, rows = [], []
    for claim in record.claims:
        more = f"; with more epochs of DPO **{again[claim.name]}**" if claim.name in again else ""
        row = claim_cells(claim)
        lines.append({**row, "verdict": row["verdict"] + more, "measured by": claim.experiment})
    for arm in record.arms:
        values = {name: list(record.values(arm, name).values()) for name in METRICS if name != "detour"}
        values["detour"] = [row["detour"] for row in record.arms[arm].values() if row["at"]]
        cells = [f"{sum(column) / len(column):.3f}" if column else "–" for column in values.values()]
        rows.append(f"| {arm} | {len(values['kl'])} | {' | '.join(cells)} |")
    return "\n".join([
        "# Claims: what the articles say, and what was measured", "",
        f"Made by `{record.command}`. The rules stand in `experiments/claims/registry.py` and were committed before "
        "the arms were run; when the rules on readings of the notebooks were written, six of the worlds had been seen. "
        f"The rules of the other labs ({', '.join(LABS)}) stand in their folders and were committed before their runs; "
        "C38 compares what the design of `experiments/advice.py` had fixed, but got its margin after the run. "
        "A claim says that a quantity is above, or below, 0 by more than a margin, the smallest difference that "
        f"matters, or that it is within that margin. {MEANING}", "",
        f"The articles: {ARTICLES}", "",
        counted(record.claims, len(record.claims) + len(record.longer)) + f" {len(record.longer)} of the intervals "
        "repeat a claim with more epochs of DPO.", "", claims_table(lines), "",
        *number_of_epochs(record, load_dials()), "## The arms", "",
        f"Each arm starts from the same SFT policy, uses {record.settings['labels']:,} labels of the default "
        f"annotator, and ends at {record.settings['last']:g} nats from SFT (two stages: the first ends at "
        f"{record.settings['first']:g}). Means over the worlds in which the arm reached that KL. Gold and proxy are "
        "in SFT-sd; every figure is exact on 32 held-out prompts. *Detour* is the length of the path of the behaviour "
        "distribution over its net displacement; it can be compared between arms with equally many blocks. A priced "
        "arm counts as having reached the KL within 0.2 nats; what is left of the difference varies from world to "
        f"world, so the intervals contain it. {len(EVERYWHERE)} arms are run in every world, the others in the first "
        f"{FEW}. No worlds: the arm ended elsewhere in all of them.",
        "",
        f"| arm | worlds | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 2) + "|", *rows, "",
        *(["## Not measured", "", "| claim | what is missing |", "|---|---|",
           *(f"| {name} | {why} |" for name, why in record.unmeasured.items()), ""] if record.unmeasured else [])])


def number_of_epochs(record: Claims, dials: Dials) -> list[str]:
    """What the number of DPO's epochs does: whether more of them still change DPO, and each verdict with both."""
    few, many = record.settings["dpo"]["epochs"], LONG.options["epochs"]
    gold, kl = dials.curve("epoch", "gold"), dials.curve("epoch", "kl")
    before, last = sorted(gold)[-2:]
    golds = dials.values("epoch", "gold")
    rise = mean_estimate([value - golds[before][seed] for seed, value in golds[last].items()])
    gains = [f"{arm}: {record.difference(long, arm, 'gold'):.3f}" for arm, long in LONGER.items()]
    lines = [f"* {long.name}, {long.english} {long.quantity}, in {len(long.values)} worlds: with {few} epochs "
             f"{short.estimate:.3f}, *{short.verdict}*; with {many} {long.estimate:.3f}, *{long.verdict}*. This "
             f"verdict {'**depends**' if long.verdict != short.verdict else 'does not depend'} on the number of epochs."
             for short, long in record.both]
    return ["## The number of DPO's epochs", "",
            f"**DPO's stages have {few} epochs and have not converged.** With one β ([dials](dials.md)), gold is "
            f"{gold[few]:.2f} at {kl[few].value:.2f} nats after {few} epochs and {gold[last]:.2f} at "
            f"{kl[last].value:.2f} nats after {last:g}; from epoch {before:g} to {last:g} it changes by {rise:.3f}. "
            f"So DPO and the relay were trained once more with {many} epochs on the same labels, and compared at the "
            "same KL by the same rules, which were committed before these runs. Each line below compares both numbers "
            "of epochs in the worlds that have both, which may be fewer than those of the table. Gold at the same "
            f"KL, {many} − {few} epochs, SFT-sd: {', '.join(gains)}. C37 and C37b are not among the claims below: the "
            f"reverse order has no arm with {many} epochs. Claims that are readings of the notebooks are about the DPO "
            "of those notebooks.", "", *lines, ""]


def make_others(workers: int) -> None:
    """Make the records of the readings and of the other labs; those that use one process, `workers` at a time."""
    def record(module: str) -> None:
        subprocess.run([sys.executable, "-m", f"experiments.{module}", "--record"], check=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(record, ("knowledge", "advice", "unpacking")))
    for module in ("readings", "dials"):
        record(module)


def make(given: argparse.Namespace) -> dict:
    """Run the arms and apply the rules: the record. Raises SystemExit if a trial is to be recorded."""
    if given.quick and given.record:
        raise SystemExit("--quick is a trial and no evidence: give it without --record, or --record without it")
    if given.all:
        make_others(given.workers)
    seeds, size = (given.seeds[:2], QUICK) if given.quick else (given.seeds, Size())
    worlds = run(seeds, given.folder / ("quick" if given.quick else "full"), size, given.workers)
    readings = read_json(RECORD)["readings"] if RECORD.exists() else {}
    quick = {"command": f"python -m experiments.claims --seeds {' '.join(map(str, seeds))} --quick"}
    return {
        **(quick if given.quick else {}), "settings": size.key(), "unmeasured": UNMEASURED,
        "claims": [*(measured(rule, worlds, readings) for rule in RULES), *of_labs()],
        "longer": [measured(longer(rule), worlds, readings) for rule in RULES if rule.name in AGAIN],
        "arms": {arm: {str(seed): rows[arm] for seed, rows in worlds.items() if arm in rows} for arm in ARMS}}


def main(arguments: list[str] | None = None) -> None:
    """Run the arms, apply the rules, print the page."""
    quick = {"action": "store_true", "help": "two worlds in small: a trial, no evidence; not with --record"}
    everything = {"action": "store_true", "help": "first make the readings and the other labs' records"}
    run_lab("claims", __doc__.split("\n")[0], arguments, seeds=SEEDS, folder=Path("runs/claims"), file=FILE, make=make,
            page=lambda path: page(load_claims(path)), options={"--quick": quick, "--all": everything, **WORKERS})


if __name__ == "__main__":
    main()
