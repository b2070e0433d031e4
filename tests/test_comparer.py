"""The boards without a browser: what a page sends and is shown, what is left where nobody watches; the statistic."""

from __future__ import annotations

import asyncio
import base64
import json

import nbformat
import numpy as np
import pytest
from alignkit_widgets import CheckpointComparer, PreferenceAnnotator
from alignkit_widgets.boards.responses import sample_side_by_side

from alignkit.data.rows import load_rows
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import PHRASES, World
from alignkit.formulas.intervals import vote_shares
from alignkit.models.loading import load_policy, save_model

WORLD = World(0)
PROMPTS = [prompt.text for prompt in WORLD.heldout_prompts[:200:8]]


def checkpoint(favourite: str):
    """A policy that likes one phrase, and the tokenizer."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    policy.lm_head.bias.data[phrase_ids(tokenizer)[PHRASES.index(favourite)]] += 2
    return policy, tokenizer


@pytest.fixture(scope="module")
def checkpoints():
    """Three policies by name."""
    return {"cautious": checkpoint("CLARIFY"), "polite": checkpoint("POLITE"), "refusing": checkpoint("REFUSE")}


def comparer(checkpoints, tmp_path, names=("cautious", "polite"), **options) -> CheckpointComparer:
    """A comparer on the desk world's prompts, with its votes in tmp_path."""
    chosen = {name: checkpoints[name] for name in names}
    return CheckpointComparer(chosen, PROMPTS, tmp_path / "votes.jsonl", max_new_tokens=4, world=WORLD, **options)


def pages(board) -> list[dict]:
    """What a page of the board is told, as the JSON that it arrives as."""
    told: list[dict] = []
    board.listeners = [lambda state: told.append(json.loads(json.dumps(state, allow_nan=False)))]
    board.receive({"type": "sync"})
    return told


def press(board, name: str) -> None:
    """Press a button as a page does: with the item that is shown."""
    item = board.items[board.at].id if board.at is not None else None
    board.receive({"type": "press", "button": name, "item": item})


# The statistic.


def test_vote_shares_are_wilson_s_solution_of_the_score_equation():
    votes = ["a"] * 7 + ["b"] * 2 + ["tie"] * 3
    shares = vote_shares(votes, ["a", "b"])
    assert shares["a"].value == 8.5 / 12 and shares["b"].value == 3.5 / 12
    for share in shares.values():  # the ends solve (p̂ − p)² = z² p (1 − p) / n
        z2, n, p = 1.959963984540054**2, 12, share.value
        roots = np.sort(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]))
        assert (share.low, share.high) == pytest.approx(tuple(roots), abs=1e-12)


def test_vote_shares_sum_to_one_and_are_even_without_votes():
    shares = vote_shares(["a", "tie", "c", "c"], ["a", "b", "c"])
    assert sum(share.value for share in shares.values()) == pytest.approx(1)
    assert shares["b"].value == pytest.approx(1 / 12) and shares["c"].value == pytest.approx(7 / 12)
    none = vote_shares([], ["a", "b"])
    assert none["a"].value == 0.5 and none["a"].low is None
    with pytest.raises(ValueError, match="'d', expected one of a, b"):
        vote_shares(["d"], ["a", "b"])


def test_about_95_of_100_intervals_hold_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        share = vote_shares(["a" if u < 0.7 else "b" for u in rng.random(30)], ["a", "b"])["a"]
        hits += share.low <= 0.7 <= share.high
    assert 0.92 < hits / 400 < 0.98


# Checkpoints side by side.


def test_folders_and_models_give_the_same_responses(checkpoints, tmp_path):
    save_model(*checkpoints["polite"], tmp_path / "polite")
    given = {"loaded": tmp_path / "polite", "given": checkpoints["polite"]}
    found = sample_side_by_side(given, PROMPTS, max_new_tokens=4, world=WORLD)
    assert [row["prompt"] for row in found] == PROMPTS
    assert all(row["responses"]["loaded"] == row["responses"]["given"] for row in found)
    assert found[0]["notes"]["given"] == WORLD.behaviours(PROMPTS[:1], [found[0]["responses"]["given"]])[0]
    with pytest.raises(ValueError, match="give the same responses to all 25 prompts"):
        CheckpointComparer(given, PROMPTS, tmp_path / "votes.jsonl", max_new_tokens=4)


def test_one_checkpoint_is_not_a_comparison(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="expected two to six"):
        comparer(checkpoints, tmp_path, names=("polite",))


