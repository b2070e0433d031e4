"""What is said of the cost before training starts."""

import json

import pytest

from alignkit import trainer
from alignkit.configs import SFTConfig
from alignkit.desk.world import World
from alignkit.jobs import estimate
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.metrics import duration
from alignkit.models.loading import load_policy
from alignkit.sft import train_sft
from alignkit.stages import CHAIN
from alignkit.sweeps.sweep import sweep


def test_the_time_of_a_step_is_what_further_batches_add(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
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
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    policy.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.5))  # a batch takes half a second

    def train(some: list) -> None:
        now[0] += 3.0  # and to begin takes three
        train_sft(policy, tokenizer, some, still)

    assert trainer.step_seconds(train, rows, 64) == pytest.approx((3.0, 0.5))
    assert all((weight == before[name]).all() for name, weight in policy.state_dict().items())


def test_what_is_said_is_what_was_recorded_and_where(tmp_path, monkeypatch, capsys):
    known = estimate.notebook_seconds()
    assert set(CHAIN) <= set(known), "a notebook of the course has no recorded time"
    monkeypatch.setattr("alignkit.jobs.notebooks._run", lambda job, **options: options["expected"])
    assert run_notebook("00_the_world", tmp_path) == known["00_the_world"]
    says = f"00_the_world: about {duration(known['00_the_world'])}, as recorded on two CPU cores where nothing else ran"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(("workers", "cores", "expected"), [
    (1, 2, "3*b + s"), (2, 2, "2*b + s"), (8, 2, "2*b + s"), (8, 4, "b + s"),
])
def test_the_time_of_a_sweep_counts_rounds_on_the_cores_that_there_are(tmp_path, monkeypatch, capsys, workers, cores,
                                                                       expected):
    known = estimate.notebook_seconds()
    names = {"b": known["03b_ppo"], "s": known["01_sft"] + known["02_reward_model"]}
    monkeypatch.setattr("alignkit.sweeps.sweep.cores", lambda: cores)
    sweep("03b_ppo", tmp_path / "s", {"kl_coef": "0.1,0.2,0.3"}, workers=workers, dry_run=True)
    says = f"about {duration(eval(expected, names))} with the defaults, as recorded on two CPU cores"
    assert says in capsys.readouterr().out.splitlines()[0]


def test_once_jobs_of_a_sweep_have_ended_their_own_time_is_said(tmp_path, monkeypatch, capsys):
    for seed, seconds in ((7, 100.0), (8, 140.0)):  # of another grid in the same folder
        (tmp_path / "jobs" / f"seed={seed}").mkdir(parents=True)
        (tmp_path / "jobs" / f"seed={seed}" / "job.json").write_text(json.dumps({"seconds": seconds}))
    monkeypatch.setattr("alignkit.sweeps.sweep.read_record",
                        lambda folder: json.loads((folder / "job.json").read_text()))
    sweep("00_the_world", tmp_path, {"seed": "0..2"}, workers=2, dry_run=True)
    assert "2 at a time, about 4:00 min, as the first took" in capsys.readouterr().out


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
