"""One kernel for a submission: an empty folder, a bare environment, limits, and replies of a bounded size.

Nothing that the student's code prints comes here: the channel of outputs is never opened. A reply that is larger than
LARGEST_REPLY is dropped by the socket before it reaches Python, and is then missed as one that came too late.
"""

import asyncio
import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import zmq
import zmq.asyncio

from alignkit.errors import AlignkitError
from alignkit.jobs.spare_kernel import JobKernel, start_options

LARGEST_REPLY = 2**20  # bytes
START_SECONDS = 120  # to start Python and import torch, on a busy machine too
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "WINDIR", "COMSPEC")


class AnswerFailed(AlignkitError, RuntimeError):
    """What was sent to a kernel did not come to its end. alive: whether the kernel can be used further; died: whether
    its process has ended."""

    def __init__(self, message: str, alive: bool, died: bool = False):
        super().__init__(message)
        self.alive, self.died = alive, died


class SubmissionKernel:
    """A kernel that runs a student's code; an asynchronous context manager. At its end all its processes are killed."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="alignkit-grade-", ignore_cleanup_errors=True)
        self.context = zmq.asyncio.Context()
        self.context.setsockopt(zmq.MAXMSGSIZE, LARGEST_REPLY)
        self.context.setsockopt(zmq.LINGER, 0)
        self.manager, self.client = JobKernel(context=self.context), None

    async def __aenter__(self) -> "SubmissionKernel":
        work, home = (Path(self.folder.name) / name for name in ("work", "home"))
        work.mkdir()
        home.mkdir()
        env = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        env |= {"HOME": str(home), "TMPDIR": str(work), "IPYTHONDIR": str(home), "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1"}
        try:
            await self.manager.start_kernel(**start_options(env, work, subprocess.DEVNULL, ()))
            self.client = self.manager.client(context=self.context)
            self.client.start_channels(iopub=False, stdin=False, hb=False, control=False)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_error) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Kill the kernel and the processes of its group; delete its folder."""
        self.manager.kill()
        with contextlib.suppress(Exception):
            await self.manager.shutdown_kernel(now=True)
        if self.client:
            self.client.stop_channels()
        self.context.destroy(linger=0)
        self.folder.cleanup()

    async def run(self, code: str, seconds: float, expression: str = "None") -> object:
        """Execute `code`; returns the JSON object or list as which `expression`, evaluated after it, shows itself.

        None where it shows itself as neither. Raises AnswerFailed: the code raised, or ended the kernel, or was not
        done after `seconds`.
        """
        request = asyncio.ensure_future(self.client.execute(
            code, reply=True, timeout=seconds, store_history=False, allow_stdin=False, stop_on_error=False,
            user_expressions={"answer": expression}))
        end = asyncio.ensure_future(self._end())
        try:
            await asyncio.wait({request, end}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise AnswerFailed(f"the kernel died: {end.result()}", alive=False, died=True)
            try:
                content = request.result()["content"]
                shown = content.get("user_expressions", {}).get("answer", {})
                error = content if content["status"] != "ok" else shown if shown["status"] != "ok" else None
                if error is None:
                    return shown["data"].get("application/json")
                name, message = str(error.get("ename", ""))[:100], str(error.get("evalue", ""))[:200]
            except TimeoutError:
                raise AnswerFailed(f"not done after {seconds:g} s (an endless loop?), or a reply of more than "
                                   f"{LARGEST_REPLY:,} bytes", alive=False) from None
            except Exception as problem:  # a forged reply can be anything
                raise AnswerFailed(f"the kernel's reply cannot be read ({type(problem).__name__})",
                                   alive=False) from None
            raise AnswerFailed(f"{name}: {message}", alive=True)
        finally:
            for task in (request, end):
                task.cancel()
            await asyncio.gather(request, end, return_exceptions=True)

    async def _end(self) -> str:
        """Wait until the kernel's process has ended; returns how."""
        while (code := await self.manager.provisioner.poll()) is None:
            await asyncio.sleep(0.05)
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
