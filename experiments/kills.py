"""Kill -9 at random moments and at named points: does every run end as if nothing had happened?

    python -m experiments.kills --kills 200

Six kinds of work (PPO, DPO, SFT, reward model, freeze, save) are done once without a kill, then again and again with
one, two or three kills, each followed by the same command again. A run counts as the same if every file that it leaves
has the same bytes as without a kill (metrics.jsonl too), and nothing else is there. Children are forks of one process
that has imported everything, so that a run takes a second or two.
"""

import argparse
import asyncio
import contextlib
import copy
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from alignkit_widgets import TrainingCockpit

from alignkit import killpoints
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.dpo import DPOState, dpo_iteration
from alignkit.folders import leftovers, recover
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import train_reward_model
from alignkit.runs.checkpoints import Checkpoints
from alignkit.runs.frozen import freeze, verify
from alignkit.runs.records import start_run, versions, write_results
from alignkit.runs.stage_folders import is_finished, stage_folder
from alignkit.sft import train_sft
from alignkit.storage import write_json
from alignkit.task import load_task

RESULTS = Path(__file__).with_name("results") / "kills.json"
EVERY = 0.05  # seconds between two checkpoints: far more often than usual, so that most runs have some to go on from
POINTS = {  # the kill points that each kind of work passes
    "ppo": ("ppo.begun", "ppo.sampled", "ppo.scored", "ppo.epoch", "ppo.half_step", "ppo.done"),
    "dpo": ("dpo.step",), "sft": ("trainer.step",), "reward": ("trainer.step",),
    "freeze": ("freeze.copied", "freeze.manifest"), "save": (),
}
OF_FOLDERS = ("folder.begun", "folder.written", "folder.flushed", "folder.exchanged")
OF_RUNS = ("metrics.row", "checkpoint.weights", "checkpoint.prune", "stage.results")


@dataclass(frozen=True)
class Work:
    """One kind of work. `do` does it in a folder; what it leaves there is compared, but for the files in `dated`."""

    name: str
    do: Callable[[Path], None]
    dated: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[str, ...]:
        runs = OF_RUNS if self.name in ("ppo", "dpo", "sft", "reward") else ()
        return (*POINTS[self.name], *OF_FOLDERS, *runs)


def works(seed: int = 0) -> list[Work]:
    """The kinds of work, with their models and data made."""
    torch.set_num_threads(1)
    policy, tokenizer = load_policy("tiny", seed=seed)
    task = load_task("desk", tokenizer, seed=seed)
    rows, strata = task.demonstrations(seed=seed)[:256], list(task.strata().values())
    train_sft(policy, tokenizer, rows, SFTConfig(epochs=1, batch_size=64))
    pairs = task.preference_pairs(policy, tokenizer, 128, seed=seed)
    judge, other = reward_model_from(policy, seed=seed), load_policy("tiny", seed=seed + 1)[0]

    def reward(_prompts: list[str], responses: list[str]) -> list[float]:
        return [float(sum(map(ord, response)) % 7) for response in responses]

    def begin(run: Path, stage: str) -> Path:
        if is_finished(start_run(run, "tiny", "desk", 0) / stage):
            raise SystemExit(0)  # as a job does that was done already
        return stage_folder(run, stage)

    def finish(model, run: Path, stage: Path) -> None:
        save_model(model, tokenizer, stage)
        write_results(run, stage.name, {"done": True}, built=stage)

    def ppo(run: Path) -> None:
        config = PPOConfig(iterations=8, prompts_per_iteration=64, minibatch_size=32, target_kl=0.5, max_kl=1e9)
        stage = begin(run, "ppo")
        state = PPOState.start(copy.deepcopy(policy), tokenizer, reward, strata, config)

        def step(_controls: dict) -> dict:
            row = ppo_iteration(state, config).log()
            del row["step"]
            return row

        cockpit = TrainingCockpit("PPO", [("KL", ["objective/kl"])], config.iterations, log=stage / "metrics.jsonl")
        asyncio.run(cockpit.run(step, checkpoints=Checkpoints(stage / "checkpoints", state, config, every=EVERY)))
        finish(state.policy, run, stage)

    def dpo(run: Path) -> None:
        config = DPOConfig(epochs=4, batch_size=16)
        stage = begin(run, "dpo")
        state = DPOState.start(copy.deepcopy(policy), tokenizer, pairs, config)

        def step(_controls: dict) -> dict:
            row = dpo_iteration(state, config).log()
            del row["step"]
            return row

        cockpit = TrainingCockpit("DPO", [("loss", ["loss"])], state.steps(config), log=stage / "metrics.jsonl")
        asyncio.run(cockpit.run(step, checkpoints=Checkpoints(stage / "checkpoints", state, config, every=EVERY)))
        finish(state.policy, run, stage)

    def sft(run: Path) -> None:
        stage, model = begin(run, "sft"), copy.deepcopy(policy)
        cockpit = TrainingCockpit("SFT", [("loss", ["loss"])], log=stage / "metrics.jsonl")
        train_sft(model, tokenizer, rows, SFTConfig(epochs=4, batch_size=32), callbacks=[cockpit.callback()],
                  checkpoints=stage / "checkpoints", checkpoint_seconds=EVERY)
        finish(model, run, stage)

    def reward_model(run: Path) -> None:
        stage, model = begin(run, "reward"), copy.deepcopy(judge)
        cockpit = TrainingCockpit("Reward", [("loss", ["loss"])], log=stage / "metrics.jsonl")
        train_reward_model(model, tokenizer, pairs, RewardConfig(epochs=4, batch_size=16),
                           callbacks=[cockpit.callback()], checkpoints=stage / "checkpoints", checkpoint_seconds=EVERY)
        finish(model, run, stage)

    elsewhere = Path(tempfile.mkdtemp(prefix="alignkit-kills-")) / "model"
    save_model(policy, tokenizer, elsewhere)

    def frozen(run: Path) -> None:
        freeze(elsewhere, run / "frozen", seed=0)
        verify(run / "frozen")

    def save(run: Path) -> None:
        recover(run / "model")
        if (run / "model").exists():  # old or new, but whole, whenever the process before was killed
            load_policy(run / "model", device="cpu")
        save_model(policy, tokenizer, run / "model")
        (run / "model" / "note.txt").write_text("a record beside the weights")
        save_model(other, tokenizer, run / "model")
        save_model(policy, tokenizer, run / "model")

    return [Work("ppo", ppo), Work("dpo", dpo), Work("sft", sft), Work("reward", reward_model),
            Work("freeze", frozen, ("manifest.json", "lineage.json")), Work("save", save)]


