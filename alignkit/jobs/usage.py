"""A command line that names the nearest right word for a wrong one."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence


class CommandParser(argparse.ArgumentParser):
    """argparse's parser; a wrong command, choice or option is answered with the nearest right one."""

    given: Sequence[str] = ()  # the words that this parser reads

    def parse_args(self, args=None, namespace=None):
        """As argparse does; `help COMMAND` means `COMMAND --help`. An option that the command does not have is an error
        (exit code 2)."""
        words = list(sys.argv[1:] if args is None else args)
        words = [*words[1:], "--help"] if words[:1] == ["help"] else words
        options, unknown = self.parse_known_args(words, namespace)
        if unknown:
            getattr(options, "parser", self)._unknown(unknown[0])
        return options

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; where a command must follow and no word does, the help is the answer (exit code 2)."""
        self.given = list(sys.argv[1:] if args is None else args)
        if not self.given and any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            self.print_help()
            self.exit(2)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """As argparse does; a misspelt option is named before what is missing, which may be what it was meant to be."""
        if message.startswith("the following arguments are required"):
            for word in (word for word in self.given if word.startswith("--") and word != "--"):
                if not any(option.startswith(word.partition("=")[0]) for option in self._option_string_actions):
                    self._unknown(word)
        super().error(message)

    def _unknown(self, word: str) -> None:
        there = [name for name in self._option_string_actions if name.startswith("--")]
        super().error(f"unknown argument {word!r}{nearest(word.partition('=')[0], there)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a value that is none of an action's choices."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(action, f"unknown {what} {value!r}{nearest(str(value), choices)} "
                                         f"(choose from {', '.join(choices)})")


def nearest(word: str, known: Iterable[str]) -> str:
    """"; did you mean X?" with the most similar of the known words, or "" if none is similar."""
    near = alike(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def alike(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most similar to `word`, at most `count`; else those with its letters as initials, or that have it
    as a part: learning_rate for `lr` and for `rate`."""
    known = list(known)
    return difflib.get_close_matches(word, known, count, 0.6) or [
        other for other in known
        if word == "".join(part[:1] for part in other.split("_")) or word in other.split("_")][:count]
