"""The process that renders a stranger's chat template: `python -I -S chat_child.py FOLDER_OF_JINJA2`.

It is run as a program and never imported. It loads only Jinja and holds no secret. It reads requests from stdin and
answers on stdout; `data.chat` is the other end and measures the time. The environment is the one that transformers
gives its templates (`transformers.utils.chat_template_utils`).
"""

import json
import marshal
import sys
import time

MEMORY = 256 * 2**20  # bytes in addition to those at the start of the process
SECONDS = 10  # of work on one request, in case the parent that would end it is gone
REASON = 300  # characters of an error


def environment():
    """Jinja's sandbox with what chat templates expect: tojson, raise_exception, strftime_now, dict, namespace, loop
    controls and `{% generation %}`."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller):
            return caller()

    class Dict:
        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class Names(Namespace):
        def __init__(*args, **kwargs):  # as in Jinja: `self` may be a name of the template
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                Names._check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            Names._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form),
                     "dict": Dict(), "namespace": Names}
    return made


def limit() -> None:
    """Limit the memory of this process to MEMORY; Windows has no such limit, and macOS does not enforce it."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    except (ImportError, OSError, ValueError):
        pass


def last_resort() -> None:
    """Let the system kill this process if one request takes more than SECONDS of work."""
    try:
        import resource

        soon = int(time.process_time()) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soon, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (ImportError, OSError, ValueError):
        pass


def rendered(template, tokens: dict, prompt: list[dict], replies: list[dict], most: int) -> list[str]:
    """The template's text for a prompt, and for each reply after it. Raises ValueError that says what is wrong."""

    def text(messages: list[dict], begins: bool) -> str:
        made = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=begins, **tokens)
        if len(made) > most:
            raise OverflowError(f"it writes more than {most:,} characters")
        return made

    try:
        head = text(prompt, True)
        texts = [text([*prompt, reply], False) for reply in replies]
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template refuses it: {type(error).__name__}: {error}"[:REASON]) from None
    if not all(each.startswith(head) for each in texts):
        raise ValueError(
            "the chat template writes the prompt in another way when the reply follows: it cannot be cut off")
    return [head, *(each[len(head):] for each in texts)]


def main() -> None:
    """Answer requests until stdin ends. All requests are marshalled: first (template, special tokens, maximum
    characters), then lists of (prompt, replies). An answer is a line of JSON, followed by the bytes of the texts whose
    lengths it contains: for each pair the lengths of its texts, or an error; {"fatal": why} is the last answer."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    made = environment()
    sink.write(b"[]\n")
    sink.flush()
    template, tokens, most = marshal.load(source)
    limit()
    try:
        last_resort()
        template = made.from_string(template)
        answer = []
    except Exception as error:
        answer = {"error": f"the chat template refuses it: {type(error).__name__}: {error}"[:REASON]}
    texts = []
    while True:
        try:
            sink.write(json.dumps(answer).encode() + b"\n" + b"".join(texts))
            sink.flush()
            if isinstance(answer, dict):
                return
            answer, texts = [], []
            pairs = marshal.load(source)
            last_resort()
            for prompt, replies in pairs:
                try:
                    own = [text.encode("utf-8", "surrogatepass")
                           for text in rendered(template, tokens, prompt, replies, most)]
                    answer.append(list(map(len, own)))
                    texts += own
                except ValueError as error:
                    answer.append(str(error))
        except EOFError:
            return
        except MemoryError:
            answer, texts, pairs = {"fatal": f"it needs more than {MEMORY // 2**20} MiB of memory"}, [], None


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main()
