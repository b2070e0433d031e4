"""What a PPO iteration and a DPO step cost with one process and with several, in turn, in one run.

    python -m benchmarks.processes --processes 2 --rounds 5 --json processes.json [--quick]
    python -m benchmarks.processes --processes 2 --shard optimizer

The models, prompts and sizes are those of `benchmarks.steps`, with one thread an operation in every process. In each
round process 0 works alone, while the others wait, and then all of them do the same iteration together. Seconds are
wall time, and CPU time of process 0; their ratio is taken within a round. Where other programs use the machine, wall
time says little: CPU seconds say how the work is divided, and not how long the processes wait for each other.

With --shard all processes work together both times, first with all optimiser states in each of them and then with a
part in each; the bytes of these states are measured too.
"""

import argparse
import copy
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from alignkit.optim import size
from alignkit.processes import join, sharing, told
from alignkit.stages import SHARDED
from alignkit.storage import write_json
from benchmarks.steps.ours import AlignkitDPO, AlignkitPPO
from benchmarks.steps.work import QUICK, Sizes, Work


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print a line for each kind of step, and write the rounds as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many work together (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--shard", choices=SHARDED, help="compare processes that share this out with ones that do not")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its times mean nothing")
    given = parser.parse_args(arguments)
    context, answers = multiprocessing.get_context("spawn"), multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_measure, args=(rank, given.processes, Path(folder) / "meeting",
                                                            given.rounds, given.quick, bool(given.shard), answers),
                                 daemon=True)
                     for rank in range(given.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a process failed")
        rounds, kept = answers.get()
    first, second = ("whole", "sharded") if given.shard else ("alone", "together")
    results = {"processes": given.processes, "shard": given.shard, "bytes": kept,
               "cores": os.cpu_count(), "load": os.getloadavg()[0], "rounds": rounds}
    for name, seconds in rounds.items():
        print(f"{name}: " + "; ".join(
            f"{kind} seconds {first} {median(one):.3f}, {second} {median(other):.3f}, ratio {_ratio(one, other)}"
            for kind, (one, other) in seconds.items()))
    for name, (all_states, most) in kept.items():
        print(f"{name}: the optimiser states are {all_states:,} bytes, of which a process keeps {most:,} or less")
    print(f"{given.processes} processes, {results['cores']} cores, load {results['load']:.1f}")
    if given.json:
        write_json(given.json, results)
    return results


def _ratio(alone: list[float], together: list[float]) -> str:
    ratios = sorted(one / other for one, other in zip(alone, together, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def _measure(rank: int, count: int, meeting: Path, rounds: int, quick: bool, shard: bool, answers) -> None:
    """One process: the same steps as the others; process 0 keeps the times."""
    torch.set_num_threads(1)
    work = Work(QUICK if quick else Sizes())
    steps = {"PPO iteration": (AlignkitPPO(work), AlignkitPPO.__call__),
             "DPO step": (AlignkitDPO(work, precomputed=True), AlignkitDPO.step)}
    join(meeting, rank, count)
    whole = copy.deepcopy(steps) if shard else {}
    seconds = {name: {"wall": ([], []), "CPU": ([], [])} for name in steps}
    for _ in range(rounds + 1):  # the first round warms up
        for name, (state, step) in steps.items():
            if shard:
                with sharing():
                    first = _timed(step, whole[name][0])
            else:
                kept = copy.deepcopy(state)
                first = _timed(step, kept) if rank == 0 else (0.0, 0.0)
                told(None)  # the others wait here
            with sharing(shard):
                second = _timed(step, state)
            for kind, *both in zip(("wall", "CPU"), first, second, strict=True):
                for times, value in zip(seconds[name][kind], both, strict=True):
                    times.append(value)
    kept = {name: [_bytes(work) for work, _ in (whole.get(name, given), given)] for name, given in steps.items()}
    dist.destroy_process_group()
    if rank == 0:
        answers.put(({name: {kind: [times[1:] for times in both] for kind, both in of.items()}
                      for name, of in seconds.items()}, kept))


def _bytes(work) -> int:
    """Of the optimiser states that the process with the most of them keeps."""
    optimizers = [work.optimizer] if hasattr(work, "optimizer") else [each for _, each in work.state.trained().values()]
    most = torch.tensor([sum(size(dict(optimizer.state)) for optimizer in optimizers)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _timed(step, state) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step(state)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
