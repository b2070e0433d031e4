"""Read a notebook's parameters without running it, and check values for them before a kernel starts.

A notebook's parameters are the assignments in its cell tagged `parameters`: a name and a literal, with an annotation
(`steps: int = 40`) if the literal does not determine the type, and a comment with a description. Papermill itself only
warns about an unknown name, accepts a value of any type, and runs a "name" that contains code.
"""

import ast
import json
import keyword
import math
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from alignkit.errors import ParameterError
from alignkit.jobs.usage import alike
from alignkit.storage import read_json

TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


# raised by text that is not Python, or that is meant to break its parser
_NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


@dataclass(frozen=True)
class Parameter:
    """type: a key of TYPES, "" if neither default nor annotation determines it; element: the type of a list's items."""

    name: str
    default: object
    type: str
    optional: bool = False
    element: str = ""
    help: str = ""

    def __str__(self) -> str:
        kind = f"list of {self.element}" if self.element else self.type or "any literal"
        return f"{self.name} ({kind}{' or none' if self.optional else ''}, default {self.default!r})"


def notebook_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook in their order, by name; {} if no cell is tagged `parameters`. Does not run the
    notebook.

    Raises ParameterError if the file is not a notebook, or if that cell contains anything except comments and
    assignments of literals to names.
    """
    notebook = Path(notebook)
    content = _content(notebook)
    try:
        cells = content["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
    except (KeyError, TypeError, AttributeError):
        raise ParameterError(f"{notebook} is not a notebook (nbformat 4)") from None
    if not tagged:
        return {}
    try:
        body = ast.parse(source).body
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
    except _NO_PYTHON as error:
        raise ParameterError(f"{notebook}: the cell tagged `parameters` is not valid Python: {error}") from None
    parameters = (_parameter(statement, comments, notebook) for statement in body if not _is_text(statement))
    return {parameter.name: parameter for parameter in parameters}


def declared(notebook: str | Path) -> tuple[tuple[str, ...], str | None]:
    """The notebooks that a notebook comes after, by name or path, and the folder in RUN that it makes, None if it names
    none: "after" and "makes" of "alignkit" in its metadata.

    Raises ParameterError if the file is not a notebook or these are not a list of texts and the name of a folder.
    """
    try:
        said = _content(Path(notebook))["metadata"].get("alignkit", {})
        after, makes = said.get("after", []), said.get("makes")
    except (KeyError, TypeError, AttributeError):
        raise ParameterError(f"{notebook} is not a notebook (nbformat 4)") from None
    if not isinstance(after, list) or not all(isinstance(each, str) and each for each in after):
        raise ParameterError(f"{notebook}: `after` of alignkit in its metadata is {after!r}, expected a list of "
                             'notebooks, such as ["02_reward_model"]')
    if makes is not None and not (isinstance(makes, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", makes)):
        raise ParameterError(f"{notebook}: `makes` of alignkit in its metadata is {makes!r}, expected the name of a "
                             "folder in lower case, such as 'world'")
    return tuple(after), makes


def _content(notebook: Path) -> dict:
    try:
        return read_json(notebook, error=ParameterError)
    except ParameterError as error:
        raise ParameterError(f"{notebook} is not a notebook: {error}") from None


def check_parameters(notebook: str | Path, given: Mapping[str, object]) -> dict[str, object]:
    """Convert `given` (name -> a value, or its text from a command line) to the types of the notebook's parameters.

    Raises ParameterError that lists all errors: a name that is not a plain name or not one of the notebook's, with the
    closest ones; a value of the wrong type, with the value.
    """
    return typed_values(notebook_parameters(notebook), given, Path(notebook).stem)


def typed_values(known: Mapping[str, Parameter], given: Mapping[str, object], notebook: str) -> dict[str, object]:
    """The same as `check_parameters`, for the parameters `known` of the notebook of that name."""
    values, wrong = {}, []
    for name, value in given.items():
        try:
            check_name(name)
            if name not in known:
                raise ParameterError(unknown_name(name, known, f"{notebook} has no such parameter"))
            values[name] = _convert(known[name], value)
        except ParameterError as error:
            wrong.append(str(error))
    if wrong:
        raise ParameterError("\n".join(wrong))
    return values


def check_name(name: object) -> None:
    """Raise ParameterError unless `name` can be a parameter: an identifier that starts with a letter and is not a
    keyword."""
    plain = isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    if not plain or name.startswith("_"):
        raise ParameterError(f"parameter name is {name!r}, expected a plain name such as `seed`")


def unknown_name(name: str, known: Mapping[str, Parameter], what: str) -> str:
    """The message for a name that is not in `known`, with close matches if there are any, otherwise with all names."""
    close = alike(name, known)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known) or 'none'}"
    return f"{name}: {what}; {hint}"


def _source(statement: ast.stmt) -> str:
    try:
        return ast.unparse(statement)[:500]
    except RecursionError:
        return type(statement).__name__


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _parameter(statement: ast.stmt, comments: Mapping[int, str], notebook: Path) -> Parameter:
    target = (
        statement.targets[0]
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1
        else getattr(statement, "target", None)
    )
    try:
        if not isinstance(target, ast.Name) or isinstance(statement, ast.AugAssign):
            raise ValueError
        default = ast.literal_eval(statement.value)
    except (*_NO_PYTHON, TypeError, AttributeError):
        raise ParameterError(
            f"{notebook}: line {statement.lineno} of the cell tagged `parameters` is {_source(statement)!r}, "
            "expected NAME = literal"
        ) from None
    kind, optional, element = _annotation(getattr(statement, "annotation", None))
    if not kind and default is not None:
        kind = type(default).__name__
    if kind == "list" and not element and default:
        kinds = {type(item).__name__ for item in default}
        element = kinds.pop() if len(kinds) == 1 else "float" if kinds == {"int", "float"} else ""
    return Parameter(
        target.id,
        default,
        kind if kind in TYPES else "",
        optional or default is None,
        element,
        comments.get(statement.end_lineno, ""),
    )


def _annotation(node: ast.expr | None) -> tuple[str, bool, str]:
    """Type, whether None is allowed, and type of the items, for `int`, `float | None`, `list[int]`; nothing for other
    annotations."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _annotation(node.left), _annotation(node.right)
        kind, _, element = left if left[0] else right
        return kind, left[1] or right[1], element
    if isinstance(node, ast.Constant) and node.value is None:
        return "", True, ""
    if isinstance(node, ast.Name):
        return node.id, False, ""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return node.value.id, False, _annotation(node.slice)[0]
    return "", False, ""


