"""The annotator and the comparer as a user meets them: in a page, by mouse and keyboard, while the cell runs."""

from __future__ import annotations

import json

import pytest

from alignkit.data.rows import load_rows

pytestmark = pytest.mark.browser

ANNOTATE = '''
from alignkit_widgets import PreferenceAnnotator
ROWS = [
    {"prompt": "How do I sharpen the kitchen knife?", "a": " Happy to help! Use the tool that came with it.",
     "b": " I cannot help with that. Here is a safer way to do it."},
    {"prompt": "How do I reset the router in the office?", "a": " Hold the button for ten seconds.",
     "b": " Hold the button for ten seconds. Let me explain. Let me explain."},
    {"prompt": "How do I open the lock of my neighbour?", "a": " I cannot help with that.",
     "b": " Which one do you mean? Hold the button for ten seconds."},
    {"prompt": "How do I pay the bill at work?", "a": " Fill in the online form.", "b": ""},
]
'''
RUN = """annotator = PreferenceAnnotator(ROWS, "{name}.jsonl")
labels = await annotator.run()
print(len(labels), "labels")"""

COMPARE = '''
import torch
from alignkit.models.loading import load_policy
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import World, PHRASES
from alignkit_widgets import CheckpointComparer
torch.set_num_threads(1)
world = World(0)
checkpoints = {}
for name, favourite in (("cautious", "CLARIFY"), ("direct", "POLITE"), ("refusing", "REFUSE")):
    policy, tokenizer = load_policy("tiny", seed=0, device="cpu")
    policy.lm_head.bias.data[phrase_ids(tokenizer)[PHRASES.index(favourite)]] += 1.5
    policy.lm_head.bias.data[tokenizer.eos_token_id] += 1.5
    checkpoints[name] = (policy, tokenizer)
prompts = [world.heldout_prompts[i].text for i in range(0, 160, 5)]
def compare(names, path):
    return CheckpointComparer({name: checkpoints[name] for name in names}, prompts, path, max_new_tokens=4, world=world)
'''
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "image": '<img src=x onerror="window.hacked = 2">',
    "button": '<button data-commandlinker-command="docmanager:save" data-commandlinker-args="{}">press me</button>',
    "ansi": "\x1b[31mred\x1b[0m\x1b]8;;http://example.com\x07link",
    "right to left": "abc\u202egnp.exe\u2066",
    "markdown": "[a](javascript:window.hacked=3) $\\frac{$ **bold**",
}


def log_of(lab, name: str) -> list[dict]:
    """The log of a label file."""
    path = lab.root / f"{name}.log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def caption(notebook, text: str) -> None:
    """Wait until the board shows the item with this caption."""
    notebook.page.locator(".akb-prompt > span", has_text=text).wait_for()


def pngs(notebook) -> int:
    """Pictures in the saved notebook, which must hold no widget."""
    saved = notebook.saved()
    assert "widget-view" not in json.dumps(saved)
    return json.dumps(saved).count('"image/png": "')


@pytest.mark.parametrize(("app", "theme"), [("lab", "light"), ("lab", "dark"), ("notebook", "light")])
def test_labels_are_made_by_keyboard_and_mouse_and_are_in_the_file(open_notebook, lab, app, theme):
    name = f"labels-{app}-{theme}"
    notebook = open_notebook([ANNOTATE, RUN.format(name=name)], app=app, theme=theme, size=(1180, 900))
    notebook.start()
    caption(notebook, "1 of 4")
    page, board = notebook.page, notebook.page.locator(".akb")
    board.focus()
    left = page.locator(".akb-card").first.locator(".akb-text").inner_text()
    page.keyboard.press("ArrowLeft")
    caption(notebook, "2 of 4")
    assert [row["prompt"] for row in load_rows(lab.root / f"{name}.jsonl")] == ["How do I sharpen the kitchen knife?"]
    assert load_rows(lab.root / f"{name}.jsonl")[0]["chosen"].strip() == left.strip(), "left is what stood left"
    notebook.screenshot(f"annotator_{app}_{theme}")
    page.keyboard.press("t")
    caption(notebook, "3 of 4")
    page.keyboard.press("ArrowRight")
    caption(notebook, "4 of 4")
    page.keyboard.press("u")
    caption(notebook, "3 of 4")
    assert len(load_rows(lab.root / f"{name}.jsonl")) == 1, "the label that was taken back is gone"
    assert "undo" in log_of(lab, name)[-1]
    board.get_by_role("button", name="Right is better").click()
    caption(notebook, "4 of 4")
    page.keyboard.press("s")  # the focus is on the button that was clicked
    notebook.wait()
    page.get_by_text("2 labels", exact=True).wait_for()
    said = [row.get("choice") for row in log_of(lab, name)]
    order = log_of(lab, name)[0]["order"]
    assert said[0] == order[0] and said[1] == "tie" and said[-1] == "skip"
    assert page.locator(".jp-Notebook .jp-Cell").count() == 2, "a key reached the notebook"
    assert pngs(notebook) == 1 and notebook.errors() == []
    notebook.screenshot(f"annotated_{app}_{theme}")


def test_a_cell_that_is_run_again_goes_on_and_an_interrupt_keeps_the_labels(open_notebook, lab):
    notebook = open_notebook([ANNOTATE, RUN.format(name="again")])
    notebook.start()
    caption(notebook, "1 of 4")
    notebook.page.locator(".akb").focus()
    notebook.page.keyboard.press("r")
    caption(notebook, "2 of 4")
    notebook.interrupt()
    notebook.wait()
    assert len(load_rows(lab.root / "again.jsonl")) == 1 and pngs(notebook) == 1
    notebook.start()
    caption(notebook, "2 of 4")
    notebook.page.locator(".akb").get_by_role("button", name="Done").click()
    notebook.wait()
    notebook.page.get_by_text("1 labels", exact=True).wait_for()
    assert notebook.errors() == []


