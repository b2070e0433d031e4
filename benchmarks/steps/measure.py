"""Both sides of each row: that they compute the same thing, the memory they take, and their seconds."""

import os
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward.reading import response_logits
from alignkit.forward.rollout import rollout_from_ids
from alignkit.runs.records import versions
from benchmarks.exact import resident
from benchmarks.steps.bare import BareDPO, BarePPO, BareReward, BareSFT
from benchmarks.steps.costs import bf16_rates, costs, probe
from benchmarks.steps.ours import AlignkitDPO, AlignkitPPO, AlignkitTraining
from benchmarks.steps.tables import NOT_MEASURED, PPO_PARTS, ROWS, _spread
from benchmarks.steps.trl import TRL
from benchmarks.steps.trl_ppo import Worker
from benchmarks.steps.work import (
    PATIENCE,
    PROCESSES,
    QUICK,
    TOLERANCE,
    Different,
    Sizes,
    Work,
    _quiet,
    _say,
    clock,
)

if PROCESSES.get_start_method() == "forkserver":  # what is imported there, every measured process has at once
    PROCESSES.set_forkserver_preload(
        [f"trl.trainer.{name}_trainer" for name in ("dpo", "sft", "reward")] + ["alignkit.dpo", "alignkit.reward"]
    )


def sides(work: Work) -> dict[str, dict[str, Callable[[], object]]]:
    """job -> side -> what makes it. A side is called, and returns its seconds; or has `step()`, which is timed.

    "best" is alignkit with its best settings, where these are others than the default ones.
    """
    jobs = {
        "ppo": {
            "alignkit": lambda: AlignkitPPO(work),
            "best": lambda: AlignkitPPO(work, shared_trunk=True, precision=work.precision),
            "bare": lambda: BarePPO(work),
        }
    }
    for name, precomputed in (("dpo", False), ("dpo_precomputed", True)):
        jobs[name] = {
            "alignkit": lambda precomputed=precomputed: AlignkitDPO(work, precomputed),
            "bare": lambda precomputed=precomputed: BareDPO(work, precomputed),
            "trl": lambda name=name: TRL(work, name),
        }
        if work.precision != "fp32":
            jobs[name]["best"] = lambda precomputed=precomputed: AlignkitDPO(work, precomputed, work.precision)
    for name, bare in (("sft", BareSFT), ("reward", BareReward)):
        jobs[name] = {
            "alignkit": lambda name=name: AlignkitTraining(work, name),
            "bare": lambda bare=bare: bare(work),
            "trl": lambda name=name: TRL(work, name),
        }
    return jobs


def seconds(name: str, side) -> dict[str, float]:
    """One measurement of a side: row -> seconds."""
    if not callable(side):
        start = clock()
        side.step()
        return {name: clock() - start}
    taken = side()
    return taken if isinstance(taken, dict) else {name: taken}


# the same numbers
def compare(work: Work) -> list[dict]:
    """What the sides give on the same weights and tokens: rows of job, quantity, sides, largest difference.

    A difference counts relative to the larger of 1 and the values' size. Raises Different if one exceeds TOLERANCE.
    """
    found = list(_compare_ppo(work))
    for name, job in sides(work).items():
        if name != "ppo":
            made = {side: make() for side, make in job.items() if side != "best"}
            steps = 1 if name in ("sft", "reward") else 3  # alignkit's come with a learning-rate schedule
            losses = {side: torch.tensor([side_made.step() for _ in range(steps)]) for side, side_made in made.items()}
            found += [
                _difference(name, f"loss, {steps} step(s)", ("alignkit", other), losses["alignkit"], losses[other])
                for other in losses
                if other != "alignkit"
            ]
    worst = max(found, key=lambda row: row["difference"])
    if not worst["difference"] <= TOLERANCE:
        raise Different(
            f"{worst['job']}: {worst['quantity']} of {' and '.join(worst['sides'])} differ by "
            f"{worst['difference']:.2g}, expected at most {TOLERANCE:g}"
        )
    return found


