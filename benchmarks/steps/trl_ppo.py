"""TRL's PPO, in an environment of its own: the last TRL that had one is older than the one installed here.

`Worker` is the benchmark's end: it makes the environment on demand (`trl==1.12.0` over the packages of this Python, so
that torch and transformers are the same) and a process in it that makes one PPO iteration each time it is called.
`python -m benchmarks.steps.trl_ppo` is that process.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import venv
from dataclasses import asdict
from pathlib import Path

VERSION = "1.12.0"
MARK = "@alignkit "  # what a line for the benchmark begins with; TRL prints lines of its own


def environment(folder: Path) -> Path:
    """The Python of the environment in `folder`, made if it is not there. Raises CalledProcessError if pip fails."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").exists():
        print(f"making an environment with trl=={VERSION} in {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=False, clear=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, f"trl=={VERSION}"]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        (packages / "host.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        (folder / "complete").touch()
    return python


class Process:
    """A process in the environment that runs a module and answers a line with a line of JSON.

    said: what it said when it was ready: versions. Raises RuntimeError if it ends before it answers.
    """

    def __init__(self, folder: Path, module: str, *arguments: str):
        self.name = module
        self.process = subprocess.Popen(
            [environment(folder), "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
            env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"},
        )
        self.said = self._answer()

    def ask(self, line: str) -> dict:
        """Its answer to a line."""
        print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"TRL's PPO ended with {self.process.wait()}; to see why, run python -m {self.name} there")


class Worker(Process):
    """One PPO iteration of TRL at each call: row -> seconds. versions: of what it runs; peak_mb: of the last call."""

    def __init__(self, folder: Path, sizes, threads: int):
        super().__init__(folder, "benchmarks.steps.trl_ppo", json.dumps(asdict(sizes)), str(threads))
        self.versions = self.said

    def __call__(self) -> dict[str, float]:
        self.observed = self.ask("go")
        self.peak_mb = self.observed.pop("peak_mb")
        return self.observed.pop("seconds")


def trainer(work, pace):
    """TRL's PPO trainer on the benchmark's models and prompts; `pace` is its callback."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from alignkit.models.adapters import frozen_copy
    from alignkit.optim import adamw

    sizes, tokenizer = work.sizes, work.tokenizer
    tokenizer.padding_side = "left"
    policy, critic = copy.deepcopy(work.sampling_policy), copy.deepcopy(work.reward_model)
    config = PPOConfig(
        output_dir=os.fspath(Path(os.environ.get("TMPDIR", "/tmp")) / "alignkit-benchmark"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        learning_rate=1e-5,
        per_device_train_batch_size=sizes.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=sizes.minibatches,
        num_ppo_epochs=sizes.epochs,
        local_rollout_forward_batch_size=sizes.prompts,
        total_episodes=sizes.prompts * 10**6,
        response_length=sizes.new_tokens,
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=1.0,
    )
    rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in work.prompts]
    trainable = [p for model in (policy, critic) for p in model.parameters() if p.requires_grad]
    return PPOTrainer(
        config,
        tokenizer,
        policy,
        frozen_copy(work.sampling_ref),
        frozen_copy(work.reward_model),
        datasets.Dataset.from_list(rows),
        critic,
        optimizers=(adamw(trainable, 1e-5), None),
        callbacks=[pace],
    )


def main() -> None:
    """Say that it is ready; then, for each line that is read, make one iteration and say how long it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps.trl_ppo", description=__doc__.split("\n")[0])
    parser.add_argument("sizes", type=json.loads, help="the benchmark's sizes, as JSON")
    parser.add_argument("threads", type=int, help="for torch")
    given = parser.parse_args()

    import torch
    import transformers
    import trl
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    from benchmarks.exact import resident
    from benchmarks.steps.work import Sizes, Work, _timed, clock

    torch.set_num_threads(given.threads)
    work = Work(Sizes(**given.sizes))
    before = resident()
    spent = {"rollout": 0.0}
    ppo_trainer.batch_generation = _timed(ppo_trainer.batch_generation, spent, "rollout")

    class Pace(TrainerCallback):
        """Waits for the benchmark before each iteration."""

        metrics, steps = {}, 0

        def wait(self):
            if not sys.stdin.readline():
                os._exit(0)
            self.steps, spent["rollout"], self.start = 0, 0.0, clock()

        def on_log(self, *_, logs, **__):
            self.metrics = logs

        def on_step_end(self, *_, **__):
            seconds = spent | {"iteration": clock() - self.start}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
            say(seconds=seconds, peak_mb=peak, steps=self.steps, kl=float(self.metrics["objective/kl"]))
            self.wait()

    def say(**what):
        print(MARK + json.dumps(what), flush=True)

    pace = Pace()
    made = trainer(work, pace)
    step = made.optimizer.step

    def counted(*arguments, **options):
        pace.steps += 1
        return step(*arguments, **options)

    made.optimizer.step = counted
    say(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
    pace.wait()
    made.train()


if __name__ == "__main__":
    main()