def _convert(parameter: Parameter, value: object) -> object:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ParameterError(f"{parameter.name} has bytes that are not text (UTF-8)") from None
    if parameter.optional and (value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))):
        return None
    if parameter.type == "list":
        return [
            _one(item, parameter.element, f"{parameter.name}[{at}]", parameter)
            for at, item in enumerate(_items(parameter, value))
        ]
    return _one(value, parameter.type, parameter.name, parameter)


def _items(parameter: Parameter, value: object) -> list:
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [item.strip() for item in value.split(",")] if value.strip() else []
        value = _literal(value)
    if not isinstance(value, (list, tuple)):
        raise ParameterError(f"{parameter.name} is {value!r}, expected a list; the parameter is {parameter}")
    return list(value)


def _one(value: object, kind: str, where: str, parameter: Parameter) -> object:
    """`value` converted to `kind`, from that kind, from text, or from an int if a float is expected."""
    text = value.strip() if isinstance(value, str) else None
    converted = value
    try:
        if kind == "bool" and text is not None:
            converted = _WORDS[text.lower()]
        elif kind in ("int", "float") and text is not None:
            converted = TYPES[kind](text)
        elif kind == "float" and type(value) is int:
            converted = float(value)
        elif kind in ("", "dict") and text is not None:
            converted = _literal(value)
        if kind and type(converted) is not TYPES[kind]:
            raise ValueError
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        shown = value if not isinstance(value, str) or len(value) < 80 else value[:80] + "…"
        article = "an" if kind == "int" else "a"
        finite = "a finite number" if kind == "float" else "true or false" if kind == "bool" else f"{article} {kind}"
        more = ("; `alignkit sweep` takes lists (0.1,0.2) and ranges (LOW..HIGH, two numbers)"
                if kind in ("int", "float") and text and ("," in text or ".." in text) else "")
        raise ParameterError(f"{where} is {shown!r}, expected {finite}; the parameter is {parameter}{more}") from None
    return converted


def _literal(text: str) -> object:
    """A JSON or Python literal; other text stays text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text