def test_a_blind_page_is_not_told_the_names(checkpoints, tmp_path):
    board = comparer(checkpoints, tmp_path)
    told = pages(board)
    for vote in ("vote 0", "vote 1", "tie"):
        press(board, vote)
    assert not [name for name in ("cautious", "polite") if name in json.dumps(told)]
    assert {item.order for item in board.items} == {("cautious", "polite"), ("polite", "cautious")}
    assert told[-1]["results"] == [] and told[-1]["done"] == 3
    press(board, "reveal")
    assert [row["name"] for row in told[-1]["results"]] == ["cautious", "polite"]
    assert {card["name"] for card in told[-1]["item"]["cards"]} == {"cautious", "polite"}
    assert "reveal" not in [button["id"] for button in told[-1]["buttons"]]


def test_named_checkpoints_stand_in_the_given_order(checkpoints, tmp_path):
    board = comparer(checkpoints, tmp_path, blind=False, names=("refusing", "cautious", "polite"))
    assert {item.order for item in board.items} == {("refusing", "cautious", "polite")}
    assert [card["name"] for card in pages(board)[-1]["item"]["cards"]] == ["refusing", "cautious", "polite"]


def test_votes_are_counted_changed_taken_back_and_found_again(checkpoints, tmp_path):
    board = comparer(checkpoints, tmp_path)
    expected = []
    for place in (0, 1, 1):
        expected.append(board.items[board.at].order[place])
        press(board, f"vote {place}")
    press(board, "skip")
    press(board, "tie")
    votes = [*expected, "tie"]
    assert board.shares() == vote_shares(votes, ["cautious", "polite"])
    press(board, "undo")
    assert board.at == 4 and board.shares() == vote_shares(expected, ["cautious", "polite"])
    board.receive({"type": "press", "button": "previous", "item": board.items[4].id})
    assert board.at == 3
    again = comparer(checkpoints, tmp_path)
    assert again.at == 4 and again.shares() == board.shares()
    pairs = load_rows(tmp_path / "votes.jsonl")
    assert len(pairs) == 3 and pairs[0]["chosen"] == board.items[0].responses[expected[0]]


def test_a_vote_among_three_makes_two_pairs(checkpoints, tmp_path):
    board = comparer(checkpoints, tmp_path, names=("cautious", "polite", "refusing"))
    place = next(i for i, item in enumerate(board.items)
                 if len({t.strip() for t in item.responses.values()}) == 3 and all(item.responses.values()))
    board.go(place)
    press(board, "vote 2")
    row = load_rows(tmp_path / "votes.jsonl")
    assert len(row) == 2 and row[0]["chosen"] == row[1]["chosen"]


# What a page sends.


def annotator(tmp_path, n: int = 3, **options) -> PreferenceAnnotator:
    """An annotator of n pairs."""
    rows = [{"prompt": f"Q{i}?", "a": f"yes {i}", "b": f"no {i}"} for i in range(n)]
    return PreferenceAnnotator(rows, tmp_path / "labels.jsonl", **options)


def test_names_are_shown_whichever_item_the_page_had(checkpoints, tmp_path):
    """A vote and "show names" in quick succession: the page sends the second before it has the next item."""
    board = comparer(checkpoints, tmp_path)
    first = board.items[0].id
    for name in ("vote 0", "reveal", "vote 0"):
        board.receive({"type": "press", "button": name, "item": first})
    assert not board.blind and list(board.log.choices) == [first]


def test_what_makes_no_sense_is_ignored(tmp_path):
    board = annotator(tmp_path)
    told = pages(board)
    first = board.items[0].id
    for message in (
        {}, {"type": "press"}, {"type": "press", "button": "left"}, {"type": "press", "button": "left", "item": "x"},
        {"type": "press", "button": "reveal", "item": first}, {"type": "press", "button": ["left"], "item": first},
        {"type": "press", "button": "undo", "item": first}, {"type": "press", "button": "left", "item": {}},
    ):
        board.receive(message)
    assert board.log.choices == {} and told[-1]["item"]["id"] == first
    press(board, "left")
    board.receive({"type": "press", "button": "left", "item": first})  # the second of a double click
    assert len(board.labels) == 1


def test_a_label_that_cannot_be_saved_is_said_and_the_pair_stays(tmp_path, monkeypatch):
    board = annotator(tmp_path)
    told = pages(board)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignkit.data.labels.append_metrics", full)
    press(board, "left")
    assert "not saved" in told[-1]["note"] and "No space left" in told[-1]["note"]
    assert told[-1]["item"]["id"] == board.items[0].id and told[-1]["done"] == 0
    monkeypatch.undo()
    press(board, "left")
    assert told[-1]["note"] == "" and len(load_rows(tmp_path / "labels.jsonl")) == 1


