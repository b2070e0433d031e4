"""Trackers follow a job's log: the same numbers, every step once, and no training that ends because of one."""

import json
import sys
import threading
import time
import types
from typing import ClassVar

import pytest
from test_jobs import notebook

from alignkit.errors import ParameterError
from alignkit.jobs import tracking
from alignkit.jobs.cli import main
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.jobs.tracking import check_tracker, flat, following
from alignkit.storage import append_metrics, read_json, read_metrics, trim_metrics

PPO_ROW = {"objective/scores": 0.5, "objective/rlhf_reward": 0.3, "objective/kl": 1.25, "objective/entropy": 2.5,
           "policy/approxkl_avg": 0.01, "loss/policy_avg": -0.02, "loss/value_avg": 0.3, "policy/clipfrac_avg": 0.1}
TRAINS = """\
from pathlib import Path
from alignkit.storage import append_metrics
stage = Path(run, "ppo")
for step in range(1, steps + 1):
    append_metrics(stage / "metrics.jsonl", {"step": step, "objective/kl": step / 7, "controls": {"kl_coef": 0.2}})
(stage / "results.json").write_text("{}")"""


class Calls:
    """A tracker that writes down what it is asked to do. `fails`: at which step it breaks."""

    made: ClassVar[list] = []
    fails: ClassVar[int | None] = None

    def __init__(self, run, what, name, settings):
        self.what, self.name, self.settings, self.logged, self.finished = what, name, dict(settings), [], 0
        self.made.append(self)

    def log(self, step, metrics):
        if step == self.fails:
            raise ConnectionError("no network\x1b[31m")
        self.logged.append((step, dict(metrics)))

    def finish(self):
        self.finished += 1


@pytest.fixture
def calls(monkeypatch):
    """The trackers that are opened, each of which only keeps what it gets."""
    monkeypatch.setattr(Calls, "made", [])
    monkeypatch.setattr(Calls, "fails", None)
    monkeypatch.setattr(tracking, "SECONDS", 0.02)
    monkeypatch.setitem(tracking.OPENERS, "wandb", Calls)
    return Calls.made


def follow(run, key="a", **options):
    return following("wandb", run, "ppo", lambda: run / "ppo", key={"key": key}, settings={"seed": 3}, **options)


def test_every_row_is_sent_once_also_when_a_killed_run_goes_on(tmp_path, calls):
    log = tmp_path / "ppo" / "metrics.jsonl"
    with follow(tmp_path):
        for step in (1, 2, 3):
            append_metrics(log, {"step": step, **PPO_ROW})
        with log.open("a") as file:
            file.write('{"step": 4, "objec')  # killed in the middle of a line
    trim_metrics(log, 2)  # it goes on from the checkpoint of step 2
    with follow(tmp_path):
        for step in (3, 4, 5):
            append_metrics(log, {"step": step, **PPO_ROW})
    first, second = calls
    assert [step for step, _ in first.logged] == [1, 2, 3] and [step for step, _ in second.logged] == [4, 5]
    assert first.name == second.name and first.settings == {"seed": 3} and first.finished == second.finished == 1
    assert read_json(tmp_path / "run.json") == {"track": "wandb"}
    assert read_json(tmp_path / "tracking.json")["ppo"]["sent"] == {"metrics.jsonl": 5}


def test_another_key_or_a_restart_is_another_run_of_the_tracker(tmp_path, calls):
    append_metrics(tmp_path / "ppo" / "metrics.jsonl", {"step": 1, **PPO_ROW})
    for options in ({}, {"key": "b"}, {"key": "b", "anew": True}, {"key": "b"}):
        with follow(tmp_path, **options):
            pass
    assert [len(each.logged) for each in calls] == [1, 1, 1]  # the last goes on, and nothing is new
    assert len({each.name for each in calls}) == 3


def test_the_run_without_kl_is_a_run_of_its_own(tmp_path, calls):
    append_metrics(tmp_path / "ppo" / "metrics.jsonl", {"step": 1, **PPO_ROW})
    append_metrics(tmp_path / "ppo" / "overoptimised" / "metrics.jsonl", {"step": 1, "gold": 0.5})
    with follow(tmp_path):
        pass
    assert {each.what: each.logged[0][1].get("gold") for each in calls} == {"ppo": None, "ppo-overoptimised": 0.5}


def test_rows_go_out_while_the_training_runs(tmp_path, calls):
    with follow(tmp_path):
        append_metrics(tmp_path / "ppo" / "metrics.jsonl", {"step": 1, **PPO_ROW})
        until = time.monotonic() + 60
        while not (calls and calls[0].logged) and time.monotonic() < until:
            time.sleep(0.02)
        assert calls and calls[0].logged and not calls[0].finished


