"""Several processes train what one process trains: the same numbers up to rounding, and equal in every process."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignkit import followers
from alignkit.errors import ParameterError, RunError
from alignkit.folders import discard
from alignkit.followers import on_processes
from alignkit.jobs import worker
from alignkit.jobs.notebooks import find_notebook, job_of, kernel_environment, run_notebook
from alignkit.jobs.worker import load_stage
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.optim import copied, size
from alignkit.ppo import ppo_iteration
from alignkit.reward import RewardScorer
from alignkit.runs.checkpoints import Checkpoints
from alignkit.runs.records import start_run
from alignkit.shards import keepers, optimizers
from alignkit.stages import PROCESSES
from tests import several
from tests.several import CASES, compute, computed, start

SECONDS = 240  # for processes to end, on a busy machine
SMALL = {"prompts_per_iteration": 21, "minibatch_size": 10, "iterations": 3, "checkpoint_seconds": 0.0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with models that nothing has trained."""
    run = start_run(tmp_path / "run", "tiny", "desk", 0)
    policy, tokenizer = load_policy("tiny", device="cpu")
    save_model(policy, tokenizer, run / "sft")
    RewardScorer(reward_model_from(policy), tokenizer).save(run / "reward")
    return run


def values_of(notebook: str, run: Path, **given) -> dict:
    """The values of all parameters of a notebook."""
    job = job_of(find_notebook(notebook), run, given)
    return {name: job.values.get(name, parameter.default) for name, parameter in job.parameters.items()}


def ended(processes: list) -> list[int]:
    """The exit codes of processes, which are waited for."""
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode for process in processes]


def weights(model) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("count, case", [
    *((2, case) for case in CASES), *((3, case) for case in ("ppo few", "ppo passes", "dpo few", "dpo ipo"))])
def test_several_processes_compute_the_numbers_of_one(count, case, tmp_path):
    processes = start(compute, count, tmp_path, case)
    several.asked.clear()
    one = computed(case)
    scored = len(several.asked)
    assert ended(processes) == [0] * count
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(count)]
    shares = [int(each.pop("asked")) for each in found]
    if case == "ppo":  # each response is scored by one process
        assert sum(shares) == scored and max(shares) <= 0.51 * scored
    for name, expected in one.items():
        if name == "asked":
            continue
        assert all(torch.equal(other[name], found[0][name]) for other in found), f"the processes differ in {name}"
        value = found[0][name]
        if "tokens" in name:
            assert torch.equal(value, expected)
        elif name == "gradients":
            assert expected.norm() > 0 and (value - expected).norm() <= 2e-6 * expected.norm()
        else:
            assert torch.allclose(value, expected, rtol=1e-4, atol=2e-6), name


def test_a_run_goes_on_with_another_number_of_processes(run):
    values = values_of("03b_ppo", run, **SMALL)
    folder, whole = run / "ppo", load_stage("03b_ppo", run, values)
    log = [ppo_iteration(whole.state, whole.config) for _ in range(3)]

    first = load_stage("03b_ppo", run, values)  # one process makes the first iteration
    checkpoints = Checkpoints(folder / "checkpoints", first.state, first.config)
    ppo_iteration(first.state, first.config)
    checkpoints.save(1)
    assert ended(start(several.train, 2, run.parent, "03b_ppo", run, values)) == [0, 0]  # two make the rest
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["objective/scores"] == pytest.approx(log[-1].score, abs=1e-5)
    assert rows[-1]["controls"]["kl_coef"] == whole.config.kl_coef

    for left in (0, 1):  # one process goes on: from the end, and from the iteration before
        last = load_stage("03b_ppo", run, values)
        assert Checkpoints(folder / "checkpoints", last.state, last.config).resume() == 3 - left
        for _ in range(left):
            assert ppo_iteration(last.state, last.config).score == pytest.approx(log[-1].score, abs=1e-5)
        assert torch.allclose(weights(last.state.policy), weights(whole.state.policy), atol=1e-6)
        if not left:
            discard(folder / "checkpoints" / f"{3:08}")


@pytest.mark.parametrize("count, case", [
    *((2, case) for case in ("ppo", "ppo ptx", "ppo trunk", "ppo lora", "ppo grpo", "dpo", "dpo ipo")),
    *((3, case) for case in ("ppo few", "ppo trunk", "dpo ipo"))])
def test_sharded_optimiser_states_change_no_bit_and_take_a_share_of_the_memory(count, case, tmp_path):
    assert ended(start(several.shard, count, tmp_path, case)) == [0] * count
    plain = load_file(tmp_path / "plain-0.safetensors")
    found = [load_file(tmp_path / f"sharded-{rank}.safetensors") for rank in range(count)]
    kept = torch.stack([each.pop("bytes") for each in found])  # (processes, optimisers)
    for name, expected in plain.items():
        if name not in ("bytes", "asked"):
            assert all(torch.equal(each[name], expected) for each in found), name
    assert torch.equal(kept.sum(0), plain["bytes"])
    if "trunk" not in case:  # its critic has one weight
        assert (kept.max(0).values <= 1.05 * plain["bytes"] / count).all(), kept


