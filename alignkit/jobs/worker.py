"""One of several processes that train a stage of a run: PPO (notebook 03b_ppo) or DPO (05_dpo).

    torchrun --nproc-per-node 2 -m alignkit.jobs.worker 03b_ppo --out runs/course -p kl_coef=0.1
    alignkit run 03b_ppo --out runs/course -p kl_coef=0.1

The first command trains and leaves its last checkpoint and its log in the stage's folder, as an interrupted notebook
does. The second one finds them, has nothing left to train, evaluates and finishes the stage. Process 0 alone writes.
With `--shard optimizer` each process keeps a part of the optimiser states only (`alignkit.shards`).

`alignkit run 03b_ppo --processes 2` needs no torchrun: there the notebook's kernel is process 0, and it starts this
program with --follow, which takes its commands from a pipe (`alignkit.followers`).
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

from alignkit.configs import DPOConfig, PPOConfig, preset
from alignkit.dpo import DPOState, dpo_iteration
from alignkit.errors import AlignkitError, ParameterError
from alignkit.followers import check_facts, obey, together
from alignkit.jobs.arguments import assignment, folder, given_parameters
from alignkit.jobs.preconditions import check_shard
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration, ran_away
from alignkit.processes import backend, join, told
from alignkit.reward import load_reward
from alignkit.runs.checkpoints import Checkpoints
from alignkit.runs.lock import run_lock
from alignkit.runs.stage_folders import stage_folder
from alignkit.shards import Shards
from alignkit.stages import CHAIN, SHARDED, TRAINED_TOGETHER
from alignkit.storage import append_metrics, plain, trim_metrics
from alignkit.task import load_task

CONTROLS = ("kl_coef", "learning_rate", "clip_range")  # what notebook 03b's cockpit logs beside the metrics of PPO


@dataclass
class Stage:
    """What a notebook trains: its state before the first step, its config, and how it makes one iteration."""

    state: object
    config: object
    iterate: Callable
    tokenizer: object
    steps: int


def load_stage(notebook: str, run: Path, values: Mapping[str, object]) -> Stage:
    """The stage that notebook 03b_ppo or 05_dpo trains in a run directory, loaded as the notebook loads it.

    values: the value of every parameter of the notebook. Raises ParameterError for another notebook.
    """
    if CHAIN.get(notebook) not in TRAINED_TOGETHER:
        raise ParameterError(f"notebook is {notebook!r}, expected one that trains "
                             f"{' or '.join(TRAINED_TOGETHER)}: 03b_ppo or 05_dpo")
    return {"ppo": _ppo, "dpo": _dpo}[CHAIN[notebook]](run, values)


def _ppo(run: Path, values: Mapping) -> Stage:
    policy, tokenizer = load_policy(run / "sft")
    if values["lora_rank"]:
        policy = add_lora(policy, rank=values["lora_rank"], seed=values["seed"])
    task = _task(values, tokenizer)
    config = _config(PPOConfig, values, max_new_tokens=task.max_new_tokens)
    state = PPOState.start(policy, tokenizer, load_reward(values["reward"] or run / "reward"),
                           list(task.strata().values()), config)
    return Stage(state, config, ppo_iteration, tokenizer, config.iterations)


def _dpo(run: Path, values: Mapping) -> Stage:
    policy, tokenizer = load_policy(run / values["reference"])
    task = _task(values, tokenizer)
    labels = {"annotator": values["annotator"], "noise": values["noise"]} if task.world else {}
    pairs = task.preference_pairs(policy, tokenizer, values["pairs"], seed=values["seed"] + 7, **labels)
    if values["lora_rank"]:
        policy = add_lora(policy, rank=values["lora_rank"], seed=values["seed"])
    config = _config(DPOConfig, values, max_new_tokens=task.max_new_tokens if task.world else None)
    state = DPOState.start(policy, tokenizer, pairs, config)
    return Stage(state, config, dpo_iteration, tokenizer, state.steps(config))


def _task(values: Mapping, tokenizer):
    names = ("seed", "skip_bad", "max_length", "max_new_tokens", "kind", "split", "columns")
    return load_task(values["data"], tokenizer, **{name: values[name] for name in names})


def _config(kind: type, values: Mapping, **more):
    names = {setting.name for setting in fields(kind)} & values.keys()
    return preset(kind, values["model"], **{**{name: values[name] for name in names}, **more})


def main(arguments: list[str] | None = None) -> int:
    """Train a stage as one of torchrun's processes, or follow the notebook's kernel; returns the exit code."""
    parser = argparse.ArgumentParser(prog="alignkit.jobs.worker", description=__doc__.split("\n")[0])
    parser.add_argument("--follow", action="store_true", help="take commands from standard input, as process 1 or more")
    parser.add_argument("notebook", nargs="?", help="03b_ppo or 05_dpo")
    parser.add_argument("--out", type=folder, metavar="DIR", help="the run directory, which every process can read")
    parser.add_argument("-p", dest="parameters", action="append", default=[], type=assignment, metavar="NAME=VALUE",
                        help="a parameter of the notebook; may be repeated")
    parser.add_argument("--shard", choices=SHARDED, help="what each keeps a part of only: optimizer, its states")
    given = parser.parse_args(arguments)
    try:
        if given.follow:
            follow()
        elif not (given.notebook and given.out):
            parser.error("expected a notebook and --out DIR")
        else:
            train(given.notebook, given.out, given_parameters(given), given.shard)
    except AlignkitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def train(notebook: str, out: Path, parameters: Mapping[str, str], shard: str | None = None) -> None:
    """Train a stage with all processes that torchrun has started, from its newest checkpoint if there is one.

    Raises ParameterError for `shard` with one process."""
    from alignkit.jobs.notebooks import find_notebook, job_of

    check_shard(shard, int(os.environ["WORLD_SIZE"]))
    job = job_of(find_notebook(notebook), out, parameters)
    values = {name: job.values.get(name, parameter.default) for name, parameter in job.parameters.items()}
    if values["model"] == "tiny":
        torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(backend(int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        train_stage(job.name, job.out, values, shard)
    finally:
        dist.destroy_process_group()


def train_stage(notebook: str, run: Path, values: Mapping[str, object], shard: str | None = None) -> None:
    """Train the stage that `load_stage` loads, in every process of a group; process 0 holds the run's lock and
    writes."""
    stage = load_stage(notebook, run, values)
    if dist.get_rank() == 0:
        told(plain(dict(stage.state.facts()), "facts"))
        with run_lock(run):
            _lead(stage, stage_folder(run, CHAIN[notebook]), values, shard)
            told(None)  # that was all
    else:
        check_facts(stage.state.facts())
        obey(iter(told, None), stage.iterate, stage.state, type(stage.config), bool(shard))


def _lead(stage: Stage, folder: Path, values: Mapping, shard: str | None) -> None:
    """Process 0: the log, the checkpoints, and what the others do too."""
    checkpoints = Checkpoints(folder / "checkpoints", stage.state, stage.config, every=values["checkpoint_seconds"])
    trim_metrics(folder / "metrics.jsonl", checkpoints.resume())
    keep, half = values.get("keep_every"), max(1, stage.steps // 2)  # of the weights for later notebooks, as 03b does
    keep = 10 * (values["data"] == "desk") if keep is None else keep

    def record(stats) -> None:
        done, row = stage.state.step, stats.log()
        if isinstance(stage.config, PPOConfig):
            row["controls"] = {name: getattr(stage.config, name) for name in CONTROLS}
            if keep and (done % keep == 0 or done == half):
                save_model(stage.state.policy, stage.tokenizer, folder / "iterations" / f"{done:03}")
        append_metrics(folder / "metrics.jsonl", {**row, "step": done})
        checkpoints.offer(done)
        print(f"{done} of {stage.steps}", flush=True)

    try:
        why = _iterate(stage, record, Shards(stage.state, _gathering) if shard else None)
    finally:
        checkpoints.close(stage.state.step)
    if why:
        checkpoints.end(stage.state.step, why)


@contextlib.contextmanager
def _gathering(number: int) -> Iterator[None]:
    told({"gather": number})
    yield


def _iterate(stage: Stage, record: Callable, shards: Shards | None) -> str:
    """All iterations that are left, in step with the other processes; returns why PPO stopped itself, else ""."""
    begun = stage.state.step  # process 0 may have gone back to a checkpoint, and gives its state to the others
    for step in range(begun, stage.steps):
        told({"config": asdict(stage.config), "send": step == begun})
        with shards.apart_during() if shards else contextlib.nullcontext():
            stats = together(stage.iterate, stage.state, stage.config, step == begun, bool(shards))
        record(stats)
        if isinstance(stage.config, PPOConfig) and (why := ran_away(stats, stage.config)):
            return why
    return ""


def follow() -> None:
    """Load the run that the first command names, and make each iteration with the process that gives the commands."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the notebook's kernel, which then ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed here is no answer
    commands = _commands()
    first = next(commands)
    torch.set_num_threads(first["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(first["rank"] % torch.cuda.device_count())
    stage = load_stage(first["notebook"], Path(first["values"]["run"]), first["values"])
    print("ready", file=answers, flush=True)
    join(Path(first["meeting"]), first["rank"], first["count"])
    check_facts(stage.state.facts())
    obey(commands, stage.iterate, stage.state, type(stage.config), bool(first.get("shard")))


def _commands() -> Iterator[dict]:
    """The commands, one JSON object a line of standard input. When it ends, so does this process, whatever it does."""
    lines: queue.Queue[dict] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(json.loads(line))
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


if __name__ == "__main__":
    sys.exit(main())
