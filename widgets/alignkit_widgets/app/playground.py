"""A run directory for the dashboard: its frozen start, its checkpoints, and PPO runs made one iteration at a time.

The computations of the dashboard (`alignkit app`) are here. New runs and votes go to RUN/app; the course's files are
only read. A directory without a run gets the desk world's SFT policy and reward model.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np

from alignkit.configs import PPOConfig, RewardConfig, SFTConfig, preset
from alignkit.desk.world import PHRASES
from alignkit.errors import RunError
from alignkit.forward.sampling import generate_texts
from alignkit.jobs.job import finished
from alignkit.jobs.notebooks import read_jobs
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import RewardScorer, load_reward, train_reward_model
from alignkit.runs.checkpoints import Checkpoints
from alignkit.runs.records import READING, gold_scale, run_facts, start_run
from alignkit.runs.stage_folders import CHECKPOINTS, delete_checkpoints
from alignkit.sft import train_sft
from alignkit.storage import branch_files, read_json, read_metrics, settings, write_json
from alignkit.task import Task, load_task
from alignkit_widgets.cockpit.ppo_run import ppo_controls, ppo_row

CONFIG = "config-of-run.json"  # of a PPO run in RUN/app
FITTED = {"max_length": int, "max_new_tokens": int, "skip_bad": bool}  # options of `load_task` that run.json lacks
Tell = Callable[[str, float], None]  # what an iteration is doing, and the share of it that is done


@dataclass(frozen=True)
class Playground:
    """A run directory, its initial models, and its task. `open_playground` makes one."""

    run: Path
    model: str
    seed: int
    task: Task = field(repr=False)
    scorer: Callable = field(repr=False)
    gold_scale: tuple[float, float] | None = None  # mean and sd of the raw gold of SFT's responses, where it is known
    _runs: dict = field(default_factory=dict, repr=False)  # what `runs` read: folder -> (times of its files, facts)

    def checkpoints(self) -> dict[str, Path]:
        """The policies in the directory, by name, in the order of training, then the app's own policies."""
        folders = [self.run / stage for stage in ("sft", "ppo", "frozen", "dpo")]
        folders += sorted((self.run / "app").glob("ppo-*"), key=_number)
        return {folder.relative_to(self.run).as_posix(): folder for folder in folders
                if (folder / "config.json").exists()}

    def prompts(self, n: int = 40) -> list[str]:
        """n held-out prompts, evenly over the classes, the same in every call."""
        rng = np.random.default_rng([self.seed, 41])
        shuffled = [[prompts[i] for i in rng.permutation(len(prompts))]
                    for prompts in self.task.strata("heldout").values()]
        rounds = range(max(map(len, shuffled), default=0))
        return [prompts[i] for i in rounds for prompts in shuffled if i < len(prompts)][:n]

    @property
    def about(self) -> str:
        """For the page: what the world or the data is, what PPO does with it, and that other data is not filtered."""
        if self.task.world is not None:
            what = (f"The desk world is a help desk with {len(self.task.world.prompts):,} questions and "
                    f"{len(PHRASES)} answer sentences, so small that every response can be enumerated, with a true "
                    "reward (gold) that is a program.")
            return (f"{what} PPO trains the SFT policy on the reward model (proxy), which learned from noisy labels; "
                    "each nat of KL to SFT costs kl_coef.")
        train, held = len(self.task.train_prompts), len(self.task.heldout_prompts)
        return (f"This run trains {Path(self.model).name} on {train:,} prompts of {Path(self.task.name).name}, and "
                f"{held:,} more are held out; the true reward is unknown. PPO trains the SFT policy on the reward "
                "model (proxy), which learned from preference pairs; each nat of KL to SFT costs kl_coef. The data's "
                "prompts and the model's responses are shown unfiltered, in the fold Samples and in Compare.")

    def config(self, **chosen) -> PPOConfig:
        """The settings of a new PPO run: the preset with the chosen options. Raises ValueError if one is impossible."""
        return preset(PPOConfig, self.model, **{"max_new_tokens": self.task.max_new_tokens, "seed": self.seed} | chosen)

    def start_ppo(self, iterations: int | None = None, **chosen) -> "LivePPO":
        """A new PPO run from RUN/sft in RUN/app/ppo-N; chosen: options of PPOConfig, such as kl_coef. Raises ValueError
        if one is impossible."""
        config = self.config(iterations=iterations, **chosen)
        policy, tokenizer = load_policy(self.run / "sft")
        state = PPOState.start(policy, tokenizer, self.scorer, list(self.task.strata().values()), config)
        numbers = [_number(path) for path in (self.run / "app").glob("ppo-*")]
        folder = self.run / "app" / f"ppo-{max(numbers, default=0) + 1}"
        folder.mkdir(parents=True)
        write_json(folder / CONFIG, settings(config))
        return LivePPO(self, folder, config, state, Checkpoints(folder / CHECKPOINTS, state, config))

    def runs(self) -> list[dict]:
        """The PPO runs of the app, newest first: name, kl_coef, seed, iterations (planned), done; kl and proxy of the
        last iteration, None before the first; and whether it can be continued.

        A run whose settings cannot be read is left out: its folder is not of this version of alignkit.
        """
        found, open_ended = [], self.unfinished()
        for folder in sorted((self.run / "app").glob("ppo-*"), key=_number, reverse=True):
            files = (folder / CONFIG, folder / "metrics.jsonl")
            written = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
            if self._runs.get(folder, (None,))[0] != written:
                self._runs[folder] = written, _run_facts(*files)
            if facts := self._runs[folder][1]:
                found.append(facts | {"unfinished": folder.name in open_ended})
        return found

    def unfinished(self) -> list[str]:
        """Names of PPO runs that were stopped, or killed, before their end, and can be continued."""
        folders = sorted((self.run / "app").glob("ppo-*"), key=_number)
        return [folder.name for folder in folders if (folder / CHECKPOINTS).is_dir()]

    def continue_ppo(self, name: str) -> "LivePPO":
        """An unfinished PPO run, to be continued from its last checkpoint. Raises RunError if there is no such run, or
        if it cannot be continued because models, data or code have changed."""
        folder = self.run / "app" / name
        if name not in self.unfinished():
            raise RunError(f"{self.run / 'app'} has no unfinished run {name!r}; it has {self.unfinished() or 'none'}")
        written = read_json(folder / CONFIG)
        try:
            config = PPOConfig(**{key: math.inf if value == "inf" else value for key, value in written.items()})
        except TypeError as error:
            raise RunError(f"{folder / CONFIG} is not of this version of alignkit: {error}") from None
        policy, tokenizer = load_policy(self.run / "sft")
        state = PPOState.start(policy, tokenizer, self.scorer, list(self.task.strata().values()), config)
        checkpoints = Checkpoints(folder / CHECKPOINTS, state, config)
        checkpoints.latest()  # raises if they belong to another run, before anything is changed
        return LivePPO(self, folder, config, state, checkpoints, continued=True)


