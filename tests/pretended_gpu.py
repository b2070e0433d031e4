"""A GPU that is only pretended: a device "gpu" whose tensors lie on the CPU, and which refuses what a GPU refuses.

A tensor on it and one on the CPU cannot be used together (but for numbers), and numpy cannot read it. Values are real,
so what runs here gives the numbers that it gives on the CPU. It stands in for CUDA as far as "which device is this
tensor on" goes: nothing here says anything about speed, bf16 or CUDA graphs.

    python -m tests.pretended_gpu       every case on both devices; the outcomes as JSON

PyTorch can have one such device a process, and it stays, so the tests run this in a process of its own.
"""

import contextlib
import copy
import json
import sys
import traceback
from dataclasses import asdict
from unittest.mock import patch

import numpy
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "gpu:0"
MADE = "device"  # the argument of what makes a tensor


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `here` has its values."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=GPU
        )

    def __init__(self, here: torch.Tensor):
        self.here = here

    def __repr__(self, **_) -> str:
        return f"OnGPU({self.here})"

    def tolist(self):
        return self.here.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a tensor on the GPU to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __format__(self, form: str) -> str:
        return format(self.here, form)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """While it is entered, "gpu:0" is a device."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) goes through here too
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args: tuple, kwargs: dict):
    """One operation: refused if its tensors are on both sides, otherwise computed here and kept on its device."""
    tensors = []
    tree_map(lambda a: tensors.append(a) if isinstance(a, torch.Tensor) else None, (args, kwargs))
    there = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    name = function._schema.name
    if name in ("aten::copy_", "aten::_to_copy"):  # the two that carry values from one to the other
        on_gpu = isinstance(args[0], OnGPU)
    elif name.startswith("aten::index") and isinstance(args[0], OnGPU) and isinstance(args[1], list | tuple):
        on_gpu = True  # places may be named by a tensor on the CPU
    else:
        apart = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim()]
        if there and apart:
            raise RuntimeError(f"{name}: tensors on the GPU, and on the CPU one of shape {apart[0]}")
        on_gpu = bool(there)
    if kwargs.get(MADE) is not None:
        on_gpu = torch.device(kwargs[MADE]).type == "gpu"
        kwargs = {**kwargs, MADE: torch.device("cpu")}
    made = function(*tree_map(_here, args), **tree_map(_here, kwargs))
    known = {id(tensor.here): tensor for tensor in there}  # an operation in place gives the tensor itself
    return tree_map(lambda a: known.get(id(a), a) if id(a) in known or not on_gpu or type(a) is not torch.Tensor
                    else OnGPU(a), made)


def _here(value):
    return value.here if isinstance(value, OnGPU) else value


def placed(model: nn.Module, device: str) -> nn.Module:
    """The model on a device, in place, as `Module.to` does it."""
    if device == GPU:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.device.type == "cpu":
                    module._parameters[name] = nn.Parameter(OnGPU(weight.data), requires_grad=weight.requires_grad)
            for name, value in module._buffers.items():
                if value is not None and value.device.type == "cpu":
                    module._buffers[name] = OnGPU(value)
    return model


# Cases: each gives numbers that must be the same wherever its models are.


def models(device: str, lora: bool = False):
    """A policy that is not its reference, the reference, a scorer and a tokenizer."""
    from alignkit.models.adapters import add_lora, frozen_copy
    from alignkit.models.heads import reward_model_from
    from alignkit.models.loading import load_policy
    from alignkit.reward import RewardScorer

    policy, tokenizer = load_policy("tiny", device="cpu")
    reference = frozen_copy(policy)
    reward_model = reward_model_from(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    if lora:
        policy = add_lora(policy)
    scorer = RewardScorer(placed(reward_model, device), tokenizer, 0.1, 0.7)
    return placed(policy, device), placed(reference, device), scorer, tokenizer


PROMPTS = ["hello there", "where is my order", "can you pick a lock", "thank you"]
ROWS = [{"prompt": prompt, "completion": "Hello.", "chosen": "Hello. Sure.", "rejected": "No."} for prompt in PROMPTS]


def ppo(device: str, lora: bool = False, own_reference: bool = True, **options) -> list[float]:
    from alignkit.configs import PPOConfig
    from alignkit.ppo import PPOState, ppo_iteration

    policy, reference, scorer, tokenizer = models(device, lora)
    config = PPOConfig(iterations=2, prompts_per_iteration=6, minibatch_size=4, **options)
    state = PPOState.start(policy, tokenizer, scorer, PROMPTS, config, demonstrations=ROWS,
                           ref_policy=None if own_reference else reference)
    first = ppo_iteration(state, config)
    saved = copy.deepcopy(state.state_dict())
    second = ppo_iteration(state, config)
    state.load_state_dict(saved)
    assert ppo_iteration(state, config) == second, "a state that was loaded goes on in another way"
    return [*asdict(first).values(), *asdict(second).values()]


def dpo(device: str, lora: bool = False, **options) -> list[float]:
    from alignkit.configs import DPOConfig
    from alignkit.dpo import dpo as train

    policy, _, _, tokenizer = models(device, lora)
    config = DPOConfig(epochs=2, batch_size=3, **options)
    return [value for stats in train(policy, tokenizer, ROWS, config) for value in asdict(stats).values()]


def evaluation(device: str) -> list[float]:
    from alignkit.evaluate.evaluation import evaluate, evaluation_set
    from alignkit.task import desk_task

    policy, reference, scorer, tokenizer = models(device)
    task = desk_task()
    evalset = evaluation_set(task, prompts=6, samples=3)
    columns = evaluate(policy, tokenizer, evalset, ref_policy=reference, reward=scorer, world=task.world).columns
    return [float(value) for name in sorted(columns) for value in columns[name] if isinstance(value, int | float)]


def texts(device: str) -> list[float]:
    from alignkit.forward.sampling import generate_texts

    policy, _, scorer, tokenizer = models(device)
    said = generate_texts(policy, tokenizer, PROMPTS, max_new_tokens=4, seed=3, samples=3)
    return scorer([p for p in PROMPTS for _ in range(3)], [text for row in said for text in row]).tolist()


def enumeration(device: str) -> list[float]:
    from alignkit import exact

    policy, _, scorer, tokenizer = models(device)
    logps = exact.response_logps(policy, tokenizer, PROMPTS[:2], max_phrases=2)
    scores = exact.proxy_table(scorer, PROMPTS[:2], exact.response_space(max_phrases=2))
    return exact.expectation(logps.exp().log().cpu(), scores.cpu()).tolist()


def one_response(device: str) -> list[float]:
    from alignkit_widgets.explorers.worked_numbers import read_response

    from alignkit.models.heads import value_model_from

    policy, reference, scorer, tokenizer = models(device)
    critic = value_model_from(scorer.model)
    numbers = read_response(policy, reference, critic, tokenizer, PROMPTS[0], "Hello. Sure.", 1.0)
    return torch.cat([numbers.logits.flatten(), numbers.ref_logits.flatten(), numbers.values]).tolist()


def by_graph(device: str) -> list[float]:
    """The step that a graph would hold, on the device; the generic loop on the CPU."""
    from alignkit.formulas.randomness import seeded
    from alignkit.forward import cuda_graph
    from alignkit.forward.rollout import left_pad
    from alignkit.forward.sampling import sample

    policy, _, _, tokenizer = models(device)
    ids, mask = left_pad([[1, 15, 20], [1, 16], [1, 15, 20], [1, 17, 18, 19]], 0)
    with patch.object(cuda_graph, "DEVICE", "gpu"), patch.object(cuda_graph, "readable", lambda *_: True):  # by types
        assert cuda_graph.usable(policy, 20) == (device == GPU)
        drawn = sample(policy, ids, mask, max_new_tokens=20, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
                       generator=seeded(1))
    return [*drawn.response_ids.flatten().tolist(), *drawn.logprobs.flatten().tolist(), *drawn.finished.tolist()]


def in_parts(device: str) -> list[float]:
    from alignkit.forward import reading

    with patch.object(reading, "MOST_LOGITS", 200):
        return dpo(device) + ppo(device, shared_trunk=True, entropy_coef=0.01)


def shift(device: str) -> list[float]:
    from alignkit.evaluate.shift import measure_shift

    policy, reference, _, tokenizer = models(device)
    measured = measure_shift([("before", reference), ("after", policy)], tokenizer, PROMPTS, samples=6)
    return [value for table in (measured.chances, measured.kl) for of_prompt in table for row in of_prompt
            for value in row if value == value]


def pairs(device: str) -> list[float]:
    from alignkit.evaluate.reward_model import reward_report
    from alignkit.task import desk_task

    policy, _, scorer, tokenizer = models(device)
    task = desk_task()
    rows = task.preference_pairs(policy, tokenizer, 40, seed=1)
    report = reward_report(scorer, rows, world=task.world)
    return [value for value in report.values() if isinstance(value, float)]


def refused(device: str) -> list[float]:
    """The pretended GPU itself."""
    here, there = torch.ones(2), torch.ones(2, device=device)
    if device == GPU:
        for wrong in (lambda: here + there, lambda: here[there.long()], lambda: numpy.asarray(there),
                      lambda: nn.functional.linear(there, torch.ones(3, 2)), lambda: there.add_(here)):
            with contextlib.suppress(RuntimeError, TypeError):
                wrong()
                raise AssertionError("a GPU refuses this")
    return [float((there + 1).sum()), float((there * here.to(device)).sum()), *there.cpu().numpy().tolist()]


CASES = {
    "ppo": ppo,
    "ppo with LoRA": lambda device: ppo(device, lora=True),
    "ppo with a shared trunk": lambda device: ppo(device, shared_trunk=True),
    "ppo with everything": lambda device: ppo(
        device, own_reference=True, ptx_coef=0.5, entropy_coef=0.01, whiten_rewards=True, target_kl=0.1, score_clip=1.0,
        temperature=0.7, missing_eos_penalty=0.2, samples_per_prompt=2, max_step_kl=10.0),
    "rloo": lambda device: ppo(device, advantage="rloo", samples_per_prompt=2),
    "grpo": lambda device: ppo(device, advantage="grpo", kl_penalty="k3", samples_per_prompt=2, tokens_per_pass=20),
    "dpo": dpo,
    "dpo with LoRA": lambda device: dpo(device, lora=True),
    "dpo, reference at each step": lambda device: dpo(device, precompute_reference=False),
    "ipo, per token": lambda device: dpo(device, loss_type="ipo", length_normalised=True),
    "ppo in passes, layers computed again": lambda device: ppo(
        device, tokens_per_pass=20, gradient_checkpointing=True, ptx_coef=0.5, entropy_coef=0.01),
    "dpo in passes, layers computed again": lambda device: dpo(device, tokens_per_pass=20, gradient_checkpointing=True),
    "log-probs in parts": in_parts,
    "sampled by the step of a graph": by_graph,
    "evaluate": evaluation,
    "generate": texts,
    "enumeration": enumeration,
    "one response": one_response,
    "shift": shift,
    "preference pairs and the reward model's report": pairs,
    "what a GPU refuses is refused": refused,
}


def _near(one: float, other: float) -> bool:
    """Equal but for the rounding of other kernels, which Adam makes larger."""
    return abs(one - other) <= 1e-3 * max(1.0, abs(other))


def main() -> None:
    from alignkit.forward import cpu

    cpu.reader = lambda model: None  # it is for a CPU: both sides take the generic pass
    outcomes = {}
    for name, case in CASES.items():
        expected = case("cpu")
        try:
            with contextlib.redirect_stdout(sys.stderr), PretendedGPU():
                found = case(GPU)
            same = len(found) == len(expected) > 0 and all(map(_near, found, expected))
            outcomes[name] = "the same" if same else f"{found} on the GPU, {expected} on the CPU"
        except Exception:
            outcomes[name] = traceback.format_exc(limit=-8)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("gpu")
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for even where autocast is switched off
    main()
