"""Labels by people: nothing chosen is lost, the pairs are those that were chosen, and they move a reward model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from alignkit_widgets.boards.annotator import first_shown
from alignkit_widgets.boards.responses import sample_pairs, word_differences

from alignkit.configs import RewardConfig
from alignkit.data.encoding import ChatText
from alignkit.data.labels import ChoiceLog, choice_items, stored_rows
from alignkit.data.rows import check, load_rows
from alignkit.desk.tiny import tiny_reward_model
from alignkit.desk.world import PHRASES, World, render
from alignkit.evaluate.reward_model import retrain
from alignkit.formulas.intervals import wilson
from alignkit.jobs.cli import main
from alignkit.models.loading import load_policy
from alignkit.reward import RewardScorer, train_reward_model

ROOT = Path(__file__).parents[1]


def rows(n: int = 6) -> list[dict]:
    """n prompts with two responses each."""
    return [{"prompt": f"Question {i}?", "responses": {"a": f"Answer {i}.", "b": f"Refusal {i}."}} for i in range(n)]


def made(tmp_path, n: int = 6) -> tuple[ChoiceLog, list]:
    """A log in tmp_path and its items."""
    items = choice_items(rows(n))
    return ChoiceLog(tmp_path / "labels.jsonl", items), items


# The log and the pairs.


def test_the_pairs_are_what_was_chosen_and_ties_and_skips_are_none(tmp_path):
    log, items = made(tmp_path)
    for item, choice in zip(items, ("a", "tie", "b", "skip", "a", "b"), strict=True):
        log.choose(item, choice)
    found = load_rows(tmp_path / "labels.jsonl")
    assert found.kind == "pairs" and not found.problems
    expected = [(0, "a"), (2, "b"), (4, "a"), (5, "b")]
    texts = {"a": "Answer {}.", "b": "Refusal {}."}
    assert list(found) == [
        {"prompt": f"Question {i}?", "chosen": texts[c].format(i), "rejected": texts["ba"["ab".index(c)]].format(i)}
        for i, c in expected
    ]
    assert main(["check", str(tmp_path / "labels.jsonl")]) == 0
    label = json.loads((tmp_path / "labels.jsonl").read_text().splitlines()[0])["label"]
    assert label == {"chosen": "a", "rejected": "b", "order": list(items[0].order), "item": items[0].id}


def test_undo_takes_the_last_choice_back_and_adds_to_the_log(tmp_path):
    log, items = made(tmp_path)
    log.choose(items[0], "a")
    log.choose(items[1], "b")
    before = (tmp_path / "labels.log.jsonl").read_bytes()
    assert log.undo() == items[1].id
    assert (tmp_path / "labels.log.jsonl").read_bytes().startswith(before), "the log is append-only"
    assert [row["chosen"] for row in load_rows(tmp_path / "labels.jsonl")] == ["Answer 0."]
    log.choose(items[0], "b")  # a change of mind
    assert [row["chosen"] for row in load_rows(tmp_path / "labels.jsonl")] == ["Refusal 0."]
    log.undo()
    assert [row["chosen"] for row in load_rows(tmp_path / "labels.jsonl")] == ["Answer 0."], "the earlier one again"
    assert log.undo() == items[0].id and log.undo() is None
    assert (tmp_path / "labels.jsonl").read_text() == ""


def test_another_log_goes_on_where_one_stopped(tmp_path):
    log, items = made(tmp_path)
    log.choose(items[0], "a", seconds=1.5)
    log.choose(items[3], "tie")
    again, _ = made(tmp_path)
    assert {name: row["choice"] for name, row in again.choices.items()} == {items[0].id: "a", items[3].id: "tie"}
    assert again.choices[items[0].id]["seconds"] == 1.5
    assert again.undo() == items[3].id


def test_choices_on_other_items_stay_and_cannot_be_undone_from_here(tmp_path):
    log, items = made(tmp_path, n=3)
    log.choose(items[2], "a")
    fewer = ChoiceLog(tmp_path / "labels.jsonl", items[:2])
    assert fewer.choices == {} and fewer.undo() is None
    fewer.choose(items[0], "b")
    assert [row["chosen"] for row in load_rows(tmp_path / "labels.jsonl")] == ["Answer 2.", "Refusal 0."]


def test_two_kernels_that_label_the_same_file_lose_nothing(tmp_path):
    one, items = made(tmp_path)
    two, _ = made(tmp_path)
    one.choose(items[0], "a")
    two.choose(items[1], "b")
    one.choose(items[2], "a")
    assert len(load_rows(tmp_path / "labels.jsonl")) == 3 and len(one.choices) == 3


CHILD = """
import sys
from alignkit.data.labels import ChoiceLog, choice_items
items = choice_items([{"prompt": f"Question {i}?", "responses": {"a": "yes", "b": "no"}} for i in range(1000)])
log = ChoiceLog(sys.argv[1], items)
for item in items:
    log.choose(item, "a")
    print(item.id, flush=True)
