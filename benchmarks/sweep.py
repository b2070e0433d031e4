"""What a sweep costs beside its work: jobs that only sleep, on a few workers.

    python -m benchmarks.sweep --jobs 30 --seconds 2 --workers 2 --json runs/sweep.json
    python -m benchmarks.sweep --bare --jobs 256 --seconds 10 --workers 64
    python -m benchmarks.sweep --jobs 12 --seconds 10 --workers 2 --address 127.0.0.1:6379

`--imports` makes the notebook import torch and TRL, as alignkit's own do. `--bare` measures the driver alone, with as
many workers as a larger machine has: they sleep themselves, without alignkit and without kernels. `--address` runs the
jobs on a Ray cluster on this machine (`ray start --head --node-ip-address 127.0.0.1`), whose processes are counted too.
The figures of a busy machine are those of that machine: its load is among them.
"""

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import nbformat

from alignkit.runs.lock import lock_handles, run_lock
from alignkit.runs.records import versions
from alignkit.storage import write_json
from alignkit.sweeps.engine import LocalEngine
from alignkit.sweeps.plan import plan
from alignkit.sweeps.ray_engine import Cluster, RayEngine, connected

CELL = "import time\nfrom pathlib import Path\n{imports}time.sleep(seconds)\nPath(run, 'made.txt').write_text('x')"
IMPORTS = "import torch, trl\n"
BARE = """\
import json, pathlib, sys, time
for line in sys.stdin:
    command = json.loads(line)
    if command.get("end"):
        break
    pathlib.Path(sys.argv[1], "attempts", command["attempt"]).mkdir(parents=True)
    seconds = command["job"]["values"]["sleep"]["seconds"]
    time.sleep(seconds)
    print(json.dumps({"status": "finished", "error": "", "cell": None, "host": "", "seconds": seconds}), flush=True)
"""


def main(arguments: list[str] | None = None) -> dict:
    """Run the jobs, print the figures, and write them to a file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that each job sleeps (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--imports", action="store_true", help="let the notebook import torch and TRL")
    parser.add_argument("--bare", action="store_true", help="measure the driver alone: workers sleep, without kernels")
    parser.add_argument("--address", metavar="HOST:PORT", help="run the jobs on this Ray cluster")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Path(place), given.jobs, given.seconds, given.workers, given.imports, given.bare,
                          given.address)
    figures |= {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "versions": versions()}
    for name, value in figures.items():
        print(f"{name:<28}{value:.2f}" if isinstance(value, float) else f"{name:<28}{value}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.json, {"command": "python -m benchmarks.sweep", **figures})
    return figures


def measure(place: Path, jobs: int, seconds: float, workers: int, imports: bool, bare: bool = False,
            address: str | None = None) -> dict:
    """The figures of one sweep: seconds until the first job begins, its wall time, what a warm job costs beside its
    sleep, CPU seconds of driver, workers and kernels, which a busy machine changes least, and the most memory that the
    workers and kernels held together (MiB, None without psutil)."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell("run = ''\nseed = 0\nseconds: float = 1.0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CELL.format(imports=IMPORTS if imports else "")),
    ]
    nbformat.write(notebook, place / "sleep.ipynb")
    began: dict[str, float] = {}
    cost: list[float] = []
    memory = [0.0]

    def on_event(kind: str, spec, _record: dict) -> None:
        if kind == "started":
            began[spec.id] = time.monotonic()
        elif kind == "finished":
            cost.append(time.monotonic() - began[spec.id] - seconds)

    start, cpu = time.monotonic(), _cpu_seconds(address)
    planned = plan(str(place / "sleep.ipynb"), place / "sweep", {"seed": f"0..{jobs - 1}", "seconds": str(seconds)})
    cluster = Cluster(address) if address else None
    with run_lock(place / "sweep"), connected(cluster) if cluster else contextlib.nullcontext():
        how = {"on_event": on_event, "on_tick": lambda: memory.append(_memory(address))}
        engine = RayEngine(place / "sweep", workers, cluster=cluster, **how) if cluster else LocalEngine(
            place / "sweep", workers, lock=lock_handles(place / "sweep"), **how)
        before = _memory(address)
        with patch("alignkit.sweeps.engine.PROGRAM", BARE) if bare else contextlib.nullcontext():
            engine.run(planned.jobs)
    wall = time.monotonic() - start
    warm = sorted(cost[workers:]) or [float("nan")]
    return {
        "jobs": jobs, "seconds": seconds, "workers": workers, "imports": imports, "bare": bare,
        "first_start_seconds": min(began.values()) - start, "wall_seconds": wall,
        "wall_over_work": wall / (jobs * seconds / workers), "cold_job_overhead": max(cost[:workers]),
        "warm_job_overhead_median": statistics.median(warm), "warm_job_overhead_worst": warm[-1],
        "cpu_seconds_a_job": (_cpu_seconds(address) - cpu) / jobs, "memory_mib": max(memory) or None,
        "memory_before_mib": before,
    }


def _cpu_seconds(address: str | None) -> float:
    """CPU seconds of this process and of those that it waited for; with a Ray cluster, also of Ray's processes."""
    own = sum(sum(resource.getrusage(whose)[:2]) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + sum(sum(each.cpu_times()[:4]) for each in (_processes(address) if address else ()))


def _processes(address: str | None) -> list:
    """This process's children, and with a Ray cluster Ray's processes on this machine, with theirs."""
    try:
        import psutil
    except ImportError:
        return []
    found = psutil.Process().children(recursive=True)
    for each in psutil.process_iter(["cmdline"]) if address else ():
        words = " ".join(each.info["cmdline"] or ())
        if each.pid != os.getpid() and ("/ray/" in words or "ray." in words or words.startswith("ray::")):
            with contextlib.suppress(psutil.Error):
                found += [each, *each.children(recursive=True)]
    return list({each.pid: each for each in found}.values())


def _memory(address: str | None) -> float:
    """MiB that these processes hold, each page counted once."""
    total = 0.0
    for process in _processes(address):
        with contextlib.suppress(Exception):  # it has ended
            total += getattr(process.memory_full_info(), "pss", 0)
    return total / 2**20


if __name__ == "__main__":
    main()
