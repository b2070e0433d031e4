"""Two pieces of work side by side, which is not to be seen in any result."""

import copy
import sys
import threading
from dataclasses import replace

import pytest
import torch

from alignkit import optim
from alignkit.configs import PPOConfig
from alignkit.models.loading import load_policy
from alignkit.optim import side_by_side
from alignkit.ppo import PPOState, ppo_iteration

CPU = torch.device("cpu")


@pytest.fixture
def torch_threads():
    """Sets PyTorch's threads; afterwards they are what they were."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_cores(monkeypatch, torch_threads):
    monkeypatch.setattr(optim, "_cores", lambda: 2)
    torch_threads(1)


def test_two_pieces_of_work_overlap_where_there_are_two_cores(two_cores):
    met = threading.Barrier(2, timeout=10)  # breaks if one runs after the other
    first, second = side_by_side(lambda: (met.wait(), threading.get_ident())[1],
                                 lambda: (met.wait(), threading.get_ident())[1], CPU)
    assert first == threading.get_ident() != second


@pytest.mark.parametrize("reason", ["one core", "operations of several threads", "a GPU"])
def test_elsewhere_one_runs_after_the_other_in_the_caller_s_thread(reason, two_cores, monkeypatch, torch_threads):
    if reason == "one core":
        monkeypatch.setattr(optim, "_cores", lambda: 1)
    if reason == "operations of several threads":
        torch_threads(2)
    order = []
    work = [lambda name=name: order.append((name, threading.get_ident())) for name in "ab"]
    side_by_side(*work, torch.device("cuda") if reason == "a GPU" else CPU)
    assert order == [("a", threading.get_ident()), ("b", threading.get_ident())]


def test_both_see_the_caller_s_grad_mode_and_autocast(two_cores):
    def seen():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    assert side_by_side(seen, seen, CPU)[1] == (True, False, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert side_by_side(seen, seen, CPU) == ((False, True, torch.float16),) * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_is_raised_when_both_have_ended(failing, two_cores):
    ended = []

    def fail():
        raise KeyError("a reward that fails")

    work = [fail, lambda: ended.append(True)]
    with pytest.raises(KeyError, match="a reward that fails"):
        side_by_side(*(work if failing == 0 else reversed(work)), CPU)
    assert ended == [True]


def test_ppo_side_by_side_is_ppo_to_the_last_bit(two_cores, monkeypatch):
    policy, tokenizer = load_policy("tiny", device="cpu")
    config = PPOConfig(prompts_per_iteration=24, minibatch_size=8, iterations=3)
    start = PPOState.start(policy, tokenizer, lambda prompts, responses: [float(len(r)) for r in responses],
                           ["hello", "how are you"], config)
    beside, apart = copy.deepcopy(start), start
    others = []
    monkeypatch.setattr(sys.modules["alignkit.ppo"], "side_by_side", lambda one, other, device: side_by_side(
        one, lambda: (others.append(threading.get_ident()), other())[1], device))
    found = [ppo_iteration(beside, replace(config)) for _ in range(3)]
    assert len(set(others) - {threading.get_ident()}) > 0
    monkeypatch.setattr(optim, "_cores", lambda: 1)
    assert found == [ppo_iteration(apart, config) for _ in range(3)]
    for model, other in ((beside.policy, apart.policy), (beside.critic, apart.critic)):
        for weight, its in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, its)