def _compare_ppo(work: Work) -> Iterator[dict]:
    own, bare = AlignkitPPO(work), BarePPO(work)
    both = ("alignkit", "bare")
    made = bare.rollout(output_logits=True, return_dict_in_generate=True)
    responses = [row.tolist() for row in made.sequences[:, bare.ids.shape[1] :]]
    prompts = [ids[mask].tolist() for ids, mask in zip(bare.ids, bare.mask, strict=True)]
    same = rollout_from_ids(
        prompts, responses, eos_token_id=work.tokenizer.eos_token_id, pad_token_id=work.tokenizer.pad_token_id
    )
    with torch.no_grad():
        scored = token_logprobs(response_logits(own.state.policy, same), same.response_ids)
    yield _difference(
        "rollout",
        "log-probs of the tokens that generate drew",
        both,
        scored,
        token_logprobs(torch.stack(made.logits, 1), same.response_ids),
    )
    steps = own.observed()
    drawn = own.state.last_rollout
    tokens = torch.cat([drawn.prompt_ids, drawn.response_ids], 1)
    batch = bare.score(tokens)
    yield _difference("rollout", "log-probs of the tokens that sample drew", both, drawn.logprobs, batch["old"])
    orders = [
        torch.randperm(len(tokens), generator=seeded(own.config.seed, own.state.iteration, epoch, 1))
        for epoch in range(work.sizes.epochs)
    ]
    rows = [part for order in orders for part in order.split(own.config.minibatch_size)]
    for quantity, mine, theirs in (
        ("old log-probs", "old_logprobs", "old"),
        ("values", "old_values", "values"),
        ("advantages", "advantages", "advantages"),
        ("returns", "returns", "returns"),
    ):
        yield _difference(
            "scoring",
            quantity,
            both,
            torch.cat([getattr(part, mine) for part, _ in steps]),
            batch[theirs][torch.cat(rows)],
        )
    losses = bare.update(batch, orders)
    yield _difference(
        "update",
        f"policy and critic loss, {len(losses)} steps",
        both,
        torch.tensor([(measured["policy_loss"], measured["value_loss"]) for _, measured in steps]),
        torch.tensor(losses),
    )


def _difference(job: str, quantity: str, pair: tuple[str, str], mine: Tensor, theirs: Tensor) -> dict:
    size = max(1.0, float(theirs.abs().max()))
    return {
        "job": job,
        "quantity": quantity,
        "sides": list(pair),
        "difference": float((mine - theirs).abs().max()) / size,
    }


GROWTH = {  # what changes -> its values; all else is as in Sizes
    "prompts": (32, 512),
    "new_tokens": (8, 128),
    "hidden": (64, 256),
    "layers": (2, 8),
    "minibatches": (1, 16),
}


