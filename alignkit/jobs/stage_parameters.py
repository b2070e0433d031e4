"""Distribute parameters to notebooks: `learning_rate` goes to all notebooks that know it, `ppo.learning_rate` to
one."""

import re
from collections.abc import Mapping

from alignkit.errors import ParameterError
from alignkit.jobs.parameters import Parameter, check_name, unknown_name
from alignkit.jobs.usage import alike
from alignkit.safe_text import one_line
from alignkit.stages import CHAIN, has_number

OF_THE_RUN = ("run", "model", "data", "seed")  # one value for all notebooks of a run
READING = ("kind", "split", "columns")  # how the data is read


def values_by_notebook(
    known: Mapping[str, Mapping[str, Parameter]], given: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """The parameters of each notebook: notebook -> name -> value, not converted.

    known: notebook -> its parameters. given: a name, or STAGE.NAME, -> value; a stage is given by its name (`ppo`), or
    by its notebook's number (`03`, `03a`) or name (`03b_ppo`). The value for a stage overrides that of the bare name.
    Raises ParameterError on a name that no notebook or not the named stage has, on an unknown stage, and on a parameter
    that is given twice, or for one stage although it belongs to the whole run.
    """
    bare = {name: value for name, value in given.items() if not _is_addressed(name)}
    for name in bare:
        check_name(name)
        if not any(name in parameters for parameters in known.values()):
            raise ParameterError(_known_by_none(name, known))
    values = {notebook: {name: value for name, value in bare.items() if name in parameters}
              for notebook, parameters in known.items()}
    addresses: dict[tuple[str, str], str] = {}
    for address in (name for name in given if name not in bare):
        stage, _, name = address.partition(".")
        notebook = _notebook(stage, address, known)
        check_name(name)
        if name in OF_THE_RUN:
            how = {"run": "--out", "seed": "-p seed=…"}.get(name, f"--{name}")
            raise ParameterError(f"{address}: {name} is the whole run's, one for all notebooks; give it as {how}")
        if name not in known[notebook]:
            others = [other for other, parameters in known.items() if name in parameters]
            raise ParameterError(f"{address}: {notebook} has no such parameter; it has: "
                                 f"{', '.join(known[notebook]) or 'none'}"
                                 + (f" ({', '.join(others)} has it)" if others else ""))
        if other := addresses.get((notebook, name)):
            raise ParameterError(f"{name} of {notebook} is given twice, as {other} and as {address}")
        addresses[notebook, name] = address
        values[notebook][name] = given[address]
    return values


def addressed(notebook: str, known: Mapping[str, Parameter], given: Mapping[str, object]) -> dict[str, object]:
    """`given` for one notebook that runs alone: STAGE.NAME becomes NAME, and overrides a bare one. Raises
    ParameterError as `values_by_notebook` does, except for bare names, which `typed_values` checks."""
    bare = {name: value for name, value in given.items() if not _is_addressed(name)}
    of_stage = {name: value for name, value in given.items() if name not in bare}
    return bare | values_by_notebook({notebook: known}, of_stage)[notebook]


def where_they_went(
    known: Mapping[str, Mapping[str, Parameter]], given: Mapping[str, object]
) -> list[str]:
    """A line for each given parameter that does not belong to the whole run: its value, and the notebooks that
    get it."""
    lines = []
    for address, value in given.items():
        stage, dot, name = address.rpartition(".")
        if name in (*OF_THE_RUN, *READING):
            continue
        notebooks = [_notebook(stage, address, known)] if dot else [
            notebook for notebook, parameters in known.items() if name in parameters]
        line = f"{address}={one_line(value, 80)}: {', '.join(notebooks)}"
        stages = [CHAIN[notebook] for notebook in notebooks if CHAIN.get(notebook)]
        if len(notebooks) > 1 and stages:
            line += f"; for one of them: -p {'ppo' if 'ppo' in stages else stages[0]}.{name}=…"
        lines.append(line)
    return lines


def _is_addressed(name: object) -> bool:
    """Whether a name has the form STAGE.NAME; all others are checked as names."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]+\.\w+", name, re.ASCII) is not None


def _notebook(stage: str, address: str, known: Mapping[str, object]) -> str:
    """The notebook in `known` to which `stage` refers."""
    def meant(notebook: str) -> bool:
        return stage in (notebook, CHAIN.get(notebook)) or has_number(notebook, stage)

    if chosen := next(filter(meant, known), None):
        return chosen
    stages = [CHAIN.get(notebook) or notebook for notebook in known]
    if elsewhere := next(filter(meant, CHAIN), None):
        raise ParameterError(f"{address} is for {elsewhere}, which is not what runs here ({', '.join(known)})")
    close = alike(stage, stages, 1)
    raise ParameterError(f"{address}: no stage is called {stage!r}; " + (
        f"did you mean {close[0]}.{address.partition('.')[2]}?" if close else
        f"expected {', '.join(stages)}, or a notebook's number or name"))


def _known_by_none(name: str, known: Mapping[str, Mapping[str, Parameter]]) -> str:
    """The message for a name that no notebook knows: the nearest names, each with the notebooks that have it."""
    anywhere = {other: None for parameters in known.values() for other in parameters}
    what = "no notebook of the course has such a parameter"
    if not (close := alike(name, anywhere)):
        return unknown_name(name, anywhere, what)
    knowing = [[notebook for notebook, parameters in known.items() if other in parameters] for other in close]
    hints = [f"{other}? ({'every notebook' if len(there) == len(known) > 1 else ', '.join(there)} has it)"
             for other, there in zip(close, knowing, strict=True)]
    return f"{name}: {what}; did you mean {' or '.join(hints)}"
