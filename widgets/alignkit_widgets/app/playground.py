"""A run directory for the dashboard: its frozen start, its checkpoints, and PPO runs made one iteration at a time.

The computations of the dashboard (`alignkit app`) are here. New runs and votes go to RUN/app; the course's files are
only read. A directory without a run gets the desk world's SFT policy and reward model.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np

from alignkit.configs import PPOConfig, RewardConfig, SFTConfig, preset
from alignkit.errors import RunError
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import PPOState, ppo_iteration
from alignkit.reward import RewardScorer, load_reward, train_reward_model
from alignkit.runs.checkpoints import Checkpoints
from alignkit.runs.records import READING, run_facts, start_run
from alignkit.runs.stage_folders import CHECKPOINTS, delete_checkpoints
from alignkit.sft import train_sft
from alignkit.storage import branch_files, read_json, settings, write_json
from alignkit.task import Task, load_task
from alignkit_widgets.cockpit.ppo_run import ppo_controls, ppo_row


@dataclass(frozen=True)
class Playground:
    """A run directory, its initial models, and its task. `open_playground` makes one."""

    run: Path
    model: str
    seed: int
    task: Task = field(repr=False)
    scorer: Callable = field(repr=False)

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

    def start_ppo(self, iterations: int | None = None, **chosen) -> "LivePPO":
        """A new PPO run from RUN/sft in RUN/app/ppo-N; chosen: options of PPOConfig, such as kl_coef."""
        policy, tokenizer = load_policy(self.run / "sft")
        config = preset(PPOConfig, self.model, iterations=iterations, max_new_tokens=self.task.max_new_tokens,
                        seed=self.seed, **chosen)
        state = PPOState.start(policy, tokenizer, self.scorer, list(self.task.strata().values()), config)
        numbers = [_number(path) for path in (self.run / "app").glob("ppo-*")]
        folder = self.run / "app" / f"ppo-{max(numbers, default=0) + 1}"
        folder.mkdir(parents=True)
        write_json(folder / "config-of-run.json", settings(config))
        return LivePPO(self, folder, config, state, Checkpoints(folder / CHECKPOINTS, state, config))

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
        written = read_json(folder / "config-of-run.json")
        try:
            config = PPOConfig(**{key: math.inf if value == "inf" else value for key, value in written.items()})
        except TypeError as error:
            raise RunError(f"{folder / 'config-of-run.json'} is not of this version of alignkit: {error}") from None
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

    def step(self, controls: Mapping[str, float]) -> dict:
        """One iteration with the current controls: metrics, samples, and in the desk world shares."""
        with self._lock:
            config = replace(self.config, **controls)
            return ppo_row(self.state, ppo_iteration(self.state, config), self.playground.task, config)

    def save(self) -> Path | None:
        """Write the current policy to the run's folder; returns None, and makes no folder, if no iteration was done.
        The checkpoints of a completed run are deleted. A continued run without a new iteration is left unchanged."""
        if self.continued and not self.state.iteration:
            return None
        if self.state.iteration or branch_files(self.folder / "metrics.jsonl"):
            with self._lock:
                saved = save_model(self.state.policy, self.state.tokenizer, self.folder)
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
    _, tokenizer = load_policy(run / "sft")
    task = load_task(facts["data"], tokenizer, seed=facts["seed"], **{name: facts.get(name) for name in READING})
    return Playground(run, facts["model"], facts["seed"], task, load_reward(run / "reward"))


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


def _number(path: Path) -> int:
    match = re.fullmatch(r"ppo-(\d+)", path.name)
    return int(match[1]) if match else 0
