"""The causes of over-optimisation: the experiment does what its factors say, and the record and its table agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkit.configs import RewardConfig, SFTConfig
from alignkit.exact.causes import FAR, Causes, Judge, load_causes, turn
from experiments import causes as maker

FACTORIAL = ("bias and noise", "noise alone", "bias alone", "neither")
SMALL = maker.Size(demonstrations=256, pairs=64, keys=1, sft=SFTConfig(epochs=1),
                   reward=RewardConfig(epochs=2, batch_size=32))


def judged(arm: str, peak: float, world: int = 0) -> Judge:
    return Judge(arm, world, 0, {"peak": peak}, {"turned": 0.1, "against gold": 0.2}, [], [])


def record_of(values: dict[str, list[float]]) -> Causes:
    """A record with one training in each world: arm -> the peak in each world."""
    judges = [judged(arm, peak, world) for arm, peaks in values.items() for world, peak in enumerate(peaks)]
    best = {world: [0.0] for world in range(len(next(iter(values.values()))))}
    return Causes("command", {}, {}, {arm: {} for arm in values}, [0.0], best, tuple(judges))


# ---- where gold turns
def test_the_turn_of_a_curve_worked_by_hand():
    found = turn([0, 1, 2, 8], [0, 1, 0.5, -1])
    assert (found.peak, found.peak_kl) == (1, 1)
    assert found.far == pytest.approx(0.5 - 1.5 * (FAR - 2) / 6) and found.fall == pytest.approx(1 - found.far)


def test_a_curve_that_still_rises_has_not_fallen():
    found = turn([0, FAR, 8], [0, 1, 2])
    assert (found.peak, found.peak_kl, found.far, found.fall) == (2, 8, 1, 0)
    assert turn([0, 1], [0, 0.4]).far == 0.4  # a curve that ends before FAR keeps its last gold


def test_a_curve_must_go_outwards():
    with pytest.raises(ValueError, match="increasing"):
        turn([1, 0], [0, 1])
    with pytest.raises(ValueError, match="increasing"):
        turn([0, 1], [0, 1, 2])


# ---- effects
def test_effects_worked_by_hand():
    """peak = 1 − 0.1 bias − 0.4 noise − 0.2 bias·noise in the first world; the second adds 1 to all of them."""
    record = record_of({"bias and noise": [0.3, 1.3], "noise alone": [0.6, 1.6], "bias alone": [0.9, 1.9],
                        "neither": [1.0, 2.0]})
    assert record.contrast("bias", "peak") == pytest.approx([-0.2, -0.2])
    assert record.contrast("noise", "peak") == pytest.approx([-0.5, -0.5])
    assert record.contrast("interaction", "peak") == pytest.approx([-0.2, -0.2])
    assert record.effect("noise", "peak").value == pytest.approx(-0.5)
    assert record.effect("noise", "peak").low is None  # one training in each world tells no spread


def test_the_interval_of_a_mean_is_for_these_worlds_trainings_are_the_repeats():
    """Worked by hand: variances 2 and 2 within two worlds, (2 + 2) / 2 trainings = 2, √2 / 2 worlds, t of 2 degrees."""
    estimate = record_of({"neither": [0.0, 0.0]}).mean([1.0, 3.0, 11.0, 13.0])
    half = 4.30265 * 2**0.5 / 2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((7.0, 7.0 - half, 7.0 + half))
    apart = record_of({"neither": [0.0, 0.0]}).mean([1.0, 1.0, 11.0, 11.0])
    assert (apart.low, apart.high) == (6.0, 6.0)  # worlds that differ are no spread of trainings


def test_unknown_names_are_refused(tmp_path):
    record = record_of({arm: [0.0] for arm in FACTORIAL})
    with pytest.raises(ValueError, match="'politeness'.*'neither'"):
        record.select("politeness")
    with pytest.raises(ValueError, match="'luck'.*interaction"):
        record.contrast("luck", "peak")
    with pytest.raises(FileNotFoundError, match="experiments.causes"):
        load_causes(tmp_path / "none.json")


# ---- the experiment
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The experiment in small, and where its cells are."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("causes")
    return maker.run([0], 1, folder, SMALL), folder


def test_arms_are_the_annotators_that_they_say():
    default = maker.ANNOTATORS["default"]
    annotators = {name: maker.ARMS[name].annotator for name in FACTORIAL}
    assert annotators["bias and noise"] == default
    assert annotators["noise alone"] == replace(default, politeness=0.0, length=0.0)
    assert annotators["bias alone"] == replace(default, sharpness=20.0, flips=0.0)
    assert annotators["neither"] == replace(annotators["bias alone"], politeness=0.0, length=0.0)
    assert maker.ARMS["a quarter of the pairs"].annotator == maker.ARMS["four times the pairs"].annotator == default


def test_the_experiment_runs_small_and_its_labels_have_the_faults_that_they_should(small, tmp_path):
    record, _ = small
    maker.write_compact(tmp_path / "causes.json", record)
    causes = load_causes(tmp_path / "causes.json")
    assert list(causes.arms) == list(maker.ARMS) and causes.worlds == [0]
    assert [causes.arms[name]["pairs"] for name in list(causes.arms)[3:]] == [64, 16, 256]
    share = {name: causes.select(name)[0].labels for name in causes.arms}
    assert share["bias and noise"]["turned"] > share["bias alone"]["turned"] + 0.05
    assert share["noise alone"]["turned"] > share["neither"]["turned"] + 0.05
    assert share["bias alone"]["against gold"] > share["neither"]["against gold"] + 0.03
    for judge in causes.judges:
        assert [judge.gold[0], judge.proxy[0]] == pytest.approx([0, 0], abs=1e-4)
        assert judge.figures["peak"] >= max(judge.gold) - 1e-3
        assert (np.diff(judge.proxy) >= -1e-4).all()  # the optimiser's own reward never falls
    assert maker.table(causes).count("\n| ") == len(causes.arms) + 3 + 2 + 2  # arms, factors, other arms, headings


def test_arms_of_a_training_share_their_responses_and_more_pairs_contain_fewer(small):
    _, folder = small
    ground = maker.Ground(0, folder, SMALL)
    rows = {name: ground.labels(arm, 0) for name, arm in maker.ARMS.items()}

    def texts(name):
        return [(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in rows[name]]

    assert texts("bias and noise") == texts("neither")
    quarter, course, more = (rows[name] for name in ("a quarter of the pairs", "bias and noise",
                                                     "four times the pairs"))
    assert 0 < len(quarter) < len(course) < len(more)
    assert quarter == course[:len(quarter)] and course == more[:len(course)]
    assert ground.labels(maker.ARMS["neither"], 1) != rows["neither"]


def test_a_reward_model_that_is_there_is_not_made_again(small, monkeypatch):
    record, folder = small
    monkeypatch.setattr(maker.Ground, "judge", lambda *arguments: pytest.fail("made again"))
    assert maker.run([0], 1, folder, SMALL)["judges"] == record["judges"]


# ---- the record
@pytest.fixture(scope="module")
def causes():
    return load_causes()


def test_the_record_has_every_cell(causes):
    assert len(causes.worlds) >= 3 and list(causes.arms)[:4] == list(FACTORIAL)
    cells = [(judge.world, judge.training) for judge in causes.select("neither")]
    assert len(set(cells)) == len(cells) >= 3 * len(causes.worlds)
    for arm in causes.arms:
        assert [(judge.world, judge.training) for judge in causes.select(arm)] == cells, arm


def test_recorded_figures_are_those_of_the_recorded_curves(causes):
    far, two = causes.kl.index(FAR), causes.kl.index(2.0)
    for judge in causes.judges:
        best = np.array(causes.best[judge.world])
        assert (np.array(judge.gold) <= best + 2e-2).all()
        assert judge.gold[far] == pytest.approx(judge.figures["far"], abs=1e-4)
        assert judge.proxy[two] == pytest.approx(judge.figures["proxy at 2"], abs=1e-4)
        assert best[two] - judge.gold[two] == pytest.approx(judge.figures["lost at 2"], abs=1e-3)
        assert judge.figures["peak"] >= max(judge.gold) - 1e-4


def test_the_table_is_the_records(causes):
    path = maker.Path(maker.__file__).parents[1] / "docs" / "causes.md"
    assert path.read_text(encoding="utf-8") == maker.table(causes)
    assert maker.FILE.stat().st_size < 200_000 and json.loads(maker.FILE.read_text())["versions"]
