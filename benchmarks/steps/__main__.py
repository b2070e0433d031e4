"""What one step costs: rollout, scoring, PPO update, whole iteration, DPO, SFT and reward-model step, beside baselines.

    python -m benchmarks.steps --json steps.json [--quick] [--threads 2] [--rounds 8] [--growth]
                               [--trl-ppo runs/trl-ppo]

Each row is measured three ways, in turn, round by round: alignkit; a bare torch + transformers loop that does the same
work (head at every position, no statistics, `generate` with top_k=0); and the trainer of the installed TRL, given one
batch over and over (its collator, data loader and logging are not timed). All in fp32 with the same fused AdamW,
without gradient checkpointing. Before anything is timed, the sides must give the same numbers on the same weights and
tokens; if they do not, there is no benchmark. With one thread all seconds are CPU time of the process, so that a busy
machine can be used; with more they are wall time.

The installed TRL has no PPO: with --trl-ppo the last one that had it is measured too, in a process of its own that
waits while the others run, from an environment in that folder that is made on demand. Its sampling is its own, so it
must agree in the number of optimiser steps and in the KL that it finds.

alignkit's PPO parts are timed inside `ppo_iteration` itself: rollout is `sample`, update is all of `ppo_step`, scoring
is everything else (drawing and tokenising prompts, decoding, the reward, old and reference log-probs, values, GAE,
statistics). Its SFT and reward training are TRL's trainers with alignkit's settings, so there the two can differ by no
more than noise and the trainer's bookkeeping round a step.

A second row has alignkit's best settings: a trunk that policy and critic share, and bf16 where this machine multiplies
bf16 faster than fp32 (tried at the model's own shapes). The shared trunk is another algorithm, so the row compares what
an iteration costs, not the same numbers. With --growth a second table shows how the cost of a default iteration grows.
"""

import argparse
from pathlib import Path

import torch

from alignkit.storage import write_json
from benchmarks.steps.measure import measure_all
from benchmarks.steps.tables import table, write_page
from benchmarks.steps.trl_ppo import VERSION
from benchmarks.steps.work import QUICK, Sizes, _quiet, _threads


def main(arguments: list[str] | None = None) -> dict:
    """Run, print the table, write the JSON and the table's place in a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--page", type=Path, help="put the table into this Markdown page, where it names that file")
    parser.add_argument("--growth", action="store_true", help="measure how the cost grows with sizes, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 8; 2 with --quick)")
    parser.add_argument(
        "--trl-ppo", type=Path, metavar="FOLDER", help=f"measure the PPO of trl {VERSION} from an environment here"
    )
    given = parser.parse_args(arguments)
    rounds = (2 if given.quick else 8) if given.rounds is None else given.rounds
    if rounds < 1:
        parser.error(f"--rounds is {rounds}, expected at least 1")
    if given.page and not given.json:
        parser.error("--page needs --json: the page names the file that its table is made from")
    if given.threads < 1:
        parser.error(f"--threads is {given.threads}, expected at least 1")
    with _quiet(), _threads(given.threads):
        results = measure_all(QUICK if given.quick else Sizes(), rounds, quick=given.quick, grow=given.growth,
                              trl_ppo=given.trl_ppo)
    print(table(results))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.json, results)
    if given.page:
        write_page(given.page, given.json.name, table(results))
    return results


if __name__ == "__main__":
    main()
