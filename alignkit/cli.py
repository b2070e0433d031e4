"""The `alignkit` command: notebooks as jobs, data and checkpoints checked, checkpoints compared.

Exit codes: 0 done; 1 it did not work, with one message and no traceback; 2 wrong usage; 130 interrupted. ALIGNKIT_TRACEBACK=1
shows tracebacks all the same. What a command needs is imported when it runs, so that `alignkit --help` is quick.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

EXPECTED = {  # errors that have said all there is to say: module -> names; looked up only in modules that were imported
    "alignkit.data": ("DataError",),
    "alignkit.parameters": ("ParameterError",),
    "alignkit.records": ("RunError",),
    "alignkit.jobs": ("RunInUse",),
    "alignkit.kernel": ("NotebookFailed",),
    "alignkit.relay": ("ManifestError", "InvariantError"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `arguments` defaults to the command line."""
    options = _parser().parse_args(arguments)
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # a job ends as with Ctrl-C: its notebook may save, and its record says so
    except ValueError:
        pass  # not in the main thread
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `alignkit check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("ALIGNKIT_TRACEBACK") or not _is_expected(error):
            raise
        from alignkit.text import visible

        print(f"alignkit: {visible(error, 5000)}", file=sys.stderr)
        return 130 if getattr(error, "status", "") == "interrupted" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignkit", description="RLHF you can run: SFT, reward model, PPO, frozen checkpoint, DPO.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, command, text, *arguments):
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=command)
        for flags, settings in arguments:
            sub.add_argument(*flags, **settings)

    out = (("--out",), {"required": True, "type": _folder, "metavar": "DIR"})
    parameters = (("-p", "--parameter"), {"action": "append", "default": [], "type": _assignment, "metavar": "NAME=VALUE",
                                          "dest": "parameters", "help": "a parameter of the notebooks; may be repeated"})
    timeout = (("--timeout",), {"type": _seconds, "metavar": "SECONDS", "help": "give a notebook up after so long"})
    data = (("--data",), {"default": "desk", "metavar": "D", "help": "`desk`, a file, a folder or a Hub id (default: desk)"})
    add("course", _course, "run the series of notebooks as one job; run again, it resumes", out,
        (("--model",), {"default": "tiny", "metavar": "M", "help": "`tiny`, a folder or a Hub id (default: tiny)"}), data, parameters, timeout)
    add("run", _run, "run one notebook as a job",
        (("notebook",), {"metavar": "NOTEBOOK", "help": "a path, or the name or number of one of alignkit's notebooks"}),
        out, parameters, timeout, (("--force",), {"action": "store_true", "help": "run it even if it was done already"}))
    add("check", _check, "validate prompts, demonstrations or preference data: exit 1 if a row is bad",
        (("source",), {"metavar": "FILE", "help": "a file, a folder or a Hub id"}))
    add("freeze", _freeze, "make a frozen checkpoint: weights, tokenizer, lineage and a SHA-256 manifest",
        (("checkpoint",), {"type": _folder, "metavar": "DIR"}), out)
    add("verify", _verify, "check a frozen checkpoint against its manifest: exit 1 if a byte differs",
        (("checkpoint",), {"type": _folder, "metavar": "DIR"}))
    add("compare", _compare, "evaluate checkpoints side by side on the frozen evaluation set",
        (("checkpoints",), {"nargs": "+", "type": _folder, "metavar": "DIR"}), data, out)
    add("report", _report, "write report.html of a run directory again", (("run",), {"type": _folder, "metavar": "DIR"}))
    return parser


# --- commands ----------------------------------------------------------------------------------------------------------


def _course(options: argparse.Namespace) -> None:
    from alignkit import jobs
    from alignkit.report import overview

    given = _parameters(options)
    for name in given.keys() & {"model", "data"}:
        raise jobs.ParameterError(f"{name}: give it as --{name}")
    run = jobs.course(options.out, options.model, options.data, given, timeout=options.timeout)
    print(f"\n{overview(run)}")


def _run(options: argparse.Namespace) -> None:
    from alignkit import jobs

    executed = jobs.run_notebook(options.notebook, options.out, _parameters(options), timeout=options.timeout, force=options.force)
    print(f"executed notebook: {_shown(executed)}")


def _check(options: argparse.Namespace) -> int:
    from alignkit.data import check
    from alignkit.text import visible

    report = check(options.source)
    print(visible(report, limit=10**9))
    return 0 if report.ok else 1


def _freeze(options: argparse.Namespace) -> None:
    from alignkit.relay import freeze, verify

    out = freeze(options.checkpoint, options.out)
    print(f"frozen: {_shown(out)}, {_files(verify(out))}")


def _verify(options: argparse.Namespace) -> None:
    from alignkit.relay import verify

    print(f"{_shown(options.checkpoint)}: {_files(verify(options.checkpoint))}, every byte as it was frozen")


def _compare(options: argparse.Namespace) -> None:
    raise NotImplementedError


def _report(options: argparse.Namespace) -> None:
    from alignkit.report import build_report

    print(_shown(build_report(options.run)))


# --- arguments ---------------------------------------------------------------------------------------------------------


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from importlib.metadata import version

        parser.exit(0, f"alignkit {version('alignkit')}\n")


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text).expanduser()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _parameters(options: argparse.Namespace) -> dict[str, str]:
    from alignkit.parameters import ParameterError

    given: dict[str, str] = {}
    for name, value in options.parameters:
        if name in given:
            raise ParameterError(f"{name} is given twice, as {given[name]!r} and as {value!r}")
        given[name] = value
    return given


# --- small things ------------------------------------------------------------------------------------------------------


def _interrupt(_signal, _frame) -> None:
    raise KeyboardInterrupt


def _is_expected(error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename is not None or isinstance(error, FileNotFoundError | FileExistsError):
        return True
    return any(isinstance(error, getattr(sys.modules[module], name, ()))
               for module, names in EXPECTED.items() if module in sys.modules for name in names)


def _files(manifest) -> str:
    return f"{len(manifest.files)} files, {sum(file['size'] for file in manifest.files.values()):,} bytes, hash {manifest.hash[:12]}"


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    sys.exit(main())
