"""Parameters reach what they mean, help lists them, and what cannot work is refused before anything starts."""

import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from transformers import GraniteConfig, GraniteForCausalLM

from alignkit.configs import DPOConfig, RewardConfig, SFTConfig
from alignkit.data.rows import check, load_rows
from alignkit.desk.tiny import desk_tokenizer
from alignkit.errors import DataError, ManifestError, ParameterError, RunError
from alignkit.evaluate.comparison import compare_directories
from alignkit.jobs import cli, listing, notebooks, preconditions, progress
from alignkit.jobs import job as job_module
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.jobs.parameters import notebook_parameters
from alignkit.jobs.progress import Progress, clipped, last_of_progress
from alignkit.jobs.stage_parameters import values_by_notebook, where_they_went
from alignkit.models import loading
from alignkit.models.loading import load_policy
from alignkit.sources import local_path

PAIR = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}


def notebook(path: Path, parameters: str, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell("# 9 · A toy\n\n**What is *asked* here?**"),
                nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def series(tmp_path):
    """Three toys: two know `rate`, one `steps`."""
    return [notebook(tmp_path / "01_sft.ipynb", "run = ''\nseed = 0\nrate = 1.0"),
            notebook(tmp_path / "02_reward_model.ipynb", "run = ''\nseed = 0\nsteps = 5"),
            notebook(tmp_path / "03b_ppo.ipynb", "run = ''\nseed = 0\nrate = 2.0")]


@pytest.fixture
def known(series):
    return {path.stem: notebook_parameters(path) for path in series}


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(notebooks, "_execute", lambda *_: pytest.fail("a kernel was started"))
    monkeypatch.setattr(notebooks, "_spare", lambda job: pytest.fail("a kernel was started") if job else None)


def alignkit(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


# --- which notebook gets what ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["ppo", "3", "03", "03b", "03b_ppo"])
def test_a_stage_is_its_name_or_its_notebooks_number_or_name_and_wins(known, stage):
    values = values_by_notebook(known, {f"{stage}.rate": "0.1", "rate": "0.2", "seed": 3})
    assert values == {"01_sft": {"rate": "0.2", "seed": 3}, "02_reward_model": {"seed": 3},
                      "03b_ppo": {"rate": "0.1", "seed": 3}}


def test_of_two_lessons_with_one_number_the_digits_mean_the_one_that_makes_the_stage():
    known = {name: notebook_parameters(notebooks.find_notebook(name)) for name in ("03a_ppo_by_hand", "03b_ppo")}
    for stage, notebook in {"3": "03b_ppo", "ppo": "03b_ppo", "03b": "03b_ppo", "03a": "03a_ppo_by_hand",
                            "3a": "03a_ppo_by_hand", "03a_ppo_by_hand": "03a_ppo_by_hand"}.items():
        values = values_by_notebook(known, {f"{stage}.kl_coef": "0.1"})
        assert {name for name, of_one in values.items() if of_one} == {notebook}, stage
    with pytest.raises(ParameterError, match="03.kl_coef is for 03b_ppo, which is not what runs here"):
        values_by_notebook({"03a_ppo_by_hand": known["03a_ppo_by_hand"]}, {"03.kl_coef": 1})


@pytest.mark.parametrize("given, says", [
    ({"rat": 1}, r"rat: no notebook of the course has such a parameter; did you mean rate\? "
                 r"\(01_sft, 03b_ppo has it\)"),
    ({"sed": 1}, r"did you mean seed\? \(every notebook has it\)"),
    ({"zzzz": 1}, "it has: run, seed, rate, steps"),
    ({"ppo.steps": 1}, r"ppo.steps: 03b_ppo has no such parameter; it has: run, seed, rate \(02_reward_model has it\)"),
    ({"pppo.rate": 1}, r"pppo.rate: no stage is called 'pppo'; did you mean ppo.rate\?"),
    ({"zzz.rate": 1}, "no stage is called 'zzz'; expected sft, reward, ppo, or a notebook's number or name"),
    ({"dpo.rate": 1}, r"dpo.rate is for 05_dpo, which is not what runs here \(01_sft, 02_reward_model, 03b_ppo\)"),
    ({"ppo.rate": 1, "03.rate": 2}, "rate of 03b_ppo is given twice, as ppo.rate and as 03.rate"),
    ({"ppo.seed": 1}, "seed is the whole run's, one for all notebooks; give it as -p seed="),
    ({"ppo.model": 1}, "give it as --model"),
    ({"ppo.run": 1}, "give it as --out"),
    ({"ppo.class": 1}, "parameter name is 'class'"),
    ({"ppo.rate.x": 1}, "expected a plain name"),
])
def test_a_parameter_that_reaches_nothing_is_refused(known, given, says):
    with pytest.raises(ParameterError, match=says):
        values_by_notebook(known, given)


def test_a_line_says_where_each_parameter_went(known):
    given = {"rate": "1e-4", "sft.rate": "3", "steps": "6\x1b[2J", "seed": 1, "kind": "pairs"}
    assert where_they_went(known, given) == [
        "rate=1e-4: 01_sft, 03b_ppo; for one of them: -p ppo.rate=…", "sft.rate=3: 01_sft",
        "steps=6␛[2J: 02_reward_model"]


def test_a_value_for_one_stage_reruns_that_stage_and_what_comes_after_it(series, tmp_path, monkeypatch, capsys):
    ran = []

    def pretend(job, executing, _timeout, on_cell, *_):
        ran.append((job.name, job.values.get("rate")))
        job.folder.mkdir(exist_ok=True)
        (job.folder / "made.txt").write_text(str(job.values.get("rate")))
        executing.touch()

    monkeypatch.setattr(notebooks, "_execute", pretend)
    monkeypatch.setattr(notebooks, "_spare", lambda job: None)
    monkeypatch.setattr(job_module, "code_hash", lambda: "code")
    out = tmp_path / "run"

    def go(**parameters) -> list:
        ran.clear()
        course(out, parameters={name.replace("__", "."): value for name, value in parameters.items()},
               notebooks=series)
        return list(ran)

    assert go(rate="3") == [("01_sft", 3.0), ("02_reward_model", None), ("03b_ppo", 3.0)]
    assert capsys.readouterr().out.startswith("rate=3: 01_sft, 03b_ppo; for one of them: -p ppo.rate=…\n")
    assert go(rate="3") == []
    assert go(rate="3", ppo__rate="4") == [("03b_ppo", 4.0)]
    assert "03b_ppo                 again: rate was 3.0, now 4.0" in capsys.readouterr().out
    assert go(sft__rate="3", ppo__rate="4") == []  # each got what it had
    given = json.loads((out / "jobs.json").read_text())
    assert (given["01_sft"]["given"], given["03b_ppo"]["given"]) == ({"rate": 3.0}, {"rate": 4.0})
    assert [name for name, _ in go(sft__rate="5", ppo__rate="4")] == ["01_sft", "02_reward_model", "03b_ppo"]


def test_a_notebook_that_runs_alone_takes_its_own_stage_alone(series, tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(notebooks, "_run", lambda job, **_: jobs.append(job) or job.executed)
    run = ["run", series[2], "--out", tmp_path / "run"]
    assert alignkit(*run, "-p", "rate=3", "-p", "ppo.rate=0.5") == 0
    assert jobs[0].values["rate"] == 0.5
    assert alignkit(*run, "-p", "sft.rate=0.5") == 1
    assert "sft.rate is for 01_sft, which is not what runs here (03b_ppo)" in capsys.readouterr().err


# --- help ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", notebooks.find_notebooks())
def test_every_parameter_of_every_notebook_says_what_it_is(name):
    text = listing.parameter_help(name, 90)
    assert all(len(line) <= 90 for line in text.splitlines())
    joined = " ".join(text.split())
    for parameter in notebook_parameters(notebooks.find_notebook(name)).values():
        assert len(parameter.help.split()) >= 2, f"{name}: {parameter.name} has no comment that says what it is"
        assert not parameter.help.startswith(("None:", "of ")), f"{name}: {parameter.name}: {parameter.help}"
        if parameter.name != "run":
            meaning = " ".join(parameter.help.split()).partition("; None: the preset")[0]
            assert f"{parameter.name} {meaning} [{parameter.type}" in joined or "list" in text
    assert "the preset" not in joined
    for shown in {"03b_ppo": ("units of the score [float or none, default 0.2 for tiny, 0.05 for other models]",
                              "around 1 [float or none, default 0.2]"),
                  "05_dpo": ("kl_coef [float or none, default 0.5 for tiny, 0.1 for other models]",)}.get(name, ()):
        assert shown in joined


def test_the_help_of_a_notebook_of_ones_own_is_aligned_and_escaped(tmp_path):
    path = notebook(tmp_path / "mine.ipynb", "run = ''\nrate: float | None = None  # a step \x1b[31m of it\n"
                    "sizes = [1, 2]\nname = 'x'  # " + "long " * 30)
    lines = listing.parameter_help(path, 70).splitlines()
    assert lines[:2] == ["mine: A toy", "  What is asked here?"]
    assert lines[3:5] == ["parameters, given as -p NAME=VALUE",
                          "in a course, to this notebook alone, as -p mine.NAME=VALUE:"]
    assert lines[5] == "  rate                    a step ␛[31m of it [float or none, default"
    assert "  sizes                   [list of int, default [1, 2]]" in lines
    assert all(len(line) <= 70 for line in lines) and lines[-1] == " " * 26 + "long long long [str, default \"x\"]"
    path = notebook(tmp_path / "none.ipynb", "")
    assert listing.parameter_help(path).endswith("It has no parameters.")


def test_help_lists_parameters_and_notebooks_without_torch(capsys):
    code = ("import sys, contextlib\nfrom alignkit.jobs.cli import main\n"
            "with contextlib.suppress(SystemExit): main(['run', '3', '--help'])\nmain(['notebooks'])\n"
            "heavy = {'torch', 'transformers', 'papermill', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: alignkit run" in done.stdout and "-p ppo.NAME=VALUE" in done.stdout
    assert "05_dpo                  DPO: preferences without a reward model" in done.stdout
    assert "needs sft, reward, frozen; 21.9 s with its defaults" in done.stdout
    with pytest.raises(SystemExit) as caught:
        alignkit("run", "42_nothing", "--help")
    assert caught.value.code == 1 and "no notebook '42_nothing'" in capsys.readouterr().err


# --- progress --------------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("text, shown", [
    ("Chosen: x\nPPO: step 44 of 80, 4:50 min left | score 0.31\n", "PPO: step 44 of 80, 4:50 min left | score 0.31"),
    ("63 steps of 128 pairs, 0.21 s each: about 30 s\nmemory: 3.2 MB\n",
     "63 steps of 128 pairs, 0.21 s each: about 30 s"),
    ("1 of 9\r2 of 9\r3 of 9", "3 of 9"),
    ("a table of numbers\n", ""),
    ("\x1b[2Jstep 1 of 2\x07", "␛[2Jstep 1 of 2␇"),
    ("9 of 10 " + "x" * 900, "9 of 10 " + "x" * 192 + "… [908 characters, the first 200 are shown]"),
])
def test_the_last_line_that_tells_progress_is_taken_and_escaped(text, shown):
    assert last_of_progress(text) == shown


def test_a_line_is_clipped_to_its_columns():
    assert clipped("abcdef", 6) == "abcdef" and clipped("abcdefg", 6) == "abcde…"
    assert clipped("日本語", 6) == "日本語" and clipped("日本語だ", 6) == "日本…"


@pytest.fixture
def clock(monkeypatch):
    """Ticks that come when they are asked for: a list of what each tick waited; the last one ends the thread."""
    def run(line: Progress, ticks) -> list:
        waited = []

        def wait(seconds: float) -> bool:
            waited.append(seconds)
            return not next(ticks, None)

        monkeypatch.setattr(line.over, "wait", wait)
        line._tick()
        return waited

    return run


def test_a_terminal_shows_the_notebooks_own_progress_on_one_line(monkeypatch, clock):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda *_, **__: shutil.os.terminal_size((71, 20)))
    monkeypatch.setattr(threading_of(progress), "start", lambda self: None)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))
    line = Progress("03b_ppo", None)
    line.at(4, 10)
    line.at(4, 10, "PPO: iteration 7 of 40, 1:20 min left | score \x1b[31m0.3 and " + "much more " * 20)
    clock(line, iter([True]))
    shown = sys.stdout.getvalue()
    assert shown.startswith("\r\x1b[K03b_ppo") and "\n" not in shown
    visible = shown.removeprefix("\r\x1b[K")
    assert len(visible) == 70 and visible.endswith("…") and "\x1b" not in visible
    assert visible.startswith("03b_ppo cell 5 of 10, 0.0 s · PPO: iteration 7 of 40")  # there is no room for the bar
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda *_, **__: shutil.os.terminal_size((400, 20)))
    clock(line, iter([True]))
    assert "░ cell 5 of 10, 0.0 s · PPO: iteration 7 of 40, 1:20 min left | score ␛[31m0.3" in sys.stdout.getvalue()
    line.at(5, 10)  # the next cell has not said anything yet
    assert "iteration" not in line.words()
    line.at(5, 10, "63 steps of 128 pairs, 0.21 s each: about 30 s\n")
    line.at(6, 10)
    assert line.words().endswith("about 30 s")  # an estimate is of a later cell


