"""From a key on a slider to the new picture: every explorer, in JupyterLab and Chromium, with the kernel's share of it.

    python -m benchmarks.explorers --json benchmarks/results/explorers.json

The target is 100 ms at the median and 200 ms at the 95th percentile, on a machine that is otherwise idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

MEASURE = Path(__file__).parents[1] / "tests" / "browser" / "measure_explorers.py"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--moves", type=int, default=30, help="of each slider")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        environment = os.environ | {"ALIGNKIT_MEASURED": str(out), "ALIGNKIT_MOVES": str(given.moves),
                                    "ALIGNKIT_REQUIRE_BROWSER": "1"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(MEASURE)], env=environment,
                       check=True)
        measured = json.loads(out.read_text(encoding="utf-8"))
    numbers = {}
    for name, times in measured.items():
        numbers[name] = {"median_ms": float(np.median(times["ms"])), "p95_ms": float(np.percentile(times["ms"], 95)),
                         "kernel_median_ms": float(np.median(times["kernel_ms"])), "moves": len(times["ms"])}
        print(f"{name:16}" + "  ".join(f"{key} {value:7.1f}" for key, value in numbers[name].items()))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        load = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
        given.json.write_text(json.dumps(load | numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
