"""Field-by-field checks of an evaluation's records, because a file may come from a stranger."""

import math
from collections.abc import Mapping

from alignkit.errors import RunError


def is_a(kind: type):
    """A check that a value is exactly of type `kind`; a whole number must fit into 64 bits."""
    def check(value: object) -> bool:
        return type(value) is kind and (kind is not int or abs(value) < 2**63)
    return check


def _is_list(kind: type):
    return lambda value: isinstance(value, list) and all(map(is_a(kind), value))


def is_figure(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_figures(value: object) -> bool:
    return isinstance(value, list) and all(map(is_figure, value))


def _is_scale(value: object) -> bool:
    return value is None or (_is_figures(value) and len(value) == 2 and value[1] > 0)


def _are_messages(value: object) -> bool:
    """Whether a value is None, or a list of messages, each with role and content."""
    return value is None or (isinstance(value, list) and bool(value) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value))


def check_fields(record: Mapping, checks: Mapping, where: str) -> None:
    """Raise RunError that names the first missing or invalid field of a record."""
    for name, check in checks.items():
        if name not in record or not check(record[name]):
            raise RunError(f"{where}: {name} is {'not what it must be' if name in record else 'missing'}")


MEASURED = {"response": _is_list(str), "length": _is_list(int), "tokens": _is_list(int), "finished": _is_list(bool),
             "logp": _is_figures, "entropy": _is_figures}
OPTIONAL = {"ref_logp": _is_figures, "k3": _is_figures, "proxy": _is_figures, "gold": _is_figures,
             "token_kl": lambda rows: isinstance(rows, list) and all(map(_is_figures, rows)),
             "behaviour": _is_list(str), "phrases": lambda rows: isinstance(rows, list) and all(map(_is_figures, rows))}
OF_SET = {"hash": is_a(str), "chat": is_a(bool), "samples": is_a(int), "seed": is_a(int), "max_new_tokens": is_a(int),
          "prompts": _is_list(str), "keys": _is_list(int), "kinds": _is_list(str)}
OF_CHATS = {"template": is_a(str), "messages": lambda rows: isinstance(rows, list) and all(map(_are_messages, rows))}
OF_EVALUATION = {"name": is_a(str), "set": is_a(dict), "columns": is_a(dict), "gold_scale": _is_scale}
TOGETHER = (("ref_logp", "k3", "token_kl"), ("gold", "behaviour", "phrases"))  # present all together, or not at all


def check_columns(stored: Mapping, count: int, where: str) -> None:
    """Raise RunError if the columns are not a valid evaluation of `count` responses."""
    columns, known = stored["columns"], {**MEASURED, **OPTIONAL}
    check_fields(columns, {name: known[name] for name in known if name in columns or name in MEASURED}, where)
    for name, column in columns.items():
        if name not in known or len(column) != count:
            raise RunError(f"{where}: column {name} is unknown, or has not {count} entries")
    for together in TOGETHER:
        if len({name in columns for name in together}) > 1:
            raise RunError(f"{where}: {', '.join(together)} must all be there, or none")
    if "gold" in columns and stored["gold_scale"] is None:
        raise RunError(f"{where}: gold_scale is missing")
