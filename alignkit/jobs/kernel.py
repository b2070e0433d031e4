"""One notebook in one kernel, through papermill, and the truth about how it ended.

Papermill's own engine leaves a notebook in which every cell says `completed` when its kernel was killed, loses the
kernel's last words, and takes whatever kernel is called python3 on this machine. `execute` raises NotebookFailed
instead, with the cell and the reason, and uses the Python that it runs under.
"""

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jupyter_client import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from alignkit.errors import NotebookFailed
from alignkit.jobs.spare_kernel import Spare, ThisPython

ENGINE = "alignkit"


def execute(
    notebook: Path,
    executed: Path,
    parameters: Mapping[str, object],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float | None = None,
    on_cell: Callable[[int, int], None] | None = None,
    spare: Spare | None = None,
) -> None:
    """Run `notebook` with `parameters` and leave it, with its outputs so far, in `executed`.

    timeout: seconds for the whole notebook. on_cell(index, number of cells): called before each cell, counted from 0 as
    in `notebook`. spare: a kernel to use, with its env and cwd, instead of a new one. Raises NotebookFailed: an error
    in a cell, a kernel that died, the timeout, or Ctrl-C.
    """
    watch = _Watch(on_cell, timeout)
    with contextlib.nullcontext(spare.log) if spare else tempfile.TemporaryFile() as log:
        try:
            # papermill fills {…} in paths in from the parameters
            execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                parameters=dict(parameters),
                engine_name=ENGINE,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                watch=watch,
                spare=spare,
                start={"env": dict(env), "cwd": str(cwd), "stdout": log, "stderr": log},
            )
        except PapermillExecutionError as error:
            raise watch.failure(
                f"{error.ename}: {error.evalue}" if error.evalue else error.ename, count=error.exec_count
            ) from None
        except DeadKernelError:
            raise watch.failure(_last_words(watch.exit_code, log)) from None
        except CellTimeoutError:
            raise watch.failure(f"not done after {timeout:g} s (timeout)", "timeout") from None
        except KeyboardInterrupt:
            raise watch.failure("interrupted", "interrupted") from None
        except RuntimeError as error:  # the kernel did not start
            if watch.cell is not None:
                raise
            raise watch.failure(f"the kernel did not start: {error}; {_last_words(watch.exit_code, log)}") from None


class _Watch:
    """What the client tells `execute` about a run: where it is, and how its kernel ended."""

    def __init__(self, on_cell: Callable[[int, int], None] | None, timeout: float | None):
        self.on_cell, self.end = on_cell, None if timeout is None else time.monotonic() + timeout
        self.cell: int | None = None
        self.line, self.exit_code = "", None

    def at(self, cell, index: int, cells: list) -> None:
        injected = [at for at, other in enumerate(cells) if "injected-parameters" in other.metadata.get("tags", [])]
        self.cell = index - sum(at < index for at in injected)
        self.line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
        if self.on_cell:
            self.on_cell(self.cell, len(cells) - len(injected))

    def seconds_left(self, _cell=None) -> int | None:
        return None if self.end is None else max(1, round(self.end - time.monotonic()))

    def failure(self, error: str, status: str = "failed", count: int | None = None) -> NotebookFailed:
        place = (
            ""
            if self.cell is None
            else f"cell {self.cell + 1}{f' (In [{count}])' if count else ''}, `{self.line[:100]}`: "
        )
        return NotebookFailed(place + error, status, self.cell, error)


class _Client(PapermillNotebookClient):
    def __init__(self, nb_man, watch: _Watch, spare: Spare | None, **options):
        super().__init__(nb_man, timeout_func=watch.seconds_left, **options)
        self.watch, self.spare = watch, spare

    def create_kernel_manager(self):
        new = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython(), config=self.config)
        self.km = self.spare.manager if self.spare else new
        return self.km

    def execute_cell(self, cell, index, **options):
        self.watch.at(cell, index, self.nb.cells)
        try:
            return super().execute_cell(cell, index, **options)
        except BaseException as error:
            self.nb_man.cell_exception(
                cell, cell_index=index
            )  # or papermill writes `completed`, here and in all later cells
            self._stop(error)
            raise

    def _stop(self, error: BaseException) -> None:
        """Note how a dead kernel ended; let a living one come to an end."""
        process = getattr(self.km.provisioner, "process", None)
        if isinstance(error, DeadKernelError):
            self.watch.exit_code = process.poll() if process else None
        elif isinstance(error, CellTimeoutError):
            self.shutdown_kernel = "immediate"
        elif isinstance(error, KeyboardInterrupt) and process and process.poll() is None:
            process.send_signal(
                signal.SIGINT
            )  # training code may write a checkpoint; shutdown then waits 5 s, and kills


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, log_output=False, watch=None, start=None, spare=None, start_timeout=60, **_ignored
    ):
        client = _Client(nb_man, watch, spare, startup_timeout=start_timeout, kernel_name=kernel_name)
        return client.execute(**start)


papermill_engines.register(ENGINE, _Engine)


def _last_words(exit_code: int | None, log) -> str:
    log.seek(0, 2)
    log.seek(max(0, log.tell() - 2000))
    last_output = log.read().decode(errors="replace").strip()
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in iter(signal.Signals) else str(-exit_code)
        how = f"its process was killed by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")
    else:
        how = "its process ended" + ("" if exit_code is None else f" with exit code {exit_code}")
    return f"the kernel died: {how}" + (f"; it last wrote: {last_output}" if last_output else "")
