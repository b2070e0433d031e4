"""The program that every job kernel runs: ipykernel, tied to the process that started it.

Run it as a script, with `python -P`. Neither this file's folder nor the kernel's start folder is then searched for
modules, so a user's pandas.py there is not imported. The user's PYTHONPATH still applies.
"""

import importlib.util
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Kill this process as soon as its parent ends, even inside a long C call; only Linux supports this.

    Elsewhere ipykernel checks once per second whether its parent exists, which it cannot do during such a call.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get("JPY_PARENT_PID", "")
    if os.name == "posix" and parent and os.getppid() != int(parent):  # the parent ended before this line
        os._exit(1)


def import_alignkit() -> None:
    """Import the alignkit to which this file belongs (the job's), whatever else is installed."""
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