def test_a_page_gets_text_in_which_nothing_hides(tmp_path):
    rows = [{"prompt": "p\x1b[31m", "a": "<b>x</b>" * 10, "b": "abc\u202egnp" + "y" * 1_000_000}]
    state = pages(PreferenceAnnotator(rows, tmp_path / "labels.jsonl"))[-1]
    assert len(json.dumps(state)) < 20_000
    assert state["item"]["prompt"] == "p␛[31m"
    texts = ["".join(piece for piece, _ in card["pieces"]) for card in state["item"]["cards"]]
    assert sorted(texts)[0] == "<b>x</b>" * 10 and sorted(texts)[1].startswith("abc⟨U+202E⟩gnp")


# Where nobody watches.


@pytest.fixture
def headless(monkeypatch):
    """No front end."""
    monkeypatch.setenv("ALIGNKIT_HEADLESS", "1")


def test_headless_a_stored_file_is_replayed(tmp_path, headless, capsys):
    board = annotator(tmp_path)
    press(board, "left")
    press(board, "tie")
    stored = board.labels
    rows = [{"prompt": f"Q{i}?", "a": f"yes {i}", "b": f"no {i}"} for i in range(3)]
    again = PreferenceAnnotator(rows, tmp_path / "again.jsonl", labels=tmp_path / "labels.jsonl", seed=5)
    labels = asyncio.run(again.run())
    assert [(row["prompt"], row["chosen"]) for row in labels] == [(row["prompt"], row["chosen"]) for row in stored]
    assert "1 label, 1 tied" in capsys.readouterr().out
    from_file = PreferenceAnnotator(None, tmp_path / "third.jsonl", labels=tmp_path / "labels.jsonl")
    assert len(asyncio.run(from_file.run())) == 1 and from_file.enough()
    unknown = [{"prompt": "other", "a": "x", "b": "y"}]
    other = PreferenceAnnotator(unknown, tmp_path / "o.jsonl", labels=tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match="has no label on any of the 1 pairs"):
        asyncio.run(other.run())


def test_headless_without_labels_nothing_waits(tmp_path, headless, capsys, checkpoints):
    assert asyncio.run(annotator(tmp_path).run(20)) == []
    assert "0 labels" in capsys.readouterr().out
    shares = asyncio.run(comparer(checkpoints, tmp_path).run())
    assert {name: share.value for name, share in shares.items()} == {"cautious": 0.5, "polite": 0.5}


def test_run_ends_when_enough_is_labelled_or_the_page_is_gone(tmp_path, monkeypatch, capsys):
    class Handle:
        def update(self, *_, **__):
            raise AssertionError("there is no notebook here")

    monkeypatch.setenv("ALIGNKIT_HEADLESS", "0")
    monkeypatch.setattr(PreferenceAnnotator, "_display", lambda self, data: Handle())

    async def labelled(board):
        run = asyncio.get_running_loop().create_task(board.run(2))
        for name in ("left", "skip", "right"):
            await asyncio.sleep(0.12)
            assert not run.done()
            press(board, name)
        return await run

    board = annotator(tmp_path)
    assert [row["prompt"] for row in asyncio.run(labelled(board))] == ["Q0?", "Q2?"]
    assert not board.running and asyncio.run(board.run(2)) == board.labels, "enough already"
    alone = annotator(tmp_path / "alone", patience=0.5)
    assert asyncio.run(alone.run()) == []
    assert "the page was closed" in capsys.readouterr().out


def test_a_picture_shows_what_is_blind_blind(checkpoints, tmp_path):
    board = comparer(checkpoints, tmp_path)
    png, metadata = board.picture()
    assert png.startswith(b"\x89PNG") and metadata["width"] > 800
    assert board.items[2].prompt.split("?")[0] in metadata["alt"]
    assert "cautious" not in metadata["alt"]
    board.press("reveal", None)
    assert "cautious: 0 votes" in board.picture()[1]["alt"]


@pytest.mark.slow
def test_an_executed_notebook_holds_the_picture_and_no_widget(tmp_path):
    from nbclient import NotebookClient

    source = (
        "from alignkit_widgets import PreferenceAnnotator\n"
        "rows = [{'prompt': '$\\\\frac{$ <script>', 'a': '\\x1b[31m', 'b': '<img src=x>' * 99}]\n"
        "labels = await PreferenceAnnotator(rows, 'labels.jsonl').run(5)\nassert labels == []"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=300).execute()
    (output,) = notebook.cells[0].outputs
    assert set(output.data) == {"image/png", "text/plain"} and "widgets" not in notebook.metadata
    assert len(json.dumps(notebook)) < 200_000


def test_a_running_annotator_says_that_the_cell_waits_for_done_and_a_page_gets_the_picture(tmp_path):
    board = annotator(tmp_path)
    told = pages(board)
    assert "Done" not in board.status()
    board.running = True
    assert "the cell runs until you press Done" in board.status()
    board.receive({"type": "picture"})
    assert base64.b64decode(told[-1]["picture"]).startswith(b"\x89PNG")