def test_each_weight_has_one_keeper_and_the_shares_are_even():
    sizes = [3, 50, 8, 8, 1, 1, 40, 7]
    weights = [torch.empty(size) for size in sizes]
    assert keepers(weights, 2) == [1, 0, 1, 1, 0, 0, 1, 0]
    for number in (1, 2, 3, 5, 20):
        held = [0] * number
        for elements, keeper in zip(sizes, keepers(weights, number), strict=True):
            held[keeper] += elements
        assert max(held) - min(held) <= max(sizes) and sum(held) == sum(sizes)


def test_a_checkpoint_of_sharded_states_has_the_bytes_of_any_other_and_anyone_goes_on_from_it(run):
    values, other = values_of("03b_ppo", run, **SMALL), shutil.copytree(run, run.parent / "other")
    folder, theirs = (place / "ppo" / "checkpoints" for place in (run, other))

    def train(count: int, *given) -> None:
        (run.parent / "meeting").unlink(missing_ok=True)
        assert ended(start(several.train, count, run.parent, "03b_ppo", *given)) == [0] * count

    train(2, run, values)
    train(2, other, values, "optimizer")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.*"))]
    assert len(files) == 6  # of two checkpoints
    for file in files:
        assert (theirs / file).read_bytes() == (folder / file).read_bytes(), file

    discard(theirs / f"{3:08}")
    train(3, other, values, "optimizer")  # three share what two have left
    discard(theirs / f"{2:08}")
    last = [load_stage("03b_ppo", place, values) for place in (run, other)]
    assert [Checkpoints(place, stage.state, stage.config).resume()
            for place, stage in zip((folder, theirs), last, strict=True)] == [3, 3]
    for one, same in zip(*(optimizers(stage.state) for stage in last), strict=True):
        assert len(one.state) == len(same.state) == len(one.param_groups[0]["params"])
    assert torch.allclose(*(weights(stage.state.policy) for stage in last), atol=1e-6)


def test_a_kernel_leads_processes_that_follow_it_and_end_with_it(run, monkeypatch):
    values = values_of("03b_ppo", run, **SMALL)
    alone, stage = load_stage("03b_ppo", run, values), load_stage("03b_ppo", run, values)
    monkeypatch.setenv(PROCESSES, json.dumps({"count": 2, "notebook": "03b_ppo", "values": values}))
    lead, state = on_processes(ppo_iteration, stage.state), stage.state
    try:
        begun = copied(state.state_dict())
        for _ in range(2):
            expected, stats = (vars(iterate(its.state, stage.config)) for iterate, its in (
                (ppo_iteration, alone), (lead, stage)))
            assert stats == pytest.approx(expected, abs=1e-5)
        assert listening([os.getpid(), lead.started[0].pid]) <= {"127.0.0.1", "::1"}

        state.load_state_dict(begun)  # rewound: the followers go back with it
        again = [vars(lead(state, stage.config)) for _ in range(2)]
        assert again[1] == stats
        assert lead(alone.state, stage.config).iteration == 3  # another run is not theirs

        lead.started[0].kill()
        before = weights(state.policy)
        with pytest.raises(RunError, match="process 1 of 2 failed: it was killed by signal 9"):
            lead(state, stage.config)
        assert torch.equal(weights(state.policy), before) and state.iteration == 2 and not lead.started
        assert lead(state, stage.config).iteration == 3  # others have started

        follower = lead.started[0]
        follower.stdin.close()  # as the end of this process would
        assert follower.wait(SECONDS) == -9
    finally:
        lead.close()


