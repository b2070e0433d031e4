"""Read benchmark files with fixed columns, in any format of `data.files`, and check each row."""

import os
from collections.abc import Callable, Sequence

from alignkit.data.chat import chat_template_of
from alignkit.data.fields import _check_special, _check_text, _rendered, _special_pattern
from alignkit.data.files import Fault, records
from alignkit.data.problems import Problem
from alignkit.errors import DataError

LISTED = 10  # maximum number of problems in an error


def read_table(source: str | os.PathLike, row_of: Callable[[dict], dict], expected: str) -> list[dict]:
    """`row_of` of each record of a source, in file order; it raises Fault on a record that cannot be used.

    expected: the required columns, for the messages. Raises DataError with the first ten problems, FILE:LINE: field:
    reason, if a record cannot be used, and if there are no records.
    """
    name, rows, problems = str(source), [], []
    unit, numbered = records(source)
    try:
        for line, record in numbered:
            try:
                if isinstance(record, Fault):
                    raise record
                if not isinstance(record, dict):
                    raise Fault(f"is {type(record).__name__}, expected an object with {expected}")
                rows.append(row_of(record))
            except Fault as fault:
                problems.append(Problem(name, line, fault.field, fault.reason, unit))
    except Fault as fault:
        raise DataError(f"{name}: {fault.reason}") from fault.__cause__
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:LISTED])
        more = f"\n  ... and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise DataError(f"{name}: {len(problems):,} of {len(rows) + len(problems):,} rows cannot be used, expected "
                        f"{expected}:\n{listed}{more}")
    if not rows:
        raise DataError(f"{name}: there are no rows in it, expected {expected}")
    return rows


def text_in(record: dict, field: str) -> str:
    """The text in a column of a record. Raises Fault if it is missing, blank or not text."""
    if field not in record:
        raise Fault("is missing", field)
    return _check_text(record[field], field)


def as_users(tokenizer, prompts: Sequence[str]) -> list[str]:
    """Prompts as user messages, rendered by the tokenizer's chat template.

    Prompts are unchanged without a tokenizer, or without a chat template. Raises DataError if a prompt contains one of
    the tokenizer's special tokens, and if the template refuses a prompt.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return list(prompts)
    special, asked = _special_pattern(tokenizer), [[{"role": "user", "content": text}] for text in prompts]
    try:
        for messages in asked:
            _check_special(special, messages)
        answers = chat_template_of(tokenizer).render([(messages, []) for messages in asked])
        return [_rendered(tokenizer, messages, answer)[0] for messages, answer in zip(asked, answers, strict=True)]
    except Fault as fault:
        raise DataError(f"a prompt cannot be asked as a user's message: {fault.reason}; leave the tokenizer out to ask "
                        "the prompts as they are") from None
