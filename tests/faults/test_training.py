"""Faults of training: killed, interrupted, out of memory, not finite, run away. Numbers as in the list of faults."""

import asyncio
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from alignkit_widgets import TrainingCockpit

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.dpo import DPOState, dpo_iteration
from alignkit.errors import InvariantError, NonFinite, OutOfMemory, RunError, is_out_of_memory
from alignkit.models.heads import reward_model_from
from alignkit.models.identity import function_hash, tensors_hash, weights_hash
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, accumulate_gradient, ppo, ppo_iteration, ran_away, sample
from alignkit.reward import train_reward_model
from alignkit.runs.checkpoints import SHARE, SHORTEST, Checkpoints
from alignkit.sft import train_sft
from alignkit.task import load_task
from experiments import kills

CONFIG = PPOConfig(iterations=5, prompts_per_iteration=32, minibatch_size=16, target_kl=0.5)


def reward(_prompts, responses):
    return [float(sum(map(ord, response)) % 7) for response in responses]


@pytest.fixture(scope="module")
def desk():
    policy, tokenizer = load_policy("tiny")
    task = load_task("desk", tokenizer)
    pairs = task.preference_pairs(policy, tokenizer, 64, seed=0)
    return {"policy": policy, "tokenizer": tokenizer, "strata": list(task.strata().values()), "pairs": pairs,
            "rows": task.demonstrations(seed=0)[:128]}


def start(desk, config=CONFIG, reward=reward):
    return PPOState.start(copy.deepcopy(desk["policy"]), desk["tokenizer"], reward, desk["strata"], config)


def fingerprint(state):
    """Weights, optimisers and counters of a state, as one hash."""
    leaves = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                walk(item, f"{name}.{key}")
        elif torch.is_tensor(value):
            leaves[name] = value
        else:
            leaves[f"{name}={value!r}"] = torch.zeros(0)

    walk(dict(state.state_dict()), "")
    return tensors_hash(leaves)


# --- 1, 2: kills ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("work", list(kills.POINTS))
def test_01_02_a_killed_run_ends_with_the_same_bytes_as_one_that_was_not(work):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # it forks; no threads here
        (row,) = fresh.submit(kills.measure, 4, seed=1, only=(work,), tell=print).result()
    assert row["kills"] >= 4 and row["same"] == row["runs"], row["wrong"]


def test_01_the_experiment_of_kills_sees_a_run_that_loses_something(tmp_path):
    def forgetful(run):  # goes on from its log, but not from its weights
        log = run / "log"
        for _ in range(len(log.read_text()) if log.exists() else 0, 3):
            with log.open("a") as file:
                file.write("x")
            kills.killpoints.reached("ppo.done")
        (run / "weights").write_text(str(torch.initial_seed()) + str(log.stat().st_mtime_ns))

    work = kills.Work("ppo", forgetful)
    kills.trial(work, tmp_path / "whole", [])
    assert kills.trial(work, tmp_path / "killed", [{"point": "ppo.done:2"}]) == ("", 1)
    assert kills.left(work, tmp_path / "whole") != kills.left(work, tmp_path / "killed")


