"""What the cockpit costs the kernel: milliseconds of CPU for one update of its panel, and for the picture at the end.

    python -m benchmarks.cockpit --json runs/cockpit.json

It runs a real kernel, with the panel on and no page: what a page does with an update, it does in its own process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SETUP = """
import json, time
from alignkit_widgets import TrainingCockpit

KEYS = [["objective/scores", "objective/rlhf_reward"], ["objective/kl"], ["objective/entropy"], ["val/eos_rate"]]
SHARES = {kind: {b: 1 / 7 for b in ("answer", "wrong answer", "hedge", "alternative", "refuse", "unsafe", "other")}
          for kind in ("benign", "look-alike", "ambiguous", "risky")}
TEXT = "How do I restart the router in the kitchen? " * 4

def step(controls):
    step.begun = step.begun or time.thread_time()
    step.i += 1
    return {key: step.i ** 0.5 for keys in KEYS for key in keys} | {"shares": SHARES, "samples": [(TEXT, TEXT)] * 8}

def measure(iterations, every):
    step.i, step.begun = 0, 0.0
    cockpit = TrainingCockpit("PPO", [(keys[0], keys) for keys in KEYS], iterations, every=every,
                              controls={"kl_coef": (0.0, 1.0, 0.2)})
    remote = cockpit.open("control")
    feed, update, spent = remote.session.feed, remote.session.feed.update, []
    def timed(*arguments, **options):
        before, begun = feed.updates, time.thread_time()
        update(*arguments, **options)
        if feed.updates > before:
            spent.append(1000 * (time.thread_time() - begun))
    feed.update = timed
    cockpit.open = lambda *_: remote
    return cockpit, spent
"""
RUN = """
cockpit, spent = measure({iterations}, {every})
begun = time.thread_time()
_ = await cockpit.run(step)
total, spent = time.thread_time() - begun, sorted(spent[1:-1])
print(json.dumps({{"updates": len(spent), "median_ms": spent[len(spent) // 2], "p95_ms": spent[int(0.95 * len(spent))],
                  "run_ms_per_iteration": 1000 * total / {iterations}}}))
"""
PICTURE = """
begun = time.thread_time()
png, _ = cockpit.picture()
print(json.dumps({"picture_ms": 1000 * (time.thread_time() - begun), "picture_kB": len(png) / 1000}))
"""


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--iterations", type=int, default=1000)
    arguments = parser.parse_args()
    head = f"import os\nos.environ['ALIGNKIT_HEADLESS'] = '0'\n{SETUP}"
    cells = [head, RUN.format(iterations=arguments.iterations, every=0), PICTURE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=600).execute()
    lines = [output["text"] for cell in notebook.cells for output in cell.outputs if output.get("name") == "stdout"]
    numbers = {
        k: v for text in lines for line in text.splitlines() if line[:1] == "{" for k, v in json.loads(line).items()
    }
    for name, value in numbers.items():
        print(f"{name:24} {value:10.3f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
