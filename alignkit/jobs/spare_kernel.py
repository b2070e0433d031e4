"""Start and stop the kernels of jobs, and prepare a spare kernel while another notebook runs.

Separate from kernel.py, because importing papermill takes longer than starting this kernel.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_core.utils import run_sync

# imports that take notebooks several seconds
NEEDED = ("alignkit.models.loading", "matplotlib.figure", "pandas", "datasets", "trl.trainer.sft_trainer")
HEAVY = re.compile(rb"\b(alignkit|torch|transformers|datasets|trl)\b")  # what a notebook that needs them names
# at exit Python searches all objects for cycles, which takes two seconds with these modules; files are closed anyway
QUICK_END = "__import__('atexit').register(__import__('gc').freeze);"
LAUNCHER = Path(__file__).with_name("ipykernel_launcher.py")


class JobKernel(AsyncKernelManager):
    """A kernel that uses the same Python as this process. Several interrupt requests interrupt it only once, because
    the running cell may be saving its state."""

    def __init__(self, **options):
        super().__init__(kernel_name="python3", kernel_spec_manager=ThisPython(), **options)
        self.was_interrupted = False

    async def _async_interrupt_kernel(self) -> None:
        if not self.was_interrupted:
            self.was_interrupted = True
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel

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