def test_01_checkpoints_lose_at_most_a_second_or_take_two_percent_of_the_time(desk, tmp_path, monkeypatch):
    state, now = start(desk), [0.0]
    monkeypatch.setattr("alignkit.runs.checkpoints.time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path / "c", state, CONFIG)
    assert not checkpoints.due()
    now[0] = SHORTEST
    assert checkpoints.due()
    checkpoints.cost = 2.0  # a large model
    now[0] = 0.99 * 2.0 / SHARE
    assert not checkpoints.due()
    now[0] = 2.0 / SHARE
    assert checkpoints.due()
    assert Checkpoints(tmp_path / "c", state, CONFIG, every=0).due()
    with pytest.raises(ValueError, match="every is -1"):
        Checkpoints(tmp_path / "c", state, CONFIG, every=-1)


def test_01_the_newest_two_checkpoints_stay(desk, tmp_path):
    state = start(desk)
    checkpoints = Checkpoints(tmp_path / "c", state, CONFIG, every=0)
    for _ in range(4):
        ppo_iteration(state, CONFIG)
        checkpoints.offer(state.iteration)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000003", "00000004"]
    saved = copy.deepcopy(dict(Checkpoints(tmp_path / "c", start(desk), CONFIG).latest()[1]))
    checkpoints.go_back(3)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["00000003"]
    checkpoints.go_back(2)  # one that was not on the disk any more is written again
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["00000002"] and saved["iteration"] == 4


# --- 3: interrupts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", ["score", "step"])
def test_03_an_interrupt_in_the_middle_of_an_iteration_leaves_none_of_it(desk, at, monkeypatch):
    state = start(desk)
    ppo_iteration(state, CONFIG)
    before, calls = fingerprint(state), []
    clean = copy.deepcopy(state)
    expected = ppo_iteration(clean, CONFIG)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    if at == "score":
        state.reward = interrupt
    else:
        step = state.critic_optimizer.step
        monkeypatch.setattr(state.critic_optimizer, "step",
                            lambda: interrupt() if len(calls) == 2 else (calls.append(1), step()))
    with pytest.raises(KeyboardInterrupt):
        ppo_iteration(state, CONFIG)
    assert fingerprint(state) == before and state.iteration == 1
    monkeypatch.undo()
    state.reward = reward
    assert ppo_iteration(state, CONFIG) == expected and fingerprint(state) == fingerprint(clean)


# --- 8: memory --------------------------------------------------------------------------------------------------------
def hungry(limit):
    """The policy's backward pass on a machine without memory for more than `limit` tokens."""
    def gradient(state, part, share, config):
        if part.rollout.response_mask.numel() + part.rollout.prompt_mask.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return accumulate_gradient(state, part, share, config)

    return gradient


def test_08_out_of_memory_says_what_to_lower_and_changes_nothing(desk, monkeypatch):
    state = start(desk)
    before = fingerprint(state)
    monkeypatch.setattr("alignkit.ppo.accumulate_gradient", hungry(100))
    with pytest.raises(OutOfMemory, match=r"nothing was changed: set tokens_per_pass to \d+, or halve_passes=True; or "
                                          r"lower prompts_per_iteration from 32 to 16, minibatch_size from 16 to 8"):
        ppo_iteration(state, CONFIG)
    assert fingerprint(state) == before


def test_08_halving_makes_the_same_iteration_in_smaller_passes(desk, monkeypatch):
    whole, halved = start(desk), start(desk)
    expected = ppo_iteration(whole, CONFIG)
    monkeypatch.setattr("alignkit.ppo.accumulate_gradient", hungry(100))
    stats = ppo_iteration(halved, replace(CONFIG, halve_passes=True))
    assert halved.pass_limit <= 100
    for name, value in expected.log().items():
        assert stats.log()[name] == pytest.approx(value, abs=2e-3), name
    with pytest.raises(OutOfMemory, match="a pass of one row has"):
        monkeypatch.setattr("alignkit.ppo.accumulate_gradient", hungry(0))
        ppo_iteration(start(desk), replace(CONFIG, halve_passes=True))


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), True), (torch.OutOfMemoryError("x"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("shape mismatch"), False), (ValueError("memory"), False),
])
def test_08_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


# --- 10, 11, 17: checkpoints that cannot be used ----------------------------------------------------------------------
@pytest.fixture
def two(desk, tmp_path):
    """A folder with the checkpoints of iterations 1 and 2."""
    state = start(desk)
    checkpoints = Checkpoints(tmp_path / "c", state, CONFIG, every=0)
    for _ in range(2):
        ppo_iteration(state, CONFIG)
        checkpoints.offer(state.iteration)
    return tmp_path / "c"


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "files.json"])
@pytest.mark.parametrize("how", ["empty", "cut", "flip", "gone"])
def test_10_11_a_torn_checkpoint_is_skipped_by_name_and_the_one_before_it_taken(desk, two, name, how):
    path = two / "00000002" / name
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes({"empty": b"", "cut": content[:-1], "flip": content}[how])
    state = start(desk)
    with pytest.warns(UserWarning, match="00000002 is not whole .*the one before it is used"):
        assert Checkpoints(two, state, CONFIG).resume() == 1
    assert state.iteration == 1
    shutil.rmtree(two / "00000001")
    fresh = start(desk)
    with pytest.warns(UserWarning, match="not whole"):
        assert Checkpoints(two, fresh, CONFIG).resume() == 0
    assert fresh.iteration == 0


