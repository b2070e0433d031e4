"""Render chat templates, which are programs by strangers, in a separate process under limits.

Jinja's sandbox prevents access to Python, but not endless loops or filling the memory. Counting loops inside the
sandbox would not help: `'x' * 3000000000`, `2 ** 1000000000` or the text of a list that contains itself twice, forty
levels deep, are single steps. So the operating system enforces the limits: a child process that contains only Jinja may
use a fixed amount of memory and time, and is then killed. It is started once per template and serves the following rows
too.
"""

import contextlib
import importlib.util
import json
import marshal
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from alignkit.data.files import LINE_LIMIT, Fault
from alignkit.errors import DataError

CHILD = Path(__file__).with_name("chat_child.py")
START = 60.0  # seconds for the process to start on a busy machine
FIRST = 4.0  # seconds for a template in total, plus more for each row and for each of its characters
PER_ROW, PER_CHARACTER = 0.01, 2e-7
INSTEAD = "use another tokenizer, or give prompt, chosen and rejected as text"
REASONING = ("reasoning_content", "thinking", "reasoning")  # as in transformers; templates read the first


class ChatTemplate:
    """A chat template in its process. `chat_template_of` makes one."""

    def __init__(self, template: str, tokens: dict):
        specification = importlib.util.find_spec("jinja2")
        if specification is None:
            raise DataError("conversations need jinja2, which renders chat templates: pip install jinja2")
        self.alive, self.deadline, self.asked = True, None, threading.Event()
        self._first, self._fault = (template, tokens, LINE_LIMIT), ""
        self._allowed, self._lock = FIRST, threading.Lock()
        folder = str(Path(specification.origin).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=os.name != "nt",  # interrupts go only to this process
            env={name: os.environ[name] for name in ("SYSTEMROOT", "TZ") if name in os.environ})
        threading.Thread(target=_watch, args=(self,), daemon=True).start()

    def render(self, rows: list[tuple[list[dict], list[dict]]]) -> list[list[str] | Fault]:
        """For each (prompt, replies), lists of messages: the prompt's text and the text of each reply after it, or a
        Fault if the template refuses them.

        Raises DataError if the template exceeds its limit of time or memory.
        """
        answers: list = [_plain(prompt, replies) for prompt, replies in rows]
        asked = [place for place, pair in enumerate(answers) if not isinstance(pair, Fault)]
        with self._lock:
            if self._first is not None:
                self._ask(None, START)
                first, self._first = marshal.dumps(self._first), None
                self._fault = self._within(first)[0]
            if self._fault:
                return [Fault(self._fault)] * len(rows)
            request = marshal.dumps([answers[place] for place in asked])
            self._allowed = min(self._allowed, FIRST) + PER_ROW * len(asked) + PER_CHARACTER * len(request)
            _, texts = self._within(request)
        for place, answer in zip(asked, texts, strict=True):
            answers[place] = answer
        return answers

    def close(self) -> None:
        """End the process."""
        self.alive = False
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        self.asked.set()

    def _within(self, request: bytes) -> tuple[str, list]:
        """The template's error, if any, and the answers to a request, which must finish in the template's remaining
        time."""
        begun = time.monotonic()
        fault, texts = self._ask(request, self._allowed)
        self._allowed -= time.monotonic() - begun
        return fault, texts

    def _ask(self, request: bytes | None, seconds: float) -> tuple[str, list]:
        """The answer to a request, or to none. Any error in between ends the process, because a late answer would be
        wrong."""
        ends = time.monotonic() + seconds
        self.deadline = ends
        self.asked.set()
        try:
            if request is not None:
                self.process.stdin.write(request)
                self.process.stdin.flush()
            answer = self._read()
        except (OSError, EOFError):
            self.close()
            if time.monotonic() >= ends:
                raise DataError(f"the chat template takes too long, more than the {seconds:.1f} s that it had: "
                                f"{INSTEAD}") from None
            raise DataError(f"the process that renders the chat template died: {INSTEAD}") from None
        except BaseException:
            self.close()
            raise
        finally:
            self.deadline = None
        return answer

    def _read(self) -> tuple[str, list]:
        line = self.process.stdout.readline(LINE_LIMIT)
        if not line.endswith(b"\n"):
            raise EOFError
        answer = json.loads(line)
        if isinstance(answer, dict):
            self.close()
            if "fatal" in answer:
                raise DataError(f"the chat template cannot be used, {answer['fatal']}: {INSTEAD}")
            return answer["error"], []
        return "", [Fault(each) if isinstance(each, str) else [self._text(length) for length in each]
                    for each in answer]

    def _text(self, length: int) -> str:
        content = self.process.stdout.read(length)
        if len(content) < length:
            raise EOFError
        return content.decode("utf-8", "surrogatepass")


def template_text(tokenizer) -> str:
    """The chat template of a tokenizer. Raises Fault if it has none as text, or several and no default."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise Fault(f"the chat template cannot be used: {error}") from None
    if not isinstance(template, str):
        raise Fault("the chat template cannot be used: it is no text")
    return template


def chat_template_of(tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer, ready to render; ends the process of the previous template.

    Raises Fault as `template_text`.
    """
    template = template_text(tokenizer)
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    key = template, tuple(tokens.items())
    if key not in _latest or not _latest[key].alive:
        for made in _latest.values():
            made.close()
        _latest.clear()
        _latest[key] = ChatTemplate(template, tokens)
    return _latest[key]


_latest: dict[tuple, ChatTemplate] = {}


def _plain(prompt: list[dict], replies: list[dict]) -> tuple[list[dict], list[dict]] | Fault:
    """A value that can be sent to the process; values without a JSON form, such as dates of a Parquet file, become the
    name of their type, as in transformers."""
    pair = [_message(message) for message in prompt], [_message(message) for message in replies]
    try:
        marshal.dumps(pair)
    except ValueError:  # too deep, or not plain
        try:
            pair = json.loads(json.dumps(pair, default=lambda value: f"<{type(value).__name__}>"))
            marshal.dumps(pair)
        except (RecursionError, ValueError, TypeError):
            return Fault("the conversation is nested too deeply, or no plain JSON")
    return pair


def _message(message: dict) -> dict:
    """A message as transformers passes it to a template: without null values, and with the reasoning under each of its
    names."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _watch(made: ChatTemplate) -> None:
    """End the process at its deadline; `readline` then returns an empty text."""
    while made.alive:
        made.asked.wait()
        made.asked.clear()
        while made.alive and (deadline := made.deadline) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                made.process.kill()
                return
            time.sleep(min(left, 0.5))
