"""The program that every kernel of a job runs: ipykernel, bound to the process that started it.

Run as a script, with `python -P`: neither this file's folder nor the one in which the kernel starts is a place to
import from, so that a pandas.py there stays what it is, a file of somebody. What the user put on PYTHONPATH counts.
"""

import importlib.util
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have this process killed as soon as its parent ends, even inside a long call in C; Linux alone can do that.

    Elsewhere ipykernel looks each second whether its parent is there, which it cannot during such a call.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get("JPY_PARENT_PID", "")
    if os.name == "posix" and parent and os.getppid() != int(parent):  # it ended before this line
        os._exit(1)


def import_alignkit() -> None:
    """Import the alignkit that this file belongs to: the job's, wherever it lies and whatever else is installed."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location(
        "alignkit", os.path.join(package, "__init__.py"), submodule_search_locations=[package])
    sys.modules["alignkit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["alignkit"])


if __name__ == "__main__":
    end_with_parent()
    import_alignkit()
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()
