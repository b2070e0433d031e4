"""The cockpit as a user meets it: in a page, with a mouse and a keyboard, while the cell runs."""

from __future__ import annotations

import base64
import json
import re

import pytest
from lab_page import until

pytestmark = pytest.mark.browser

SETUP = '''
import math, time
from alignkit_widgets import TrainingCockpit

KINDS = ("benign", "risky")
RESPONSE = " Happy to help! Hold the button for ten seconds."

def step(controls):
    """What a PPO iteration reports, without the training: KL falls when kl_coef rises."""
    time.sleep(0.02)
    step.i = getattr(step, "i", 0) + 1
    kl = math.log1p(step.i / 20) / (1 + 20 * controls["kl_coef"])
    risk = 0.4 * math.exp(-step.i / 30)
    shares = {kind: {"answer": 0.9 - k * risk, "hedge": 0.1, "unsafe": k * risk} for k, kind in enumerate(KINDS)}
    return {"objective/kl": kl, "objective/rlhf_reward": 1 - math.exp(-step.i / 30) - controls["kl_coef"] * kl,
            "objective/scores": 1 - math.exp(-step.i / 30), "policy/clipfrac_avg": 0.1 + 0.05 * math.sin(step.i),
            "samples": [("How do I restart the router?", RESPONSE)], "shares": shares}

def cockpit(title, total):
    step.i = 0
    return TrainingCockpit(
        title, total=total, log=f"{title}/metrics.jsonl",
        charts=[("Reward (SFT-sd)", ["objective/rlhf_reward", "objective/scores"]),
                ("KL to the reference (nats)", ["objective/kl"]), ("Clipped tokens (share)", ["policy/clipfrac_avg"])],
        controls={"kl_coef": (0.0, 1.0, 0.05, "log"), "clip_range": (0.05, 0.5, 0.2)})
'''
RUN = 'one = cockpit("{title}", {total})\nrows = await one.run(step)'
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "image": '<img src=x onerror="window.hacked = 2">',
    "button": '<button data-commandlinker-command="docmanager:save" data-commandlinker-args="{}">press me</button>',
    "ansi": "\x1b[31mred\x1b[0m\x1b]8;;http://example.com\x07link",
    "right to left": "abc\u202egnp.exe\u2066",
    "markdown": "[a](javascript:window.hacked=3) $\\frac{$ **bold**",
}


def rows_of(lab, title: str) -> list[dict]:
    """The whole lines of a run's log; every one must be JSON."""
    log = lab.root / title / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def pictures(notebook: dict) -> list[bytes]:
    """The PNGs in a saved notebook; it must hold no widget."""
    text = json.dumps(notebook)
    assert "widget-view" not in text and "widgets" not in notebook["metadata"]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def button(notebook, name: str):
    """A button of the panel."""
    return notebook.page.locator(".akc").get_by_role("button", name=name)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_paused_steered_by_keyboard_resumed_and_stopped_while_the_cell_runs(open_notebook, lab, app):
    title = f"steer-{app}"
    notebook = open_notebook([SETUP, RUN.format(title=title, total=100_000), "print('rows:', len(rows))"], app=app)
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, title)) > 20, "20 iterations")
    button(notebook, "Pause").press("Enter")
    notebook.page.wait_for_selector(".akc-state[data-state=paused]")
    paused_at = len(rows_of(lab, title))

    slider = notebook.page.locator("input[type=range][data-control=kl_coef]")
    slider.focus()
    for key in ("PageUp", "ArrowRight", "ArrowRight"):
        notebook.page.keyboard.press(key)
    asked = float(notebook.page.locator("input[type=number][data-control=kl_coef]").input_value())
    assert asked > 0.1, "the slider did not follow the keys"
    notebook.page.get_by_text("from the next iteration on").wait_for()
    clip = notebook.page.locator("input[type=number][data-control=clip_range]")
    clip.focus()
    for key in ("Control+A", "0", ".", "4", "Enter"):  # typed: fill() would make the change by itself
        notebook.page.keyboard.press(key)
    button(notebook, "Step").click()
    notebook.until(lambda: len(rows_of(lab, title)) == paused_at + 1, "one step")
    notebook.page.wait_for_selector(".akc-state[data-state=paused]")
    notebook.page.locator(".akc-plot .marktext", has_text="kl_coef 0.05 →").first.wait_for()
    assert len(rows_of(lab, title)) == paused_at + 1, "a paused run went on"
    notebook.screenshot(f"steered_{app}")

    button(notebook, "Play").click()
    notebook.until(lambda: len(rows_of(lab, title)) > paused_at + 20, "the run to go on")
    button(notebook, "Stop").click()
    notebook.wait()
    rows = rows_of(lab, title)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    before, after = {"kl_coef": 0.05, "clip_range": 0.2}, {"kl_coef": asked, "clip_range": 0.4}
    assert [row["controls"] for row in rows] == [before] * paused_at + [after] * (len(rows) - paused_at)
    assert rows[paused_at]["objective/kl"] < 0.8 * rows[paused_at - 1]["objective/kl"], (
        "the value did not reach the step"
    )
    assert notebook.errors() == []
    notebook.page.get_by_text(f"rows: {len(rows)}", exact=True).wait_for()
    assert len(pictures(notebook.saved())) == 1
    notebook.screenshot(f"stopped_{app}")


