"""The exact frontier of a sweep of the desk world: for each seed, from the SFT policy and reward model of its jobs.

`alignkit sweep` at its end and `alignkit report` enumerate every response to the prompts on which the jobs were
evaluated, and write the curves to DIR/frontier.json under a hash of what they were computed from. Whoever reads a
sweep compares hashes: no model is loaded, and a curve of other models is never shown.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignkit.errors import AlignkitError, RunError
from alignkit.metrics import duration, is_number
from alignkit.runs.records import gold_scale, run_facts
from alignkit.safe_text import one_line
from alignkit.storage import content_hash, file_hash, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

FILE = "frontier.json"  # in the sweep's folder
VERSION = 1  # of the curves: part of their hash
BETAS = tuple(float(f"{beta:.4g}") for beta in np.geomspace(40, 0.02, 40))  # of the frontiers
DRAWS = tuple(2.0**power for power in range(13))  # n of best-of-n
CURVES = {"frontier": ("beta", "kl", "proxy", "gold"), "gold_frontier": ("beta", "kl", "gold"),
          "best_of_n": ("n", "kl", "proxy", "gold")}
MADE_FROM = ("evaluation_set.json", *(f"{stage}/{name}" for stage in ("sft", "reward")
                                      for name in ("config.json", "model.safetensors", "tokenizer.json")))
EVALUATED = ("sft", "ppo", "dpo")  # stages whose results.json names the evaluation set on which they were measured
MOST_BYTES, MOST_PROMPTS = 2**26, 1024  # of a file of the tiny model, and of an evaluation set
AT_ONCE = 16  # prompts, which bounds the memory of the tables


def known_curves(root: Path, runs: Sequence[Path], own_reward: bool) -> dict[str, dict[int, object]]:
    """The exact curves that are stored in a sweep's folder, as fields of `results.SweepResults`.

    runs: the run directories of its policies; own_reward: whether a job was given a reward instead of its run's model.
    Returns {"frontiers", "gold_frontiers", "best_of_n": seed -> curve, "curve_prompts": seed -> number of prompts,
    "no_curve": seed -> why a seed of the tiny desk model has none}; a sweep of another model has empty ones.
    """
    found: dict[str, dict[int, object]] = {"frontiers": {}, "gold_frontiers": {}, "best_of_n": {}, "curve_prompts": {},
                                           "no_curve": {}}
    origins = _origins(runs)
    stored = _stored(root) if origins else {}
    for seed, own in origins.items():
        entry = stored.get(str(seed), {})
        if why := _why_none(own, own_reward):
            found["no_curve"][seed] = why
        elif entry.get("made_from") not in own:
            found["no_curve"][seed] = "not enumerated yet; `alignkit report DIR` does it"
        elif "error" in entry:
            found["no_curve"][seed] = one_line(entry["error"], 300)
        else:
            for name, curve in zip(("frontiers", "gold_frontiers", "best_of_n"), CURVES, strict=True):
                found[name][seed] = entry[curve]
            found["curve_prompts"][seed] = entry["prompts"]
    return found


def write_curves(root: Path, runs: Sequence[Path], own_reward: bool, say: Callable[[str], object]) -> None:
    """Enumerate the seeds of a sweep of the tiny desk model whose exact curves are not stored yet, and store them.

    say: is told what is enumerated and how long it took. A seed for which that is impossible is stored with the reason.
    """
    origins = _origins(runs)
    stored = _stored(root) if origins else {}
    for seed, own in origins.items():
        made_from, run = next(iter(own.items()))
        entry = stored.get(str(seed), {})
        if _why_none(own, own_reward) or (entry.get("made_from") == made_from and "error" not in entry):
            continue
        begun = time.monotonic()
        try:
            stored[str(seed)] = {"made_from": made_from, **_enumerated(run, seed, say)}
            say(f"exact frontier of seed {seed}: enumerated in {duration(time.monotonic() - begun)}")
        except (AlignkitError, ValueError, RuntimeError, OSError) as error:
            stored[str(seed)] = {"made_from": made_from, "error": one_line(error, 300)}
            say(f"exact frontier of seed {seed}: there is none: {one_line(error, 300)}")
        write_json(root / FILE, {"worlds": {name: stored[name] for name in sorted(stored)}})


def curves(ref_logps: "Tensor", proxy: "Tensor", gold: "Tensor") -> dict[str, dict[str, list]]:
    """The exact curves of enumerated prompts, means over them: what `CURVES` names, β from None (∞) to 0.

    ref_logps: log π_SFT; proxy, gold: rewards; each (prompts, N) in the order of `exact.response_space()`.
    """
    from alignkit import exact

    along, best = exact.frontier(ref_logps, proxy, BETAS, gold), exact.frontier(ref_logps, gold, BETAS)
    betas = [None, *along.beta[1:].tolist()]
    drawn = [exact.best_of_n(ref_logps, proxy, n) for n in DRAWS]
    return {
        "frontier": {"beta": betas, "kl": along.kl.tolist(), "proxy": along.reward.tolist(),
                     "gold": along.other.tolist()},
        "gold_frontier": {"beta": betas, "kl": best.kl.tolist(), "gold": best.reward.tolist()},
        "best_of_n": {"n": list(DRAWS),
                      "kl": [max(0.0, float(exact.response_kl(logps, ref_logps).mean())) for logps in drawn],
                      "proxy": [float(exact.expectation(logps, proxy).mean()) for logps in drawn],
                      "gold": [float(exact.expectation(logps, gold).mean()) for logps in drawn]},
    }


def _origins(runs: Sequence[Path]) -> dict[int, dict[str, Path]]:
    """World seed -> hash of what a policy of that seed is measured with -> the first run of such a policy.

    Only runs of the tiny desk model with an SFT policy and a reward model, whose policies were evaluated on the run's
    evaluation set, as SFT was.
    """
    found: dict[int, dict[str, Path]] = {}
    hashes: dict[tuple, str] = {}  # of files, which jobs share by hard links
    for run in runs:
        try:
            facts = run_facts(run)
            if (facts.get("model"), facts.get("data")) != ("tiny", "desk") or "seed" not in facts:
                continue
            sets = [read_json(path).get("evaluation_set") for stage in EVALUATED
                    if (path := run / stage / "results.json").exists()]
            if len(set(map(str, sets))) > 1:
                continue
            own = content_hash([VERSION, [_hash(run / name, hashes) for name in MADE_FROM], gold_scale(run)])
        except (OSError, RunError):
            continue
        found.setdefault(facts["seed"], {}).setdefault(own, run)
    return dict(sorted(found.items()))


def _why_none(own: Mapping[str, Path], own_reward: bool) -> str:
    """Why the jobs of one seed have no common frontier; "" if they have one."""
    if own_reward:
        return "a job was given a reward of its own"
    if len(own) > 1:
        return f"its jobs began with {len(own)} different sets of SFT policy, reward model and evaluation prompts"
    return ""


def _hash(path: Path, known: dict[tuple, str]) -> str:
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
        raise RunError(f"{path} is no file of the tiny model")
    name = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if name not in known:
        known[name] = file_hash(path)
    return known[name]


def _enumerated(run: Path, seed: int, say: Callable[[str], object]) -> dict:
    """The curves of one run's SFT policy and reward model on its evaluation prompts, and how many these are."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from alignkit import exact
    from alignkit.desk.world import MAX_PHRASES, World
    from alignkit.evaluate.evaluation import EvaluationSet
    from alignkit.models.loading import load_policy
    from alignkit.reward import load_reward

    evalset = EvaluationSet.load(run / "evaluation_set.json")
    if len(evalset.prompts) > MOST_PROMPTS or evalset.max_new_tokens != MAX_PHRASES:
        raise RunError(f"the jobs were evaluated on {len(evalset.prompts)} prompts with responses of at most "
                       f"{evalset.max_new_tokens} tokens, expected {MOST_PROMPTS} prompts at most and {MAX_PHRASES} "
                       "tokens")
    world, space, (mean, sd) = World(seed), exact.response_space(), gold_scale(run)
    prompts = [world.find(text) for text in evalset.prompts]
    disable_progress_bar()
    policy, tokenizer = load_policy(run / "sft", device="cpu")
    scorer = load_reward(run / "reward", device="cpu")
    many = f"each of {len(prompts)} prompts" if len(prompts) > 1 else "1 prompt"
    say(f"exact frontier of seed {seed}: enumerating {len(space):,} responses to {many} …")
    parts, threads, begun = [], torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(1)  # a second thread only slows down matrices this small
    try:
        for some in _groups(prompts):
            ref_logps = exact.response_logps(policy, tokenizer, some)
            gold = (exact.gold_table(world, some, space) - mean) / sd
            parts.append((len(some), curves(ref_logps, exact.proxy_table(scorer, some, space), gold)))
            if len(parts) == 1 and len(prompts) > len(some):
                left = (time.monotonic() - begun) * (len(prompts) / len(some) - 1)
                say(f"exact frontier of seed {seed}: about {duration(left)} to go")
    finally:
        torch.set_num_threads(threads)
    return {"prompts": len(prompts), **_mean(parts)}


