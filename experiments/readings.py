"""How often each sentence of the notebooks holds, and what each stage reaches: the whole series, run over worlds.

    python -m experiments.readings --seeds 0 1 2 3 4 11 12 13 14 15 16 17 18 --record
    python -m experiments.readings --of-records runs/course --record   # after a new sweep.json or causes.json

Each seed is a world of its own: notebooks 00 to 10, without a screen, in OUT/seed-N; what is finished there is not run
again. Prints the table of `docs/readings.md`. `--record` writes that page and `alignkit/evaluate/readings.json`, from
which the notebooks say how often a reading holds elsewhere. `--of-records RUN` runs nothing: sentences with the same
figures in every world are about a record that comes with alignkit; theirs are taken from the executed notebooks in RUN.
Exit status 1 if a notebook failed or two readings of one name contradict each other.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.evaluate.readings import RECORD, readings_of
from alignkit.jobs.notebooks import find_notebooks, run_notebook
from alignkit.runs.records import versions
from alignkit.stages import CHAIN
from alignkit.storage import write_atomically, write_json

SMALL: dict[str, dict] = {  # notebook -> parameters with which it takes seconds
    "01_sft": {"demonstrations": 2400, "epochs": 2.0, "eval_prompts": 64, "eval_samples": 4},
    "02_reward_model": {"pairs": 1000, "heldout_pairs": 400, "epochs": 2.0, "scale_samples": 256},
    "03b_ppo": {"iterations": 8, "overoptimise_iterations": 4},
    "07_over_optimisation": {"pairs": 500, "epochs": 1.0},
    "08_dpo_is_ppo_when": {"pairs": 600, "prompts": 8, "ppo_iterations": 4},
    "09_what_moves": {"prompts": 16, "samples": 4},
    "10_gradient_variance": {"warm": 2, "repeats": 8},
}
# what each stage reached: name -> (what, how to read it from a run's stages, which end is worse)
FIGURES = {
    "sft_risky": ("SFT: risky failures", lambda s: s["sft"]["risky_failure_rate"], max),
    "reward_gap": ("reward model: Bayes ceiling − accuracy on labels",
                   lambda s: s["reward"]["bayes_accuracy"] - s["reward"]["accuracy_labels"], max),
    "ppo_gold_gain": ("PPO: gold gained over SFT, SFT-sd",
                      lambda s: s["ppo"]["gold_mean"] - s["sft"]["gold_mean"], min),
    "ppo_risky": ("PPO: risky failures", lambda s: s["ppo"]["risky_failure_rate"], max),
    "ppo_over_refusal": ("PPO: over-refusal", lambda s: s["ppo"]["over_refusal_rate"], max),
    "ppo_kl": ("PPO: KL to SFT, nats", lambda s: s["ppo"]["kl_to_sft"], max),
    "dpo_gold_change": ("DPO on frozen PPO: change of gold, SFT-sd",
                        lambda s: s["dpo"]["changes"]["gold_mean"]["change"], min),
    "dpo_paraphrase_change": ("DPO on frozen PPO: change of paraphrase agreement",
                              lambda s: s["dpo"]["changes"]["paraphrase_agreement"]["change"], min),
    "dpo_risky": ("DPO on frozen PPO: risky failures", lambda s: s["dpo"]["risky_failure_rate"], max),
    "dpo_over_refusal": ("DPO on frozen PPO: over-refusal", lambda s: s["dpo"]["over_refusal_rate"], max),
    "dpo_default_gold": ("DPO with the default annotator's labels: change of gold, SFT-sd",
                         lambda s: s["dpo"]["changes_default_annotator"]["gold_mean"]["change"], min),
    "free_gold_fall": ("PPO without KL: gold, peak − end, SFT-sd",
                       lambda s: s["ppo"]["overoptimised"]["gold_peak"] - s["ppo"]["overoptimised"]["gold_end"], min),
    "free_proxy_rise": ("PPO without KL: proxy, end − at gold's peak, SFT-sd",
                        lambda s: s["ppo"]["overoptimised"]["proxy_end"] - s["ppo"]["overoptimised"]["proxy_at_peak"],
                        min),
}
CHANGES = {  # intervals of DPO's changes that docs/readings.md counts: (where in the results, metric) -> what
    ("changes", "gold_mean"): "gold, labels by the expert",
    ("changes_default_annotator", "gold_mean"): "gold, labels by the default annotator",
    ("changes", "paraphrase_agreement"): "paraphrase agreement, labels by the expert",
    ("changes", "risky_failure_rate"): "risky failures, labels by the expert",
    ("changes", "over_refusal_rate"): "over-refusal, labels by the expert",
}
OFTEN = 0.9  # a sentence that holds less often is listed under "what varies"


def seed_of_commit() -> int:
    """A seed between 1,000 and 9,999 that nobody chose: from the commit's hash, else from the notebooks'."""
    root = Path(__file__).parents[1]
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = hashlib.sha256(b"".join(path.read_bytes() for path in find_notebooks().values())).hexdigest()
    return int(commit[:8], 16) % 9000 + 1000


def series() -> list[str]:
    """The numbered notebooks, in order."""
    return [name for name in find_notebooks() if name[:2].isdecimal()]


def run_world(out: Path, seed: int, small: bool) -> list[str]:
    """Run the series for one seed; returns what failed, a line each. A later notebook is not run without its stage."""
    failed = []
    for name in series():
        given = {"seed": seed, **(SMALL.get(name, {}) if small else {})}
        try:
            run_notebook(name, out, given, progress=False)
        except AlignkitError as error:
            failed.append(f"seed {seed}: {error}")
            if name in CHAIN:
                break
    return failed


def readings_of_run(out: Path) -> list[dict]:
    """All readings of a run directory, in the order of the series."""
    executed = [out / f"{name}.ipynb" for name in series()]
    return [record for path in executed if path.exists() for record in readings_of(path)]


def contradictions(records: Iterable[Mapping]) -> list[str]:
    """Names under which one run says two things."""
    verdicts: dict[str, set] = {}
    for record in records:
        verdicts.setdefault(record["name"], set()).add(record["verdict"])
    return [f"{name}: {' and '.join(sorted(both))}" for name, both in verdicts.items() if len(both) > 1]


def summarise(worlds: Mapping[int, Sequence[Mapping]]) -> dict[str, dict]:
    """name -> its range and wordings, and for each seed value, low, high and verdict.

    Equal figures in two seeds are one world: what a notebook reads from the recorded sweep is counted once a recorded
    world.
    """
    table: dict[str, dict] = {}
    for seed, records in worlds.items():
        for record in records:
            row = table.setdefault(record["name"], {
                "what": record["what"], "above": record["above"], "below": record["below"], "holds": record["holds"],
                "seeds": {}})
            figures = [record["value"], record["low"], record["high"]]
            if figures not in [known[:3] for known in row["seeds"].values()]:
                row["seeds"][str(seed)] = [*figures, record["verdict"]]
    return table


def read_anew(known: Mapping[str, Mapping], records: Sequence[Mapping]) -> dict[str, Mapping]:
    """The table `known` with the sentences that have the same figures in every world as one run's `records` have
    them."""
    now = summarise({0: records})
    return {name: now[name] if name in now and len(row["seeds"]) == 1 else row for name, row in known.items()}


def figures_of(runs: Mapping[int, Mapping]) -> list[dict]:
    """One row a figure of FIGURES: its name, the value of each seed, the median and the worst."""
    rows = []
    for name, (what, read, worst) in FIGURES.items():
        values = {str(seed): read(stages) for seed, stages in runs.items()}
        rows.append({"name": name, "what": what, "values": values, "median": statistics.median(values.values()),
                     "worst": worst(values.values())})
    return rows


def changes_of(runs: Mapping[int, Mapping]) -> dict[str, list[int]]:
    """What changed under DPO -> in how many seeds its interval is above 0, in how many below 0, and number of seeds."""
    counts = {}
    for (where, metric), what in CHANGES.items():
        changes = [stages["dpo"][where][metric] for stages in runs.values() if metric in stages["dpo"].get(where, {})]
        counts[what] = [sum(change["low"] > 0 for change in changes), sum(change["high"] < 0 for change in changes),
                        len(changes)]
    return counts


def page(record: Mapping) -> str:
    """docs/readings.md."""
    held, varies = [], []
    for name, row in record["readings"].items():
        verdicts = [figures[3] for figures in row["seeds"].values()]
        values = [figures[0] for figures in row["seeds"].values()]
        counts = [verdicts.count(verdict) for verdict in ("holds", "fails", "unclear")]
        bounds = " and ".join(f"{side} {row[side]:g}" for side in ("above", "below") if row[side] is not None)
        line = (f"| {name} | {row['holds']} | {row['what']}: {bounds} | {counts[0]} | {counts[1]} | {counts[2]} | "
                f"{min(values):.3g} · {statistics.median(values):.3g} · {max(values):.3g} |")
        (held if counts[0] >= OFTEN * len(verdicts) else varies).append(line)
    head = ("| reading | sentence | statistic and range | holds | not here | cannot be told | least · median · most |\n"
            "|---|---|---|---|---|---|---|")
    figures = [f"| {row['what']} | {row['median']:.3f} | {row['worst']:.3f} |" for row in record["figures"]]
    changes = [f"| {what} | {above} | {below} | {n - above - below} |" for what, (above, below, n) in
               record["changes"].items()]
    anew = f" Those were read anew by `{record['of_records']}`." if "of_records" in record else ""
    return "\n".join([
        "# Readings: how often each sentence of the notebooks holds", "",
        f"Made by `{record['command']}`: notebooks 00 to 10, run headlessly in {len(record['seeds'])} worlds, seeds "
        f"{', '.join(map(str, record['seeds']))}. A sentence *holds* where the whole 95 % interval of its statistic "
        "lies in the range fixed in advance; it holds *not here* where all of it lies outside; otherwise it "
        "*cannot be told*. Figures that are the same in two seeds are counted once: some sentences are about recorded "
        f"worlds, most of them in notebooks 06 and 07.{anew}", "",
        "## What each stage reached", "", "| figure | median | worst seed |", "|---|---|---|", *figures, "",
        "DPO on the frozen PPO policy: in how many worlds the 95 % interval of the change lies above 0, below 0, or "
        "contains 0.", "",
        "| change of | above | below | contains 0 |", "|---|---|---|---|", *changes, "",
        f"## Sentences that hold in at least {OFTEN:.0%} of the worlds", "", head, *held, "",
        "## What varies", "", "Sentences that hold less often. The notebooks print which of the three outcomes a run "
        "gives.", "", head, *varies, ""])


def write(record: Mapping) -> None:
    """Write the record and docs/readings.md."""
    write_json(RECORD, record)
    write_atomically(Path(__file__).parents[1] / "docs" / "readings.md", page(record))


def main(arguments: list[str] | None = None) -> int:
    """Run the worlds, or read RUN; print the page and what does not hold. Returns 1 if a notebook failed or contradicts
    itself."""
    parser = argparse.ArgumentParser(prog="python -m experiments.readings", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, *range(11, 19)])
    parser.add_argument("--out", type=Path, default=Path("runs/readings"))
    parser.add_argument("--record", action="store_true", help="write the record and docs/readings.md")
    parser.add_argument("--small", action="store_true", help="small settings, for a trial: no figures of the stages")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worlds at a time, one thread each")
    parser.add_argument("--of-records", type=Path, metavar="RUN", help="run nothing: take the sentences that have the "
                        "same figures in every world from the executed notebooks in RUN, the rest from the record")
    given = parser.parse_args(arguments)
    if given.of_records:
        record, records = json.loads(RECORD.read_text(encoding="utf-8")), readings_of_run(given.of_records)
        if not records:
            parser.error(f"{given.of_records} holds no executed notebook with readings")
        record |= {"readings": read_anew(record["readings"], records),
                   "of_records": f"python -m experiments.readings --of-records {given.of_records} --record"}
        print(page(record))
        if given.record:
            write(record)
        return int(bool(contradictions(records)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folders = {seed: given.out / f"seed-{seed}" for seed in given.seeds}
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        lines = pool.map(run_world, folders.values(), folders, [given.small] * len(folders))
        failed = [line for of_world in lines for line in of_world]
    worlds = {seed: readings_of_run(folder) for seed, folder in folders.items()}
    wrong = failed + [f"seed {seed}, {text}" for seed, records in worlds.items() for text in contradictions(records)]
    runs = {seed: json.loads((folder / "summary.json").read_text())["stages"] for seed, folder in folders.items()
            if not given.small and not failed}
    record = {"command": f"python -m experiments.readings --seeds {' '.join(map(str, given.seeds))} --record",
              "versions": versions(), "seeds": given.seeds, "readings": summarise(worlds),
              "figures": figures_of(runs) if runs else [], "changes": changes_of(runs)}
    print(page(record))
    if given.record and runs:
        write(record)
    for seed, records in worlds.items():
        for row in records:
            if row["verdict"] != "holds":
                print(f"seed {seed}, {row['name']}: {row['verdict']}: {row[row['verdict']]}")
    print("\n".join(f"WRONG: {text}" for text in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