def test_17_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ(desk, two):
    with pytest.raises(RunError, match=r"config.kl_coef was 0.2, now 0.3; config.seed was 0, now 4"):
        Checkpoints(two, start(desk), replace(CONFIG, kl_coef=0.3, seed=4)).resume()
    other = start(desk)
    with torch.no_grad():
        next(other.policy.parameters())[0] += 1
    with pytest.raises(RunError, match=r"policy was '[0-9a-f]+…, now"):
        Checkpoints(two, other, CONFIG).resume()
    with pytest.raises(RunError, match=r"reward was"):
        Checkpoints(two, start(desk, reward=lambda prompts, responses: [0.0] * len(prompts)), CONFIG).resume()
    moved = start(desk)
    moved.prompts[0][0] = "another question"
    with pytest.raises(RunError, match=r"prompts was"):
        Checkpoints(two, moved, CONFIG).resume()


class Rewards:
    """A callable object."""

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, prompts, responses):
        return [self.sign * len(response) for response in responses]


def scaled(sign, prompts, responses):
    return [sign * len(response) for response in responses]


def closure(sign):
    return lambda prompts, responses: [sign * len(response) for response in responses]


@pytest.mark.parametrize("make", [lambda sign: functools.partial(scaled, sign), Rewards, closure,
                                  lambda sign: Rewards(sign).__call__])
def test_17_a_reward_is_known_by_what_it_does(make):
    assert function_hash(make(1)) == function_hash(make(1)) != function_hash(make(-1))


def test_17_a_reward_with_other_code_is_another_one():
    one, other = lambda prompts, responses: [1.0], lambda prompts, responses: [2.0]
    assert function_hash(one) != function_hash(other)


def test_17_another_reference_is_another_run(desk, two):
    other = copy.deepcopy(desk["policy"])
    with torch.no_grad():
        next(other.parameters())[0] += 1
    state = PPOState.start(copy.deepcopy(desk["policy"]), desk["tokenizer"], reward, desk["strata"], CONFIG,
                           ref_policy=other)
    with pytest.raises(RunError, match="reference was"):
        Checkpoints(two, state, CONFIG).resume()


@pytest.mark.parametrize("saved", [5, {"float": 1}, {"items": 5}, {"tensor": "9"}, {"what": []}, [], "x"])
def test_10_a_checkpoint_with_right_hashes_and_wrong_content_is_skipped_too(desk, two, saved):
    place = two / "00000002"
    record = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**record, "saved": saved}))
    digests = {name: hashlib.sha256((place / name).read_bytes()).hexdigest()
               for name in ("state.json", "tensors.safetensors")}
    (place / "files.json").write_text(json.dumps(digests))
    with pytest.warns(UserWarning, match="not whole"):
        assert Checkpoints(two, start(desk), CONFIG).resume() == 1