def test_a_kernel_gathers_sharded_states_and_says_when_they_are_lost(run, monkeypatch):
    values, other = values_of("03b_ppo", run, **SMALL), shutil.copytree(run, run.parent / "other")
    assert ended(start(several.train, 2, run.parent, "03b_ppo", other, values)) == [0, 0]
    stage = load_stage("03b_ppo", run, values)
    state, config = stage.state, stage.config
    plain, checkpoints = (Checkpoints(place / "ppo" / "checkpoints", state, config) for place in (other, run))
    monkeypatch.setenv(PROCESSES, json.dumps({"count": 2, "shard": "optimizer", "notebook": "03b_ppo",
                                              "values": values}))
    lead = on_processes(ppo_iteration, state)
    try:
        with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):  # before there is anything to lose
            broken.setattr(state, "reward", lambda *_: 1 / 0)
            lead(state, config)
        assert state.whole and not lead.started

        lead(state, config)
        saved = copied(state.state_dict())
        stats = [vars(lead(state, config)) for _ in range(2)]
        last = followers.checksum(state.state_dict())
        assert last == followers.checksum(plain.latest()[1])
        state.load_state_dict(copied(saved))  # rewound
        assert followers.checksum(state.state_dict()) == followers.checksum(saved)  # not what the others have now
        assert [vars(lead(state, config)) for _ in range(2)] == stats
        assert followers.checksum(state.state_dict()) == last
        for name, optimizer in zip(("policy", "critic"), optimizers(state), strict=True):
            assert size(dict(optimizer.state)) <= 0.52 * size(saved[f"{name}_optimizer"]["state"])

        lead.started[0].kill()
        before = weights(state.policy)
        with pytest.raises(RunError, match="by signal 9; nothing was .* go on from the last checkpoint"):
            checkpoints.save(3)
        checkpoints.close(3)  # as the end of a run that has failed
        assert not state.whole and not checkpoints.latest() and torch.equal(weights(state.policy), before)
        for use in (lambda: lead(state, config), state.state_dict):
            with pytest.raises(RunError, match="optimiser states are lost with the processes"):
                use()
        state.load_state_dict(copied(saved))
        assert vars(lead(state, config)) == stats[0]

        lead.started[0].kill()
        with pytest.raises(RunError, match="optimiser states that it kept are lost"):
            lead(state, config)
        assert not state.whole and state.iteration == 2 and state.step == -1
    finally:
        lead.close()


def listening(processes: list[int]) -> set[str]:
    """The addresses at which processes accept TCP connections; only Linux says so."""
    if sys.platform != "linux":
        return set()
    sockets = {os.readlink(handle) for process in processes for handle in Path(f"/proc/{process}/fd").iterdir()
               if handle.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    names = {"0100007F": "127.0.0.1", "0" * 24 + "01000000": "::1"}
    found = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    return {names.get(address, address) for address in found}


def test_a_process_that_cannot_load_the_run_says_why(run, monkeypatch):
    values = values_of("03b_ppo", run, **SMALL)
    state = load_stage("03b_ppo", run, values).state
    job = {"count": 2, "notebook": "03b_ppo", "values": {**values, "reward": "nowhere:score"}}
    monkeypatch.setenv(PROCESSES, json.dumps(job))
    lead = on_processes(ppo_iteration, state)
    with pytest.raises(RunError, match="process 1 of 2 could not load the run: .*'nowhere' could not be imported"):
        lead(state, load_stage("03b_ppo", run, values).config)
    assert not lead.started and state.iteration == 0


def test_a_process_that_has_loaded_another_run_names_what_differs(tmp_path):
    assert ended(start(several.disagree, 2, tmp_path)) == [0, 0]
    assert "another prompts, reward than process 0" in (tmp_path / "error").read_text()


def test_processes_are_for_the_notebooks_that_train_ppo_and_dpo(run, monkeypatch):
    with pytest.raises(ParameterError, match="processes is 2, expected 1 for 02_reward_model"):
        run_notebook("02_reward_model", run, processes=2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    job = job_of(find_notebook("5"), run, {"beta": 0.25, "model": "some/model"})
    environment = kernel_environment(job, 3)
    told = json.loads(environment[PROCESSES])
    assert (told["count"], told["notebook"], told["values"]["beta"]) == (3, "05_dpo", 0.25)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert json.loads(kernel_environment(job, 3, "optimizer")[PROCESSES])["shard"] == "optimizer"
    assert PROCESSES not in kernel_environment(job)
    monkeypatch.delenv(PROCESSES, raising=False)
    assert on_processes(ppo_iteration, None) is ppo_iteration


def test_sharding_is_refused_where_nobody_is_to_share_with(run, monkeypatch, capsys):
    with pytest.raises(ParameterError, match="shard is 'optimizer', expected none with 1 process, "):
        run_notebook("03b_ppo", run, shard="optimizer")
    with pytest.raises(ParameterError, match="shard is 'weights', expected 'optimizer'"):
        run_notebook("03b_ppo", run, shard="weights", processes=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert worker.main(["03b_ppo", "--out", str(run), "--shard", "optimizer"]) == 1
    assert "ParameterError: shard is 'optimizer', expected none with 1 process" in capsys.readouterr().err


def test_a_checksum_sees_a_bit_of_a_weight_an_optimiser_and_a_counter(run):
    state = load_stage("03b_ppo", run, values_of("03b_ppo", run, **SMALL)).state
    seen = {followers.checksum(state.state_dict())}
    assert followers.checksum(state.state_dict()) in seen
    weight = next(state.policy.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    seen.add(followers.checksum(state.state_dict()))
    state.policy_optimizer.state[weight] = {"exp_avg": torch.ones_like(weight)}
    seen.add(followers.checksum(state.state_dict()))
    state.kl_coef = 0.3
    seen.add(followers.checksum(state.state_dict()))
    assert len(seen) == 4