@dataclass(frozen=True)
class LivePPO:
    """One PPO run. folder: for its log and its final policy."""

    playground: Playground
    folder: Path
    config: PPOConfig
    state: PPOState = field(repr=False)
    checkpoints: Checkpoints = field(repr=False)
    continued: bool = False
    _lock: Lock = field(default_factory=Lock, repr=False)  # a run may be saved from a non-training thread

    @property
    def controls(self) -> dict[str, tuple]:
        """The controls of the run, for a TrainingCockpit: name -> (low, high, start)."""
        return ppo_controls(self.config)

    def step(self, controls: Mapping[str, float], tell: Tell = lambda words, share: None) -> dict:
        """One iteration with the current controls: metrics, samples, and in the desk world shares. tell: is told, in
        this thread, what the iteration is doing."""
        with self._lock:
            config = replace(self.config, **controls)
            with _told(self.state, config, tell):
                stats = ppo_iteration(self.state, config)
            return ppo_row(self.state, stats, self.playground.task, config, self.playground.gold_scale)

    def save(self) -> Path | None:
        """Write the current policy to the run's folder; returns None, and makes no folder, if no iteration was done.
        The checkpoints of a completed run are deleted. A continued run without a new iteration is left unchanged."""
        if self.continued and not self.state.iteration:
            return None
        if self.state.iteration or branch_files(self.folder / "metrics.jsonl"):
            with self._lock:
                saved = save_model(self.state.policy, self.state.tokenizer, self.folder)
            measured_file(self.playground.run, f"app/{self.folder.name}").unlink(missing_ok=True)
            if self.state.iteration >= self.config.iterations:
                delete_checkpoints(self.folder)
            return saved
        shutil.rmtree(self.folder)
        return None


