"""What a GPU makes of it: whether the numbers are right there, then decoding and training of 0.5 and 1.5 B models.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json [--device cuda] [--quick]

Nothing is downloaded: models have the shapes of Qwen2.5 0.5B and 1.5B and random weights. It ends within 8 minutes on
an H200; rows for which no time is left say so. If one of the comparisons with float32 on the CPU fails, nothing is
timed and the exit code is 1. Beside alignkit's sampler stands `generate` of transformers on a copy in bf16 (top_k=0),
beside its DPO step TRL's trainer where TRL is installed.

The limit of decoding is what memory and arithmetic, both measured, leave: a step reads each weight in bf16 and the keys
and values of half the new tokens, prefill multiplies. MFU is the share of the measured rate of one large bf16 product
that the products of a step make: 6 a weight and token, the head at response tokens alone, attention not counted.

`--quick --device cpu` runs the same code on tiny shapes; what it measures says nothing about a GPU, and it says so.
"""

import argparse
import copy
import gc
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from alignkit.configs import DPOConfig, PPOConfig
from alignkit.desk.tiny import desk_tokenizer
from alignkit.desk.world import World
from alignkit.dpo import Pairs, dpo_step
from alignkit.formulas.randomness import seeded
from alignkit.forward import cuda_graph, reading
from alignkit.forward.reading import response_logits, response_logprobs
from alignkit.forward.rollout import Rollout, rollout_from_ids, to_device
from alignkit.forward.sampling import sample
from alignkit.models.adapters import frozen_copy
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import pick_device
from alignkit.optim import adamw
from alignkit.ppo import PPOBatch, PPOState, ppo, ppo_step
from alignkit.runs.records import versions
from alignkit.storage import write_json

NO_GPU = "made on a CPU with tiny shapes, to try the code: no result about a GPU"


class Different(RuntimeError):
    """The device does not compute what float32 on the CPU does."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 with tied embeddings."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    """The work. batches: rows decoded at once. rows: responses of a PPO update; a DPO step has as many pairs."""

    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]
    prompt: int
    new: int
    rows: int
    rounds: int
    product: int
    copied: int


FULL = Sizes(
    (Shape("0.5B", 896, 4864, 24, 14, 2, 151_936), Shape("1.5B", 1536, 8960, 28, 12, 2, 151_936)),
    batches=(64, 256), prompt=256, new=256, rows=8, rounds=3, product=8192, copied=2**30,
)
QUICK = Sizes((Shape("tiny", 32, 64, 2, 4, 2, 128),), batches=(4,), prompt=12, new=20, rows=4, rounds=1, product=128,
              copied=2**20)


def qwen2(shape: Shape, device: torch.device, spread: float = 0.02, seed: int = 0) -> Qwen2ForCausalLM:
    """A policy with random weights of this standard deviation, made on the device."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=32_768, tie_word_embeddings=True, initializer_range=spread,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            return Qwen2ForCausalLM(config).eval()


def random_rollout(shape: Shape, rows: int, prompt: int, new: int, seed: int, ragged: bool = False) -> Rollout:
    """Prompts and responses of random tokens, on the CPU."""
    generator = seeded(seed, rows)
    lengths = [(prompt - 3 * row % prompt, new - 2 * row % new) if ragged else (prompt, new) for row in range(rows)]
    drawn = [[torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist() for length in both]
             for both in lengths]
    return rollout_from_ids(*map(list, zip(*drawn, strict=True)), eos_token_id=2, pad_token_id=0)


# Whether the numbers are right.


