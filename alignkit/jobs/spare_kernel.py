"""The kernels of jobs: how one starts and how it is stopped, and one that gets ready while other work goes on.

Apart from kernel.py, because papermill takes longer to import than this kernel takes to start.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_core.utils import run_sync

# what notebooks spend seconds importing
NEEDED = ("alignkit.models.loading", "matplotlib.figure", "pandas", "datasets", "trl.trainer.sft_trainer")
# at its end Python looks through all objects for cycles, two seconds with these modules; files are closed all the same
QUICK_END = "__import__('atexit').register(__import__('gc').freeze);"
LAUNCHER = Path(__file__).with_name("ipykernel_launcher.py")


class JobKernel(AsyncKernelManager):
    """A kernel of the Python that this process runs under. It is interrupted once, however often it is asked to: the
    cell that runs may be writing what it has."""

    def __init__(self, **options):
        super().__init__(kernel_name="python3", kernel_spec_manager=ThisPython(), **options)
        self.was_interrupted = False

    async def _async_interrupt_kernel(self) -> None:
        if not self.was_interrupted:
            self.was_interrupted = True
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel

    def kill(self) -> None:
        """Kill at once what is left of the kernel and of the processes it started; nothing, if it came to its end."""
        process = getattr(self.provisioner, "process", None)
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # a kernel leads a group of its own
            else:
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


class Spare:
    """A kernel for the next notebook, which starts and imports while the present one runs. `close` it in the end.

    lock: descriptors that the kernel inherits, so that it holds the run's lock too.
    """

    def __init__(self, env: Mapping[str, str], cwd: Path, lock: tuple[int, ...] = ()):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.manager = JobKernel()
        imports = [f"--IPKernelApp.exec_lines=__import__('{name}')" for name in NEEDED]
        try:
            run_sync(self.manager.start_kernel)(extra_arguments=imports, **start_options(env, cwd, self.log, lock))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the kernel if it still runs."""
        try:
            if self.manager.has_kernel:
                run_sync(self.manager.shutdown_kernel)(now=True)
        finally:
            self.manager.kill()
            self.log.close()


def start_options(env: Mapping[str, str], cwd: Path, log, lock: tuple[int, ...]) -> dict[str, object]:
    """What a kernel is started with, as `start_kernel` and Popen take it."""
    return {"env": dict(env), "cwd": str(cwd), "stdout": log, "stderr": log, **({"pass_fds": lock} if lock else {})}


class ThisPython(KernelSpecManager):
    """Every kernel is the Python that this process runs under, whatever is installed as `python3`."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-P", str(LAUNCHER), "-f", "{connection_file}",
                  "--IPKernelApp.ignore_cwd=True",  # an IPython before 9.7 does not know -P
                  "--IPKernelApp.log_level=ERROR",  # or its warnings lead the last words of every kernel that dies
                  f"--IPKernelApp.exec_lines={QUICK_END}"],
            display_name="Python 3",
            language="python",
            metadata={"debugger": False},
        )
