"""The output of `alignkit run NOTEBOOK --help` and `alignkit notebooks`, read from the notebooks without running
them."""

import json
import re
import shutil
import textwrap
from pathlib import Path

from alignkit import configs
from alignkit.errors import ParameterError
from alignkit.jobs.estimate import WHERE, notebook_seconds
from alignkit.jobs.notebooks import find_notebook, find_notebooks
from alignkit.jobs.parameters import Parameter, notebook_parameters
from alignkit.metrics import duration
from alignkit.safe_text import one_line
from alignkit.stages import CHAIN, NEEDS
from alignkit.storage import read_json

NAMES = 24  # columns for the names of parameters


def parameter_help(notebook: str | Path, columns: int | None = None) -> str:
    """A notebook's title and parameters, each with its comment, type and default.

    columns: width of the text, by default the terminal's, at most 100. Raises FileNotFoundError if there is no such
    notebook, ParameterError if the file is not a notebook.
    """
    path, columns = find_notebook(notebook), columns or _columns()
    parameters = [each for each in notebook_parameters(path).values() if each.name != "run"]  # which is --out
    presets = _presets(path)
    title, question = _head(path)
    stage = CHAIN.get(path.stem) or path.stem
    head = [f"{one_line(path.stem, 100)}: {title}" if title else one_line(path.stem, 100)]
    head += textwrap.wrap(question, columns, initial_indent="  ", subsequent_indent="  ")
    if not parameters:
        return "\n".join([*head, "", "It has no parameters."])
    return "\n".join([*head, "", "parameters, given as -p NAME=VALUE", "in a course, to this notebook alone, as "
                      f"-p {one_line(stage, 100)}.NAME=VALUE:",
                      *(_entry(each, columns, presets) for each in parameters)])


def notebook_list(columns: int | None = None) -> str:
    """The notebooks: name, title, the question of each, the stages that it needs, and its duration with default
    settings."""
    columns, seconds = columns or _columns(), notebook_seconds()
    entries = []
    for name, path in find_notebooks().items():
        title, question = _head(path)
        needs = ", ".join(NEEDS.get(name, ())) or "no other stage"
        time = f"; {duration(seconds[name])} with its defaults, on {WHERE}" if name in seconds else ""
        entries.append("\n".join([
            f"{one_line(name, 100):<{NAMES}}{title}",
            *textwrap.wrap(question, columns, initial_indent="    ", subsequent_indent="    "),
            *textwrap.wrap(f"needs {needs}{time}", columns, initial_indent="    ", subsequent_indent="    ")]))
    ending = "alignkit run NAME --help lists a notebook's parameters; alignkit course runs 00 to 05."
    return "\n\n".join([*entries, ending])


def _presets(notebook: Path) -> dict[str, str]:
    """The defaults, in words, of the parameters that a notebook hands to `preset`, for which None is the preset."""
    cells = read_json(notebook, error=ParameterError)["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    words = {}
    for config, options in re.findall(r"\bpreset\((\w+), model,([^()]*)\)", code):
        for name in re.findall(r"\b(\w+)=\1\b", options):
            tiny, other = (_literal(getattr(configs.preset(getattr(configs, config), model), name))
                           for model in ("tiny", "another"))
            words[name] = tiny if tiny == other else f"{tiny} for tiny, {other} for other models"
    return words


def _entry(parameter: Parameter, columns: int, presets: dict[str, str]) -> str:
    kind = f"list of {parameter.element}" if parameter.element else parameter.type or "any literal"
    kind += " or none" if parameter.optional else ""
    default = "none" if parameter.default is None else _literal(parameter.default)
    meaning = one_line(parameter.help.strip(), 1000)
    if (found := re.fullmatch(r"(.*); None: the preset( for the model)?", meaning)) and parameter.name in presets:
        meaning, default = found[1], presets[parameter.name]
    text = f"{meaning + ' ' if meaning else ''}[{kind}, default {default}]"
    name = f"  {parameter.name:<{NAMES}}"
    lines = textwrap.wrap(text, max(columns, NAMES + 32), initial_indent=name, subsequent_indent=" " * len(name),
                          break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _literal(value: object) -> str:
    return one_line(json.dumps(value, ensure_ascii=False, default=repr), 60)


def _head(path: Path) -> tuple[str, str]:
    """The title in a notebook's first cell, without its number, and the bold sentence below it; "" if missing."""
    try:
        first = read_json(path, error=ParameterError)["cells"][0]
        text = "".join(first["source"]) if first["cell_type"] == "markdown" else ""
    except (KeyError, IndexError, TypeError):
        return "", ""
    title = re.search(r"^#\s+(?:\d+[a-z]?\s*·\s*)?(.+)$", text, re.MULTILINE)
    question = re.search(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
    return (one_line(title[1], 200) if title else "",
            one_line(re.sub(r"[*_`]", "", question[1]), 400) if question else "")


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, 100)