def _groups(prompts: Sequence) -> Iterator[Sequence]:
    return (prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE))


def _mean(parts: Sequence[tuple[int, Mapping]]) -> dict[str, dict[str, list]]:
    """The curves over all prompts from those of some prompts each: (their number, their curves)."""
    sizes, first = [size for size, _ in parts], parts[0][1]
    return {curve: {name: first[curve][name] if name in ("beta", "n") else np.average(
        [part[curve][name] for _, part in parts], axis=0, weights=sizes).tolist() for name in names}
        for curve, names in CURVES.items()}


def _stored(root: Path) -> dict[str, dict]:
    """The sound entries of DIR/frontier.json by seed; what is damaged counts as not there."""
    try:
        worlds = read_json(root / FILE).get("worlds")
    except (OSError, RunError):
        return {}
    return {seed: entry for seed, entry in worlds.items() if _is_sound(entry)} if isinstance(worlds, dict) else {}


def _is_sound(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("made_from"), str):
        return False
    if isinstance(entry.get("error"), str):
        return True
    return (type(entry.get("prompts")) is int and 0 < entry["prompts"] <= MOST_PROMPTS
            and all(_is_curve(entry.get(curve), names) for curve, names in CURVES.items()))


def _is_curve(curve: object, names: Sequence[str]) -> bool:
    """Whether a stored curve has the named columns, at the known β or n, of numbers."""
    places = list(DRAWS) if names[0] == "n" else [None, *BETAS, 0.0]
    return (isinstance(curve, dict) and curve.keys() == set(names) and curve[names[0]] == places
            and all(isinstance(curve[name], list) and len(curve[name]) == len(places)
                    and all(map(_is_moderate, curve[name])) for name in names[1:])
            and min(curve["kl"]) >= 0)


def _is_moderate(value: object) -> bool:
    """Whether a value is a number of a size that rewards and KL have."""
    return is_number(value) and abs(value) < 1e9
