"""The `alignkit` command: run notebooks as jobs, check data and checkpoints, compare checkpoints.

Exit codes: 0 success; 1 failure, with one message and no traceback; 2 wrong usage; 130 interrupted.
ALIGNKIT_TRACEBACK=1 shows tracebacks. Each command imports its dependencies when it runs, so `alignkit --help` is fast.
"""

import argparse
import contextlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignkit import __version__
from alignkit.errors import AlignkitError, ParameterError
from alignkit.jobs.arguments import (
    add_out,
    assignment,
    count,
    expanded,
    folder,
    given_parameters,
    given_reading,
    seconds,
)
from alignkit.jobs.usage import CommandParser
from alignkit.safe_text import one_line
from alignkit.stages import SHARDED
from alignkit.sweeps.command import add_sweep
from alignkit.teaching.commands import add_teaching


class Refused(AlignkitError, ValueError):
    """A command cannot be carried out with the given arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `arguments` defaults to the command line."""
    options = _parser().parse_args(arguments)
    try:
        with _one_interrupt():
            return options.command(options) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `alignkit check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("ALIGNKIT_TRACEBACK") or not isinstance(error, OSError | AlignkitError):
            raise
        from alignkit.safe_text import in_red, visible

        print(in_red(f"alignkit: {visible(error, 5000)}", sys.stderr), file=sys.stderr)
        return 130 if getattr(error, "status", "") == "interrupted" else 1


def _parser() -> argparse.ArgumentParser:
    about = "RLHF you can run: SFT, reward model, PPO, frozen checkpoint, DPO."
    epilog = ("examples: alignkit course --out runs/first     alignkit run 03b_ppo --help\n"
              "alignkit COMMAND --help explains a command, its options and gives an example")
    parser = CommandParser(prog="alignkit", description=about, epilog=epilog,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"alignkit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command, about: str, **more) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", **more)
        added.set_defaults(command=command, parser=added)
        return added

    _add_jobs(add)
    add_sweep(add)

    frozen = "the folder of a frozen checkpoint, such as RUN/frozen"
    check = add("check", _check, "validate prompts, demonstrations or preference data: exit 1 if a row is bad",
                epilog="example: alignkit check pairs.jsonl --kind pairs --columns prompt=question,chosen=good")
    check.add_argument("source", metavar="FILE", help="a file, a folder or a Hub id")
    add_reading(check)

    freeze = add("freeze", _freeze, "make a frozen checkpoint: weights, tokenizer, lineage and a SHA-256 manifest",
                 epilog="example: alignkit freeze runs/course/ppo --out frozen/ppo")
    freeze.add_argument("checkpoint", type=folder, metavar="DIR", help="the folder of a trained model, such as RUN/ppo")
    add_out(freeze)

    verify = add("verify", _verify, "check a frozen checkpoint against its manifest: exit 1 if a byte differs",
                 epilog="example: alignkit verify frozen/ppo")
    verify.add_argument("checkpoint", type=folder, metavar="DIR", help=frozen)

    card = add("card", _card, "write the model card of a frozen checkpoint, README.md beside its manifest",
               epilog="example: alignkit card runs/qwen/frozen --licence apache-2.0")
    card.add_argument("checkpoint", type=folder, metavar="DIR", help=frozen)
    card.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: README.md in DIR)")
    push = add("push", _push, "push a frozen checkpoint to the Hugging Face Hub: private by default, asks first",
               epilog="example: alignkit push runs/qwen/frozen me/qwen-aligned --licence apache-2.0")
    push.add_argument("checkpoint", type=folder, metavar="DIR", help=frozen)
    push.add_argument("repo", metavar="REPO_ID", help="the repository on the Hub, OWNER/NAME")
    push.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    push.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    for command in (card, push):
        command.add_argument("--licence", metavar="LICENCE", help="such as mit or apache-2.0 (default: unknown)")

    export = add("export", _export, "export a run's data and settings to another tool",
                 epilog="example: alignkit export runs/qwen --to trl --out for_trl")
    export.add_argument("run", type=folder, metavar="RUN", help="a run directory, such as runs/course")
    export.add_argument("--to", required=True, choices=("llama-factory", "trl"), help="the tool to export to")
    add_out(export)

    compare = add("compare", _compare, "evaluate checkpoints side by side on the frozen evaluation set; of a sweep's "
                  "folder: its settings, with intervals over seeds",
                  epilog="example: alignkit compare runs/course/sft runs/course/dpo --out comparison")
    compare.add_argument("checkpoints", nargs="+", type=folder, metavar="DIR",
                         help="folders of models, the reference first; or the folder of one sweep")
    compare.add_argument("--data", metavar="DATA", help="`desk`, a file, a folder or a Hub id (default: that of the "
                         "run in which the first DIR lies, else desk)")
    add_reading(compare)
    compare.add_argument("--out", type=folder, metavar="DIR", help="the folder to write to; not needed for a sweep")

    advise = add("advise", _advise, "say what to do next with a run, finished or not: its decision, reasons and gaps",
                 epilog="example: alignkit advise runs/course")
    advise.add_argument("run", type=folder, metavar="RUN", help="a run directory, such as runs/course")

    about = "measure a checkpoint with suites (MMLU, GSM8K, IFEval, …, any task of lm-eval); see docs/evaluation.md"
    suites = add("evaluate", _evaluate, about, epilog="example: alignkit evaluate runs/qwen/frozen "
                 "--suite mmlu,gsm8k,xstest=prompts.csv --limit 100")
    suites.add_argument("checkpoint", type=folder, metavar="DIR", help="the folder of a model, such as RUN/frozen")
    suites.add_argument("--suite", required=True, metavar="NAME,…", help="suites, or tasks of lm-eval; "
                        "xstest=FILE, rewardbench=FILE (of a reward model)")
    suites.add_argument("--tasks", type=folder, metavar="FOLDER", help="your own lm-eval task files; they can run code")
    suites.add_argument("--limit", type=int, metavar="NUMBER", help="use only the first N items of each task")
    suites.add_argument("--batch-size", type=int, default=8, metavar="NUMBER", help="sequences at a time (default: 8)")
    suites.add_argument("--seed", type=int, default=0, metavar="NUMBER", help="random seed of the tasks (default: 0)")
    suites.add_argument("--run-model-code", action="store_true", help="allow programs that the model wrote to run")
    suites.add_argument("--out", type=folder, metavar="DIR", help="folder for suites.json (default: the checkpoint's)")

    add_teaching(add)

    for verb in importlib.metadata.entry_points(group="alignkit.commands"):  # commands of other packages, such as `app`
        verb.load()(add)

    report = add("report", _report, "write report.html of a run directory, or sweep.html of a sweep's folder, again",
                 epilog="example: alignkit report runs/course")
    report.add_argument("run", type=folder, metavar="DIR", help="a run directory or a sweep's folder")

    runs = add("runs", None, "manage run directories", epilog="example: alignkit runs prune runs/course --yes")
    runs = runs.add_subparsers(required=True, metavar="ACTION")
    about = "list the folders that a run has set aside and the leftovers of killed processes; --yes deletes them"
    prune = runs.add_parser("prune", help=about, description=f"{about[0].upper()}{about[1:]}.",
                            epilog="example: alignkit runs prune runs/course --yes")
    prune.set_defaults(command=_prune, parser=prune)
    prune.add_argument("run", type=folder, metavar="RUN", help="a run directory, such as runs/course")
    prune.add_argument("--yes", action="store_true", help="delete the listed folders")
    return parser


# --- commands --------------------------------------------------------------------------------------------------------
def _course(options: argparse.Namespace) -> None:
    from alignkit.jobs import notebooks
    from alignkit.jobs.report import overview

    given = given_parameters(options)
    for name in sorted(given.keys() & {"model", "data"}):
        raise ParameterError(f"{name}: give it as --{name}")
    if options.data == "desk" and (reading := given_reading(options)):
        raise ParameterError(f"--{next(iter(reading))} says how to read a file or a data set; give one with --data")
    run = notebooks.course(options.out, options.model, options.data, given, timeout=options.timeout,
                           restart=options.restart, track=options.track)
    print(f"\n{overview(run)}")


def _run(options: argparse.Namespace) -> None:
    from alignkit.jobs import notebooks

    executed = notebooks.run_notebook(
        options.notebook, options.out, given_parameters(options), timeout=options.timeout, force=options.force,
        restart=options.restart, track=options.track, processes=options.processes, shard=options.shard,
    )
    print(f"executed notebook: {_shown(executed)}")


def _notebooks(_options: argparse.Namespace) -> None:
    from alignkit.jobs.listing import notebook_list

    print(notebook_list())


def _lab(options: argparse.Namespace) -> None:
    from alignkit.jobs.lab import lab_copies, lab_report, open_lab

    print(lab_report(lab_copies(options.folder)), flush=True)
    open_lab(options.folder, options.arguments)


def _check(options: argparse.Namespace) -> int:
    from alignkit.data.rows import check
    from alignkit.safe_text import visible

    report = check(options.source, options.kind, split=options.split, columns=options.columns)
    print(visible(report, limit=10**9))
    return 0 if report.ok else 1


def _freeze(options: argparse.Namespace) -> None:
    from alignkit.runs.frozen import freeze, verify

    try:
        out = freeze(options.checkpoint, options.out)
    except ValueError as error:
        raise Refused(str(error)) from error
    print(f"frozen: {_shown(out)}, {_files(verify(out))}")


def _verify(options: argparse.Namespace) -> None:
    from alignkit.runs.frozen import verify

    print(f"{_shown(options.checkpoint)}: {_files(verify(options.checkpoint))}, every byte as it was frozen")


def _card(options: argparse.Namespace) -> None:
    from alignkit.publish.card import write_card

    print(_shown(write_card(options.checkpoint, licence=options.licence, out=options.out)))


def _push(options: argparse.Namespace) -> None:
    from alignkit.publish.hub import push

    push(options.checkpoint, options.repo, public=options.public, licence=options.licence,
         ask=lambda: options.yes or answer("push this? [y/N] "))


def _export(options: argparse.Namespace) -> None:
    from alignkit.publish.export import export

    print(export(options.run, options.to, options.out))


def _compare(options: argparse.Namespace) -> None:
    from alignkit.sweeps.results import is_sweep, load_results

    checkpoints = expanded(options.checkpoints)
    if sweeps := [place for place in checkpoints if is_sweep(place)]:
        from alignkit.sweeps.page import compared

        if len(checkpoints) > 1:
            raise ParameterError(f"{sweeps[0]} is a sweep: compare its settings alone, without other folders")
        print(compared(load_results(sweeps[0])))
        return
    from alignkit.evaluate.comparison import compare_directories
    from alignkit.jobs.notebooks import absolute
    from alignkit.safe_text import in_red, visible

    if options.out is None:
        raise ParameterError("--out DIR is missing: the folder for the table and the page")
    comparison = compare_directories(checkpoints, absolute("data", options.data), options.out,
                                     **given_reading(options))
    for line in visible(comparison, limit=10**6).splitlines():
        print(in_red(line) if line and line == comparison.warning else line)
    print(f"\npage: {_shown(options.out / 'compare.html')}; also compare.md, .csv, .json and pictures")


def _advise(options: argparse.Namespace) -> None:
    from alignkit.evaluate.advised_run import advise_run
    from alignkit.safe_text import visible

    print(visible(advise_run(options.run), limit=10**6))


def _evaluate(options: argparse.Namespace) -> None:
    from alignkit.evaluate import suites
    from alignkit.safe_text import visible

    rows = suites.run_suites(
        options.checkpoint, options.suite.split(","), tasks=options.tasks, limit=options.limit, seed=options.seed,
        batch_size=options.batch_size, run_model_code=options.run_model_code, out=options.out)
    for line in suites.lines(rows).values():
        print(visible(f"{line.label}: {line}" + f", {line.about}" * bool(line.about)))
    print(f"\nrecord: {_shown((options.out or options.checkpoint) / 'suites.json')}")


def _report(options: argparse.Namespace) -> None:
    from alignkit.sweeps.results import is_sweep

    if is_sweep(options.run):
        from alignkit.sweeps.page import report_sweep

        page = report_sweep(options.run, lambda words: print(words, file=sys.stderr, flush=True))
    else:
        from alignkit.jobs.report import build_report

        page = build_report(options.run)
    print(_shown(page))


def _prune(options: argparse.Namespace) -> None:
    from alignkit.runs.lock import run_lock
    from alignkit.runs.stage_folders import prune, removable
    from alignkit.safe_text import visible

    removable(options.run)  # raises if it is not a run
    with run_lock(options.run):
        folders = removable(options.run)
        for folder in folders:
            print(f"{folder.bytes / 1e6:10,.1f} MB  {_shown(folder.path)}: {visible(folder.what)}")
        total = f"{len(folders)} folders, {sum(folder.bytes for folder in folders) / 1e6:,.1f} MB"
        if options.yes:
            prune(folders)
            print(f"deleted: {total}")
        else:
            print(f"{total}; --yes deletes them" if folders else "nothing to delete")


# --- arguments -------------------------------------------------------------------------------------------------------
def _add_jobs(add) -> None:
    """The verbs that run notebooks: course, notebooks and run."""
    course = add("course", _course, "run the series of notebooks as one job; repeat the command to resume",
                 epilog="example: alignkit course --out runs/qwen --model Qwen/Qwen2.5-0.5B --data pairs.jsonl "
                 "-p pairs=2000 -p ppo.kl_coef=0.1")
    course.add_argument("--model", default="tiny", metavar="MODEL", help="`tiny`, a folder or a Hub id (default: tiny)")
    add_data(course)
    add_reading(course)
    add_job(course)
    add_restart(course)

    add("notebooks", _notebooks, "list the notebooks: question, required stages and duration of each",
        epilog="example: alignkit notebooks")

    lab = add("lab", _lab, "open JupyterLab on copies of the notebooks; a copy that you changed is never replaced",
              epilog="example: alignkit lab --folder runs/lab -- --no-browser --port=8889")
    lab.add_argument("--folder", default=Path("runs/lab"), type=folder, metavar="DIR",
                     help="the folder of the copies (default: runs/lab)")
    lab.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: arguments of `jupyter lab`")

    run = add("run", _run, "run one notebook as a job; `run NOTEBOOK --help` lists its parameters", add_help=False,
              epilog="examples: alignkit run 03b_ppo --out runs/course -p kl_coef=0.1 -p seed=1     "
              "alignkit run 05_dpo --out runs/qwen --processes 2 --shard optimizer")
    run.add_argument("-h", "--help", nargs=0, action=_NotebookHelp,
                     help="show this help (after NOTEBOOK also its parameters) and exit")
    run.add_argument(
        "notebook", metavar="NOTEBOOK", help="a path, or the name or number of a notebook of alignkit: 03b_ppo or 3"
    )
    add_reading(run)
    add_job(run)
    add_restart(run)
    run.add_argument("--force", action="store_true", help="run the notebook even if it has already finished")
    run.add_argument("--processes", type=count, default=1, metavar="COUNT", help="processes that train together, in "
                     "03b_ppo and 05_dpo; the same numbers, up to rounding (default: 1)")
    run.add_argument("--shard", choices=SHARDED, help="what each of several processes keeps a part of only: optimizer, "
                     "the optimiser's states; the same bits as without")


class _NotebookHelp(argparse.Action):
    """--help, which also lists the parameters of the notebook named before it."""

    def __call__(self, parser, options, values, option_string=None):
        parser.print_help()
        if options.notebook:
            from alignkit.jobs.listing import parameter_help

            try:
                print(f"\n{parameter_help(options.notebook)}")
            except (OSError, AlignkitError) as error:
                parser.exit(1, f"alignkit: {one_line(error, 2000)}\n")
        parser.exit()


def add_data(command: argparse.ArgumentParser) -> None:
    """Add --data to a command."""
    about = "`desk`, a file, a folder or a Hub id (default: desk)"
    command.add_argument("--data", default="desk", metavar="DATA", help=about)


def add_job(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a notebook job to a command: --out, -p, --timeout and --track."""
    add_out(command)
    about = "a parameter of all notebooks, or of one as STAGE.NAME=VALUE (ppo.kl_coef=0.1); may be repeated"
    command.add_argument(
        "-p", dest="parameters", action="append", default=[], type=assignment, metavar="NAME=VALUE", help=about
    )
    about = "stop a notebook after SECONDS, such as 600"
    command.add_argument("--timeout", type=seconds, metavar="SECONDS", help=about)
    command.add_argument("--track", choices=("tensorboard", "wandb", "mlflow", "trackio"),
                         help="also send the training's metrics to this tracker (default: none)")


def add_reading(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say how to read data to a command: --kind, --split and --columns."""
    command.add_argument("--kind", choices=("pairs", "demonstrations", "prompts"),
                         help="the kind of data (default: detected from its columns)")
    command.add_argument("--split", metavar="SPLIT", help="the split of a data set (default: train, or the only one)")
    command.add_argument("--columns", type=_columns, metavar="FIELD=COLUMN,…",
                         help="the column of each field: prompt=question,chosen=good; system= ignores a column")


def add_restart(command: argparse.ArgumentParser) -> None:
    """Add --restart to a command."""
    command.add_argument("--restart", action="store_true", help="start again instead of continuing from the last "
                         "checkpoint; existing results are set aside")


def _columns(text: str) -> str:
    """FIELD=COLUMN,…, checked but returned as written."""
    from alignkit.data.layouts import columns_of

    try:
        columns_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def port(text: str) -> int:
    """A port named on the command line, 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)


# --- small things ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Take the first SIGTERM or SIGHUP as Ctrl-C, so that the notebook may save and the job's record says so.

    Later ones are ignored: a terminal that closes, or a system that shuts down, sends several, and they must not break
    off what the first one began. Only a second Ctrl-C does. What is ignored from the start (nohup) stays ignored.
    """
    begun = False

    def interrupt(number, _frame) -> None:
        nonlocal begun
        again, begun = begun, True
        if number == signal.SIGINT or not again:
            raise KeyboardInterrupt

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(question: str) -> bool:
    """Whether the person at the terminal says yes; where there is none the answer is no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _files(manifest) -> str:
    size = sum(file["size"] for file in manifest.files.values())
    return f"{len(manifest.files)} files, {size:,} bytes, hash {manifest.hash[:12]}"


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    path = Path(path).absolute()
    return one_line(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path, 1000)