"""


def test_a_killed_process_loses_nothing(tmp_path):
    path = tmp_path / "labels.jsonl"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    said = [child.stdout.readline().strip() for _ in range(25)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.read().split()
    child.wait()
    items = choice_items(
        [{"prompt": f"Question {i}?", "responses": {"a": "yes", "b": "no"}} for i in range(1000)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = ChoiceLog(path, items)
    assert set(said) <= set(log.choices) and len(log.choices) <= len(said) + 1
    assert len(load_rows(path)) == len(log.choices)


def test_a_torn_last_line_is_cut_off_and_the_rest_counts(tmp_path):
    log, items = made(tmp_path)
    log.choose(items[0], "a")
    with (tmp_path / "labels.log.jsonl").open("a") as file:
        file.write('{"item": "half of a li')
    with pytest.warns(UserWarning, match="torn"):
        again, _ = made(tmp_path)
    again.choose(items[1], "b")
    assert len(load_rows(tmp_path / "labels.jsonl")) == 2


def test_pairs_that_a_crash_left_behind_are_made_again_from_the_log(tmp_path):
    log, items = made(tmp_path)
    log.choose(items[0], "a")
    (tmp_path / "labels.jsonl").write_text("")
    made(tmp_path)
    assert len(load_rows(tmp_path / "labels.jsonl")) == 1


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(FileExistsError, match="choose another name"):
        made(tmp_path)
    (tmp_path / "labels.log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"labels.log.jsonl:1: is not the record of a choice"):
        made(tmp_path)
    for name in ("labels.csv", "labels.log.jsonl"):
        with pytest.raises(ValueError, match="ends in .jsonl"):
            ChoiceLog(tmp_path / name, choice_items(rows()))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, "at least two responses"),
        ({"prompt": "p", "responses": {"a": "x"}}, "at least two responses"),
        ({"prompt": " ", "responses": {"a": "x", "b": "y"}}, "prompt is blank"),
        ({"prompt": "p", "responses": {"a": "x", "b": None}}, "b is NoneType, expected text"),
        ({"prompt": "p", "responses": {"a": "x", "b": "y\0"}}, "b holds a NUL"),
        ({"prompt": "p", "responses": {"a": "x", "b": "\ud800"}}, "b holds a NUL or half of a surrogate"),
        ({"prompt": ChatText("<s>p"), "responses": {"a": "x", "b": "y"}}, "chat template"),
        ({"prompt": "p", "responses": {"tie": "x", "b": "y"}}, "named 'tie'"),
    ],
)
def test_what_a_label_file_cannot_hold_is_refused_at_the_start(row, reason):
    with pytest.raises(ValueError, match=r"rows\[1\]") as refused:
        choice_items([rows(1)[0], row])
    assert reason in str(refused.value)


def test_every_choice_that_is_accepted_is_a_row_that_data_accepts(tmp_path):
    hostile = ["<script>alert(1)</script>", "\x1b[31mred", "abc\u202egnp", "x" * 1_000_000, "a\nb\r\n\u2028c", "é🙂"]
    items = choice_items([{"prompt": "p", "responses": {"a": text, "b": "other"}} for text in [*hostile, "", " "]])
    log = ChoiceLog(tmp_path / "labels.jsonl", items)
    for item in items:
        log.choose(item, "a")
    report = check(tmp_path / "labels.jsonl")
    assert report.ok and report.rows == len(hostile)
    assert [row["chosen"] for row in load_rows(tmp_path / "labels.jsonl")] == hostile


def test_the_order_is_seeded_recorded_and_does_not_depend_on_the_row(tmp_path):
    many = rows(400)
    orders = [item.order for item in choice_items(many, seed=3)]
    assert orders == [item.order for item in choice_items(many, seed=3)]
    assert orders[::-1] == [item.order for item in choice_items(many[::-1], seed=3)]
    assert orders != [item.order for item in choice_items(many, seed=4)]
    assert 150 < sum(order == ("a", "b") for order in orders) < 250


def test_position_bias_is_the_share_of_the_left(tmp_path):
    log, items = made(tmp_path)
    for item in items[:4]:
        log.choose(item, item.order[0])
    log.choose(items[4], items[4].order[1])
    log.choose(items[5], "tie")
    bias = first_shown(list(log.choices.values()))
    assert (bias.value, bias.low, bias.high) == (0.8, *wilson(4, 5))
    assert first_shown([]) is None


def test_a_stored_file_is_replayed_from_its_log_or_from_its_pairs(tmp_path):
    log, items = made(tmp_path)
    for item, choice in zip(items, ("a", "tie", "b", "skip"), strict=False):
        log.choose(item, choice)
    again = ChoiceLog(tmp_path / "again.jsonl", choice_items(rows(), seed=9))
    assert again.replay(tmp_path / "labels.jsonl") == 4 and again.replay(tmp_path / "labels.jsonl") == 0
    assert again.pairs() == [
        row | {"label": row["label"] | {"order": list(again.items[row["label"]["item"]].order)}} for row in log.pairs()
    ]
    (tmp_path / "labels.log.jsonl").rename(tmp_path / "gone")
    third = ChoiceLog(tmp_path / "third.jsonl", items)
    assert third.replay(tmp_path / "labels.jsonl") == 2, "a file of pairs has no ties"
    assert load_rows(tmp_path / "third.jsonl") == load_rows(tmp_path / "labels.jsonl")
    assert [row["prompt"] for row in stored_rows(tmp_path / "labels.jsonl")] == ["Question 0?", "Question 2?"]


# Differences between words.


def test_pieces_add_up_to_the_text_and_mark_what_others_lack():
    one, two = word_differences(["Hold the red button.", "Hold the button  now."])
    assert "".join(piece for piece, _ in one) == "Hold the red button."
    assert "".join(piece for piece, _ in two) == "Hold the button  now."
    assert [piece for piece, differs in one if differs] == [" red button."]
    assert [piece for piece, differs in two if differs] == [" button  now."]
    assert word_differences(["same text ", "same text "]) == [[("same text ", False)]] * 2
    assert word_differences(["", "x"]) == [[], [("x", True)]]
    first, later = word_differences(["Fill in.", "Yes! Fill in."])  # the space before a word is no difference
    assert (first, later) == ([("Fill in.", False)], [("Yes!", True), (" Fill in.", False)])
    three = word_differences(["a b c", "a b d", "a e d"])
    assert [[piece for piece, differs in one if differs] for one in three] == [[" b c"], [" b d"], [" e d"]]


# Pairs from a policy, and what they move.


def test_sampled_pairs_differ_and_are_seeded():
    policy, tokenizer = load_policy("tiny", device="cpu")
    prompts = [prompt.text for prompt in World(0).train_prompts[:40]]
    found = sample_pairs(policy, tokenizer, prompts, max_new_tokens=4, seed=1)
    assert [row["prompt"] for row in found] == prompts
    assert all(row["a"].strip() != row["b"].strip() for row in found)
    assert found == sample_pairs(policy, tokenizer, prompts, max_new_tokens=4, seed=1)
    assert found != sample_pairs(policy, tokenizer, prompts, max_new_tokens=4, seed=2)


def test_a_policy_that_says_one_thing_gives_no_pairs():
    policy, tokenizer = load_policy("tiny", device="cpu")
    policy.lm_head.bias.data[tokenizer.eos_token_id] = 1e3
    assert sample_pairs(policy, tokenizer, ["How do I sharpen the kitchen knife?"], max_new_tokens=4) == []


@pytest.fixture(scope="module")
def desk():
    """A reward model trained on the desk world's default annotator, and more pairs."""
    world, rng = World(0), np.random.default_rng(0)
    _, tokenizer = load_policy("tiny", device="cpu")
    train, held = world.train_prompts[::3], world.heldout_prompts

    def pairs(prompts, seed):
        texts = [prompt.text for prompt in prompts]
        first, second = ([render(rng.choice(PHRASES, size=rng.integers(1, 5))) for _ in texts] for _ in range(2))
        return world.preference_pairs(texts, first, second, seed=seed)

    model = tiny_reward_model(tokenizer, seed=0)
    earlier = pairs(train, 1)
    train_reward_model(model, tokenizer, earlier, RewardConfig(epochs=2))
    return RewardScorer(model, tokenizer), earlier, pairs(held[:200], 2)