def checks(device: torch.device) -> list[dict]:
    """Comparisons of the device with float32 on the CPU: what, difference, tolerance; differences are of log-probs in
    nats (root mean square) unless `what` says otherwise. None is larger than its tolerance: Different otherwise.
    """
    shape, low = Shape("small", 128, 256, 4, 8, 2, 512), device.type == "cuda"
    plain = qwen2(shape, torch.device("cpu"), spread=0.08)
    there = copy.deepcopy(plain).to(device)
    made = []

    def note(what: str, difference: float, tolerance: float) -> None:
        made.append({"what": what, "difference": difference, "tolerance": tolerance})
        _say(f"{what}: {difference:.2g} (at most {tolerance:g})")

    with patch.object(cuda_graph, "DEVICE", device.type):
        note("decoder: log-probs against the model's own, in standard deviations", cuda_graph._error(there),
             cuda_graph.TOLERANCE[torch.bfloat16 if low else torch.float32])
        note("decoder: 0 if it is used, 1 if not", float(not cuda_graph.usable(there, 64)), 0.0)
        start = random_rollout(shape, 16, 24, 1, seed=1, ragged=True)
        for what, temperature in (("greedy", 1e-5), ("sampled", 1.0)):
            drawn = sample(there, start.prompt_ids, start.prompt_mask, max_new_tokens=48, eos_token_id=2,
                           pad_token_id=0, generator=seeded(2), temperature=temperature)
            mask = drawn.response_mask
            if what == "greedy":
                with torch.no_grad():
                    logits = response_logits(plain, to_device(drawn, "cpu"))
                chosen = logits.gather(-1, drawn.response_ids.cpu()[..., None]).squeeze(-1)
                behind = (logits.amax(-1) - chosen)[mask.cpu()].max() / logits.std()
                note("greedy tokens: behind the CPU's best logit, in standard deviations", float(behind),
                     0.1 if low else 1e-4)
                continue
            with torch.no_grad():
                scored = response_logprobs(plain, to_device(drawn, "cpu"))
                own = response_logprobs(there, drawn)
            note("sampled tokens: log-probs against the CPU's", _rms(drawn.logprobs, scored, mask),
                 0.05 if low else 1e-4)
            note("sampled tokens: log-probs against the trainer's", _rms(drawn.logprobs, own, mask),
                 0.05 if low else 1e-4)
        with patch.object(cuda_graph, "DEVICE", "none"):
            again = sample(there, start.prompt_ids, start.prompt_mask, max_new_tokens=48, eos_token_id=2,
                           pad_token_id=0, generator=seeded(2))
        first = drawn.response_ids[:, 0] != again.response_ids[:, 0]
        note("share of rows whose first token differs from the generic loop's", float(first.float().mean()),
             0.15 if low else 0.0)
        stats = _first_iteration(device)
        note("first PPO iteration: KL to the reference, nats per response", abs(stats.kl_to_ref), 0.1 if low else 1e-4)
        note("first PPO iteration: mean ratio − 1", abs(stats.ratio_first - 1), 0.02 if low else 1e-4)
    for what in ("PPO", "DPO"):
        gradients = [_gradients(what, model, shape, 8) for model in (plain, there)]
        for part in gradients[0]:
            note(f"{what} step: gradient of the {part}, relative", _apart(gradients[0][part], gradients[1][part]),
                 0.1 if low else 1e-4)
        gradients = [_gradients(what, there, shape, 8, **options)
                     for options in ({}, {"tokens_per_pass": 150, "gradient_checkpointing": True})]
        note(f"{what} step in passes, layers computed again: gradient, relative",
             _apart(*(each["policy"] for each in gradients)), 0.05 if low else 1e-4)
    rollout = to_device(random_rollout(shape, 8, 24, 32, seed=3, ragged=True), device)
    parts = []
    for most in (2**28, 37 * shape.vocabulary):
        with patch.object(reading, "MOST_LOGITS", most):
            there.zero_grad()
            logprobs = response_logprobs(there, rollout)
            logprobs.sum().backward()
            parts.append((logprobs.detach(), _flat(there)))
    note("log-probs in parts against all at once", _rms(parts[0][0], parts[1][0], rollout.response_mask),
         0.05 if low else 1e-4)
    note("their gradient, relative", _apart(parts[0][1], parts[1][1]), 0.05 if low else 1e-4)
    wrong = [check for check in made if not check["difference"] <= check["tolerance"]]
    if wrong:
        raise Different("; ".join(f"{check['what']}: {check['difference']:.3g}, at most {check['tolerance']:g}"
                                  for check in wrong))
    return made


