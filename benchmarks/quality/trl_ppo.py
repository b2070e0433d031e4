"""TRL's side: a PPO run of the last TRL that had one, in a process of its own.

`TRL` is the benchmark's end of it. `python -m benchmarks.quality.trl_ppo` is the process, which runs in the environment
that `benchmarks.steps.trl_ppo` makes: TRL 1.12 over this Python's packages. It is told to begin a run, to make an
iteration, and to write its policy's weights; what it is not told it does not do, so that the sides can alternate.

The run has the same SFT policy, reference, prompts in the same order, response length, temperature, KL coefficient,
discount, λ, clip ranges, batch, minibatch and epochs, and the same fused AdamW with the same two rates and their linear
decay; its value model begins as a copy of the reward model, as alignkit's critic does. The reward is TRL's own reading
of the same reward model, with EOS put after a response that has none and with the same scale, as alignkit's scorer
reads it; before a run the two must agree. What remains TRL's: no clipping of gradients, the score's place one
token after EOS, log-probs of the sampler as old ones, and all of its bookkeeping.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.quality.rules import PRICE, Setting
from benchmarks.steps.trl_ppo import MARK, Process

CHECKED = 64  # prompts on which the two rewards must agree, each with a response of each length
CLOSE = 1e-4  # SFT-sd


class TRL:
    """A PPO run of TRL: each call is an iteration and returns its seconds, CPU and wall, of the process.

    process: a `Process` of this module, which can hold one run at a time. world: as `ours.World`.
    """

    def __init__(self, process: Process, world, setting: Setting):
        self.process, self.policy = process, world.policy()[0]
        self.file = world.folder / "trl_policy.safetensors"
        self.agreed = process.ask(json.dumps({"do": "begin", "folder": os.fspath(world.folder), "seed": world.seed,
                                              "setting": asdict(setting)}))
        self.iterations, self.samples, self.said = setting.iterations, setting.prompts, {}

    def __call__(self) -> dict[str, float]:
        self.said = self.process.ask(json.dumps({"do": "iterate"}))
        return {unit: self.said.pop(unit) for unit in ("cpu", "wall")}

    def weights(self):
        """The policy as it is now."""
        from safetensors.torch import load_model

        self.process.ask(json.dumps({"do": "write", "file": os.fspath(self.file)}))
        load_model(self.policy, self.file)
        return self.policy

    def close(self) -> None:
        """Abandon the run; the process waits for the next one."""
        self.process.ask(json.dumps({"do": "end"}))


# ---- the process
def scores(original, scorer):
    """TRL's `get_reward`, which reads the reward model as alignkit's scorer does: EOS at the end, the scorer's scale.

    Any other model is read by TRL's own.
    """
    import torch

    pad, eos = scorer.tokenizer.pad_token_id, scorer.tokenizer.eos_token_id

    def get_reward(model, ids, pad_token_id, context_length):
        if model is not scorer.model:
            return original(model, ids, pad_token_id, context_length)
        ended = (ids[:, context_length:] == eos).any(1)
        ids = torch.cat([ids, torch.where(ended, pad, eos)[:, None]], 1)
        logits, final, lengths = original(model, ids, pad_token_id, context_length)
        return logits, (final - scorer.mean) / scorer.std, lengths

    return get_reward


def check_rewards(get_reward, scorer, prompts: list[str]) -> float:
    """The largest difference between TRL's reward and alignkit's, on responses of every length.

    Raises Different if it is more than CLOSE.
    """
    import torch

    from alignkit.desk.tiny import phrase_ids
    from alignkit.forward.rollout import encode_prompts
    from benchmarks.steps.work import Different

    tokenizer, phrases = scorer.tokenizer, phrase_ids(scorer.tokenizer)
    texts, rows = [], []
    for number in range(len(prompts[:CHECKED])):
        length = number % 5
        row = [phrases[(number + 3 * place) % len(phrases)] for place in range(length)]
        texts.append(tokenizer.decode(row))
        ended = [*row, tokenizer.eos_token_id][:4]  # a response of four sentences has no room for EOS
        rows.append(ended + [tokenizer.pad_token_id] * (4 - len(ended)))
    ids, _ = encode_prompts(tokenizer, prompts[:CHECKED])
    with torch.no_grad():
        _, theirs, _ = get_reward(scorer.model, torch.cat([ids, torch.tensor(rows)], 1), tokenizer.pad_token_id,
                                  ids.shape[1])
    worst = float((theirs - scorer(prompts[:CHECKED], texts)).abs().max())
    if not worst <= CLOSE:
        raise Different(f"TRL's reward and alignkit's differ by {worst:.3g} SFT-sd, expected at most {CLOSE:g}")
    return worst


def trainer(folder: Path, seed: int, setting: Setting, pace, scorer, prompts: list[str]):
    """TRL's PPO trainer for a run; `pace` is its callback, `prompts` are those of all iterations in order."""
    import datasets
    import numpy as np
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import DataLoader
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from alignkit.models.adapters import frozen_copy
    from alignkit.models.heads import value_model_from
    from alignkit.models.loading import load_policy
    from alignkit.optim import adamw

    policy, tokenizer = load_policy(folder / "sft")
    tokenizer.padding_side = "left"
    critic, ref = value_model_from(scorer.model), frozen_copy(policy)
    same = setting.config(seed)
    config = PPOConfig(
        output_dir=os.fspath(folder / "trl"), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no", seed=seed, num_sample_generations=0,
        per_device_train_batch_size=setting.prompts, gradient_accumulation_steps=1,
        num_mini_batches=setting.prompts // setting.minibatch, num_ppo_epochs=setting.epochs,
        local_rollout_forward_batch_size=setting.prompts, total_episodes=setting.prompts * setting.iterations,
        response_length=same.max_new_tokens, stop_token="eos", temperature=same.temperature, kl_coef=PRICE,
        vf_coef=same.value_coef, cliprange=same.clip_range, cliprange_value=same.value_clip_range, gamma=same.gamma,
        lam=same.gae_lambda)
    optimizer = adamw(list(policy.parameters()), same.learning_rate)
    optimizer.add_param_group({"params": list(critic.parameters()), "lr": same.critic_learning_rate})
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / setting.iterations))
    rows = datasets.Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts])
    made = PPOTrainer(config, tokenizer, policy, ref, scorer.model, rows, critic, optimizers=(optimizer, schedule),
                      callbacks=[pace])
    made.dataloader = made.accelerator.prepare(  # as PPOTrainer makes it, without the shuffle
        DataLoader(rows, batch_size=setting.prompts, collate_fn=made.data_collator, drop_last=True))
    np.random.seed(seed)  # its minibatches are drawn from numpy's global generator, which it does not seed
    return made, policy