def threading_of(module):
    return module.threading.Thread


def test_a_log_gets_a_line_every_half_minute_at_most(monkeypatch, clock):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(threading_of(progress), "start", lambda self: None)
    line = Progress("03b_ppo", None)
    line.at(4, 10)

    def ticks():
        line.at(4, 10, "step 1 of 3\nstep 2 of 3\n")
        yield True  # new: told
        yield True  # nothing new, and the second tick: told
        yield True  # nothing new, the third: not told
        line.at(4, 10, "step 3 of 3\n")
        yield True  # new

    waited = clock(line, ticks())
    assert set(waited) == {30}
    told = sys.stdout.getvalue().splitlines()
    assert [text.rpartition("· ")[2] for text in told] == ["step 2 of 3", "step 2 of 3", "step 3 of 3"]
    assert all("\r" not in text and text.startswith("03b_ppo                 cell 5 of 10, ") for text in told)


def test_what_a_cell_prints_reaches_the_progress_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Progress, "at", lambda self, *what: seen.append(what))
    path = notebook(tmp_path / "x.ipynb", "run = ''\nseed = 0", "import sys\nprint('step 3 of 9, 2.0 s left')\n"
                    "print('5 of 6', file=sys.stderr)")
    run_notebook(path, tmp_path / "run")
    assert (2, 3, "step 3 of 9, 2.0 s left\n") in seen and not [what for what in seen if "5 of 6" in what[2]]