def _first_iteration(device: torch.device):
    """One PPO iteration of the desk world on the device, with responses long enough for the decoder."""
    tokenizer = desk_tokenizer()
    policy = qwen2(Shape("desk", 64, 128, 2, 4, 2, len(tokenizer)), torch.device("cpu"), spread=0.03).to(device)
    config = PPOConfig(prompts_per_iteration=16, max_new_tokens=cuda_graph.SHORTEST, minibatch_size=8, iterations=1)
    prompts = [prompt.text for prompt in World(0).train_prompts[:16]]
    state = PPOState.start(policy, tokenizer, lambda prompts, responses: [len(text) / 50 for text in responses],
                           prompts, config)
    return next(ppo(state, config))


def _gradients(what: str, policy: nn.Module, shape: Shape, rows: int, **options) -> dict[str, Tensor]:
    """Gradients of one step, on the policy's device, of weights that do not move."""
    policy = copy.deepcopy(policy)
    step, models = _step(what, policy, shape, rows, 24, 32, learning_rate=0.0, ragged=True, **options)
    step()
    return {name: _flat(model) for name, model in models.items()}


def _step(what: str, policy: nn.Module, shape: Shape, rows: int, prompt: int, new: int, *, learning_rate: float = 1e-6,
          ragged: bool = False, **options) -> tuple[Callable, dict[str, nn.Module]]:
    """A PPO or DPO step on random tokens, to be made again and again, and the models that it trains."""
    device = policy.device
    one, other = (to_device(random_rollout(shape, rows, prompt, new, seed, ragged), device) for seed in (4, 5))
    other = replace(other, prompt_ids=one.prompt_ids, prompt_mask=one.prompt_mask)
    if what == "DPO":
        config = DPOConfig(batch_size=rows, max_grad_norm=math.inf, beta=0.1, **options)
        refs = _noise((2, rows), 6, device)
        counts = [side.response_mask.sum(1) for side in (one, other)]
        pairs = Pairs(one, other, *(-6.0 * count + 3 * ref for count, ref in zip(counts, refs, strict=True)))
        optimizer = adamw(list(policy.parameters()), learning_rate)
        return lambda: dpo_step(policy, optimizer, pairs, config), {"policy": policy}
    critic = reward_model_from(policy, seed=7)
    config = PPOConfig(max_grad_norm=math.inf, minibatch_size=rows, clip_range=math.inf, value_clip_range=math.inf,
                       **options)
    mask = one.response_mask
    noise = torch.where(mask, _noise((3, *mask.shape), 8, device), 0.0)
    with torch.no_grad():
        old = response_logprobs(policy, one) + 0.1 * noise[0]
    batch = PPOBatch(one, old, torch.zeros_like(old), noise[1], noise[2])
    state = PPOState(policy, policy, critic, None, None, [], adamw(list(policy.parameters()), learning_rate),
                     adamw(list(critic.parameters()), learning_rate))
    return lambda: ppo_step(state, batch, config), {"policy": policy, "critic": critic}


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(device)


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().cpu()
                      for weight in model.parameters()])


