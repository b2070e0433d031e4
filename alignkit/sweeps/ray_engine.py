"""The second engine of sweeps: the jobs are tasks of a Ray cluster that runs already.

A task calls `node.run_here` on its node and returns the folder of the attempt; the driver writes and publishes it. Ray
repeats nothing by itself: what died is counted and repeated by the driver, as with the local engine.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from alignkit.errors import MissingExtra, ParameterError, RunError
from alignkit.safe_text import one_line
from alignkit.sweeps.engine import Engine, Task
from alignkit.sweeps.node import base_parcel, errand, receive
from alignkit.sweeps.plan import Spec

CONNECT_SECONDS = 5  # for the head's port to accept a connection
LOOK_SECONDS = 2  # between two looks at the cluster's nodes
LOST_SECONDS = 60  # without a node that a job fits on
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # at 0, Ray does not replace 127.0.0.1 by the machine's own address
# Read by Ray: no report of usage is sent; `uv run` does not upload the current folder to the nodes.
RAY_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster by the address of its head, HOST:PORT, and the CPUs and GPUs that each job gets there.

    Raises ParameterError on an address or a number that Ray would not take.
    """

    address: str
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65536):
            raise ParameterError(f"--address is {self.address!r}, expected HOST:PORT of a Ray head, such as "
                                 "127.0.0.1:6379; start the sweep on a machine of the cluster")
        for name, number in (("cpus", self.cpus), ("gpus", self.gpus)):
            if number > 1 and number != int(number):
                raise ParameterError(f"--{name} is {number:g}, expected a whole number, or a part of one such as 0.5")
        if not self.cpus and not self.gpus:
            raise ParameterError("--cpus is 0, expected more than 0 unless a job asks for --gpus: the cluster would "
                                 "start all jobs at once")

    @property
    def needs(self) -> dict[str, float]:
        """What a job needs, under Ray's names."""
        return {name: number for name, number in (("CPU", self.cpus), ("GPU", self.gpus)) if number}

    def room(self) -> int:
        """How many jobs the cluster's nodes have room for, if it does nothing else."""
        import ray

        return sum(min(int(node["Resources"].get(name, 0) / number + 1e-6) for name, number in self.needs.items())
                   for node in ray.nodes() if node["Alive"])


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Be connected to a Ray cluster inside the block.

    Raises MissingExtra if Ray is not installed; RunError if nothing, or no Ray of this version, answers at the address,
    or if no node has what a job needs.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(f"--address needs Ray ({error}): pip install 'alignkit[ray]'") from error
    _look(cluster.address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    except (RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise RunError(f"cannot join the Ray cluster at {cluster.address}: {one_line(error, 1000)}. The sweep must be "
                       "started on a machine of the cluster; `ray start --address HOST:PORT --num-cpus 0` makes this "
                       "one a part of it") from None
    try:
        if before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's would end the process at once
        if not cluster.room():
            each = [{name: node["Resources"].get(name, 0) for name in cluster.needs} for node in ray.nodes()
                    if node["Alive"]]
            raise RunError(f"a job needs {_amounts(cluster.needs)}, and no node of the cluster has that; its nodes "
                           f"have: {'; '.join(map(_amounts, each)) or 'nothing'}")
        yield
    finally:
        ray.shutdown()


@dataclass
class RayEngine(Engine):
    """Runs jobs as tasks of the cluster to which this process is `connected`, at most `workers` at a time and no more
    than there is room for."""

    cluster: Cluster | None = None
    tasks: dict = field(default_factory=dict)  # Ray's reference -> Task
    bases: dict = field(default_factory=dict)  # ID of a shared job -> the reference of its parcel
    function: object = None
    room: int = 0
    looked: float = 0.0
    had_room: float = 0.0

    def running(self) -> list[Task]:
        """The jobs that were handed to Ray and have not ended."""
        return list(self.tasks.values())

    def _has_room(self) -> bool:
        now = time.monotonic()
        if not self.room or now - self.looked > LOOK_SECONDS:
            self.room, self.looked = self.cluster.room(), now
        if self.room:
            self.had_room = now
        elif self.had_room and now - self.had_room > LOST_SECONDS:
            raise RunError("no node of the cluster that a job fits on is left; the same command goes on, here or on "
                           "another cluster")
        return len(self.tasks) < min(self.workers, self.room)

    def _start(self, task: Task, following: Spec | None) -> None:
        import ray

        spec, base = task.spec, task.spec.base
        sent = errand(self.root, spec, task.attempt, timeout=self.timeout, threads=max(1, int(self.cluster.cpus)))
        if base and base not in self.bases:
            self.bases[base] = ray.put(base_parcel(self.root, base))
        (self.root / "attempts" / task.attempt).mkdir(exist_ok=True)  # so that attempts are counted
        options = {"name": spec.id, "num_cpus": self.cluster.cpus, "num_gpus": self.cluster.gpus,
                   "scheduling_strategy": "SPREAD"}
        self.function = self.function or ray.remote(max_retries=0)(_function())
        self.tasks[self.function.options(**options).remote(sent, self.bases.get(base))] = task

    def _listen(self, seconds: float) -> None:
        import ray

        if not self.tasks:
            time.sleep(0 if not self.waiting or self.room else seconds)
            return
        ended, _ = ray.wait(list(self.tasks), timeout=seconds)
        for reference in ended:
            self._take(self.tasks.pop(reference), reference)
        needed = {task.spec.base for task in (*self.waiting, *self.running())}
        self.bases = {base: reference for base, reference in self.bases.items() if base in needed}

    def _take(self, task: Task, reference) -> None:
        """Receive what a task has returned, or note how it ended."""
        import ray
        from ray import exceptions

        try:
            answer = ray.get(reference)
        except exceptions.TaskCancelledError:
            self._ended(task, _record("interrupted", "interrupted"))
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError,
                exceptions.ObjectLostError, exceptions.LocalRayletDiedError) as error:
            self._died(task, f"{type(error).__name__}: {one_line(error, 1000)}", None)
        except exceptions.RayError as error:
            self._ended(task, _record("failed", one_line(getattr(error, "cause", None) or error, 2000)))
        else:
            record = answer["record"]
            try:
                if answer["content"] is not None:
                    receive(self.root, task.spec, task.attempt, answer)
            except RunError as error:
                record = {**record, "status": "failed", "error": str(error)}
            self._ended(task, record)

    def _stop(self) -> None:
        self._cancel(force=False)

    def _close(self) -> None:
        self._cancel(force=True)

    def _cancel(self, *, force: bool) -> None:
        for reference in self.tasks:
            import ray

            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(reference, force=force)


def _function():
    """What a task runs. Ray sends a function that is made in another one by its code, so a node needs no alignkit to
    say that it has none."""

    def run_job_of_sweep(task: dict, base: bytes | None) -> dict:
        try:
            from alignkit.sweeps.node import run_here
        except ImportError as error:
            import platform

            record = {"status": "failed", "cell": None, "host": platform.node(), "seconds": 0.0,
                      "error": f"{platform.node()} has no alignkit that can run jobs of sweeps ({error}): install "
                               f"alignkit {task['version']}, with the source of the driver, on all nodes"}
            return {"record": record, "content": None, "unchanged": []}
        return run_here(task, base)

    return run_job_of_sweep


def _look(address: str) -> None:
    """Raise RunError if no Ray head answers at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(f"nothing answers at {address} ({error}); is a Ray head running there? `ray start --head` "
                       "starts one") from None
    with contextlib.suppress(ImportError):
        from ray._raylet import GcsClient
        from ray.exceptions import RayError

        try:
            nodes = GcsClient(address=address).get_all_node_info().values()  # gives up after 40 seconds
        except (RayError, RuntimeError, OSError) as error:
            raise RunError(f"what answers at {address} is no Ray head ({one_line(error, 300)})") from None
        if os.environ.get(LOOPBACK) != "0" and any(node.node_manager_address in ("127.0.0.1", "::1") for node in nodes):
            raise RunError(f"the Ray cluster at {address} listens on this machine alone, and Ray looks for it under "
                           f"the machine's other address: export {LOOPBACK}=0 first, as before `ray start`")


def _amounts(amounts: dict[str, float]) -> str:
    return ", ".join(f"{number:g} {name}" for name, number in amounts.items())


def _record(status: str, error: str) -> dict:
    return {"status": status, "error": error, "cell": None, "host": None, "seconds": 0.0}
