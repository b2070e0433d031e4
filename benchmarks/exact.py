"""What it costs to enumerate a policy: seconds and peak memory, as T and the number of prompts grow.

    python -m benchmarks.exact --json exact.json

Each row is measured in a process of its own, forked after everything is loaded, so that its peak is its own. One
thread.
The baseline scores every response with an ordinary forward pass, prompt included, without a cache.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time

import torch
import transformers

from alignkit import exact
from alignkit.desk.tiny import phrase_ids, tiny_reward_model
from alignkit.desk.world import World
from alignkit.formulas.tokens import sequence_logps, token_logprobs
from alignkit.forward.reading import response_logits
from alignkit.forward.rollout import Rollout, encode_prompts
from alignkit.models.loading import load_policy
from alignkit.reward import RewardScorer

ENUMERATIONS = [(2, 1), (3, 1), (4, 1), (5, 1), (4, 4), (4, 16), (4, 64), (5, 4), (6, 1)]  # (T, prompts)
TARGETS = {(4, 1): 0.15, (5, 1): 1.5}  # seconds on one thread


@torch.no_grad()
def uncached(policy, tokenizer, prompts: list[str], max_phrases: int) -> torch.Tensor:
    """logps (prompts, N) the plain way: every response is a row."""
    space = exact.response_space(11, max_phrases)
    ids, mask = encode_prompts(tokenizer, prompts)
    response_ids, response_mask = space.token_ids(phrase_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = []
    for prompt in range(len(prompts)):
        for start in range(0, len(space), 1024):
            some = slice(start, start + 1024)
            n = len(response_ids[some])
            rollout = Rollout(ids[prompt].expand(n, -1), mask[prompt].expand(n, -1), response_ids[some],
                              response_mask[some], torch.zeros(n, max_phrases), response_mask[some][:, 0])
            logprobs = token_logprobs(response_logits(policy, rollout), rollout.response_ids)
            rows.append(sequence_logps(logprobs, rollout.response_mask))
    return torch.cat(rows).view(len(prompts), -1)


def measure(job, repeats: int) -> dict:
    """Median seconds of `repeats` runs of `job`, and the memory it added at its peak, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)
        before = resident()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - start)
        sender.send({"seconds": statistics.median(seconds), "fastest": min(seconds), "repeats": repeats,
                     "peak_mb": max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)})

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the measured process ended with {process.exitcode}")
    return receiver.recv()


def resident() -> float:
    """Memory of this process now, MB (its peak so far where /proc is missing)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="where to write the rows")
    parser.add_argument("--quick", action="store_true", help="small cases only, one repeat")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy, tokenizer = load_policy("tiny", device="cpu")
    prompts = [prompt.text for prompt in World(0).heldout_prompts[::12]]
    scorer = RewardScorer(tiny_reward_model(tokenizer), tokenizer)
    exact.response_logps(policy, tokenizer, prompts[:1], max_phrases=2)  # imports and kernels, once
    cases = [(T, n) for T, n in ENUMERATIONS if not arguments.quick or 11**T * n < 2000]
    rows = []

    def record(what: str, max_phrases: int, count: int, repeats: int, job) -> None:
        responses = sum(11**t for t in range(max_phrases + 1))
        row = {"what": what, "T": max_phrases, "prompts": count, "responses": responses,
               **measure(job, 1 if arguments.quick else repeats)}
        if what == "enumerate":
            row["target_seconds"] = TARGETS.get((max_phrases, count))
        rows.append(row)
        print(f"{what:24} T={max_phrases} prompts={count:3} responses={responses:7,} "
              f"{row['seconds']:8.3f} s  {row['peak_mb']:7.0f} MB", flush=True)

    for T, count in cases:
        record("enumerate", T, count, 5 if T < 6 else 1, lambda T=T, count=count:
               exact.response_logps(policy, tokenizer, prompts[:count], max_phrases=T))
    for T, count in cases:
        if T <= 4 and count == 1:
            record("enumerate, no cache", T, count, 1, lambda T=T: uncached(policy, tokenizer, prompts[:1], T))
    for T, count in [case for case in cases if case in ((3, 1), (4, 1), (4, 4))]:
        space = exact.response_space(11, T)
        record("reward table", T, count, 3, lambda space=space, count=count:
               exact.proxy_table(scorer, prompts[:count], space))
        ids, mask = encode_prompts(tokenizer, prompts[:count])
        where = {"phrase_ids": phrase_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_phrases": T}
        ref_logps = exact.trie_logps(policy, ids, mask, **where)
        rewards = torch.randn(ref_logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        record("optimum, 24 β", T, count, 3, lambda ref=ref_logps, rewards=rewards:
               exact.frontier(ref, rewards, [0.03 * 1.3**i for i in range(24)]))
        record("exact gradient", T, count, 3, lambda ids=ids, mask=mask, rewards=rewards, ref=ref_logps, where=where:
               exact.exact_gradient(policy, ids, mask, rewards, ref, 0.3, **where))
    report = {"rows": rows, "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                         "transformers": transformers.__version__},
              "machine": platform.machine(), "threads": 1}
    with open(arguments.json, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
