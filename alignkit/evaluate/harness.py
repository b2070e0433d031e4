"""Measure a checkpoint loaded by alignkit with tasks of EleutherAI's lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness).

lm-eval is an optional extra, imported on first use. It never loads the model itself: it gets alignkit's model and
tokenizer, and `alignkit.data.chat` renders the chat templates.
"""

import contextlib
import difflib
import functools
import logging
import os
import random
from collections.abc import Iterator, Mapping

from alignkit.errors import AlignkitError, DataError, MissingExtra, ParameterError
from alignkit.evaluate.suite_records import Score, score
from alignkit.safe_text import one_line

BOOTSTRAP = 1000  # draws for a standard error that has no formula


def prepare(options) -> None:
    """Load the task of `options.suite` and its data into options.prepared, so that errors appear before any
    measurement.

    Raises MissingExtra without lm-eval, ParameterError on an unknown name and on a task that runs model-written code
    unless options.run_model_code is set, DataError, naming the data set, if its data cannot be loaded.
    """
    suite = options.suite
    try:
        with _quiet():
            manager = _manager(options)
    except ImportError as error:
        raise MissingExtra(f"{suite.name} is measured by lm-evaluation-harness, which is not installed ({error}): "
                           "in alignkit's folder, pip install -e '.[evaluate]'") from error
    if suite.task not in manager.task_index:
        raise ParameterError(f"{suite.name}: there is no such suite, nor such a task of lm-eval{_nearest(options)}")
    configs = _configs(manager, suite.task)
    if any(config.get("unsafe_code") for config in configs) and not options.run_model_code:
        raise ParameterError(
            f"{suite.name} runs programs that the model wrote, with all your permissions on this machine, and lm-eval "
            "fetches the program that runs them (code_eval) from the Hub; in a container or a virtual machine, say "
            "--run-model-code")
    try:
        with _quiet(), _code_allowed(options.run_model_code), _generators_kept():
            options.prepared[suite.name] = manager.load([suite.task])
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{suite.name} needs {error.name}: in alignkit's folder, pip install -e '.[evaluate]'") from error
    except Exception as error:
        data = dict.fromkeys(_data_of(config) for config in configs if config.get("dataset_path"))
        raise DataError(
            f"{suite.name} needs {', '.join(data) or 'data'}, which cannot be read here ({type(error).__name__}: "
            f"{one_line(error, 300)}); load it once with a network and without HF_HUB_OFFLINE, copy the cache of a "
            "machine that has it (HF_HOME), or give a task file with data of your own (--tasks FOLDER)") from error


def measure(checkpoint, options) -> dict[str, Score]:
    """The figures of `options.suite`, which `prepare` has loaded: metric -> Score.

    A suite of the table has one figure; any other task has all figures that lm-eval returns. `checkpoint` has `model`,
    `tokenizer`, `path` and `chat_template`. lm-eval shows the progress, with an estimate, on stderr. Raises DataError
    if the task cannot be measured on this model.
    """
    from lm_eval import evaluate  # simple_evaluate would call git and pip for their versions

    suite, loaded = options.suite, options.prepared[options.suite.name]
    with _quiet(), _code_allowed(options.run_model_code), _generators_kept(options.seed):
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=suite.shots or 0)
            task.set_fewshot_seed(seed=options.seed)
        try:
            results = evaluate(
                _language_model(checkpoint, options.batch_size), loaded, limit=options.limit, log_samples=False,
                bootstrap_iters=BOOTSTRAP, apply_chat_template=checkpoint.chat_template,
                fewshot_as_multiturn=checkpoint.chat_template, confirm_run_unsafe_code=options.run_model_code)
        except (AssertionError, ValueError) as error:  # for example a prompt longer than the model's context
            raise error if isinstance(error, AlignkitError) else DataError(
                f"{suite.name} cannot be measured on {one_line(checkpoint.path)}: {one_line(error, 400)}") from error
    figures = _scores(results, suite.task)
    if suite.metric is None:
        return figures
    if suite.metric not in figures:
        raise DataError(f"{suite.name}: lm-eval gave no {suite.metric}, only {', '.join(figures) or 'nothing'}; this "
                        "version of lm-eval is another than the one that alignkit was written for")
    return {suite.metric: figures[suite.metric]}