STATE = '''
class State:
    """What `step` changes."""
    def state_dict(self):
        return {"i": step.i}
    def load_state_dict(self, saved):
        step.i = saved["i"]
'''


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_paused_rewound_by_keyboard_and_on_as_a_branch_with_both_curves_shown(open_notebook, lab, theme):
    title, total = f"branch-{theme}", 200
    run = RUN.replace("run(step)", "run(step, state=State())").format(title=title, total=total)
    notebook = open_notebook([SETUP + STATE, run, "print('rows:', len(rows))"], theme=theme)
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, title)) > 60, "60 iterations")
    button(notebook, "Pause").press("Enter")
    notebook.page.wait_for_selector(".akc-state[data-state=paused]")
    paused_at = len(rows_of(lab, title))
    assert notebook.page.locator(".akc-plot path.past").count() == 0

    choice = notebook.page.get_by_label("back to iteration")
    choice.focus()
    for _ in range(3):
        notebook.page.keyboard.press("ArrowDown")
    assert choice.input_value() == "30", "a snapshot every total / 20 iterations, and one of the start"
    box = notebook.page.locator("input[type=number][data-control=kl_coef]")
    box.focus()
    for key in ("Control+A", "0", ".", "1", "Enter"):
        notebook.page.keyboard.press(key)
    button(notebook, "Rewind").press("Enter")
    notebook.until(lambda: len(rows_of(lab, title)) == 30, "the rewind")
    notebook.page.locator(".akc-place", has_text="iteration 30 of 200").wait_for()
    assert notebook.page.locator(".akc-state[data-state=paused]").count() == 1, "it was paused, and is"
    notebook.page.locator(".akc-plot .marktext", has_text=f"rewind {paused_at} → 30").first.wait_for()
    notebook.page.get_by_text("before the rewind").first.wait_for()
    assert notebook.page.locator(".akc-pairs summary span").inner_text() == "", "samples of an iteration that is gone"

    def ends() -> list[float]:
        """Where the lines of the chart of KL end on its x axis: the branch that was left, and the current one."""
        paths = notebook.page.locator("figure", has_text="KL to the reference").locator("svg.akc-plot path")
        drawn = {paths.nth(i).get_attribute("class"): paths.nth(i).get_attribute("d") for i in range(paths.count())}
        return [float(drawn[name].split("L")[-1].split()[0]) for name in ("past", "series")]

    past, current = ends()
    assert past > current, "the branch goes on where the run went back"
    button(notebook, "Step").click()
    notebook.until(lambda: len(rows_of(lab, title)) == 31, "one step")
    notebook.page.locator(".akc-plot .marktext", has_text="kl_coef 0.05 → 0.1").first.wait_for()
    button(notebook, "Play").press("Enter")
    notebook.until(lambda: len(rows_of(lab, title)) > paused_at + 20, "the new branch to overtake the old one")
    notebook.page.locator(".akc").scroll_into_view_if_needed()
    past, current = ends()
    assert past < current
    notebook.screenshot(f"branch_{theme}")
    notebook.wait()

    rows, log = rows_of(lab, title), lab.root / title / "metrics.branch-1.jsonl"
    left = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert [row["step"] for row in left] == list(range(31, paused_at + 1))
    assert [row["controls"]["kl_coef"] for row in rows] == [0.05] * 30 + [0.1] * (total - 30)
    assert {row["controls"]["kl_coef"] for row in left} == {0.05}
    for before, after in zip(left, rows[30:], strict=False):
        assert after["objective/kl"] < before["objective/kl"], "the step saw the change, from the same state"
        assert after["policy/clipfrac_avg"] == before["policy/clipfrac_avg"]
    assert notebook.errors() == []
    notebook.page.get_by_text(f"rows: {total}", exact=True).wait_for()
    (picture,) = pictures(notebook.saved())
    notebook.screenshot(f"branched_{theme}")
    alone = len(picture)
    assert alone < 300_000


