"""Record what the notebooks of a finished run took, for the estimate that `alignkit course` gives.

    python -m benchmarks.seconds runs/course

The run must be one of the default settings, made on this machine while nothing else ran.
"""

import argparse
import json
from pathlib import Path

from alignkit.jobs.estimate import RECORDED
from alignkit.runs.records import versions
from alignkit.storage import write_json


def main(arguments: list[str] | None = None) -> None:
    """Write alignkit/jobs/seconds.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seconds", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run directory")
    given = parser.parse_args(arguments)
    taken = json.loads((given.run / "seconds.json").read_text(encoding="utf-8"))
    write_json(RECORDED, {"command": "python -m benchmarks.seconds", "versions": versions(), "notebooks": taken})
    print(f"{RECORDED.name}: {len(taken)} notebooks, {sum(taken.values()):.0f} s")


if __name__ == "__main__":
    main()