def _apart(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _rms(one: Tensor, other: Tensor, mask: Tensor) -> float:
    return float((one.cpu() - other.cpu())[mask.cpu()].square().mean().sqrt())


# What it costs.


def seconds(job: Callable, device: torch.device, rounds: int) -> float:
    """Median seconds of `rounds` runs after one that does not count; on a GPU by its own events."""
    job()
    spent = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            torch.cuda.synchronize(device)
            spent.append(start.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            job()
            spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def limits(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The rate of a large bf16 product of random numbers (FLOP/s), and of a copy (bytes read and written a second)."""
    one, other = (torch.randn(sizes.product, sizes.product, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 100, (sizes.copied,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return {"flops": 2 * sizes.product**3 / seconds(lambda: one @ other, device, 20),
            "bandwidth": 2 * sizes.copied / seconds(lambda: target.copy_(source), device, 20)}


def decoding(shape: Shape, sizes: Sizes, device: torch.device, rates: dict[str, float], late: Callable) -> list[dict]:
    """Rows: new tokens a second of a batch of prompts without padding, for alignkit and for `generate` in bf16."""
    policy, rows = qwen2(shape, device), []
    low = copy.deepcopy(policy).to(torch.bfloat16)
    weights = sum(weight.numel() for weight in policy.parameters())
    for batch in sizes.batches:
        if late():
            rows.append({"model": shape.name, "batch": batch, "left_out": "no time was left"})
            continue
        _say(f"decoding {shape.name}, {batch} rows")
        start = to_device(random_rollout(shape, batch, sizes.prompt, 1, seed=9), device)
        ids, mask = start.prompt_ids, start.prompt_mask
        jobs = {
            "alignkit": lambda ids=ids, mask=mask: sample(
                policy, ids, mask, max_new_tokens=sizes.new, eos_token_id=-1, pad_token_id=0, generator=seeded(1)),
            "generate": lambda ids=ids, mask=mask: low.generate(
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=sizes.new, min_new_tokens=sizes.new,
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0),
        }
        keys = 2 * shape.layers * shape.groups * (shape.hidden // shape.heads) * 2 * (sizes.prompt + sizes.new / 2)
        step = max((2 * weights + batch * keys) / rates["bandwidth"], 2 * weights * batch / rates["flops"])
        limit = sizes.new * step + 2 * weights * batch * sizes.prompt / rates["flops"]
        row = {"model": shape.name, "batch": batch, "limit_tokens_per_second": batch * sizes.new / limit,
               "limit_step_ms": 1000 * step, "graph": cuda_graph.usable(policy, sizes.new)}
        for name, job in jobs.items():
            try:
                spent, peak = _measured(job, device, sizes.rounds if name == "alignkit" else 1)
            except torch.OutOfMemoryError:
                row[name] = {"left_out": "not enough memory"}
                continue
            row[name] = {"seconds": spent, "tokens_per_second": batch * sizes.new / spent,
                         "share_of_limit": limit / spent, "peak_gb": peak}
        rows.append(row)
    return rows


def training(shape: Shape, sizes: Sizes, device: torch.device, rates: dict[str, float], late: Callable) -> list[dict]:
    """Rows: a PPO update of policy and critic, and a DPO step with the reference precomputed, of one minibatch."""
    rows = []
    for what, name in (("PPO", "PPO update"), ("DPO", "DPO step"), ("TRL", "DPO step, TRL")):
        row = {"model": shape.name, "step": name}
        rows.append(row)
        if late():
            row["left_out"] = "no time was left"
            continue
        if what == "TRL" and importlib.util.find_spec("trl") is None:
            row["left_out"] = "trl is not installed"
            continue
        _say(f"{name}, {shape.name}")
        policy = qwen2(shape, device)
        embedded = policy.get_input_embeddings().weight.numel()
        products = sum(weight.numel() for weight in policy.parameters()) - embedded
        responses = sizes.rows * (1 if what == "PPO" else 2)
        tokens, said = responses * (sizes.prompt + sizes.new), responses * sizes.new
        flops = 6 * (tokens * products * (2 if what == "PPO" else 1) + said * embedded)
        try:
            step = (_trl_step(policy, shape, sizes, device) if what == "TRL"
                    else _step(what, policy, shape, sizes.rows, sizes.prompt, sizes.new)[0])
            spent, peak = _measured(step, device, sizes.rounds)
        except torch.OutOfMemoryError:
            row["left_out"] = "not enough memory"
        else:
            row |= {"seconds": spent, "tokens": tokens, "tokens_per_second": tokens / spent,
                    "mfu": flops / spent / rates["flops"], "peak_gb": peak}
        policy = step = None
        gc.collect()  # a trainer is full of cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _trl_step(policy: nn.Module, shape: Shape, sizes: Sizes, device: torch.device) -> Callable:
    """A training step of TRL's DPO trainer in bf16, on as many and as long pairs, the reference precomputed."""
    import datasets
    import trl

    from benchmarks.steps.work import word_tokenizer

    tokenizer = word_tokenizer(shape.vocabulary)
    drawn = [random_rollout(shape, sizes.rows, sizes.prompt, sizes.new - 1, seed) for seed in (4, 5)]  # EOS follows
    rows = [[" ".join(["", *(f"w{token}" for token in ids)]) for ids in both] for both in zip(
        *(part.tolist() for side in drawn for part in (side.prompt_ids, side.response_ids)), strict=True)]
    data = datasets.Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}
                                       for prompt, chosen, _, rejected in rows])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, bf16=device.type == "cuda", use_cpu=device.type == "cpu", gradient_checkpointing=False,
            report_to="none", disable_tqdm=True, per_device_train_batch_size=sizes.rows, beta=0.1, max_grad_norm=1.0,
            max_length=2 * (sizes.prompt + sizes.new), precompute_ref_log_probs=True)
        trainer = trl.DPOTrainer(policy, args=config, train_dataset=data, processing_class=tokenizer,
                                 ref_model=frozen_copy(policy),
                                 optimizers=(adamw(list(policy.parameters()), 1e-6), None))
        trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
        batch = next(iter(trainer.get_train_dataloader()))

    def step() -> float:
        loss = trainer.training_step(trainer.model, dict(batch), None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.item()

    return step


def _measured(job: Callable, device: torch.device, rounds: int) -> tuple[float, float | None]:
    """Median seconds, and the peak of allocated memory, GB (None on a CPU)."""
    if device.type != "cuda":
        return seconds(job, device, rounds), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return seconds(job, device, rounds), torch.cuda.max_memory_allocated(device) / 1e9


def measure_all(sizes: Sizes, device: torch.device, minutes: float = 7.0) -> dict:
    """Checks, limits and all rows; rows are begun in the first `minutes` only."""
    begun = time.monotonic()
    results = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "note": "" if device.type == "cuda" else NO_GPU,
        "versions": {**versions(), "cuda": torch.version.cuda},
        "sizes": asdict(sizes),
    }
    results["checks"] = checks(device)

    def late() -> bool:
        return time.monotonic() - begun > 60 * minutes

    rates = results["limits"] = limits(sizes, device)
    results["decoding"] = [row for shape in sizes.shapes for row in decoding(shape, sizes, device, rates, late)]
    results["training"] = [row for shape in sizes.shapes[::-1] for row in training(shape, sizes, device, rates, late)]
    return {**results, "seconds": time.monotonic() - begun}