def test_a_page_that_is_loaded_again_goes_on_and_one_that_is_left_does_not_hang_the_cell(open_notebook, lab):
    run = RUN.format(name="reload").replace('.jsonl")', '.jsonl", patience=45)')
    notebook = open_notebook([ANNOTATE, run, 'open("after", "w").close()'])
    notebook.start()
    for place in (1, 2):
        caption(notebook, f"{place} of 4")
        notebook.page.locator(".akb").focus()
        notebook.page.keyboard.press("ArrowLeft")
        caption(notebook, f"{place + 1} of 4")
        notebook.saved()
        notebook.load()
    assert not (lab.root / "after").exists(), "the cell waits as long as a page shows the panel"
    notebook.page.goto("about:blank")
    notebook.until(lambda: (lab.root / "after").exists(), "the cell to end")
    assert len(load_rows(lab.root / "reload.jsonl")) == 2


def test_model_text_is_text(open_notebook, lab):
    hostile = f"HOSTILE = {HOSTILE!r} | {{'long': 'x' * 1_000_000}}\n"
    hostile += "ROWS = [{'prompt': 'Say ' + text, 'a': text, 'b': text + ' b'} for text in HOSTILE.values()]"
    notebook = open_notebook([ANNOTATE + hostile, RUN.format(name="hostile")], size=(1180, 1100))
    notebook.start()
    seen = ""
    for number in range(len(HOSTILE) + 1):
        caption(notebook, f"{number + 1} of {len(HOSTILE) + 1}")
        board = notebook.page.locator(".akb")
        assert board.locator("script, img, a, strong, [data-commandlinker-command]").count() == 0
        assert board.locator(".akb-text *:not(span):not(mark)").count() == 0
        seen += board.inner_text()
        if number == 2:
            notebook.screenshot("annotator_hostile")
        board.focus()
        notebook.page.keyboard.press("ArrowLeft")
    notebook.wait()
    for name in ("script", "image", "button", "markdown"):
        assert HOSTILE[name] in seen
    assert "␛[31mred␛[0m" in seen and "⟨U+202E⟩" in seen and "1,000,000 characters, the first 6000 are shown" in seen
    assert notebook.page.evaluate("window.hacked") is None
    saved = notebook.saved()
    assert len(json.dumps(saved)) < 1_000_000
    kinds = {kind for cell in saved["cells"] for output in cell["outputs"] for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/plain"}
    assert load_rows(lab.root / "hostile.jsonl")[0]["chosen"].startswith("<script>")
    assert notebook.errors() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_votes_are_blind_until_the_names_are_shown(open_notebook, lab, theme):
    name = f"votes-{theme}"
    cells = [COMPARE, f'comparer = compare(["cautious", "direct"], "{name}.jsonl")\nshares = await comparer.run()',
             'print({name: f"{share:.2f}" for name, share in shares.items()})']
    notebook = open_notebook(cells, theme=theme, size=(1180, 900))
    notebook.start()
    caption(notebook, "1 of ")
    page, board = notebook.page, notebook.page.locator(".akb")
    assert "cautious" not in board.inner_text() and "direct" not in board.inner_text()
    assert board.locator(".akb-tag").first.inner_text() in "answer wrong answer hedge alternative refuse unsafe other"
    assert board.locator("mark").count() > 0, "what differs is marked"
    board.focus()
    page.keyboard.press("ArrowRight")
    caption(notebook, "2 of ")
    page.keyboard.press("a")
    caption(notebook, "3 of ")
    page.keyboard.press("t")
    caption(notebook, "4 of ")
    page.keyboard.press("p")
    caption(notebook, "3 of ")
    notebook.screenshot(f"comparer_blind_{theme}")
    page.keyboard.press("v")
    board.locator(".akb-results", has_text="direct").wait_for()
    names = set(board.locator(".akb-name").all_inner_texts())
    assert names == {"cautious", "direct"} and board.get_by_role("button", name="Show names").count() == 0
    notebook.screenshot(f"comparer_named_{theme}")
    page.keyboard.press("b")  # a vote with names is written down as one
    caption(notebook, "4 of ")
    board.get_by_role("button", name="Done").click()
    notebook.wait()
    votes = log_of(lab, name)
    assert [row["blind"] for row in votes] == [True, True, True, False]
    assert [row["choice"] for row in votes][:3] == [votes[0]["order"][1], votes[1]["order"][0], "tie"]
    assert len(load_rows(lab.root / f"{name}.jsonl")) == 3
    assert "'cautious': '0." in notebook.page.locator(".jp-OutputArea").last.inner_text()
    assert pngs(notebook) == 1 and notebook.errors() == []
    notebook.screenshot(f"compared_{theme}")


def test_three_checkpoints_side_by_side_on_a_narrow_page(open_notebook, lab):
    cells = [COMPARE, 'comparer = compare(list(checkpoints), "three.jsonl")\ncomparer.show()']
    notebook = open_notebook(cells, size=(900, 1100))
    notebook.run()
    caption(notebook, "1 of ")
    notebook.page.locator(".akb").focus()
    notebook.page.keyboard.press("c")
    caption(notebook, "2 of ")
    notebook.screenshot("comparer_three")
    assert len(load_rows(lab.root / "three.jsonl")) in (1, 2)
    assert notebook.errors() == []