def child(work: Work, folder: Path, *, point: str = "", after: float | None = None) -> str:
    """Do `work` in a process of its own, killed at a kill point or after some seconds: "done", "killed" or "failed"."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException), (folder / "child.log").open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                killpoints.arm(point)
                with contextlib.suppress(SystemExit):
                    work.do(folder / "run")
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.stderr)
                sys.stderr.flush()
        os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return "killed" if os.WIFSIGNALED(status) else "done" if os.WEXITSTATUS(status) == 0 else "failed"


def left(work: Work, folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the work left, by path. Files that hold a date count by their presence."""
    files = {}
    for path in sorted((folder / "run").rglob("*")):
        if path.is_file():
            name, content = path.relative_to(folder / "run").as_posix(), path.read_bytes()
            files[name] = "dated" if path.name in work.dated else hashlib.sha256(content).hexdigest()
    return files


def trial(work: Work, folder: Path, kills: list[dict]) -> tuple[str, int]:
    """Do the work, killed once for each of `kills`, then to the end: ("" or what is wrong in the end, kills that hit).
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run").mkdir()
    hit = 0
    for kill in kills:
        outcome = child(work, folder, **kill)
        hit += outcome == "killed"
        if outcome == "failed":
            return f"failed after {hit} kills: {(folder / 'child.log').read_text(errors='replace')[-800:]}", hit
    if child(work, folder) != "done":
        return f"did not end after {hit} kills: {(folder / 'child.log').read_text(errors='replace')[-800:]}", hit
    return "", hit


def measure(kills: int, seed: int = 0, only: tuple[str, ...] = (), tell: Callable[[str], None] = print) -> list[dict]:
    """Rows of the table, one for each kind of work: kills that hit, runs, those that ended the same, what differed."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rng, rows = random.Random(seed), []
    chosen = [work for work in works(seed) if not only or work.name in only]
    with tempfile.TemporaryDirectory(prefix="alignkit-kills-") as place:
        for number, work in enumerate(chosen):
            folder, share = Path(place) / work.name, kills // len(chosen) + (number < kills % len(chosen))
            wrong, _ = trial(work, folder / "whole", [])
            if wrong:
                raise RuntimeError(f"{work.name} without a kill: {wrong}")
            begun = time.monotonic()
            trial(work, folder / "whole", [])
            seconds, whole = time.monotonic() - begun, left(work, folder / "whole")
            row = {"work": work.name, "seconds": round(seconds, 2), "kills": 0, "runs": 0, "same": 0,
                   "points": {}, "wrong": []}
            while row["kills"] < share:
                plan = []
                for _ in range(rng.choice((1, 1, 2, 3))):
                    point = f"{rng.choice(work.points)}:{rng.choice((1, 1, 2, 3, 5, 8))}"
                    plan.append({"point": point} if rng.random() < 0.5 else {"after": rng.uniform(0, 1.1 * seconds)})
                wrong, hit = trial(work, folder / "killed", plan)
                present = left(work, folder / "killed")
                differing = sorted(name for name in whole.keys() | present.keys()
                                   if whole.get(name) != present.get(name))
                wrong = wrong or (f"differs: {', '.join(differing[:5])}" if differing else "")
                wrong = wrong or ("temporary folders are left" if leftovers(folder / "killed") else "")
                row["kills"], row["runs"], row["same"] = row["kills"] + hit, row["runs"] + 1, row["same"] + (not wrong)
                for kill in plan:
                    name = kill.get("point", "random moment").partition(":")[0]
                    row["points"][name] = row["points"].get(name, 0) + 1
                if wrong:
                    row["wrong"].append({"plan": plan, "wrong": wrong})
            rows.append(row)
            tell(f"{work.name:<8}{row['kills']:>5} kills in {row['runs']:>4} runs of {seconds:.1f} s: {row['same']} "
                 f"ended the same{''.join(f'; {each}' for each in row['wrong'][:3])}")
    return rows


def main() -> int:
    """The command: prints the table, writes results/kills.json; 1 if a run ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="kill -9 that hit, over all kinds of work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=(), choices=list(POINTS))
    options = parser.parse_args()
    rows = measure(options.kills, options.seed, tuple(options.only))
    if not options.only:
        write_json(RESULTS, {"command": f"python -m experiments.kills --kills {options.kills} --seed {options.seed}",
                             "versions": versions(), "rows": rows})
    same, runs = sum(row["same"] for row in rows), sum(row["runs"] for row in rows)
    print(f"{sum(row['kills'] for row in rows)} kills, {same} of {runs} runs ended the same")
    return int(same != runs)


if __name__ == "__main__":
    sys.exit(main())