def table(results: dict) -> str:
    """The results as Markdown."""
    rates = results["limits"]
    lines = [
        f"{results['gpu'] or 'No GPU'}{': ' + results['note'] if results['note'] else ''}. Measured limits: "
        f"{rates['flops'] / 1e12:.3g} TFLOP/s (bf16 product), {rates['bandwidth'] / 1e12:.3g} TB/s (copy). "
        f"{len(results['checks'])} comparisons with float32 on the CPU, none off. {results['seconds']:.0f} s.", "",
        "| model | batch | alignkit, tokens/s | share of limit | peak, GB | `generate`, tokens/s | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["decoding"]:
        sides = [row.get(side, row) for side in ("alignkit", "generate")]
        mine, theirs = (side.get("left_out") or f"{side['tokens_per_second']:,.0f}" for side in sides)
        share = "–" if "left_out" in sides[0] else f"{sides[0]['share_of_limit']:.0%}"
        peaks = [_gb(side) for side in sides]
        mine += "" if row.get("graph", True) else " (no graph)"
        lines.append(f"| {row['model']} | {row['batch']} | {mine} | {share} | {peaks[0]} | {theirs} | {peaks[1]} |")
    lines += ["", "| model | step | seconds | tokens/s | MFU | peak, GB |", "|---|---|---|---|---|---|"]
    for row in results["training"]:
        if "left_out" in row:
            lines.append(f"| {row['model']} | {row['step']} | {row['left_out']} | – | – | – |")
        else:
            lines.append(f"| {row['model']} | {row['step']} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} | "
                         f"{row['mfu']:.0%} | {_gb(row)} |")
    return "\n".join(lines)


def _gb(row: dict) -> str:
    return "–" if row.get("peak_gb") is None else f"{row['peak_gb']:.1f}"


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--device", default="auto", help="a GPU where there is one, unless it is said")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the code")
    given = parser.parse_args(arguments)
    device = pick_device(given.device)
    if device.type != "cuda" and not given.quick:
        parser.error(f"--device is {device}, expected a GPU; with --quick the code can be tried on a CPU")
    transformers.logging.set_verbosity_error()
    try:
        results = measure_all(QUICK if given.quick else FULL, device)
    except Different as error:
        raise SystemExit(f"wrong numbers on {device}, so nothing was timed: {error}") from error
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.json, results)
    print(table(results))
    return results


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
