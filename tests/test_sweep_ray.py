"""Sweeps on Ray's own test cluster, on loopback: every job has one result, whatever dies, and nothing is left."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from alignkit.errors import RunError
from alignkit.jobs.notebooks import run_notebook
from alignkit.sweeps import ray_engine
from alignkit.sweeps.engine import Task
from alignkit.sweeps.plan import plan
from alignkit.sweeps.ray_engine import Cluster, RayEngine, connected
from alignkit.sweeps.sweep import sweep
from tests.test_sweep import RESULT, WAITS, WHOLE, gone, kernel, notebook, reads, rows, scores, stage, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the test extra brings Ray on Linux only")
PATIENCE = 300  # seconds for Ray's processes to start on a machine with much other work
# Read by Ray's processes. The third keeps a loopback address, which Ray would replace by that of the machine.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_agent_register_timeout_ms": str(PATIENCE * 1000)}
SHOWS_GPU = "import os\nname = os.environ.get('CUDA_VISIBLE_DEVICES', 'none')"


def place() -> dict:
    """The address of a node, and a free port for its agent of runtime environments."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return {"node_ip_address": "127.0.0.1", "runtime_env_agent_port": free.getsockname()[1]}


class Nodes:
    """A head without CPUs, and two nodes with one CPU and one (pretended) GPU each."""

    def __init__(self):
        from ray.cluster_utils import Cluster as TestCluster

        self.cluster = TestCluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True, **place()})
        self.address = self.cluster.address
        self.others = [self.cluster.add_node(num_cpus=1, num_gpus=1, **place()) for _ in range(2)]

    def raylet(self, node) -> int:
        return node.all_processes["raylet"][0].process.pid

    def processes(self) -> list[psutil.Process]:
        """Those of the cluster, with all that they have started."""
        own = [info.process.pid for node in (self.cluster.head_node, *self.cluster.worker_nodes)
               for infos in node.all_processes.values() for info in infos]
        found = {}
        for pid in own:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        return list(found.values())

    def at_work(self) -> list[int]:
        """Kernels, and Ray's workers that run a job."""
        with_kernels = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                if "ipykernel_launcher" in words or (words.startswith("ray::") and "seed=" in words):
                    with_kernels.append(process.pid)
        return with_kernels


@contextlib.contextmanager
def patient_ray():
    """Without Ray's limits for the start of a node: 30 seconds for all of it, and 15 for each port that an agent picks,
    after which the node aborts. -1 is what an agent without Ray's dashboard writes too."""
    from ray import _raylet
    from ray._private import node, ray_constants, services

    start = node.Node.start_ray_processes

    def with_ports(self):
        ports = (_raylet.METRICS_AGENT_PORT_NAME, _raylet.METRICS_EXPORT_PORT_NAME,
                 _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME)
        for name in ports:
            _raylet.persist_port(self._session_dir, self._node_id, name, -1)
        _raylet.persist_port(self._session_dir, self._node_id, _raylet.RUNTIME_ENV_AGENT_PORT_NAME,
                             self._ray_params.runtime_env_agent_port)
        start(self)

    def patient(*given, once=services.get_node):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return once(*given)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # read when Ray was imported
        patch.setattr(services, "get_node", patient)
        patch.setattr(node.Node, "start_ray_processes", with_ports)
        yield


@pytest.fixture(scope="module")
def nodes():
    import ray

    with patient_ray():
        made = Nodes()
        processes = made.processes()
        try:
            yield made
        finally:
            processes += made.processes()
            ray.shutdown()
            made.cluster.shutdown()
            assert gone([process.pid for process in processes]), "a process of the cluster is left"


