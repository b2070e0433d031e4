"""Start and stop the kernels of jobs, and prepare a spare kernel while another notebook runs.

Separate from kernel.py, because importing papermill takes longer than starting this kernel.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_core.utils import run_sync

# imports that take notebooks several seconds
NEEDED = ("alignkit.models.loading", "matplotlib.figure", "pandas", "datasets", "trl.trainer.sft_trainer")
HEAVY = re.compile(rb"\b(alignkit|torch|transformers|datasets|trl)\b")  # what a notebook that needs them names
# at exit Python searches all objects for cycles, which takes two seconds with these modules; files are closed anyway
QUICK_END = "__import__('atexit').register(__import__('gc').freeze);"
STARTS = 3  # of a kernel; between the choice of its ports and its start another process may take one of them
LAUNCHER = Path(__file__).with_name("ipykernel_launcher.py")


class JobClient(AsyncKernelClient):
    """Knows that a kernel is ready as soon as it is; jupyter_client's own client waits 0.2 seconds longer, for an
    output that does not come."""

    async def _async_wait_for_ready(self, timeout: float | None = None) -> None:
        """Ask the kernel for its facts until it answers, on the channel of answers and on that of outputs. Outputs of
        what was asked before are read on the way, so none is left. Raises RuntimeError if it ends or does not answer
        in `timeout` seconds."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while not await self._answers(self.kernel_info()):
            if not await self._async_is_alive():
                raise RuntimeError("Kernel died before replying to kernel_info")
            if time.monotonic() > end:
                raise RuntimeError(f"Kernel didn't respond in {timeout:g} seconds")

    wait_for_ready = _async_wait_for_ready

    async def _answers(self, asked: str) -> bool:
        """Whether the kernel answers this request, and says on the channel of outputs that it is done with it. It may
        have sent that before the channel was open; then it has to be asked again."""
        with contextlib.suppress(queue.Empty):
            while (await self._async_get_shell_msg(timeout=1))["parent_header"].get("msg_id") != asked:
                pass
            while True:
                message = await self._async_get_iopub_msg(timeout=0.2)
                own = message["parent_header"].get("msg_id") == asked
                if own and message["content"].get("execution_state") == "idle":
                    return True
        return False


class JobKernel(AsyncKernelManager):
    """A kernel that uses the same Python as this process. Several interrupt requests interrupt it only once, because
    the running cell may be saving its state."""

    def __init__(self, **options):
        super().__init__(kernel_name="python3", kernel_spec_manager=ThisPython(), client_factory=JobClient, **options)
        self.was_interrupted = False

    async def _async_interrupt_kernel(self) -> None:
        if not self.was_interrupted:
            self.was_interrupted = True
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options) -> None:
        """Start the process. An interrupt meanwhile is raised when the process is known, so that it can be killed."""
        came: list[tuple] = []
        with interrupts_given_to(lambda *signalled: came.append(signalled)):
            await super()._async_launch_kernel(kernel_cmd, **options)
        for handler, number, frame in came:
            handler(number, frame)

    async def _async_finish_shutdown(self, waittime: float | None = None, pollinterval: float = 0.01,
                                     restart: bool = False) -> None:
        """As jupyter_client's, but look every hundredth of a second, not every tenth, whether the kernel has ended."""
        await super()._async_finish_shutdown(waittime, pollinterval, restart)

    finish_shutdown = _async_finish_shutdown

    def kill(self) -> None:
        """Kill the rest of the kernel and its child processes at once; does nothing if it has ended normally."""
        process = getattr(self.provisioner, "process", None)
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # a kernel leads its own process group
            else:
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


@contextlib.contextmanager
def interrupts_given_to(handle: Callable[[Callable, int, object], None]) -> Iterator[None]:
    """Inside the block a signal that has a Python handler calls `handle(handler, number, frame)` instead of
    `handler(number, frame)`. In another thread than the main one nothing changes."""
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and callable(handler := signal.getsignal(number)):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, lambda number, frame, handler=handler: handle(handler, number, frame))
                before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Spare:
    """A kernel for the next notebook, which starts and imports while the present one runs. Call `close` at the end.

    lock: descriptors that the kernel inherits, so that it holds the run's lock too. needed: what it imports.
    """

    def __init__(self, env: Mapping[str, str], cwd: Path, lock: tuple[int, ...] = (),
                 needed: Sequence[str] = NEEDED):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.manager = JobKernel()
        imports = [f"--IPKernelApp.exec_lines=__import__('{name}')" for name in needed]
        try:
            run_sync(self.manager.start_kernel)(extra_arguments=imports, **start_options(env, cwd, self.log, lock))
        except BaseException:
            self.close()
            raise

    def is_alive(self) -> bool:
        """Whether the kernel's process still runs."""
        return bool(run_sync(self.manager.is_alive)())

    def close(self) -> None:
        """Stop the kernel if it still runs."""
        try:
            if self.manager.has_kernel:
                run_sync(self.manager.shutdown_kernel)(now=True)
        finally:
            self.manager.kill()
            self.log.close()


def needed_by(notebook: Path) -> tuple[str, ...]:
    """The imports to prepare in a notebook's kernel: NEEDED, or none if the notebook names no library that is slow to
    import."""
    return NEEDED if HEAVY.search(notebook.read_bytes()) else ()


def start_options(env: Mapping[str, str], cwd: Path, log, lock: tuple[int, ...]) -> dict[str, object]:
    """Start options of a kernel, for `start_kernel` and Popen."""
    return {"env": dict(env), "cwd": str(cwd), "stdout": log, "stderr": log, **({"pass_fds": lock} if lock else {})}


class ThisPython(KernelSpecManager):
    """Every kernel uses the Python of this process, whatever is installed as `python3`."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-P", str(LAUNCHER), "-f", "{connection_file}",
                  "--IPKernelApp.ignore_cwd=True",  # IPython before 9.7 does not support -P
                  "--IPKernelApp.log_level=ERROR",  # otherwise its warnings precede every kernel's last error
                  f"--IPKernelApp.exec_lines={QUICK_END}"],
            display_name="Python 3",
            language="python",
            metadata={"debugger": False},
        )
