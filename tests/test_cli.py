"""The `alignkit` command: exit codes, messages, and what it does not import."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from alignkit.evaluate import comparison
from alignkit.jobs import cli, notebooks


def alignkit(*arguments: str) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def toy(tmp_path):
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell("run = ''\nseed = 0", metadata={"tags": ["parameters"]})]
    nbformat.write(nb, tmp_path / "toy.ipynb")
    return tmp_path / "toy.ipynb"


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, alignkit.jobs.cli\n"
        "try: alignkit.jobs.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'papermill', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    before = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cpu_seconds() - before < 1
    for command in ("course", "run", "check", "freeze", "verify", "compare", "evaluate", "report"):
        assert command in done.stdout


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["dance"], "unknown command 'dance'"),
        (["course"], "required: --out"),
        (["run", "x.ipynb", "--out", "r", "-p", "seed"], "'seed' is not NAME=VALUE"),
        (["run", "x.ipynb", "--out", "r", "--timeout", "-3"], "not a number of seconds above 0"),
        (["run", "x.ipynb", "--out", ""], "expected a folder"),
        (["compare", "--out", "r"], "required: DIR"),
    ],
)
def test_wrong_usage_exits_with_2(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        alignkit(*arguments)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        alignkit("--version")
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("alignkit 0.")


def test_expected_errors_are_one_message_and_exit_code_1(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "_execute", lambda *_: pytest.fail("a kernel was started"))
    run = ["run", toy, "--out", tmp_path / "out"]
    for arguments, says in (
        *(([command, "03b_ppo", "--out", tmp_path / "o", "-p", f"kl_coef={text}"],
           "lists (0.1,0.2) and ranges (LOW..HIGH, two numbers)")
          for command, text in (("run", "0.1,0.2"), ("run", "0.1..0.3"), ("sweep", "0.1..x"))),
        ([*run, "-p", "sed=1"], "alignkit: sed: toy has no such parameter; did you mean seed?"),
        ([*run, "-p", "seed=x"], "alignkit: seed is 'x', expected an int"),
        ([*run, "-p", "seed=1", "-p", "seed=2"], "seed is given twice, as '1' and as '2'"),
        (["run", "09_nothing", "--out", "r"], "no notebook '09_nothing'"),
        (["course", "--out", tmp_path / "out", "-p", "model=x"], "model: give it as --model"),
        (
            ["course", "--out", tmp_path / "out", "--model", "./nowhere"],
            "model is './nowhere', and there is no such file",
        ),
        (["report", tmp_path / "nowhere"], "is not a run directory"),
        (["verify", tmp_path], "manifest.json is missing"),
        (["freeze", tmp_path, "--out", tmp_path / "frozen"], "not a whole checkpoint"),
        (["check", tmp_path / "nowhere.jsonl"], "nowhere.jsonl"),
    ):
        assert alignkit(*arguments) == 1, arguments
        said = capsys.readouterr()
        assert says in said.err and "Traceback" not in said.err, said.err


def test_unexpected_errors_keep_their_traceback(toy, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(notebooks, "_execute", broken)
    with pytest.raises(KeyError):
        alignkit("run", toy, "--out", tmp_path / "out")


def test_check_names_the_line_of_a_bad_row(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    good = {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}
    pairs.write_text(json.dumps(good) + "\n")
    assert alignkit("check", pairs) == 0
    assert "1 good, 0 bad" in capsys.readouterr().out
    pairs.write_text(json.dumps(good) + "\n" + json.dumps({**good, "chosen": None}) + "\n")
    assert alignkit("check", pairs) == 1
    assert f"{pairs}:2: " in capsys.readouterr().out


def test_freeze_and_verify(tmp_path, capsys):
    from alignkit.models.loading import load_policy, save_model

    save_model(*load_policy("tiny", seed=0, device="cpu"), tmp_path / "a")
    assert alignkit("freeze", tmp_path / "a", "--out", tmp_path / "b") == 0
    assert alignkit("verify", tmp_path / "b") == 0
    assert "every byte as it was frozen" in capsys.readouterr().out
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    assert alignkit("verify", tmp_path / "b") == 1
    assert "config.json has" in capsys.readouterr().err


def test_compare_hands_its_folders_on_and_says_where_the_page_is(tmp_path, capsys, monkeypatch):
    seen = []
    compared = type("Compared", (str,), {"warning": ""})("the table")
    monkeypatch.setattr(comparison, "compare_directories", lambda *given: seen.append(given) or compared)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    assert alignkit("compare", "a", "b", "--data", "pairs.jsonl", "--out", "compared") == 0
    assert seen == [([Path("a"), Path("b")], str(tmp_path / "pairs.jsonl"), Path("compared"))]
    said = capsys.readouterr().out
    assert "the table" in said and "compared/compare.html" in said
    for name in ("r2", "r1"):
        Path(name).mkdir()
    assert alignkit("compare", "r*", "--out", "compared") == 0 and seen[1][0] == [Path("r1"), Path("r2")]
    assert alignkit("compare", "s*", "--out", "compared") == 1
    assert "s*: nothing matches this pattern" in capsys.readouterr().err and len(seen) == 2


def test_errors_are_red_on_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert alignkit("verify", "nowhere") == 1 and "\x1b" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert alignkit("verify", "nowhere") == 1 and capsys.readouterr().err.startswith("\x1b[31malignkit: ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert alignkit("verify", "nowhere") == 1 and "\x1b" not in capsys.readouterr().err