# --- what is refused before anything starts --------------------------------------------------------------------------
@pytest.mark.parametrize("given, says", [
    (["learning_rate=-1"], "01_sft: learning_rate is -1.0, expected 0 or more; the parameter is learning_rate"),
    (["ppo.clip_range=-0.1"], "03b_ppo: clip_range is -0.1, expected 0 or more"),
    (["gae_lambda=2"], "gae_lambda is 2.0, expected a number between 0 and 1"),
    (["dpo.batch_size=0"], "05_dpo: batch_size is 0, expected at least 1"),
    (["sft.epochs=0"], "01_sft: epochs is 0.0, expected more than 0"),
    (["loss_type=zzz"], "loss_type is 'zzz', expected one of sigmoid"),
    (["loss_type=ipo", "label_smoothing=0.1"], "label_smoothing goes with loss_type"),
    (["seed=-1"], "seed is -1, expected a whole number from 0"),
    (["max_length=0"], "max_length is 0, expected at least 1"),
    (["steps=1"], "steps: no notebook of the course has such a parameter"),
])
def test_a_value_out_of_range_is_refused_and_leaves_nothing(tmp_path, no_kernel, capsys, given, says):
    parameters = [part for each in given for part in ("-p", each)]
    assert alignkit("course", "--out", tmp_path / "run", *parameters) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig])