def run(order: dict) -> None:
    """Make the run that was ordered, an iteration at a time, until it is told to end."""
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    from alignkit import ppo
    from alignkit.formulas.randomness import seeded
    from alignkit.reward import RewardScorer
    from alignkit.task import desk_task
    from experiments import sweep

    folder, seed, setting = Path(order["folder"]), order["seed"], Setting(**order["setting"])
    scorer, strata = RewardScorer.load(folder / "reward"), sweep.strata(desk_task(seed))
    prompts = [prompt for iteration in range(1, setting.iterations + 1)
               for prompt in ppo._draw_prompts(strata, setting.prompts, seeded(seed, iteration, 2))]
    original = ppo_trainer.get_reward
    ppo_trainer.get_reward = scores(original, scorer)
    pace = _pace(TrainerCallback)
    try:
        worst = check_rewards(ppo_trainer.get_reward, scorer, prompts)
        made, policy = trainer(folder, seed, setting, pace, scorer, prompts)
        pace.begin(policy, made.optimizer)
        say(reward_difference=worst)
        pace.wait()
        made.train()
    except End:
        say()
    finally:
        ppo_trainer.get_reward = original


class End(Exception):
    """The run is abandoned."""


def _pace(callback: type):
    """A callback that waits for the benchmark before each iteration, and then says what the last one took."""

    class Pace(callback):
        """policy, optimizer: of the run. logs: what TRL last measured."""

        def begin(self, policy, optimizer) -> None:
            self.policy, self.logs, self.steps, step = policy, {}, 0, optimizer.step

            def counted(*arguments, **options):
                self.steps += 1
                return step(*arguments, **options)

            optimizer.step = counted

        def on_log(self, *_, logs, **__):
            self.logs = logs

        def on_step_end(self, *_, **__):
            say(cpu=time.process_time() - self.cpu, wall=time.perf_counter() - self.start, steps=self.steps,
                kl=float(self.logs["objective/kl"]), score=float(self.logs["objective/scores"]))
            self.wait()

        def wait(self) -> None:
            from safetensors.torch import save_model

            while True:
                order = json.loads(sys.stdin.readline() or '{"do": "end"}')
                if order["do"] == "iterate":
                    break
                if order["do"] == "end":
                    raise End
                save_model(self.policy, order["file"])
                say()
            self.steps, self.cpu, self.start = 0, time.process_time(), time.perf_counter()

    return Pace()


def say(**what) -> None:
    """A line for the benchmark."""
    print(MARK + json.dumps(what), flush=True)


def main() -> None:
    """Say what this is; then make each run that is ordered."""
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    say(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
    while line := sys.stdin.readline():
        run(json.loads(line))


if __name__ == "__main__":
    main()