def _manager(options):
    """lm-eval's index of tasks: those of the folder, followed by lm-eval's own unless the suite is in the folder."""
    from lm_eval.tasks import TaskManager

    if options.tasks is None:
        return _lm_evals_own()
    if "" not in options.prepared:  # no suite has this name
        options.prepared[""] = TaskManager(include_path=str(options.tasks), include_defaults=False)
    manager = options.prepared[""]
    if not _is_task(manager.task_index.get(options.suite.task)):  # a group may name tasks of lm-eval
        for name, entry in _lm_evals_own().task_index.items():
            manager.task_index.setdefault(name, entry)
    return manager


@functools.cache
def _lm_evals_own():
    """The index of lm-eval's own tasks: thousands of files, which takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_task(entry) -> bool:
    return entry is not None and entry.kind.name == "TASK"


def _nearest(options) -> str:
    close = [name for names in (options.known, _manager(options).task_index)
             for name in difflib.get_close_matches(options.suite.name, names, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def _configs(manager, name: str) -> list[Mapping]:
    """The settings of a task, or of all the tasks of a group or tag, as stated in its files."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    config = entry.cfg or {}
    children = config.get("task") if "group" in config else sorted(entry.tags) if entry.cfg is None else None
    if isinstance(children, str):
        children = [children]
    if not children:
        return [config]
    return [one for child in children for one in
            ([child] if isinstance(child, Mapping) and "dataset_path" in child
             else _configs(manager, child if isinstance(child, str) else str(child.get("task", child.get("group")))))]


def _data_of(config: Mapping) -> str:
    """The data set that a task reads, or its own files."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return f"the files {files}" if files else f"the data set {config['dataset_path']}"


def _scores(results: Mapping, name: str) -> dict[str, Score]:
    """Metric -> Score of the task or group `name`; if a group has no figure itself, of each of its tasks."""
    table = results["results"]
    own = _task_scores(results, name) if name in table else {}
    return own or {f"{task} {metric}": figure
                   for task in table for metric, figure in _task_scores(results, task).items()}


def _task_scores(results: Mapping, task: str) -> dict[str, Score]:
    row, figures = results["results"][task], {}
    for key, value in row.items():
        metric, _, name_of_filter = key.partition(",")
        if not name_of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{name_of_filter}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        called = metric if name_of_filter == "none" else f"{metric},{name_of_filter}"
        figures[called] = score(float(value), stderr, row.get("sample_len"), results["n-shot"].get(task))
    return figures


def _language_model(checkpoint, batch_size: int):
    """The checkpoint as lm-eval's HFLM; its chat template is rendered under alignkit's limits."""
    from lm_eval.models.huggingface import HFLM

    class OwnTemplate(HFLM):
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            messages = chat_history if add_generation_prompt else chat_history[:-1]
            text = _rendered(self.tokenizer, messages)
            return text if add_generation_prompt else text + chat_history[-1]["content"]

    return OwnTemplate(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=batch_size)


def _rendered(tokenizer, messages: list[dict]) -> str:
    """Messages rendered by the model's chat template, up to the start of the model's reply."""
    from alignkit.data.chat import chat_template_of
    from alignkit.data.files import Fault

    text = chat_template_of(tokenizer).render([(messages, [])])[0]
    if isinstance(text, Fault):
        raise DataError(f"the model's chat template refuses a prompt of this suite: {text}")
    return text[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's warnings, which are meant for its direct users."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Set the variable that code_eval requires before it runs a program."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if allowed else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]
        else:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


@contextlib.contextmanager
def _generators_kept(seed: int | None = None) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch, from which lm-eval draws; restore their state afterwards."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