def open_playground(run: str | Path, tell: Callable[[str], None] = print, data: str | None = None) -> Playground:
    """The run in a directory; in an empty or missing one, the desk world's SFT policy and reward model are trained
    first.

    tell: called with a message before each slow operation. data: the data of the run; None uses the name in its
    run.json, if that is the desk world or an existing file or folder, because a name from a run folder is never
    fetched. Raises RunError if the directory holds an incomplete run of the course (an SFT policy without a reward
    model), or such a name.
    """
    run = Path(run)
    facts = {"model": "tiny", "data": "desk", "seed": 0} | run_facts(run)
    if data is None and facts["data"] != "desk" and not Path(facts["data"]).expanduser().exists():
        raise RunError(f"{run / 'run.json'} names the data {facts['data']!r}, which is no file or folder here, and a "
                       "name in a run folder is not fetched; if you know it and want it, say so: --data NAME")
    facts["data"] = facts["data"] if data is None else data
    has = {stage: (run / stage / "config.json").exists() for stage in ("sft", "reward")}
    of_course = (run / "sft" / "results.json").exists() or (run / "jobs.json").exists()
    begun_here = has["sft"] and (run / "run.json").exists() and not of_course
    if not any(has.values()) or (begun_here and not has["reward"]):  # an earlier start may have been killed
        if facts["model"] != "tiny" or facts["data"] != "desk":
            raise RunError(f"{run} has no sft/ and reward/ yet; run notebooks 01 and 02 in it first (alignkit course)")
        tell(f"{run} has no run yet: making the desk world's SFT policy and reward model (about a minute)")
        make_desk_start(start_run(run, "tiny", "desk", facts["seed"]), facts["seed"])
    elif not all(has.values()):
        lacking = next(stage for stage, present in has.items() if not present)
        raise RunError(f"{run} has no {lacking}/ with a model; run its notebook first (alignkit course), or choose an "
                       "empty directory for the desk world's defaults")
    policy, tokenizer = load_policy(run / "sft")
    task = load_task(facts["data"], tokenizer, seed=facts["seed"], **{name: facts.get(name) for name in READING},
                     **_as_in_jobs(run))
    scale = None if task.world is None else _gold_scale(run, task, policy, tokenizer)
    return Playground(run, facts["model"], facts["seed"], task, load_reward(run / "reward"), scale)


def _gold_scale(run: Path, task: Task, policy: object, tokenizer: object) -> tuple[float, float]:
    """Mean and sd of the raw gold of SFT's responses: as notebook 01 measured them, else of a response to each fifth
    prompt."""
    with suppress(OSError, RunError):
        return gold_scale(run)
    asked = task.train_prompts[::5]
    responses = generate_texts(policy, tokenizer, asked, max_new_tokens=task.max_new_tokens, seed=2)
    gold = task.world.gold_scores(asked, [texts[0] for texts in responses])
    return float(gold.mean()), float(gold.std()) or 1.0


def _as_in_jobs(run: Path) -> dict:
    """How the run's notebooks fitted the data: the options FITTED, as far as RUN/jobs.json has them."""
    fitted = {}
    for record in read_jobs(run).values():
        known = finished(record).get("key", {}).get("parameters", {})
        fitted |= {name: known[name] for name, kind in FITTED.items() if type(known.get(name)) is kind}
    return fitted


def make_desk_start(run: Path, seed: int = 0, pairs: int = 1500, sft: SFTConfig | None = None,
                    reward: RewardConfig | None = None) -> None:
    """Train the tiny SFT policy and reward model of the desk world into RUN/sft and RUN/reward."""
    policy, tokenizer = load_policy("tiny", seed=seed)
    task = load_task("desk", tokenizer, seed=seed)
    train_sft(policy, tokenizer, task.demonstrations(seed=seed), sft or SFTConfig(seed=seed))
    save_model(policy, tokenizer, run / "sft")
    model = reward_model_from(policy, seed=seed)
    train_reward_model(model, tokenizer, task.preference_pairs(policy, tokenizer, pairs, seed=seed),
                       reward or RewardConfig(seed=seed))
    asked = task.train_prompts[::5]
    responses = generate_texts(policy, tokenizer, asked, max_new_tokens=task.max_new_tokens, seed=seed + 2)
    RewardScorer(model, tokenizer).normalised(asked, [texts[0] for texts in responses]).save(run / "reward")


def measured_file(run: Path, name: str) -> Path:
    """Where the app stores the measurement of one of the run's policies, named as `Playground.checkpoints` does."""
    return run / "app" / "measured" / f"{name.replace('/', '.')}.json"


@contextmanager
def _told(state: PPOState, config: PPOConfig, tell: Tell) -> Iterator[None]:
    """Tell of an iteration inside the block: that it samples and scores, and then each of its optimiser steps."""
    responses = config.prompts_per_iteration * config.samples_per_prompt
    steps, done = config.epochs * math.ceil(responses / config.minibatch_size), 0

    def stepped(*_) -> None:
        nonlocal done
        done = min(done + 1, steps)  # an iteration that ran out of memory is repeated
        tell(f"optimiser step {done} of {steps}", done / (steps + 1))

    tell(f"sampling and scoring {responses} responses", 0.0)
    hook = (state.critic_optimizer or state.policy_optimizer).register_step_post_hook(stepped)
    try:
        yield
    finally:
        hook.remove()


def _run_facts(config: Path, log: Path) -> dict | None:
    """What the app's table says of a run, from its settings and its log; None if they cannot be read."""
    try:
        chosen, rows = read_json(config), read_metrics(log)
        shown = {name: chosen[name] for name in ("kl_coef", "seed", "iterations")}
    except (OSError, RunError, KeyError, TypeError):
        return None
    last = rows[-1] if rows else {}
    return {"name": log.parent.name, **shown, "done": last.get("step", 0), "kl": last.get("objective/kl"),
            "proxy": last.get("objective/scores")}


def _number(path: Path) -> int:
    match = re.fullmatch(r"ppo-(\d+)", path.name)
    return int(match[1]) if match else 0