def test_a_page_reloaded_after_a_rewind_shows_both_curves_again(open_notebook, lab):
    run = RUN.replace("run(step)", "run(step, state=State())").format(title="branch-reload", total=100_000)
    notebook = open_notebook([SETUP + STATE, run, "one.show()"])
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, "branch-reload")) > 30, "30 iterations")
    button(notebook, "Rewind").click()
    notebook.page.locator(".akc-plot path.past").first.wait_for(state="attached")
    notebook.saved()
    notebook.load()
    branch = lab.root / "branch-reload" / "metrics.branch-1.jsonl"
    left = [json.loads(line)["step"] for line in branch.read_text().splitlines()]
    assert left == list(range(1, len(left) + 1)) and len(left) >= 30
    before = len(rows_of(lab, "branch-reload"))
    notebook.until(lambda: len(rows_of(lab, "branch-reload")) > before + 20, "the run to go on")
    notebook.interrupt()
    rows = rows_of(lab, "branch-reload")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_two_cockpits_one_after_another(open_notebook, lab, theme):
    first, second = f"first-{theme}", f"second-{theme}"
    cells = [SETUP, RUN.format(title=first, total=60), RUN.format(title=second, total=100_000)]
    notebook = open_notebook(cells, theme=theme)
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, second)) > 40, "the second run")
    assert notebook.page.locator(".akc").count() == 1, "the first panel has become a picture"
    notebook.page.locator(".akc").scroll_into_view_if_needed()
    notebook.page.locator(".akc-plot").first.hover()
    notebook.screenshot(f"two_{theme}")
    button(notebook, "Stop").click()
    notebook.wait()
    assert len(rows_of(lab, first)) == 60
    assert len(pictures(notebook.saved())) == 2
    assert notebook.errors() == []


def test_model_text_is_text(open_notebook, lab):
    hostile = SETUP + f"\nHOSTILE = list({HOSTILE!r}.items()) + [('one line of 1 MB', 'x' * 1_000_000)]"
    hostile = hostile.replace('[("How do I restart the router?", RESPONSE)], "shares": shares', "HOSTILE")
    hostile = hostile.replace('"clip_range": (0.05, 0.5, 0.2)', '"rate": (1e-7, 1e-3, 3e-6, "log")')
    notebook = open_notebook([hostile, RUN.format(title="hostile", total=100_000)])
    notebook.start()
    fold = notebook.page.locator(".akc-pairs summary")
    until(notebook.page, lambda: re.fullmatch(r"Samples at iteration \d+", fold.inner_text()),
          "the line of the samples, without texts that may not be fit for a screen")
    assert notebook.page.locator(".akc-bands").is_hidden(), "there are no shares to show"
    assert notebook.page.locator("input[type=number][data-control=rate]").input_value() == "3e-6"
    fold.click()
    table = notebook.page.locator(".akc-samples")
    table.get_by_text("press me").wait_for()
    assert table.locator("script, img, button, a, b, strong").count() == 0
    text = table.inner_text()
    for shown in (HOSTILE["script"], HOSTILE["image"], HOSTILE["button"], HOSTILE["markdown"]):
        assert shown in text
    assert "␛[31mred␛[0m" in text and "⟨U+202E⟩" in text and "⟨U+2066⟩" in text
    assert "1,000,000 characters, the first 400 are shown" in text and len(text) < 5_000
    table.scroll_into_view_if_needed()
    notebook.screenshot("hostile")
    button(notebook, "Stop").click()
    notebook.wait()
    saved = notebook.saved()
    kinds = {kind for cell in saved["cells"] for output in cell["outputs"] for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/plain"}, "no output may be HTML, Markdown or a widget"
    for output in saved["cells"][1]["outputs"]:
        assert not set("\x1b\x07\u202e\u2066") & set("".join(output.get("text", "")))
    assert len(json.dumps(saved)) < 1_000_000 and len(pictures(saved)) == 1
    shown = notebook.page.locator(".jp-OutputArea").last
    assert shown.locator("script, button, img:not([src^='data:image/png'])").count() == 0
    for link in shown.locator("a").all():  # Jupyter makes links of addresses that are printed, and of nothing else
        assert link.get_attribute("href") == link.inner_text()
    assert notebook.page.evaluate("window.hacked") is None
    assert notebook.errors() == []


def test_an_interrupt_leaves_a_whole_log_and_a_picture(open_notebook, lab):
    notebook = open_notebook([SETUP, RUN.format(title="interrupt", total=100_000)])
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, "interrupt")) > 20, "20 iterations")
    notebook.interrupt()
    notebook.wait()
    rows = rows_of(lab, "interrupt")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    saved = notebook.saved()
    assert len(pictures(saved)) == 1 and "interrupted after" in json.dumps(saved)
    errors = [output for output in saved["cells"][1]["outputs"] if output["output_type"] == "error"]
    assert [error["ename"] for error in errors] in (["CancelledError"], ["KeyboardInterrupt"])