def test_configs_refuse_what_no_training_can_do(config):
    for name, value in {"epochs": 0, "learning_rate": float("nan"), "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"{name} is "):
            config(**{name: value})
    config(learning_rate=0.0)  # a trial that moves nothing
    with pytest.raises(ValueError, match="centre is -1, expected 0 or more"):
        RewardConfig(centre=-1)


@pytest.mark.parametrize("rows, arguments, says", [
    ([{"prompt": "Why?", "completion": " So."}], [], "has demonstrations, and notebook 02_reward_model needs pairs"),
    ([{"prompt": "Why?"}], [], "has prompts, and notebook 02_reward_model needs pairs"),
    ([PAIR, {**PAIR, "chosen": None}], [], "a.jsonl:2: chosen: is null, expected text (1 bad row among the first 2"),
    ([], [], "there are no rows in it"),
    ([PAIR], ["--kind", "demonstrations"], "needs pairs"),
    ([PAIR], ["--columns", "prompt=question,chosen=a"], "a.jsonl"),
])
def test_data_that_cannot_do_is_refused_and_leaves_nothing(tmp_path, no_kernel, capsys, rows, arguments, says):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert alignkit("course", "--data", tmp_path / "a.jsonl", *arguments, "--out", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_only_the_first_rows_are_looked_at_beforehand(tmp_path):
    rows = [json.dumps({**PAIR, "prompt": f"{number}?"}) + "\n" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(rows) + "x\n")
    assert check(tmp_path / "a.jsonl").bad_rows == 1
    assert check(tmp_path / "a.jsonl", most=100).ok


@pytest.fixture
def granite(tmp_path):
    """A model of an architecture that has no class that scores a text."""
    tokenizer = desk_tokenizer()
    config = GraniteConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2)
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    return tmp_path / "granite"


def test_a_model_that_cannot_become_a_reward_model_is_refused_before_sft(granite, tmp_path, no_kernel, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n")
    arguments = ["course", "--model", granite, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "run"]
    assert alignkit(*arguments) == 1
    said = capsys.readouterr().err
    assert "cannot become a reward model: granite models have no class that scores a text" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
    loading.check_model(granite)  # as a policy it will do
    (granite / "model.safetensors").rename(granite / "pytorch_model.bin")
    assert alignkit(*arguments) == 1 and "has no model.safetensors, only pytorch_model.bin" in capsys.readouterr().err
    shutil.copytree(granite, tmp_path / "run2" / "sft")
    with pytest.raises(RunError, match="has no model.safetensors"):
        run_notebook("02", tmp_path / "run2", {"model": str(granite), "data": str(tmp_path / "a.jsonl")})


def test_prompts_of_your_model_that_cannot_be_asked_are_refused_before_anything_trains(tmp_path, no_kernel, capsys):
    (tmp_path / "xs.csv").write_text("prompt,type,label\nHow do I bake bread?,x,perhaps\n")
    for name, says in (("none.csv", "no such file"), ("xs.csv", "expected safe or unsafe")):
        given = f"refusal_prompts={tmp_path / name}"
        assert alignkit("run", "your_model", "--out", tmp_path / "run", "-p", given) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_missing_stage_is_refused_and_leaves_nothing(tmp_path, no_kernel, capsys):
    for notebook in ("3", "03a"):
        assert alignkit("run", notebook, "--out", tmp_path / "run") == 1
        assert "sft has no model: run notebook 01_sft" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_directory_that_takes_no_file_is_refused(series, tmp_path, no_kernel, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(RunError, match=r"run' cannot be written to: No space left on device"):
        run_notebook(series[0], tmp_path / "run")


def test_the_configs_of_the_notebooks_are_those_that_they_make():
    for name, configs in preconditions.CONFIGS.items():
        source = notebooks.find_notebook(name).read_text(encoding="utf-8")
        assert all(f"preset({config.__name__}, model" in source for config in configs)


@pytest.mark.parametrize("notebook, name, value, least", [
    ("01_sft", "demonstrations", 0, 1), ("02_reward_model", "heldout_pairs", -3, 1), ("03b_ppo", "lora_rank", -1, 0),
    ("your_model", "pairs", 0, 1), ("your_model", "eval_samples", 0, 1), ("your_model", "lora_rank", -1, 0)])
def test_a_count_that_cannot_be_is_refused_before_a_kernel_starts(tmp_path, notebook, name, value, least):
    with pytest.raises(ParameterError, match=f"{notebook}: {name} is {value}, expected {least} or more; the parameter"):
        run_notebook(notebook, tmp_path / "run", {name: value})
    assert not (tmp_path / "run").exists()


def test_values_of_your_model_are_checked_as_ppos_and_dpos(tmp_path):
    for name, value in {"iterations": -1, "kl_coef": -0.5, "beta": -1.0}.items():
        with pytest.raises(ParameterError, match=f"your_model: {name} is"):
            run_notebook("your_model", tmp_path / "run", {name: value})
    assert not (tmp_path / "run").exists()


def test_values_that_fit_together_are_taken_in_any_order():
    """advantage "rloo" is refused with one sample a prompt: here samples_per_prompt comes after it."""
    values = {"iterations": 3, "advantage": "rloo", "samples_per_prompt": 4}
    job = SimpleNamespace(name="03b_ppo", settings=values, parameters={name: name for name in values}, builds_beside=())
    preconditions.check_values(job)
    job.settings = {**values, "samples_per_prompt": 1}
    with pytest.raises(ParameterError, match="samples_per_prompt is 1, expected .*; the parameter is advantage"):
        preconditions.check_values(job)
    job.settings = {**values, "iterations": 0}
    with pytest.raises(ParameterError, match="iterations is 0, expected at least 1; the parameter is iterations"):
        preconditions.check_values(job)


# --- a path, or a Hub id ---------------------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "models" / "qwen-small").mkdir(parents=True)
    (tmp_path / "pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["org/name", "gpt2", "Qwen/Qwen2.5-0.5B", "nobody/models"])
def test_a_hub_id_is_none(here, name):
    assert local_path(name) is None


@pytest.mark.parametrize("name", [
    "./models/x", "models/x/", "../x", "~/x", "~nobody-at-all/x", "C:\\x", "a/b/c", "models/x", "/no/where", "x.jsonl",
    "data.parquet", "a b", "x/", "gone\0", "x" * 5000 + "/a/b", Path("gpt2"), "https://host/org/name"])
def test_what_can_only_be_a_path_is_never_a_hub_id(here, name):
    with pytest.raises(ParameterError, match="^model is .*, and there is no such file or folder"):
        local_path(name, "model")
    with pytest.raises(DataError, match=": there is no such file or folder"):
        local_path(name, error=DataError)


def test_what_is_here_is_a_path_whatever_it_looks_like(here):
    (here / "org" / "name").mkdir(parents=True)
    assert local_path("org/name") == Path("org/name") and local_path("models") == Path("models")
    assert local_path("~/pairs.jsonl") == here / "pairs.jsonl"


@pytest.mark.parametrize("name, hint", [
    ("models/qwen-smal", "; did you mean models/qwen-small?"),
    ("model/qwen-small/", "; did you mean models/qwen-small?"),
    ("./pair.jsonl", "; did you mean pairs.jsonl?"), ("./zzz/yyy", " (zzz is not there)"), ("./zzz", "")])
def test_the_nearest_name_is_told(here, name, hint):
    with pytest.raises(ParameterError) as caught:
        local_path(name, "data")
    assert str(caught.value) == f"data is {name!r}, and there is no such file or folder{hint}"


def test_every_door_decides_alike(here, no_kernel, capsys, monkeypatch):
    monkeypatch.setattr(loading, "cached_file", lambda *_, **__: pytest.fail("the Hub was asked"))
    for arguments in (["course", "--model", "models/x", "--out", "run"],
                      ["course", "--data", "models/x", "--out", "run"], ["check", "models/x"],
                      ["compare", "models/x", "--out", "compared"],
                      ["compare", "models/qwen-small", "--data", "models/x", "--out", "compared"]):
        assert alignkit(*arguments) == 1
        assert "there is no such file or folder" in capsys.readouterr().err, arguments
    assert not (here / "run").exists()
    with pytest.raises(ManifestError, match="model is 'models/x', and there is no such"):
        load_policy("models/x")
    with pytest.raises(DataError, match="models/x: there is no such"):
        load_rows("models/x")
    with pytest.raises(ManifestError, match=r"runs/a: there is no such file or folder"):
        compare_directories(["runs/a"])
