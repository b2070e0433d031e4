"""What several processes compute together in tests/test_processes.py, and one process alone."""

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from alignkit.configs import DPOConfig, PPOConfig
from alignkit.desk.world import World
from alignkit.dpo import DPOState, dpo_iteration
from alignkit.errors import RunError
from alignkit.followers import check_facts
from alignkit.jobs import worker
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_policy
from alignkit.optim import size
from alignkit.ppo import PPOState, collect, ppo_iteration, ppo_step
from alignkit.ppo import _demonstrations as demonstrations
from alignkit.processes import join, sharing, told

PROMPTS = [prompt.text for prompt in World(0).train_prompts[:40]]
PAIRS = [{"prompt": prompt, "chosen": " Yes.", "rejected": " No, sorry." if number % 3 else " I"}
         for number, prompt in enumerate([*PROMPTS, *PROMPTS[:13]])]
DEMONSTRATIONS = [{"prompt": prompt, "completion": " Yes." if number % 2 else " I"}
                  for number, prompt in enumerate(PROMPTS[:9])]
GROUPS = {"prompts_per_iteration": 33, "samples_per_prompt": 3}
CASES = {  # name -> settings; each has sizes that N does not divide
    "ppo": {}, "ppo ptx": {"ptx_coef": 0.5}, "ppo trunk": {"shared_trunk": True, "kl_penalty": "k3",
                                                            "whiten_advantages": False},
    "ppo passes": {"tokens_per_pass": 150, "ptx_coef": 0.5}, "ppo lora": {"lora": True, "entropy_coef": 0.1},
    "ppo rloo": {"advantage": "rloo", **GROUPS}, "ppo grpo": {"advantage": "grpo", "kl_penalty": "k3", **GROUPS},
    "ppo few": {"prompts_per_iteration": 5, "minibatch_size": 2, "ptx_coef": 0.5, "tokens_per_pass": 150},
    "ppo one": {"prompts_per_iteration": 1, "minibatch_size": 1},
    "dpo": {}, "dpo each": {"precompute_reference": False, "tokens_per_pass": 90},
    "dpo ipo": {"loss_type": "ipo", "length_normalised": True, "lora": True},
    "dpo few": {"batch_size": 2, "pairs": 5},
}


asked: list[str] = []  # the responses that the reward has scored in this process


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that needs no model."""
    asked.extend(responses)
    return [0.1 * len(response) - 0.01 * len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


def computed(case: str) -> dict[str, Tensor]:
    """A run of a case: its first batch and gradients before clipping, and statistics and weights some steps later."""
    options = dict(CASES[case])
    policy, tokenizer = load_policy("tiny", device="cpu")
    policy = add_lora(policy) if options.pop("lora", False) else policy
    asked.clear()
    found = (_dpo if case.startswith("dpo") else _ppo)(policy, tokenizer, options)
    found["asked"] = torch.tensor(len(asked))
    return {name: value.detach().contiguous() for name, value in found.items()}


def _ppo(policy, tokenizer, options: dict) -> dict[str, Tensor]:
    config = PPOConfig(**{"prompts_per_iteration": 101, "minibatch_size": 33, "iterations": 2, "epochs": 1, **options})
    state = PPOState.start(policy, tokenizer, length, PROMPTS, config, demonstrations=DEMONSTRATIONS)
    batch, collected = collect(state, config)
    rows = torch.arange(config.minibatch_size)
    mixed = demonstrations(state, config, 0)
    first = copy.deepcopy(state)
    measured = ppo_step(first, batch[rows], replace(config, max_grad_norm=1e9), demonstrations=mixed)
    gradients = _flat([weight.grad for model, _ in first.trained().values() for weight in model.parameters()])
    state.iteration = 0
    stats = [ppo_iteration(state, config) for _ in range(2)]
    rollout = state.last_rollout
    return {"bytes": _bytes(state.policy_optimizer, state.critic_optimizer),
            "tokens": torch.where(batch.rollout.response_mask, batch.rollout.response_ids, -1),
            "later tokens": torch.where(rollout.response_mask, rollout.response_ids, -1),
            "logprobs": batch.old_logprobs, "advantages": batch.advantages, "returns": batch.returns,
            "scores": state.last_scores, "gradients": gradients,
            "step": torch.tensor(list(measured.values())), "collected": torch.tensor(list(collected.values())),
            "stats": torch.tensor([list(map(float, vars(each).values())) for each in stats]),
            "weights": _flat([weight for model, _ in state.trained().values() for weight in model.parameters()])}


def _dpo(policy, tokenizer, options: dict) -> dict[str, Tensor]:
    pairs = PAIRS[: options.pop("pairs", len(PAIRS))]
    config = DPOConfig(**{"batch_size": 33, "epochs": 2, "max_grad_norm": 1e9, **options})
    state = DPOState.start(policy, tokenizer, pairs, config)
    first = dpo_iteration(state, config)
    gradients = _flat([weight.grad for weight in policy.parameters()])
    stats = [first, *(dpo_iteration(state, config) for _ in range(2))]
    return {"bytes": _bytes(state.optimizer), "gradients": gradients, "weights": _flat(policy.parameters()),
            "stats": torch.tensor([list(map(float, vars(each).values())) for each in stats])}


def _bytes(*optimizers) -> Tensor:
    """Of the states that this process keeps."""
    return torch.tensor([size(dict(optimizer.state)) for optimizer in optimizers if optimizer is not None])


def _flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


def start(target, count: int, *given) -> list:
    """`count` processes that run target(rank, count, *given) as a group. They are copies of one that has imported this
    module, so that they start quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.several"])
    processes = [context.Process(target=_joined, args=(target, rank, count, *given), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def _joined(target, rank: int, count: int, folder: Path, *given) -> None:
    torch.set_num_threads(1)
    join(folder / "meeting", rank, count)
    target(rank, count, folder, *given)
    dist.destroy_process_group()


def compute(rank: int, count: int, folder: Path, case: str) -> None:
    """Write what a case computes to RANK.safetensors in the folder."""
    with sharing():
        save_file(computed(case), folder / f"{rank}.safetensors")


def shard(rank: int, count: int, folder: Path, case: str) -> None:
    """Write what a case computes without and with sharded optimiser states to plain- and sharded-RANK.safetensors."""
    for name, given in (("plain", False), ("sharded", True)):
        with sharing(given):
            save_file(computed(case), folder / f"{name}-{rank}.safetensors")


def train(rank: int, count: int, folder: Path, notebook: str, run: Path, values: dict, shard: str | None = None
          ) -> None:
    """What each process of torchrun does."""
    worker.train_stage(notebook, run, values, shard)


def disagree(rank: int, count: int, folder: Path) -> None:
    """Process 1 has loaded another reward and other prompts than process 0, and writes what it says about that."""
    if rank == 0:
        told({"policy": "a", "reward": "b", "prompts": "c"})
        return
    try:
        check_facts({"policy": "a", "reward": "B", "prompts": "C"})
    except RunError as error:
        (folder / "error").write_text(str(error))
