"""Arguments that several commands have, and how the text given for them is read."""

import argparse
import glob
from collections.abc import Iterable
from pathlib import Path

from alignkit.errors import ParameterError


def add_out(command: argparse.ArgumentParser) -> None:
    """Add --out to a command."""
    about = "the folder to write to, such as runs/first"
    command.add_argument("--out", required=True, type=folder, metavar="DIR", help=about)


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE as its two parts."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as kl_coef=0.1")
    return name, value


def folder(text: str) -> Path:
    """A folder named on the command line; it need not exist."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text).expanduser()


def expanded(paths: Iterable[Path]) -> list[Path]:
    """Paths with patterns (hand-ins/*.ipynb) replaced by what they match, as the shells of Windows do not.

    Raises FileNotFoundError for a pattern that matches nothing. A path that is there is never read as a pattern.
    """
    found = []
    for path in paths:
        matched = [path]
        if glob.has_magic(str(path)) and not path.exists():
            matched = [Path(each) for each in sorted(glob.glob(str(path)))]
            if not matched:
                raise FileNotFoundError(f"{path}: nothing matches this pattern")
        found += matched
    return found


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def number(text: str) -> int:
    """A whole number, 0 or more."""
    if not (text.isdecimal() and int(text) < 10**6):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if not (text.isdecimal() and 0 < int(text) < 10**6):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def given_parameters(options: argparse.Namespace) -> dict[str, str]:
    """The parameters given as -p and, those of reading the data, as options of their own; none twice."""
    given: dict[str, str] = {}
    for name, value in options.parameters:
        if name in given:
            raise ParameterError(f"{name} is given twice, as {given[name]!r} and as {value!r}")
        given[name] = value
    for name, value in given_reading(options).items():
        if name in given:
            raise ParameterError(f"{name} is given twice, as --{name} and as -p {name}")
        given[name] = value
    return given


def given_reading(options: argparse.Namespace) -> dict[str, str]:
    """How the data is to be read, as far as it was said."""
    return {name: value for name in ("kind", "split", "columns")
            if (value := getattr(options, name, None)) is not None}
