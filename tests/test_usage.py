"""Help: each command has an example, each option a sentence, and a wrong word gets the nearest right one as answer."""

import argparse
import re
import shlex

import pytest

from alignkit.jobs import cli
from alignkit.jobs.notebooks import find_notebook
from alignkit.jobs.usage import alike, nearest


def commands(parser: argparse.ArgumentParser, name: str = "alignkit") -> dict[str, argparse.ArgumentParser]:
    """Every command and sub-command by its name."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                found |= commands(child, f"{name} {word}")
    return found


COMMANDS = commands(cli._parser())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_sentence_and_every_command_an_example_that_it_understands(name, tmp_path):
    for action in COMMANDS[name]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert len((action.help or "").split()) >= 2, f"{name}: {action.option_strings or action.metavar}"
        assert action.metavar is None or len(action.metavar) > 1, f"{name}: {action.metavar} says nothing"
    examples = (COMMANDS[name].epilog or "").removeprefix("examples: ").removeprefix("example: ").split("\n")[0]
    for example in examples.split("     "):
        program, *arguments = shlex.split(example)
        assert program == "alignkit" and ("--help" in arguments or cli._parser().parse_args(arguments))


@pytest.mark.parametrize("arguments, says", [
    (["corse", "--out", "r"], "unknown command 'corse'; did you mean course?"),
    (["dance"], "unknown command 'dance' (choose from course, "),
    (["run", "03b_ppo", "--out", "r", "--timout", "3"], "unknown argument '--timout'; did you mean --timeout?"),
    (["runs", "prune", "r", "--yess"], "unknown argument '--yess'; did you mean --yes?"),
    (["course", "--out", "r", "--track", "tensorbord"], "unknown value 'tensorbord'; did you mean tensorboard?"),
    (["--verison"], "unknown argument '--verison'; did you mean --version?"),
    (["course", "--outt", "r"], "unknown argument '--outt'; did you mean --out?"),
    (["course", "--outt=r"], "unknown argument '--outt=r'; did you mean --out?"),
    (["runs", "--hepl"], "unknown argument '--hepl'; did you mean --help?"),
    (["course", "--mod", "tiny"], "the following arguments are required: --out"),
    (["grade", "--"], "the following arguments are required: FILE"),
    (["run", "03b_ppo", "--out", "r", "-p", "kl_coef", "0.35"], "'kl_coef' is not NAME=VALUE, such as kl_coef=0.1"),
])
def test_a_wrong_word_is_answered_with_the_nearest_right_one(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("arguments, code, says", [
    ([], 2, "usage: alignkit [-h]"), (["runs"], 2, "usage: alignkit runs [-h]"), (["help"], 0, "usage: alignkit [-h]"),
    (["help", "sweep"], 0, "usage: alignkit sweep"), (["help", "run", "03b_ppo"], 0, "kl_coef"),
])
def test_no_command_and_help_are_answered_with_the_help(capsys, arguments, code, says):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr()
    assert caught.value.code == code and says in said.out and not said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_that_an_option_takes_has_an_example(name):
    for action in COMMANDS[name]._actions:
        if action.option_strings and action.metavar in ("NUMBER", "COUNT", "SECONDS", "SEED"):
            assert ("such as" in action.help or f"{action.option_strings[-1]} " in COMMANDS[name].epilog
                    or re.search(r"default: \d", action.help)), f"{name}: {action.option_strings[-1]}"


def test_a_wrong_notebook_is_answered_with_the_nearest_one():
    with pytest.raises(FileNotFoundError, match=r"no notebook '03b_pp'; did you mean 03b_ppo\?; expected"):
        find_notebook("03b_pp")
    assert nearest("xyz", ["course", "run"]) == ""
    assert alike("lr", ["seed", "learning_rate", "kl_coef"]) == alike("rate", ["learning_rate"]) == ["learning_rate"]