def test_28_a_run_that_stopped_by_itself_does_not_train_on_when_it_is_resumed(desk, tmp_path):
    rows = []
    for _ in range(2):
        state, log = start(desk), tmp_path / "metrics.jsonl"

        def step(_controls, state=state):
            stats = ppo_iteration(state, CONFIG)
            return {"kl": stats.kl_to_ref, "stop": "KL ran away" if stats.iteration == 2 else ""}

        cockpit = TrainingCockpit("PPO", [("KL", ["kl"])], CONFIG.iterations, log=log)
        checkpoints = Checkpoints(tmp_path / "c", state, CONFIG)
        rows.append(asyncio.run(cockpit.run(step, checkpoints=checkpoints)))
        assert cockpit.session.stop == "KL ran away" and state.iteration == 2
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_17_a_checkpoint_of_other_code_is_refused_and_other_threads_are_told(desk, two, monkeypatch):
    record = json.loads((two / "00000002" / "state.json").read_text())
    assert record["versions"]["torch"] and record["threads"] == torch.get_num_threads()
    monkeypatch.setattr("alignkit.runs.checkpoints.torch.get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="now there are 7"):
        assert Checkpoints(two, start(desk), CONFIG).resume() == 2
    monkeypatch.setattr("alignkit.runs.checkpoints.code_hash", lambda: "other")
    with pytest.raises(RunError, match="code was"):
        Checkpoints(two, start(desk), CONFIG).resume()


def test_17_a_state_of_another_size_is_refused_before_anything_is_changed(desk):
    state = start(desk)
    before, saved = fingerprint(state), copy.deepcopy(dict(state.state_dict()))
    name = next(iter(saved["critic"]))
    saved["critic"][name] = saved["critic"][name][:-1]
    for weight in saved["policy"].values():
        weight.data.zero_()
    with pytest.raises(ValueError, match=r"a model of another size: .* is \("):
        state.load_state_dict(saved)
    assert fingerprint(state) == before


# --- 21: the clock ----------------------------------------------------------------------------------------------------
def test_21_the_newest_checkpoint_is_that_of_the_last_step_whatever_the_clock_says(desk, two, monkeypatch):
    for name, when in (("00000001", 2e9), ("00000002", 1e9)):
        os.utime(two / name, (when, when))
    assert Checkpoints(two, start(desk), CONFIG).resume() == 2
    now = iter(range(10**6, 0, -3600))  # every look at the clock is an hour earlier
    monkeypatch.setattr("time.time", lambda: next(now))
    state = start(desk)
    checkpoints = Checkpoints(two, state, CONFIG, every=0)
    checkpoints.resume()
    cockpit = TrainingCockpit("PPO", [("KL", ["kl"])], 4, log=two.parent / "metrics.jsonl")
    asyncio.run(cockpit.run(lambda _: {"kl": ppo_iteration(state, CONFIG).kl_to_ref}, checkpoints=checkpoints))
    assert checkpoints.seconds >= 0 and cockpit.session.busy >= 0 and not checkpoints.due() < 0
    assert Checkpoints(two, start(desk), CONFIG).resume() == 4


# --- 30: responses that end at once -----------------------------------------------------------------------------------
def test_30_a_policy_that_says_nothing_at_all_trains_and_stays_finite(desk):
    state = start(desk)
    end = desk["tokenizer"].eos_token_id
    with torch.no_grad():
        head = state.policy.get_output_embeddings()
        state.ref_policy.get_output_embeddings().weight.mul_(0)
        head.weight.mul_(0)
    bias = torch.zeros(head.weight.shape[0])
    bias[end] = 50.0
    for model in (state.policy, state.ref_policy):
        model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output + bias)
    stats = ppo_iteration(state, CONFIG)
    assert stats.length == 1 and stats.eos_rate == 1 and all(math.isfinite(value) for value in stats.log().values())


# --- 23, 24b, 25: what is not finite ----------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38, 1e30])
def test_23_a_score_that_is_not_finite_or_huge_leaves_nothing_and_a_retry_is_clean(desk, value):
    state, clean = start(desk), start(desk)
    ppo_iteration(state, CONFIG)
    ppo_iteration(clean, CONFIG)
    before = fingerprint(state)

    def broken(prompts, responses):
        scores = reward(prompts, responses)
        scores[3] = value
        return scores

    state.reward = broken
    with pytest.raises(NonFinite) as caught:
        ppo_iteration(state, CONFIG)
    assert caught.value.step == 2 and caught.value.batch["prompts"] and caught.value.batch["responses"]
    assert fingerprint(state) == before and state.iteration == 1
    state.reward = reward
    assert ppo_iteration(state, CONFIG) == ppo_iteration(clean, CONFIG)
    assert fingerprint(state) == fingerprint(clean)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_24b_a_learning_rate_that_destroys_the_model_stops_the_trainer_with_step_and_batch(desk, stage, tmp_path):
    if stage == "sft":
        model = copy.deepcopy(desk["policy"])
        train, config = train_sft, SFTConfig(epochs=4, batch_size=32, learning_rate=1e20)
        rows = desk["rows"]
    else:
        model = reward_model_from(desk["policy"], seed=0)
        train, config = train_reward_model, RewardConfig(epochs=4, batch_size=32, learning_rate=1e20)
        rows = desk["pairs"]
    with pytest.raises(NonFinite, match=r"step \d+ of (SFT|Reward)Trainer: .* A learning rate of 1e\+20") as caught:
        train(model, desk["tokenizer"], rows, config, checkpoints=tmp_path / "checkpoints")
    assert caught.value.step >= 2 and len(caught.value.batch["input_ids"]) >= 32
    kept = json.loads((tmp_path / "nonfinite.json").read_text())
    assert kept["step"] == caught.value.step and kept["batch"] == caught.value.batch
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_25_a_gradient_that_is_not_finite_in_the_second_minibatch_takes_the_first_back(desk, monkeypatch):
    state = start(desk)
    before, clip, calls = fingerprint(state), torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *rest):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:  # policy and critic once each, then the policy again
            parameters[0].grad[:] = math.nan
        return clip(parameters, *rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(NonFinite):
        ppo_iteration(state, CONFIG)
    assert len(calls) > 3 and fingerprint(state) == before


def test_25_dpo_makes_no_step_on_a_gradient_that_is_not_finite_and_goes_on_the_same(desk, monkeypatch):
    config = DPOConfig(epochs=2, batch_size=32)

    def begun():
        return DPOState.start(copy.deepcopy(desk["policy"]), desk["tokenizer"], desk["pairs"], config)

    state, clean = begun(), begun()
    dpo_iteration(state, config), dpo_iteration(clean, config)
    before = fingerprint(state)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, *rest: torch.tensor(math.nan))
    with pytest.raises(NonFinite):
        dpo_iteration(state, config)
    monkeypatch.undo()
    assert fingerprint(state) == before and state.step == 1
    assert dpo_iteration(state, config) == dpo_iteration(clean, config)


