"""The command `alignkit sweep` and its options."""

import argparse

from alignkit.errors import ParameterError
from alignkit.jobs.arguments import add_out, assignment, count, given_parameters, number, seconds


def add_sweep(add) -> None:
    """Add the verb that runs a notebook, or the course, many times. add(name, function, about, …) makes one."""
    about = ("run a notebook, or the course, for each point of a grid of parameters; repeat the command to resume "
             "(Linux, macOS, WSL)")
    sweep = add("sweep", _sweep, about,
                epilog="example: alignkit sweep 03b_ppo -p kl_coef=0.05,0.1,0.2 -p seed=0..4 --out runs/kl --workers 2")
    sweep.add_argument("notebook", metavar="NOTEBOOK", help="a notebook (path, name or number), or `course`")
    add_out(sweep)
    about = "the values of a parameter: a list 0.05,0.1, whole numbers 0..4; 'in quotes' a comma is part of a value"
    sweep.add_argument("-p", dest="parameters", action="append", default=[], type=assignment, metavar="NAME=VALUES",
                       help=about)
    sweep.add_argument("--workers", type=count, metavar="COUNT", help="jobs at a time (default: the cores, 1 unless "
                       "the model is `tiny`; with --address as many as the cluster has room for)")
    about = "draw COUNT points, such as 20, from the ranges LOW..HIGH and log:LOW..HIGH; lists are crossed with them"
    sweep.add_argument("--random", type=count, metavar="COUNT", help=about)
    sweep.add_argument("--random-seed", type=int, default=0, metavar="SEED", help="seed of these draws (default: 0)")
    sweep.add_argument("--retries", type=int, default=1, metavar="COUNT", help="how often to repeat a job whose "
                       "kernel, worker or node died, such as 3 (default: 1); one that failed with an error is not "
                       "repeated")
    sweep.add_argument("--timeout", type=seconds, metavar="SECONDS", help="stop a notebook after SECONDS, such as "
                       "600")
    sweep.add_argument("--address", metavar="HOST:PORT", help="run the jobs on the Ray cluster whose head is there; "
                       "needs alignkit[ray] (default: on this machine)")
    sweep.add_argument("--cpus", type=_amount, metavar="NUMBER", help="CPUs that a job asks the Ray cluster for, "
                       "such as 2 (default: 1)")
    sweep.add_argument("--gpus", type=_amount, metavar="NUMBER", help="GPUs that a job asks the Ray cluster for, or a "
                       "part of one, such as 0.5 (default: 0)")
    about = ("run only job NUMBER, such as 3, counted from 0 as --dry-run lists them, for the array jobs of a cluster; "
             "the same command without --job then writes the tables")
    sweep.add_argument("--job", type=number, metavar="NUMBER", help=about)
    sweep.add_argument("--dry-run", action="store_true", help="check the grid and list its jobs; start and write "
                       "nothing")


def _sweep(options: argparse.Namespace) -> int:
    from alignkit.sweeps.ray_engine import Cluster
    from alignkit.sweeps.sweep import sweep

    asked = {name: value for name in ("cpus", "gpus") if (value := getattr(options, name)) is not None}
    if asked and options.address is None:
        raise ParameterError(f"--{next(iter(asked))} says what a job asks a Ray cluster for: give --address HOST:PORT "
                             "too. On this machine --workers says how many jobs share the cores")
    cluster = None if options.address is None else Cluster(options.address, **asked)
    return sweep(options.notebook, options.out, given_parameters(options), workers=options.workers,
                 draws=options.random, seed=options.random_seed, retries=options.retries, timeout=options.timeout,
                 dry_run=options.dry_run, job=options.job, cluster=cluster)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return amount
