"""Run one notebook in one kernel with papermill, and report correctly how it ended.

If a kernel is killed, papermill's own engine marks every cell of the notebook as `completed` and loses the kernel's
last output; it also uses any kernel named python3 on this machine. `execute` raises NotebookFailed with the cell and
the reason instead, and uses the Python of this process.
"""

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from jupyter_core.utils import run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from alignkit.errors import NotebookFailed, is_out_of_memory
from alignkit.jobs.memory import memory_advice
from alignkit.jobs.spare_kernel import STARTS, JobKernel, Spare, interrupts_given_to, start_options

ENGINE = "alignkit"
SAVE_SECONDS = 10  # time for an interrupted cell to save its state
START_SECONDS = 600  # for a kernel to answer, which imports torch first; one that died is noticed at once
PORT_TAKEN = "zmq.error.ZMQError: Address already in use"
STOP_SECONDS = 2  # from SIGTERM to SIGKILL, for a kernel that has not stopped by then


def execute(
    notebook: Path,
    executed: Path,
    parameters: Mapping[str, object],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float | None = None,
    on_cell: Callable[..., None] | None = None,
    spare: Spare | None = None,
    lock: tuple[int, ...] = (),
) -> None:
    """Run `notebook` with `parameters` and write it, with its outputs so far, to `executed`.

    timeout: seconds for the whole notebook. on_cell(index, number of cells): called before each cell, counted from 0 as
    in `notebook`, and with a third argument, text, whenever the cell prints some. spare: a kernel to use, with its env
    and cwd, instead of a new one. lock: descriptors that a new kernel inherits. Raises NotebookFailed: an error in a
    cell, a dead kernel, the timeout, or Ctrl-C, after which the cell has SAVE_SECONDS to save its state; a second
    Ctrl-C ends it at once. No process of the kernel remains.
    """
    for starts_left in reversed(range(STARTS)):
        try:
            return _execute(notebook, executed, parameters, partial(start_options, env, cwd, lock=lock),
                            _Watch(on_cell, timeout), spare)
        except NotebookFailed as failed:
            if not (starts_left and failed.died and failed.cell is None and PORT_TAKEN in failed.error):
                raise
            spare = None  # it is the kernel that has died


def _execute(notebook: Path, executed: Path, parameters: Mapping[str, object], start: Callable[..., dict],
             watch: "_Watch", spare: Spare | None) -> None:
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
                start_timeout=START_SECONDS,
                watch=watch,
                spare=spare,
                start=start(log=log),
            )
        except PapermillExecutionError as error:
            what = f"{error.ename}: {error.evalue}" if error.evalue else error.ename
            advice = memory_advice(notebook, parameters, what) if is_out_of_memory(what) else ""
            raise watch.failure("; ".join(filter(None, (what, advice))), count=error.exec_count) from None
        except DeadKernelError:
            what = _last_words(watch.exit_code, log)
            advice = memory_advice(notebook, parameters) if watch.ran_out_of_memory(what) else ""
            advice = advice and f"if it was memory, {advice}"
            raise watch.failure("; ".join(filter(None, (what, advice))), died=True) from None
        except CellTimeoutError:
            raise watch.failure(f"not done after {watch.timeout:g} s (timeout)", "timeout") from None
        except KeyboardInterrupt:
            raise watch.failure("interrupted", "interrupted") from None
        except OSError as error:
            error.filename = error.filename or str(executed)  # a full disk does not say where it is full
            raise
        except RuntimeError as error:  # the kernel did not start
            if watch.cell is not None:
                raise
            what = f"the kernel did not start: {error}; {_last_words(watch.exit_code, log)}"
            raise watch.failure(what, died=True) from None


class _Watch:
    """Information from the client to `execute` about a run: its position, and how its kernel ended."""

    def __init__(self, on_cell: Callable[..., None] | None, timeout: float | None):
        self.on_cell, self.timeout = on_cell, timeout
        self.end = None if timeout is None else time.monotonic() + timeout
        self.cell: int | None = None
        self.cells = 0
        self.line, self.exit_code = "", None

    def at(self, cell, index: int, cells: list) -> None:
        injected = [at for at, other in enumerate(cells) if "injected-parameters" in other.metadata.get("tags", [])]
        self.cell, self.cells = index - sum(at < index for at in injected), len(cells) - len(injected)
        self.line = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
        if self.on_cell:
            self.on_cell(self.cell, self.cells)

    def printed(self, text: str) -> None:
        if self.on_cell and self.cell is not None and text:
            self.on_cell(self.cell, self.cells, text)

    def seconds_left(self, _cell=None) -> int | None:
        return None if self.end is None else max(1, round(self.end - time.monotonic()))

    def ran_out_of_memory(self, last_words: str) -> bool:
        """The system kills processes that use too much memory with SIGKILL; other programs rarely do."""
        return self.exit_code == -getattr(signal, "SIGKILL", 9) or is_out_of_memory(last_words)

    def failure(self, error: str, status: str = "failed", count: int | None = None,
                died: bool = False) -> NotebookFailed:
        place = (
            ""
            if self.cell is None
            else f"cell {self.cell + 1}{f' (In [{count}])' if count else ''}, `{self.line[:100]}`: "
        )
        return NotebookFailed(place + error, status, self.cell, error, died)


