"""A command line that names the nearest right word for a wrong one."""

import argparse
import difflib
from collections.abc import Iterable


class CommandParser(argparse.ArgumentParser):
    """argparse's parser; a wrong command, choice or option is answered with the nearest right one."""

    def parse_args(self, args=None, namespace=None):
        """As argparse does; an option that the command does not have is an error (exit code 2)."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(options, "parser", self)
            there = [name for name in parser._option_string_actions if name.startswith("--")]
            wrong = unknown[0].partition("=")[0]
            parser.error(f"unknown argument {unknown[0]!r}{nearest(wrong, there)}")
        return options

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a value that is none of an action's choices."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(action, f"unknown {what} {value!r}{nearest(str(value), choices)} "
                                         f"(choose from {', '.join(choices)})")


def nearest(word: str, known: Iterable[str]) -> str:
    """"; did you mean X?" with the most similar of the known words, or "" if none is similar."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
