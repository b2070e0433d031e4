"""What the cockpit costs the kernel: CPU time of an update of its panel over 1,000 iterations, and its share of a run.

    python -m benchmarks.cockpit --json benchmarks/results/cockpit.json

The targets are 5 ms an update and 2 % of a default PPO run. A real kernel runs it, with the panel on and no page: what
a page does with an update, it does in its own process. The long run's step computes nothing, so all it takes is the
cockpit's, its log included; and it is told of every iteration, which a run of short iterations is not. The PPO run is
the desk world's default, from a start that is trained hastily, with snapshots to rewind to.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SETUP = """
import os
os.environ["ALIGNKIT_HEADLESS"] = "0"
import json, time
from pathlib import Path
import torch
from alignkit import RewardConfig, SFTConfig, start_run
from alignkit_widgets import PPO_CHARTS, TrainingCockpit
from alignkit_widgets.app.playground import make_desk_start, open_playground
from alignkit_widgets.cockpit.snapshots import Snapshots, _size

torch.set_num_threads(1)
SHARES = {kind: {b: 1 / 7 for b in ("answer", "wrong answer", "hedge", "alternative", "refuse", "unsafe", "other")}
          for kind in ("benign", "look-alike", "ambiguous", "risky")}
TEXT = "How do I restart the router in the kitchen? " * 4

def step(controls):
    step.i += 1
    numbers = {key: step.i ** 0.5 for _, keys in PPO_CHARTS for key in keys}
    return numbers | {"shares": SHARES, "samples": [(TEXT, TEXT)] * 8}

step.i = 0

def timed(function, spent, counts=lambda: True):
    def call(*arguments, **options):
        begun = time.thread_time()
        result = function(*arguments, **options)
        if counts():
            spent.append(1000 * (time.thread_time() - begun))
        return result
    return call

def watched(cockpit):
    \"\"\"Milliseconds of each update of its panel, as they will come.\"\"\"
    remote, spent, seen = cockpit.open("control"), [], [0]
    feed = remote.session.feed

    def new():
        seen[0], before = feed.updates, seen[0]
        return feed.updates > before

    feed.update = timed(feed.update, spent, new)
    cockpit.open = lambda *_: remote
    return spent

def say(name, **numbers):
    print(json.dumps({name: numbers}))
"""
LONG = """
controls = {{"kl_coef": (0.0, 1.0, 0.2)}}
cockpit = TrainingCockpit("PPO", PPO_CHARTS, {iterations}, every=0, controls=controls, log="long.jsonl")
spent = watched(cockpit)
begun = time.process_time()
_ = await cockpit.run(step)
total, spent = 1000 * (time.process_time() - begun), sorted(spent[1:-1])
begun = time.process_time()
png, _ = cockpit.picture()
drawn = 1000 * (time.process_time() - begun)
say("long_run", iterations={iterations}, updates=len(spent), update_median_ms=spent[len(spent) // 2],
    update_p95_ms=spent[int(0.95 * len(spent))], update_max_ms=spent[-1], iteration_ms=(total - drawn) / {iterations},
    picture_ms=drawn, picture_kB=len(png) / 1000)
"""
PPO = """
run = start_run(Path("run").resolve(), "tiny", "desk", 0)
make_desk_start(run, pairs=256, sft=SFTConfig(epochs=0.5), reward=RewardConfig(epochs=1))
live, copies = open_playground(run).start_ppo(), []
cockpit = TrainingCockpit("PPO", PPO_CHARTS, live.config.iterations, controls=live.controls, log=run / "live.jsonl")
spent, Snapshots.take = watched(cockpit), timed(Snapshots.take, copies)
begun = time.process_time()
_ = await cockpit.run(live.step, state=live.state)
total = 1000 * (time.process_time() - begun)
begun = time.process_time()
cockpit.picture()
drawn = 1000 * (time.process_time() - begun)
total -= drawn
done, size = live.config.iterations, _size(live.state.state_dict())
say("default_ppo", iterations=done, updates=len(spent), update_median_ms=sorted(spent)[len(spent) // 2],
    iteration_ms=(total - sum(spent) - sum(copies)) / done, snapshot_max_ms=max(copies), snapshot_MB=size / 1e6,
    updates_percent=100 * sum(spent) / total, snapshots_percent=100 * sum(copies) / total, picture_ms=drawn)
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cockpit", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--iterations", type=int, default=1000, help="of the long run")
    given = parser.parse_args(arguments)
    cells = [SETUP, LONG.format(iterations=given.iterations), PPO]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    printed = [output["text"] for cell in notebook.cells for output in cell.outputs if output.get("name") == "stdout"]
    numbers = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    for line in "".join(printed).splitlines():
        numbers |= json.loads(line) if line.startswith("{") else {}
    long_run, run = numbers["long_run"], numbers["default_ppo"]
    long_run["percent_of_ppo"] = 100 * long_run["iteration_ms"] / run["iteration_ms"]
    for name in ("long_run", "default_ppo"):
        print(name, *(f"{key} {value:,.3f}" for key, value in numbers[name].items()), sep="\n  ")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