class _Client(PapermillNotebookClient):
    def __init__(self, nb_man, watch: _Watch, spare: Spare | None, **options):
        super().__init__(nb_man, timeout_func=watch.seconds_left, **options)
        self.watch, self.kernel = watch, spare.manager if spare else JobKernel(config=self.config)

    def create_kernel_manager(self):
        self.km = self.kernel
        return self.km

    def execute_cell(self, cell, index, **options):
        self.watch.at(cell, index, self.nb.cells)
        try:
            return run_sync(self._cell)(cell, index, **options)
        except BaseException as error:
            # otherwise papermill writes `completed`, here and in all later cells
            self.nb_man.cell_exception(cell, cell_index=index)
            self._stop(error)
            raise

    async def _cell(self, cell, index, **options):
        """Raises KeyboardInterrupt beside the task that collects the outputs: it goes on when the loop does."""
        self.task = asyncio.ensure_future(self.async_execute_cell(cell, index, **options))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nothing awaits it
        interrupt = asyncio.Event()
        with _interrupts_set(interrupt):
            waiting = asyncio.ensure_future(interrupt.wait())
            await asyncio.wait((self.task, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
        if interrupt.is_set():
            raise KeyboardInterrupt
        return self.task.result()

    def process_message(self, msg, cell, cell_index):
        output = super().process_message(msg, cell, cell_index)
        content = msg.get("content", {})
        if msg.get("msg_type") == "stream" and content.get("name") == "stdout":
            self.watch.printed(content.get("text", ""))
        return output

    async def _async_poll_kernel_alive(self):
        with contextlib.suppress(AssertionError):  # an interrupted cell's, still here when its client is closed
            await super()._async_poll_kernel_alive()

    def _stop(self, error: BaseException) -> None:
        """Record how a dead kernel ended; let a living one finish."""
        if isinstance(error, DeadKernelError):
            process = getattr(self.kernel.provisioner, "process", None)
            self.watch.exit_code = process.poll() if process else None
        elif isinstance(error, CellTimeoutError):
            self.shutdown_kernel = "immediate"
        elif isinstance(error, KeyboardInterrupt):
            self.shutdown_kernel = "immediate"  # in case there is a second one
            if run_sync(self._let_save)():
                self.shutdown_kernel = "graceful"

    async def _let_save(self) -> bool:
        """Interrupt the cell, once, and wait for it to end; False if it has not, and the kernel was told to stop.

        The shutdown request comes after that: ipykernel takes it as leave to end the processes that the cell has
        started. A client of its own asks, since the one that ran the cell may have been interrupted anywhere.
        """
        await self.kernel.interrupt_kernel()
        client = self.kernel.client()
        client.start_channels()
        try:
            await asyncio.wait_for(client.wait_for_ready(timeout=SAVE_SECONDS), SAVE_SECONDS)
            await asyncio.wait([self.task], timeout=STOP_SECONDS)
            return True
        except (RuntimeError, TimeoutError):  # it died, or the time is over
            await self.kernel.provisioner.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.kernel.provisioner.wait(), STOP_SECONDS)
            return False
        finally:
            client.stop_channels()
            self.task.cancel()


def _interrupts_set(event: asyncio.Event) -> contextlib.AbstractContextManager:
    """Signals that raise KeyboardInterrupt set `event` instead.

    An exception raised by a signal handler ends whichever task of the loop is running at that moment, sometimes the one
    that collects a cell's outputs.
    """
    loop = asyncio.get_running_loop()

    def handle(handler: Callable, number: int, frame: object) -> None:
        try:
            handler(number, frame)
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(event.set)

    return interrupts_given_to(handle)


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, log_output=False, watch=None, start=None, spare=None, start_timeout=60, **_ignored
    ):
        client = _Client(nb_man, watch, spare, startup_timeout=start_timeout, kernel_name=kernel_name)
        try:
            return client.execute(**start)
        finally:
            client.kernel.kill()  # a second Ctrl-C may come at any time


papermill_engines.register(ENGINE, _Engine)


def _last_words(exit_code: int | None, log) -> str:
    log.seek(0, 2)
    log.seek(max(0, log.tell() - 2000))
    last_output = log.read().decode(errors="replace").strip()
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in iter(signal.Signals) else str(-exit_code)
        how = f"its process was killed by {name}" + (
            ", by somebody or, as is frequent, because memory ran out" if name == "SIGKILL" else "")
    else:
        how = "its process ended" + ("" if exit_code is None else f" with exit code {exit_code}")
    return f"the kernel died: {how}" + (f"; it last wrote: {last_output}" if last_output else "")
