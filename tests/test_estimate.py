"""What is said of the cost before training starts."""

import json

import pytest

from alignkit import trainer
from alignkit.configs import SFTConfig
from alignkit.desk.world import World
from alignkit.jobs import estimate
from alignkit.jobs.notebooks import course
from alignkit.models.loading import load_policy
from alignkit.sft import train_sft
from alignkit.stages import CHAIN


def test_the_time_of_a_step_is_what_further_batches_add(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    seen = []

    def train(rows: list) -> None:
        seen.append(len(rows))
        now[0] += 3.0 + 0.5 * len(rows) / 8  # three seconds to begin, half a second a step of 8 rows

    assert trainer.step_seconds(train, range(20), 8) == pytest.approx((3.0, 0.5))
    assert seen == [8, 8, 40]
    with pytest.raises(ValueError, match="rows is empty"):
        trainer.step_seconds(train, [], 8)


def test_a_trial_at_learning_rate_0_moves_no_weight(monkeypatch):
    """By a clock that counts what is done, not how long it takes: a busy machine changes nothing."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    rows = World(0).demonstrations(40, messiness=0.7, seed=0)
    still = SFTConfig(epochs=1, batch_size=64, learning_rate=0.0)
    now = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    policy.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.5))  # a batch takes half a second

    def train(some: list) -> None:
        now[0] += 3.0  # and to begin takes three
        train_sft(policy, tokenizer, some, still)

    assert trainer.step_seconds(train, rows, 64) == pytest.approx((3.0, 0.5))
    assert all((weight == before[name]).all() for name, weight in policy.state_dict().items())


def test_recorded_times_are_scaled_by_the_speed_of_the_machine():
    recorded = json.loads(estimate.RECORDED.read_text(encoding="utf-8"))
    assert set(CHAIN) <= set(recorded["notebooks"]), "a notebook of the course has no recorded time"
    same, twice = estimate.notebook_seconds(1.0), estimate.notebook_seconds(2.0)
    assert same == recorded["notebooks"] and all(twice[name] == same[name] / 2 for name in same)


@pytest.mark.parametrize(("parameters", "says"), [(None, "about "), ({"pairs": 5}, "each notebook prints")])
def test_the_course_says_what_it_will_take_before_it_starts(tmp_path, monkeypatch, capsys, parameters, says):
    ran = []
    monkeypatch.setattr("alignkit.jobs.notebooks._spare", lambda job: None)
    monkeypatch.setattr("alignkit.jobs.notebooks._check_facts", lambda job: None)  # no stage is made here
    monkeypatch.setattr(
        "alignkit.jobs.notebooks._run", lambda job, **options: ran.append((job.name, options["expected"]))
    )
    monkeypatch.setattr("alignkit.jobs.report.build_report", lambda out: None)
    course(tmp_path, parameters=parameters)
    assert says in capsys.readouterr().out.splitlines()[1 if parameters else 0]  # after where a parameter went
    assert [name for name, _ in ran] == list(CHAIN)
    assert all((expected is None) == bool(parameters) for _, expected in ran)