def growth(sizes: Sizes, values: dict[str, tuple[int, ...]]) -> list[dict]:
    """Seconds of alignkit's second PPO iteration and second DPO step, as one size at a time changes."""
    rows = []
    for name, value in [(None, None), *((name, value) for name, some in values.items() for value in some)]:
        _say(f"growth: {name} {value}" if name else "growth: the sizes above")
        changed = replace(sizes, **{name: value}) if name else sizes
        if name == "hidden":
            changed = replace(changed, intermediate=sizes.intermediate * value // sizes.hidden)
        work = Work(changed)
        iteration, step = AlignkitPPO(work), AlignkitDPO(work, True)
        iteration(), step.step()
        rows.append(
            {
                "changed": name,
                "value": value,
                "parameters": sum(parameter.numel() for parameter in work.policy.parameters()),
                "iteration": iteration()["iteration"],
                "iteration_tokens": changed.prompts * changed.new_tokens,
                "dpo": seconds("dpo", step)["dpo"],
            }
        )
    return rows


# measure
def measure_all(
    sizes: Sizes, rounds: int, *, quick: bool = False, grow: bool = False, trl_ppo: Path | None = None
) -> dict:
    """Compare, measure memory, then time: a dict as the JSON has it. trl_ppo: where TRL's PPO lives."""
    rates = bf16_rates(quick)
    work = Work(sizes, precision="bf16" if rates["bf16"] > 1.5 * rates["fp32"] else "fp32")
    jobs = sides(work)
    peaks = _peaks(work, jobs)
    _say("the same numbers on all sides")
    checks = compare(work)
    if trl_ppo is not None:
        worker = Worker(trl_ppo, sizes, torch.get_num_threads())
        jobs["ppo"]["trl"] = lambda: worker
    load = [os.getloadavg()]
    made = {(job, side): make() for job, makers in jobs.items() for side, make in makers.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    probes, observed = [], []
    for number in range(-1, rounds):  # the first warms up
        _say(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        probes.append(probe(quick))
        for job, makers in jobs.items():
            order = list(makers)
            shift = number % len(order)
            for side in order[shift:] + order[:shift]:
                for row, value in seconds(job, made[job, side]).items():
                    if number >= 0:
                        taken.setdefault((row, side), []).append(value)
        if trl_ppo is not None:
            own = made["ppo", "alignkit"].stats
            observed.append((own.steps, worker.observed["steps"], own.kl_to_ref, worker.observed["kl"]))
    load.append(os.getloadavg())
    if trl_ppo is not None:
        alike = _same_ppo(sizes, observed)
        peaks["ppo"]["trl"] = worker.peak_mb
        worker.close()
    grown = growth(sizes, {"prompts": (2,), "new_tokens": (3,)} if quick else GROWTH) if grow else []
    flops, bandwidth = (statistics.median(rate) for rate in zip(*probes, strict=True))
    cost, cheaper = costs(work), costs(work, shared_trunk=True)
    faster = flops * max(1.0, rates[work.precision] / rates["fp32"])  # of the best settings
    rows = []
    for name in ROWS:
        job = "ppo" if name in PPO_PARTS else name
        limit = cost[name].limit(flops, bandwidth)
        limits = dict.fromkeys(jobs[job], limit) | {"best": cheaper[name].limit(faster, bandwidth)}
        measured = {
            side: _spread(taken[name, side])
            | {
                "seconds": taken[name, side],
                "tokens_per_second": cost[name].tokens / statistics.median(taken[name, side]),
                "limit_seconds": limits[side],
                "share_of_limit": limits[side] / statistics.median(taken[name, side]),
                "peak_mb": peaks[job][side],
            }
            for side in jobs[job]
            if (name, side) in taken
        }
        ratios, best_ratios = (
            {
                side: _spread([theirs / mine for theirs, mine in zip(taken[name, side], taken[name, own], strict=True)])
                for side in measured
                if side != own and own in measured
            }
            for own in ("alignkit", "best")
        )
        rows.append(
            {
                "name": name,
                "what": ROWS[name],
                "tokens": cost[name].tokens,
                "flops": sum(phase[0] for phase in cost[name].phases),
                "bytes": sum(phase[1] for phase in cost[name].phases),
                "limit_seconds": limit,
                "sides": measured,
                "ratios": ratios,
                "best_ratios": best_ratios,
            }
        )
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if torch.get_num_threads() == 1 else "wall time",
        "load_before": load[0],
        "load_after": load[1],
        "matmul_flops_per_second": flops,
        "matmul_best": max(rate for rate, _ in probes),
        "bytes_per_second": bandwidth,
        "bytes_best": max(rate for _, rate in probes),
    }
    return {
        "versions": versions(),
        "machine": machine,
        "sizes": asdict(sizes),
        "precision": "float32",
        "best": {"shared_trunk": True, "precision": work.precision, "flops_per_second": rates},
        "growth": grown,
        "rounds": rounds,
        "parameters": sum(parameter.numel() for parameter in work.policy.parameters()),
        "rows": rows,
        "checks": checks,
        "trl_ppo": None if trl_ppo is None else alike | {"versions": worker.versions},
        "not_measured": NOT_MEASURED if trl_ppo is None else {},
    }


def _same_ppo(sizes: Sizes, observed: list[tuple[int, int, float, float]]) -> dict:
    """What alignkit's and TRL's PPO must agree in: steps, and the KL of what they sampled.

    observed: steps of alignkit and of TRL, KL of alignkit and of TRL, a row a round. Raises Different if the steps
    are not the same, or the mean KL differs by more than a quarter (the samples are not the same).
    """
    steps = sizes.epochs * sizes.minibatches
    made = {count for row in observed for count in row[:2]}
    if made != {steps}:
        raise Different(f"alignkit's and TRL's PPO made {sorted(made)} optimiser steps an iteration, expected {steps}")
    kl, kl_trl = (statistics.mean(values) for values in list(zip(*observed, strict=True))[2:])
    if sizes != QUICK and not abs(kl_trl / kl - 1) < 0.25:  # the quick sizes sample too little to tell
        raise Different(f"the KL of a rollout is {kl:.3g} nats, in TRL {kl_trl:.3g}, expected within 25 %")
    return {"steps": steps, "kl": kl, "kl_trl": kl_trl}


def _peaks(work: Work, jobs: dict) -> dict[str, dict[str, float | None]]:
    """Peak memory of making a side and taking one step on one thread, MB over what was there.

    Each has a process, started by a server that has the imports and nothing else: a fork of this one would inherit
    locks of threads that it does not have. None where it took longer than PATIENCE.
    """
    peaks: dict[str, dict[str, float | None]] = {}
    for job, made in jobs.items():
        for side in made:
            _say(f"memory: {job}, {side}")
            receiver, sender = PROCESSES.Pipe(duplex=False)
            process = PROCESSES.Process(target=_peak, args=(asdict(work.sizes), work.precision, job, side, sender))
            process.start()
            sender.close()
            try:
                peaks.setdefault(job, {})[side] = receiver.recv() if receiver.poll(PATIENCE) else None
            except EOFError as error:
                raise RuntimeError(f"measuring the memory of {job}, {side} ended without a result") from error
            finally:
                process.join(10)
                process.kill()
    return peaks


def _peak(sizes: dict, precision: str, job: str, side: str, sender) -> None:
    torch.set_num_threads(1)
    with _quiet():
        make = sides(Work(Sizes(**sizes), precision=precision))[job][side]
        before = resident()
        seconds(job, make())
    sender.send(max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before))