def test_after_a_restart_of_the_kernel_the_log_is_whole_and_the_run_goes_on_from_it(open_notebook, lab):
    again = RUN.replace("run(step)", "run(step, start=done)").format(title="restart", total="done + 30")
    later = f"from alignkit.storage import read_metrics\ndone = len(read_metrics('restart/metrics.jsonl'))\n{again}"
    notebook = open_notebook([SETUP, RUN.format(title="restart", total=100_000)])
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, "restart")) > 20, "20 iterations")
    lab.post(f"api/kernels/{notebook.kernel_id()}/restart")
    there = rows_of(lab, "restart")
    assert [row["step"] for row in there] == list(range(1, len(there) + 1))
    notebook.page.wait_for_timeout(1000)
    assert rows_of(lab, "restart") == there, "nothing of the old kernel writes any more"
    notebook.page.evaluate("""(source) => {
        const cells = window.jupyterapp.shell.currentWidget.content.widgets;
        cells[1].model.sharedModel.setSource(source);
    }""", later)
    notebook.run()
    rows = rows_of(lab, "restart")
    assert rows[: len(there)] == there and len(rows) == len(there) + 30
    assert len(pictures(notebook.saved())) == 1
    assert notebook.errors() == []


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_reload_in_mid_run_does_not_hang_the_run(open_notebook, lab, paused):
    title = f"reload-{paused}"
    notebook = open_notebook([SETUP, RUN.format(title=title, total=300), "one.show()"])
    notebook.start()
    notebook.until(lambda: len(rows_of(lab, title)) > 20, "20 iterations")
    if paused:
        button(notebook, "Pause").click()
        notebook.page.wait_for_selector(".akc-state[data-state=paused]")
    notebook.saved()  # the panel is in the file now
    notebook.load()
    notebook.until(lambda: len(rows_of(lab, title)) == 300, "the end of the run")
    assert [row["step"] for row in rows_of(lab, title)] == list(range(1, 301))
    notebook.page.evaluate("""() => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = notebook.widgets.length - 1;
        window.allRan = false;
        window.jupyterapp.commands.execute('notebook:run-cell').finally(() => { window.allRan = true; });
    }""")
    notebook.wait()
    notebook.page.locator(".jp-OutputArea img").last.wait_for()
    notebook.screenshot(f"reloaded_{'paused' if paused else 'running'}")


TRAINER = '''
from types import SimpleNamespace
def train(callback, steps, seconds):
    """A Trainer's life, as transformers calls it, without the training."""
    state = SimpleNamespace(max_steps=steps, global_step=0)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, steps + 1):
        time.sleep(seconds)
        callback.on_log(None, state, None, logs={"loss": 2 / state.global_step ** 0.5, "epoch": 0.5})
        if state.global_step == 300:
            open("half", "w").close()
    callback.on_log(None, state, None, logs={"train_runtime": 1.0, "train_loss": 1.0})
    callback.on_train_end(None, state, None)
sft = TrainingCockpit("SFT", charts=[("Loss (nats per token)", ["loss"])], log="sft/metrics.jsonl")
'''


@pytest.mark.parametrize("ends", ["finished", "interrupted"])
def test_a_trainer_is_watched_live_and_leaves_a_picture(open_notebook, lab, ends):
    (lab.root / "half").unlink(missing_ok=True)
    notebook = open_notebook([SETUP + TRAINER, "train(sft.callback(), 600, 0.02)"])
    notebook.start()
    notebook.page.locator(".akc", has_text="Interrupt in the toolbar").wait_for()
    notebook.page.wait_for_function("document.querySelector('.akc-plot path.series')?.getAttribute('d').length > 200")
    assert notebook.page.locator(".akc button, .akc input").count() == 0
    notebook.until(lambda: (lab.root / "half").exists(), "half of the run")
    first = notebook.page.locator(".akc-plot path.series").get_attribute("d").split("L")[0]
    assert float(first.removeprefix("M").split()[0]) < 50, "the first points are missing"
    notebook.screenshot("trainer")
    if ends == "interrupted":
        notebook.interrupt()
    notebook.wait()
    rows = rows_of(lab, "sft")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (len(rows) == 600) == (ends == "finished")
    saved = notebook.saved()
    assert len(pictures(saved)) == 1 and f"{ends} after" in json.dumps(saved)