def long(pairs: list[dict]) -> list[dict]:
    """The same pairs as somebody labels them who wants long answers; equally long ones are left out."""
    found = []
    for row in pairs:
        first, second = sorted((row["chosen"], row["rejected"]), key=lambda text: text.count("."))
        if first.count(".") < second.count("."):
            found.append({"prompt": row["prompt"], "chosen": second, "rejected": first})
    return found


def test_twenty_labels_move_the_reward_model_where_they_point(desk):
    scorer, earlier, heldout = desk
    labelled = long(earlier)[:20]
    before = {name: weight.clone() for name, weight in scorer.model.named_parameters()}
    after, moved = retrain(scorer, labelled, long(heldout))
    assert all((weight == before[name]).all() for name, weight in scorer.model.named_parameters()), "the old one moved"
    assert after is not scorer and moved.seconds < 60
    print(moved)
    assert moved.labelled["after"]["accuracy"].value > moved.labelled["before"]["accuracy"].value
    gained = moved.heldout["after"]["accuracy"].value - moved.heldout["before"]["accuracy"].value
    assert gained > 0.15, "what was learned of 20 labels holds on prompts that nobody labelled"
    assert moved.length_bias["after"] > moved.length_bias["before"] + 0.15
    assert len(moved.heldout["after"]["probability"]) == len(long(heldout))
    assert "ranked as labelled, the new labels" in str(moved) and "retrained in" in str(moved)


def test_figures_of_what_moved_are_those_of_a_slow_count(desk):
    scorer, earlier, heldout = desk
    after, moved = retrain(scorer, earlier[:4], heldout[:30], config=RewardConfig(epochs=1, batch_size=4))
    right = sum(
        float(after([row["prompt"]], [row["chosen"]])) > float(after([row["prompt"]], [row["rejected"]]))
        for row in heldout[:30]
    )
    accuracy = moved.heldout["after"]["accuracy"]
    assert (accuracy.value, accuracy.low, accuracy.high) == pytest.approx((right / 30, *wilson(right, 30)))
    row = heldout[0]
    margin = float(after.raw([row["prompt"]], [row["chosen"]]) - after.raw([row["prompt"]], [row["rejected"]]))
    assert moved.heldout["after"]["probability"][0] == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-5)


def test_retrain_needs_labels(desk):
    with pytest.raises(ValueError, match="labelled is empty"):
        retrain(desk[0], [])