# --- 26: sampler and trainer ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_26_a_sampler_that_is_not_the_policy_is_caught_at_every_iteration(desk, iteration, monkeypatch):
    def hotter(*arguments, temperature, **rest):
        return sample(*arguments, temperature=3 * temperature, **rest)

    state = start(desk)
    for _ in range(iteration - 1):
        ppo_iteration(state, CONFIG)
    before = fingerprint(state)
    monkeypatch.setattr("alignkit.ppo.sample", hotter)
    with pytest.raises(InvariantError, match="Sampler and trainer do not score alike"):
        ppo_iteration(state, CONFIG)
    assert fingerprint(state) == before


# --- 28: KL that runs away --------------------------------------------------------------------------------------------
def test_28_a_run_whose_kl_runs_away_stops_by_default_and_says_what_to_do(desk):
    wild = replace(CONFIG, iterations=20, learning_rate=0.5, kl_coef=0.0, target_kl=None)
    state = start(desk, wild, lambda prompts, responses: [1e6 * score for score in reward(prompts, responses)])
    stats = list(ppo(state, wild))
    assert len(stats) < 20 and stats[-1].kl_to_ref > wild.kl_limit == 8.0
    assert "Raise kl_coef or lower learning_rate" in ran_away(stats[-1], wild)
    assert ran_away(stats[-1], replace(wild, max_kl=math.inf)) == ""
    assert ran_away(replace(stats[-1], kl_to_ref=math.nan), wild)


def test_28_a_healthy_run_stays_far_below_the_limit(desk):
    stats = list(ppo(start(desk), CONFIG))
    assert len(stats) == CONFIG.iterations and max(row.kl_to_ref for row in stats) < CONFIG.kl_limit / 4


# --- resuming ---------------------------------------------------------------------------------------------------------
def test_training_with_checkpoints_is_training_without(desk, tmp_path):
    ends = []
    for checkpoints in (None, tmp_path / "c"):
        policy = copy.deepcopy(desk["policy"])
        log = train_sft(policy, desk["tokenizer"], desk["rows"], SFTConfig(epochs=1, batch_size=32),
                        checkpoints=checkpoints, checkpoint_seconds=0)
        ends.append((weights_hash(policy), log))
    assert ends[0] == ends[1]


def test_a_finished_training_goes_on_from_its_end_without_a_step(desk, tmp_path):
    ends = []
    for _ in range(2):
        policy = copy.deepcopy(desk["policy"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log = train_sft(policy, desk["tokenizer"], desk["rows"], SFTConfig(epochs=1, batch_size=32),
                            checkpoints=tmp_path / "c")
        ends.append((weights_hash(policy), log))
    assert ends[0] == ends[1]