@contextlib.contextmanager
def driver(nodes: Nodes, source: Path, out: Path, *more: str):
    """`alignkit sweep --address` in a process of its own."""
    command = [sys.executable, "-P", "-m", "alignkit", "sweep", str(source), "--out", str(out), "--address",
               nodes.address, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def waiting(place: Path, *seeds: int) -> tuple[Path, Path]:
    """A notebook whose jobs with these seeds wait to be killed, once."""
    marks = place / "marks"
    source = notebook(place / "toy.ipynb", WAITS.replace("MARKS", repr(str(marks))), RESULT)
    marks.mkdir()
    for seed in seeds:
        (marks / f"{seed}").touch()
    return source, marks


def waits(marks: Path, seed: int) -> bool:
    return (marks / f"{seed}.pid").exists() and bool((marks / f"{seed}.pid").read_text())


def listening_elsewhere(processes: list[psutil.Process]) -> list[str]:
    """Sockets that listen beyond loopback, as /proc/net/tcp and tcp6 have them."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in process.net_connections("tcp"):
                address = each.laddr.ip.removeprefix("::ffff:") if each.laddr else ""
                if each.status == psutil.CONN_LISTEN and address not in ("::1", "127.0.0.1"):
                    found.append(f"{process.name()}: {each.laddr}")
    return found


# --- where nothing answers -------------------------------------------------------------------------------------------
def test_an_address_without_a_ray_head_is_said_and_nothing_is_written(tmp_path, monkeypatch):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"nothing answers at 127.0.0.1:{port} .*is a Ray head running there"):
            sweep(source, tmp_path / "s", {"seed": "0"}, cluster=Cluster(f"127.0.0.1:{port}"))
    from ray import _raylet
    from ray.exceptions import RpcError

    def another(address):  # Ray's own answer, after 40 seconds
        raise RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr(_raylet, "GcsClient", another)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(RunError, match="is no Ray head"):
        sweep(source, tmp_path / "s", {"seed": "0"}, cluster=Cluster(f"127.0.0.1:{other.getsockname()[1]}"))
    assert not (tmp_path / "s").exists()


def test_every_death_counts_as_an_attempt_whatever_ray_calls_it(tmp_path, monkeypatch):
    import ray
    from ray import exceptions

    source = notebook(tmp_path / "toy.ipynb", RESULT)
    spec = plan(str(source), tmp_path / "s", {"seed": "0"}).jobs[0]
    for name in ("OutOfMemoryError", "WorkerCrashedError", "NodeDiedError"):
        events = []
        engine = RayEngine(tmp_path / name, 1, retries=1, cluster=Cluster("127.0.0.1:1"),
                           on_event=lambda kind, spec, record, events=events: events.append((kind, record)))

        def dies(_reference, name=name):
            raise getattr(exceptions, name)("it died")

        monkeypatch.setattr(ray, "get", dies)
        task = Task(spec, attempt=f"{spec.id}.1")
        engine._take(task, None)
        assert engine.waiting == [task] and task.deaths == 1
        engine.waiting.clear()
        task.attempt = f"{spec.id}.2"
        engine._take(task, None)
        assert [kind for kind, _ in events] == ["again", "failed"] and not engine.waiting
        assert name in events[1][1]["error"] and events[1][1]["status"] == "died"
        assert (tmp_path / name / "failed" / spec.id / "job.json").exists()


# --- a sweep on the cluster ------------------------------------------------------------------------------------------
def test_jobs_on_the_cluster_have_the_results_of_alignkit_run(nodes, tmp_path, capsys, monkeypatch):
    series = [notebook(tmp_path / "01_sft.ipynb", stage("sft", "seed / 3"), parameters=WHOLE),
              notebook(tmp_path / "02_reward_model.ipynb", reads("sft"), stage("reward", "before + bonus / 7"),
                       "if bonus > 1: raise ValueError('no such luck')", SHOWS_GPU,
                       "(place / 'samples.json').write_text(json.dumps(name))", parameters=f"{WHOLE}\nbonus = 1.0")]
    out = tmp_path / "ein größer Versuch"
    cluster = Cluster(nodes.address, cpus=0.5, gpus=0.5)
    before = signal.getsignal(signal.SIGTERM)
    assert sweep("course", out, {"bonus": "0.1,0.3,2", "seed": "1"}, series=series, cluster=cluster) == 1
    said = capsys.readouterr().out
    assert "3 jobs of the course; 1 series of earlier notebooks" in said and "3 at a time" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert [row["status"] for row in rows(out)] == ["finished", "finished", "failed"]
    assert "ValueError: no such luck" in rows(out)[2]["error"] and rows(out)[2]["attempts"] == 1
    for row in rows(out)[:2]:
        place = tmp_path / f"run {row['bonus']}"
        for path in series:
            run_notebook(path, place, {"seed": 1} | ({"bonus": row["bonus"]} if "02" in path.name else {}),
                         progress=False)
        for name in ("reward/results.json", "reward/weights.bin", "sft/results.json", "sft/weights.bin"):
            assert (out / "jobs" / row["job"] / name).read_bytes() == (place / name).read_bytes(), name
        assert (out / "jobs" / row["job"] / "reward" / "samples.json").read_text() == '"0"', "a part of a GPU"
    assert len({path.stat().st_ino for path in out.rglob("sft/weights.bin")}) == 1 and not list(
        (out / "attempts").iterdir())
    with pytest.raises(RunError, match=r"a job needs 1 CPU, 3 GPU, and no node of the cluster has that.*1 CPU, 1 GPU"):
        sweep("course", out, {"bonus": "4"}, series=series, cluster=Cluster(nodes.address, gpus=3))
    monkeypatch.setattr(ray_engine, "connected", lambda _: pytest.fail("the cluster was asked"))
    assert sweep("course", out, {"bonus": "0.1,0.3", "seed": "1"}, series=series, cluster=cluster) == 0
    assert "2 of them done already" in capsys.readouterr().out


def test_a_kernel_a_worker_and_a_node_that_are_killed(nodes, tmp_path):
    source, marks = waiting(tmp_path, 0, 1, 2)
    out = tmp_path / "s"
    with driver(nodes, source, out, "-p", "seed=0..4") as process:
        wait_for(lambda: waits(marks, 0) and waits(marks, 1), process)
        assert not listening_elsewhere([*nodes.processes(), psutil.Process(process.pid),
                                        *psutil.Process(process.pid).children(recursive=True)])
        worker = psutil.Process(kernel(marks, 1)).ppid()
        killed = [kernel(marks, 0), kernel(marks, 1), worker]
        os.kill(killed[0], signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: waits(marks, 2), process)
        worker = psutil.Process(kernel(marks, 2)).ppid()
        node = next(node for node in nodes.others if nodes.raylet(node) == psutil.Process(worker).ppid())
        killed += [kernel(marks, 2), worker, nodes.raylet(node)]
        nodes.cluster.remove_node(node, allow_graceful=False)
        nodes.others.remove(node)
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "again, because it died: toy failed in cell 2" in said and said.count("again, because it died") == 3
    assert "its worker died: WorkerCrashedError" in said and gone(killed), said
    assert scores(out) == {seed: seed + 2.0 for seed in range(5)} and not list((out / "attempts").iterdir())
    assert [row["attempts"] for row in rows(out)] == [2, 2, 2, 1, 1] and len(list((out / "jobs").iterdir())) == 5


def test_ctrl_c_and_a_killed_driver_leave_nothing_and_the_same_command_goes_on(nodes, tmp_path):
    source, marks = waiting(tmp_path, 1)
    out = tmp_path / "s"
    with driver(nodes, source, out, "-p", "seed=0..2") as process:
        wait_for(lambda: waits(marks, 1) and (out / "jobs").is_dir(), process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert re.search(r"seed=1_\w+: interrupted$", said, re.MULTILINE), said
    assert gone([kernel(marks, 1)]) and rows(out)[1]["status"] == "not run"
    for path in marks.iterdir():
        path.unlink()
    (marks / "2").touch()
    with driver(nodes, source, out, "-p", "seed=0..2") as process:
        wait_for(lambda: waits(marks, 2) and len(list((out / "jobs").iterdir())) == 2, process)
        left = nodes.at_work()
        assert kernel(marks, 2) in left and len(left) >= 2
        process.kill()
        process.wait()
        assert gone(left), "a worker or a kernel is left"
    stamps = {path: path.stat().st_mtime_ns for path in (out / "jobs").rglob("results.json")}
    with driver(nodes, source, out, "-p", "seed=0..2") as process:
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "2 of them done already" in said, said
    assert scores(out) == {0: 2.0, 1: 3.0, 2: 4.0} and not list((out / "attempts").iterdir())
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()) and len(stamps) == 2


def test_a_node_with_another_source_is_said(nodes, tmp_path, monkeypatch):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    monkeypatch.setattr("alignkit.sweeps.node.code_hash", lambda: "the driver's")
    assert sweep(source, tmp_path / "s", {"seed": "0"}, cluster=Cluster(nodes.address)) == 1
    (row,) = rows(tmp_path / "s")
    assert row["status"] == "failed" and "another source of alignkit" in row["error"] and row["attempts"] == 1


def test_a_connection_is_closed_and_one_that_ray_would_seek_elsewhere_is_said(nodes, monkeypatch):
    import ray

    with connected(Cluster(nodes.address)):
        assert ray.is_initialized()
    assert not ray.is_initialized()
    monkeypatch.delenv(ray_engine.LOOPBACK)
    with pytest.raises(RunError, match=f"listens on this machine alone.*export {ray_engine.LOOPBACK}=0"), connected(
            Cluster(nodes.address)):
        pass
