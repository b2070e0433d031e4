"""A kernel that gets ready for a notebook while other work goes on.

Apart from kernel.py, because papermill takes longer to import than this kernel takes to start.
"""

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


class Spare:
    """A kernel for the next notebook, which starts and imports while the present one runs. `close` it in the end."""

    def __init__(self, env: Mapping[str, str], cwd: Path):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        imports = [f"--IPKernelApp.exec_lines=__import__('{name}')" for name in NEEDED]
        where = {"env": dict(env), "cwd": str(cwd), "stdout": self.log, "stderr": self.log}
        run_sync(self.manager.start_kernel)(extra_arguments=imports, **where)

    def close(self) -> None:
        """Stop the kernel if it still runs."""
        if self.manager.has_kernel:
            run_sync(self.manager.shutdown_kernel)(now=True)
        self.log.close()


class ThisPython(KernelSpecManager):
    """Every kernel is the Python that this process runs under, whatever is installed as `python3`."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
                  f"--IPKernelApp.exec_lines={QUICK_END}"],
            display_name="Python 3",
            language="python",
            metadata={"debugger": False},
        )