def test_a_tracker_that_fails_warns_once_and_the_block_goes_on(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setattr(Calls, "fails", 2)
    with follow(tmp_path):
        for step in (1, 2, 3, 4):
            append_metrics(tmp_path / "ppo" / "metrics.jsonl", {"step": step, **PPO_ROW})
            time.sleep(0.05)
        went_on = True
    told = capsys.readouterr().err
    assert went_on and told.count("--track wandb has failed") == 1 and "no network␛[31m" in told


def test_a_tracker_that_hangs_is_left_behind(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.2)
    monkeypatch.setattr(Calls, "finish", lambda self: threading.Event().wait())
    append_metrics(tmp_path / "ppo" / "metrics.jsonl", {"step": 1, **PPO_ROW})
    with follow(tmp_path):
        pass
    assert "it did not finish" in capsys.readouterr().err


def test_names_are_trls_and_a_number_is_made_where_only_trl_has_it():
    numbers = flat({"step": 7, **PPO_ROW, "controls": {"kl_coef": 0.2}, "note": "text", "flag": True})
    assert numbers == {**PPO_ROW, "controls/kl_coef": 0.2, "objective/non_score_reward": pytest.approx(-0.2)}


def test_tensorboards_own_reader_finds_the_numbers_of_the_log(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing import event_accumulator as reader

    log = tmp_path / "ppo" / "metrics.jsonl"
    for step in range(1, 6):
        append_metrics(log, {"step": step, "objective/kl": step / 7, "rewards/margins": -step / 3})
    with following("tensorboard", tmp_path, "ppo", lambda: tmp_path / "ppo", key={}, settings={}):
        pass
    (folder,) = (tmp_path / "tracking" / "tensorboard").iterdir()
    events = reader.EventAccumulator(str(folder)).Reload()
    for name in ("objective/kl", "rewards/margins"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert seen == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in read_metrics(log)}


def stub(monkeypatch, name: str, **members) -> None:
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))


def test_wandb_is_offline_unless_its_own_variable_says_otherwise(tmp_path, monkeypatch):
    opened, logged = [], []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)
    stub(monkeypatch, "wandb", init=lambda **options: opened.append(options) or run)
    for mode in (None, "online"):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        tracking._WandB(tmp_path, "ppo", "ppo-1", {"seed": 0}).log(4, {"objective/kl": 1.0})
    assert [each["mode"] for each in opened] == ["offline", "online"]
    assert opened[0]["id"] == "ppo-1" and opened[0]["resume"] == "allow" and opened[0]["config"] == {"seed": 0}
    assert logged == [(4, {"objective/kl": 1.0})] * 2


def test_trackio_stays_on_this_machine_by_default(tmp_path, monkeypatch):
    opened, logged = [], []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)
    stub(monkeypatch, "trackio", init=lambda **options: opened.append(options) or run)
    monkeypatch.setenv("TRACKIO_DIR", "x")
    tracking._Trackio(tmp_path, "ppo", "ppo-1", {}).log(2, {"loss": 1.0})
    assert "space_id" not in opened[0] and opened[0]["resume"] == "allow" and logged == [(2, {"loss": 1.0})]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_told_before_a_kernel_starts(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr("alignkit.jobs.notebooks._execute", lambda *a: pytest.fail("a kernel was started"))
    for command in (["run", "03"], ["course"]):
        assert main([*command, "--out", str(tmp_path / "run"), "--track", name]) == 1
        assert f"pip install -e '.[{name}]'" in capsys.readouterr().err


def test_unknown_trackers_and_notebooks_that_train_nothing_are_refused(tmp_path):
    with pytest.raises(ParameterError, match="expected one of tensorboard, wandb, mlflow, trackio"):
        check_tracker("excel")
    with pytest.raises(ParameterError, match="not the notebook of a stage"):
        run_notebook("00", tmp_path / "run", track="tensorboard")


@pytest.mark.slow
def test_a_job_is_tracked_from_its_first_step_to_its_last_also_when_it_is_made_again(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(tracking, "check_tracker", lambda name: None)
    made = notebook(tmp_path / "03b_ppo.ipynb", f"Path = __import__('pathlib').Path\n{TRAINS}")
    out = tmp_path / "run"
    run_notebook(made, out, {"steps": 3}, progress=False, track="wandb")
    run_notebook(made, out, {"steps": 3}, progress=False, track="wandb")  # done already: no kernel, nothing sent
    assert [step for each in calls for step, _ in each.logged] == [1, 2, 3] and calls[0].settings["steps"] == 3
    assert calls[0].logged[2][1] == {"objective/kl": pytest.approx(3 / 7), "controls/kl_coef": 0.2}
    course(out / "more", notebooks=[made], parameters={"steps": 2}, progress=False, track="wandb")
    assert [step for step, _ in calls[1].logged] == [1, 2]
    assert json.loads((out / "more" / "run.json").read_text())["track"] == "wandb"


def test_without_track_nothing_is_written(tmp_path):
    with following(None, tmp_path, "ppo", lambda: tmp_path, key={}, settings={}):
        pass
    assert not list(tmp_path.iterdir())
