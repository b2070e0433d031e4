"""Kernels, signals and locks: faults 3, 4, 5, 8, 9, 13, 16, 52 of the list, and folders with a pandas.py."""

import asyncio
import contextlib
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from alignkit_widgets.app import playground, server
from jupyter_client.provisioning import local_provisioner

from alignkit.errors import NotebookFailed, RunError, RunInUse, is_out_of_memory
from alignkit.folders import replacing
from alignkit.jobs import job as job_module
from alignkit.jobs import kernel, spare_kernel
from alignkit.jobs.cli import _one_interrupt, main
from alignkit.jobs.memory import memory_advice
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.reward import load_reward
from alignkit.runs.lock import lock_handles, run_lock
from alignkit.storage import append_metrics, read_metrics, write_atomically

ROOT = Path(__file__).parents[2]
START = """import os, sys, time
from pathlib import Path
run = Path(run)
(run / 'kernel').write_text(str(os.getpid()))
"""
SAVES = START + """(run / 'child').write_text(str(__import__('subprocess').Popen(
    ['sh', '-c', 'trap "" INT; exec sleep 600']).pid))
try:
    (run / 'ready').touch()
    while True: time.sleep(0.05); print('.', end='')
except KeyboardInterrupt:
    with open(run / 'log', 'a') as log:
        print('first', file=log, flush=True)
        try:
            time.sleep(2)
            print('saved', file=log, flush=True)
            if not os.path.exists(f"/proc/{(run / 'child').read_text()}"): print('child gone', file=log, flush=True)
        except KeyboardInterrupt:
            print('second_interrupt', file=log, flush=True)
    raise"""
KNOBS = "run = ''\nprompts_per_iteration = 128\nminibatch_size: int = None\nmax_length = 512\nseed = 7"
LONG_CALL = START + """(run / 'ready').touch()
import re
re.match('(a+)+$', 'a' * 60 + 'b')"""  # in C, with the GIL, for years


@pytest.fixture(autouse=True)
def _same_code(monkeypatch):
    monkeypatch.setattr(job_module, "code_hash", lambda: "code")


def notebook(path: Path, *cells: str, parameters: str = "run = ''") -> Path:
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)
    return path


def started(source: Path, out: Path, cwd: Path | None = None) -> subprocess.Popen:
    """`alignkit run` in a process of its own, when its cell is at work."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'widgets'}"}
    code = "import sys; from alignkit.jobs.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "run", str(source), "--out", str(out)]
    job = subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    wait_for(lambda: (out / "ready").exists() or job.poll() is not None, 60)
    assert (out / "ready").exists(), job.communicate()[0]
    return job


def signalled(arguments: list, *steps: tuple) -> int:
    """The exit code of the command `arguments`, in this process, which gets signals: each step has a condition and the
    names of those that are sent once it holds."""
    going = True

    def send() -> None:
        for condition, *names in steps:
            while going and not condition():
                time.sleep(0.02)
            for name in names:
                if going:
                    os.kill(os.getpid(), getattr(signal, name))
                    time.sleep(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return main([str(argument) for argument in arguments])
    finally:
        going = False
        sender.join()


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(reached)


def alive(pid: int | str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_free(run: Path) -> bool:
    try:
        with run_lock(run):
            return True
    except RunInUse:
        return False


def status(out: Path) -> dict:
    (record,) = json.loads((out / "jobs.json").read_text()).values()
    return record


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_03_one_interrupt_and_time_to_save(tmp_path, capfd, number):
    """Whichever signal ends the command, the cell is interrupted once, saves, and the record says `interrupted`."""
    out, source = tmp_path / "run", notebook(tmp_path / "x.ipynb", SAVES)
    more = () if number == "SIGINT" else ("SIGHUP", "SIGTERM")  # a terminal that closes sends more than one
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    code = signalled(["run", source, "--out", out], ((out / "ready").exists, number), ((out / "log").exists, *more))
    gc.collect()
    printed = "".join(capfd.readouterr())
    assert (out / "log").read_text().split("\n") == ["first", "saved", ""]
    assert code == 130 and status(out)["status"] == "interrupted", printed
    assert "was interrupted in cell 2" in printed and "Traceback" not in printed and "Task" not in printed, printed
    assert not alive((out / "kernel").read_text()) and wait_for(lambda: not alive((out / "child").read_text()), 5)
    cells = json.loads((out / "x.ipynb").read_text())["cells"]
    assert "KeyboardInterrupt" in str(cells[-1]["outputs"]), "the executed notebook shows how the cell ended"
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_03_an_interrupt_ends_no_task_that_collects_outputs(number):
    """The signal comes while the task itself is at work, not while the loop waits."""
    ended = []

    async def collect() -> None:
        os.kill(os.getpid(), getattr(signal, number))
        await asyncio.sleep(0.01)
        ended.append(True)

    async def cell() -> None:
        event = asyncio.Event()
        with kernel._interrupts_set(event):
            await collect()
        assert event.is_set()

    with _one_interrupt():
        before = signal.getsignal(signal.SIGINT)
        asyncio.run(cell())
        assert signal.getsignal(signal.SIGINT) is before
    assert ended


def test_03_a_second_ctrl_c_ends_the_wait(tmp_path, capfd):
    out, source = tmp_path / "run", notebook(tmp_path / "x.ipynb", SAVES.replace("sleep(2)", "sleep(9)"))
    begun = []
    code = signalled(["run", source, "--out", out], ((out / "ready").exists, "SIGINT"),
                     (lambda: (out / "log").exists() and not begun.append(time.monotonic()), "SIGINT"))
    printed = "".join(capfd.readouterr())
    assert time.monotonic() - begun[0] < 5 and (out / "log").read_text() == "first\n"
    assert code == 130 and status(out)["status"] == "interrupted", printed
    assert "Traceback" not in printed and not alive((out / "kernel").read_text()), printed


def test_03_a_kernel_that_ignores_all_signals_is_gone_within_the_bound(tmp_path, capfd, monkeypatch):
    cell = START + """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run / 'ready').touch()
while True: time.sleep(1)"""
    out, source, begun = tmp_path / "run", notebook(tmp_path / "x.ipynb", cell), []
    assert kernel.SAVE_SECONDS == 10
    monkeypatch.setattr(kernel, "SAVE_SECONDS", 1)
    code = signalled(["run", source, "--out", out],
                     (lambda: (out / "ready").exists() and not begun.append(time.monotonic()), "SIGTERM"))
    assert time.monotonic() - begun[0] < 1 + kernel.STOP_SECONDS + 4
    assert code == 130 and status(out)["status"] == "interrupted"
    assert not alive((out / "kernel").read_text()) and "Traceback" not in "".join(capfd.readouterr())


def test_03_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _one_interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_03_an_interrupt_while_the_kernel_starts_leaves_none(tmp_path):
    """In Python too, where the process that started it lives on, and with it the lock that the kernel has."""
    out, source = tmp_path / "run", notebook(tmp_path / "x.ipynb", START)
    before = set(psutil.Process().children())  # what earlier tests in this process have left

    def kernels() -> bool:
        return bool(set(psutil.Process().children()) - before)

    assert signalled(["run", source, "--out", out], (kernels, "SIGINT")) == 130
    assert status(out)["status"] == "interrupted" and not kernels()
    with run_lock(out):
        pass


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_03_an_interrupt_between_a_kernels_start_and_its_record_leaves_none(tmp_path, monkeypatch, name):
    out, source = tmp_path / "run", notebook(tmp_path / "x.ipynb", START)
    launch, launched = local_provisioner.launch_kernel, []

    def interrupted(*arguments, **options) -> subprocess.Popen:
        launched.append(launch(*arguments, **options))
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.05)  # the handler runs here, before anybody has the process
        return launched[-1]

    monkeypatch.setattr(local_provisioner, "launch_kernel", interrupted)
    assert main(["run", str(source), "--out", str(out)]) == 130
    assert status(out)["status"] == "interrupted" and launched[0].poll() is not None and is_free(out)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> str:
    """What is said of a kernel that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    cell = "import os\nos.write(2, b'my last words\\n')\nos.kill(os.getpid(), 9)"
    with pytest.raises(NotebookFailed) as caught:
        run_notebook(notebook(folder / "x.ipynb", cell, parameters=KNOBS), folder / "run", {"max_length": 300})
    assert status(folder / "run")["status"] == "failed"
    return str(caught.value)


def test_04_the_last_words_of_a_dead_kernel_are_its_own(killed):
    assert "SIGKILL" in killed and "it last wrote: my last words" in killed
    assert "encryption" not in killed and "IPKernelApp" not in killed


@pytest.mark.parametrize("taken, ends", [(1, "finished"), (kernel.STARTS, "failed")])
def test_a_kernel_whose_port_was_taken_meanwhile_is_started_again(tmp_path, take_ports, taken, ends):
    asked = take_ports(taken)
    with contextlib.nullcontext() if ends == "finished" else pytest.raises(NotebookFailed, match="in use"):
        run_notebook(notebook(tmp_path / "x.ipynb", "1 + 1", parameters=KNOBS), tmp_path / "run")
    assert status(tmp_path / "run")["status"] == ends and len(asked) == 5 * min(taken + 1, kernel.STARTS)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_05_a_kernel_in_a_long_call_is_killed_with_its_parent(tmp_path):
    out = tmp_path / "run"
    job = started(notebook(tmp_path / "x.ipynb", LONG_CALL), out)
    time.sleep(0.5)
    job.kill()
    job.communicate()
    assert wait_for(lambda: not alive((out / "kernel").read_text()), 10) and wait_for(lambda: is_free(out), 5)


def test_05_a_kernel_that_outlives_its_parent_holds_the_lock(tmp_path):
    """As on a system that cannot end it: the cell itself takes that back."""
    out = tmp_path / "run"
    stays = LONG_CALL.replace("(run / 'ready')", "__import__('ctypes').CDLL(None).prctl(1, 0)\n(run / 'ready')")
    job = started(notebook(tmp_path / "x.ipynb", stays), out)
    pid = int((out / "kernel").read_text())
    try:
        time.sleep(0.5)
        job.kill()
        job.communicate()
        time.sleep(1.5)
        assert alive(pid)
        told = f"in use by pid {job.pid} since .*was killed; its kernel is still at work"
        with pytest.raises(RunInUse, match=told), run_lock(out):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: is_free(out), 10)
    with run_lock(out):
        assert len(lock_handles(out)) == 1
    assert lock_handles(out) == ()


def test_05_a_spare_kernel_holds_the_lock_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr(spare_kernel, "NEEDED", ("json",))
    cell = "import os\nfrom pathlib import Path\n" \
           "Path(run, 'places').write_text(str([os.path.basename(os.readlink(f'/proc/self/fd/{fd}')) " \
           "for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]))"
    course(tmp_path / "run", notebooks=[notebook(tmp_path / "a.ipynb", cell)], progress=False)
    assert "'.lock'" in (tmp_path / "run" / "places").read_text()


def test_08_out_of_memory_says_what_to_lower(tmp_path, killed):
    """In a cell, and when the system has killed the kernel."""
    source = notebook(tmp_path / "x.ipynb", "raise MemoryError", parameters=KNOBS)
    with pytest.raises(NotebookFailed, match="`raise MemoryError`: MemoryError; ") as caught:
        run_notebook(source, tmp_path / "run", {"max_length": 300})
    for message in (str(caught.value), killed):
        assert "prompts_per_iteration is 128: try 64" in message and "lower minibatch_size" in message
        assert "max_length is 300: try 150" in message and "seed" not in message
        assert message.endswith("or a smaller model")


@pytest.mark.parametrize("error, is_one", [
    ("MemoryError", True), ("torch.OutOfMemoryError: CUDA out of memory. Tried", True), ("OutOfMemoryError: x", True),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried", True),
    ("_ArrayMemoryError: Unable to allocate 256 PiB for an array", True), ("RuntimeError: std::bad_alloc", True),
    ("OSError: [Errno 12] Cannot allocate memory", True), ("ValueError: no memory of that", False), ("KeyError", False),
])
def test_08_an_error_of_another_kind_has_no_advice(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_08_advice_names_the_preset_and_is_given_once():
    advice = memory_advice(ROOT / "notebooks" / "03b_ppo.ipynb", {"model": "some/model"})
    assert "prompts_per_iteration is 64: try 32" in advice and "minibatch_size is 16: try 8" in advice
    assert memory_advice(ROOT / "notebooks" / "03b_ppo.ipynb", {}, "out of memory; lower minibatch_size to 4") == ""
    assert "minibatch_size" in memory_advice(Path("none.ipynb"), {})


def test_09_a_hanging_cell_that_ignores_signals_leaves_no_process(tmp_path):
    cell = START + """import signal, subprocess
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run / 'child').write_text(str(subprocess.Popen(['sleep', '600']).pid))
while True: pass"""
    out = tmp_path / "run"
    with pytest.raises(NotebookFailed, match="ran out of time"):
        run_notebook(notebook(tmp_path / "x.ipynb", cell), out, timeout=2)
    assert status(out)["status"] == "timeout"
    assert not alive((out / "kernel").read_text()) and wait_for(lambda: not alive((out / "child").read_text()), 5)


@contextlib.contextmanager
def small_files(size: int = 3000):
    """A limit on the size of files, as good as a full disk: `write` fails, and knows no path."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_13_a_full_disk_is_named(tmp_path):
    append_metrics(tmp_path / "m.jsonl", {"step": 1})
    for name, write in {"a.json": lambda path: write_atomically(path, b"x" * 5000),
                        "m.jsonl": lambda path: append_metrics(path, {"x": "y" * 5000})}.items():
        with small_files(), pytest.raises(OSError, match=f"File too large: '{tmp_path}/{name}'"):
            write(tmp_path / name)
    with pytest.warns(UserWarning, match="torn"):
        append_metrics(tmp_path / "m.jsonl", {"step": 2})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
    full = pytest.raises(OSError, match=f"File too large: '{tmp_path}/new'")
    with small_files(), full, replacing(tmp_path / "new") as new:
        (new / "x").write_text("x" * 5000)
    with pytest.raises(FileNotFoundError, match=r"/nowhere/gone\.json'"):
        write_atomically(tmp_path / "nowhere" / "gone.json", "{}")


def test_13_the_command_names_the_file(tmp_path, capfd):
    out = tmp_path / "run"
    source = notebook(tmp_path / "x.ipynb", "print('x' * 20000)")
    with small_files(8000):
        code = main(["run", str(source), "--out", str(out)])
    printed = "".join(capfd.readouterr())
    assert code == 1 and f"File too large: '{out}/" in printed and "Traceback" not in printed, printed


def test_14_a_directory_that_goes_away_or_cannot_be_made_is_named(tmp_path, capfd):
    out, source = tmp_path / "run", notebook(tmp_path / "x.ipynb", "import shutil\nshutil.rmtree(run)")
    assert main(["run", str(source), "--out", str(out)]) == 1
    printed = "".join(capfd.readouterr())
    assert f"No such file or directory: '{out}/" in printed and "Traceback" not in printed, printed
    for place in ("/proc/none/run", source / "run"):
        assert main(["run", str(source), "--out", str(place)]) == 1
        assert f"run directory '{place}' cannot be made" in "".join(capfd.readouterr())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "jobs.json").write_text('{"x": {"sta')
    assert main(["run", str(source), "--out", str(tmp_path / "torn")]) == 1
    printed = "".join(capfd.readouterr())
    assert f"{tmp_path / 'torn' / 'jobs.json'}" in printed and "Traceback" not in printed


@pytest.fixture
def app(monkeypatch):
    """The app without models: an empty playground, and a note of the port it listens on."""
    listening = []
    monkeypatch.setattr(playground, "open_playground", lambda run, **_: SimpleNamespace(run=run, model="tiny"))
    listen = server.Dashboard.listen

    def noted(self, port: int) -> str:
        url = listen(self, port)
        listening.append(self.port)
        return url

    monkeypatch.setattr(server.Dashboard, "listen", noted)
    return listening


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_16_the_app_and_a_job_hold_the_same_lock(tmp_path, capfd, app, number):
    run, refused = tmp_path / "run", []
    for folder in (run, link(run, tmp_path / "link")):
        with run_lock(run):
            assert main(["app", str(folder), "--new"]) == 1
        printed = "".join(capfd.readouterr())
        assert f"in use by pid {os.getpid()} since 20" in printed and "Traceback" not in printed, printed
    source = notebook(tmp_path / "x.ipynb", "pass")

    def is_refused() -> bool:
        if app:
            for job in (lambda: run_notebook(source, run), lambda: course(run, notebooks=[source])):
                with pytest.raises(RunInUse, match=f"in use by pid {os.getpid()} since 20"):
                    job()
            refused.append(True)
        return bool(app)

    assert signalled(["app", run, "--new"], (is_refused, number)) == 0 and refused
    printed = "".join(capfd.readouterr())
    assert f"http://127.0.0.1:{app[0]}/?token=" in printed and "Traceback" not in printed, printed
    assert is_free(run)


def test_03_the_app_waits_for_what_it_saves_and_a_second_ctrl_c_ends_that(tmp_path, capfd, monkeypatch, app):
    class AtOnce(BaseException):
        pass

    def leave(code: int) -> None:
        raise AtOnce(code)

    saving = []

    async def close(_dashboard) -> None:
        saving.append(True)
        await asyncio.sleep(30)

    monkeypatch.setattr(server.Dashboard, "close", close)
    monkeypatch.setattr(server.os, "_exit", leave)
    with pytest.raises(AtOnce, match="130"):
        signalled(["app", tmp_path / "run", "--new"], (lambda: app, "SIGTERM"),
                  (lambda: saving, "SIGHUP", "SIGTERM", "SIGINT"))
    assert "ended at once; training since the last checkpoint is lost" in capfd.readouterr().out
    assert is_free(tmp_path / "run")


def link(target: Path, name: Path) -> Path:
    name.symlink_to(target)
    return name


@pytest.mark.parametrize("make", [lambda lock, mine: lock.symlink_to(mine), lambda lock, mine: os.mkfifo(lock),
                                  lambda lock, mine: lock.mkdir()])
def test_16_a_lock_that_a_stranger_made_writes_and_hangs_nowhere(tmp_path, make):
    mine, run = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_text("my own")
    run.mkdir()
    make(run / ".lock", mine)
    with pytest.raises(RunError, match=r"\.lock is not a plain file"), run_lock(run):
        pass
    assert mine.read_text() == "my own"


def test_16_a_lock_file_of_any_bytes_is_told(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00pid 99999999999999999999 since" * 99)
    with run_lock(tmp_path), pytest.raises(RunInUse, match=f"pid {os.getpid()}"), run_lock(tmp_path):
        pass


def test_52_a_port_in_use_is_named_and_the_default_is_one_that_is_free(tmp_path, capfd, app):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["app", str(tmp_path / "run"), "--new", "--port", str(port)]) == 1 and not app
        printed = "".join(capfd.readouterr())
        assert f"port {port} of 127.0.0.1" in printed and "choose another --port" in printed
        assert "Traceback" not in printed and is_free(tmp_path / "run")

        def reached() -> bool:
            return bool(app) and not socket.create_connection(("127.0.0.1", app[-1]), 5).close()

        assert signalled(["app", tmp_path / "run", "--new"], (reached, "SIGINT")) == 0 and app[-1] != port
    assert f"http://127.0.0.1:{app[-1]}/?token=" in "".join(capfd.readouterr())


def test_54_a_secret_of_the_environment_stands_in_no_file_of_the_run(tmp_path, monkeypatch):
    secret = "hf_" + "aSecretOfTheUser" * 2
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    source = notebook(tmp_path / "x.ipynb", "import os\nassert os.environ['HF_TOKEN']\nraise ValueError('stop')")
    with pytest.raises(NotebookFailed, match="ValueError: stop") as caught:
        course(tmp_path / "run", notebooks=[source], progress=False)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 4 and secret not in str(caught.value)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


# --- a kernel that is asked whether it is ready


def asked_when_ready(tmp_path: Path, harm=lambda pid: None, seconds: float = 60) -> tuple[list, list[str]]:
    """Start a kernel, harm it, and wait until it is ready; returns the messages that are left of that, and what a cell
    then prints."""
    async def ask() -> tuple[list, list[str]]:
        spare = spare_kernel.Spare(dict(os.environ), tmp_path, needed=())
        client = spare.manager.client()
        try:
            harm(spare.manager.provisioner.process.pid)
            client.start_channels()
            await client.wait_for_ready(timeout=seconds)
            left, printed = [], []
            for channel in (client.shell_channel, client.iopub_channel):
                while await channel.msg_ready():
                    left.append(await channel.get_msg())
            await client.execute_interactive("print('first'); print('last')", timeout=60,
                                             output_hook=lambda message: printed.append(message["content"].get("text")))
            return left, printed
        finally:
            client.stop_channels()
            spare.manager.kill()
            spare.log.close()
    return asyncio.run(ask())


def test_a_kernel_is_ready_as_soon_as_it_answers_and_no_output_is_lost(tmp_path):
    for _ in range(3):
        left, printed = asked_when_ready(tmp_path)
        assert left == [] and "".join(text for text in printed if text) == "first\nlast\n"


def test_a_kernel_that_has_ended_or_does_not_answer_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="Kernel died before replying"):
        asked_when_ready(tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(RuntimeError, match="Kernel didn't respond in 1 seconds"):
        asked_when_ready(tmp_path, lambda pid: os.kill(pid, signal.SIGSTOP), seconds=1)


# --- what a kernel imports -------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A folder with modules that must not be imported, and the user's own reward; the command is started in it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("pandas", "ipykernel", "runpy", "pathlib", "numpy", "IPython", "alignkit", "torch",
                 "matplotlib_inline", "ipykernel_launcher", "sitecustomize", "usercustomize", "ipython_config"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name + ' '!r})\n")
    (folder / "my_rewards.py").write_text("import my_words\ndef score(prompts, responses): return [my_words.ONE]\n")
    (folder / "my_words.py").write_text("ONE = 1\n")
    monkeypatch.chdir(folder)
    return folder


LOOKS = """import pandas, sys, os, alignkit
before = list(sys.path)
if reward:
    from alignkit import load_reward
    assert load_reward(reward)(['a'], ['b']) == [1] and sys.path == before
Path = __import__('pathlib').Path
Path(run, 'places').write_text('\\n'.join(str(Path(p).absolute() if p else Path.cwd()) for p in sys.path)
                                + f'\\n{alignkit.__file__}')"""


def test_pandas_py_where_a_kernel_starts_is_not_imported_and_a_reward_is(tmp_path, hostile, monkeypatch):
    """In a kernel, in a spare one, and with the notebook in the same folder."""
    monkeypatch.setattr(spare_kernel, "NEEDED", ("pandas",))
    spare, alone = (notebook(hostile / f"{name}.ipynb", LOOKS, parameters=f"run = ''\nreward = {reward!r}")
                    for name, reward in (("spare", "my_rewards:score"), ("alone", "")))
    course(tmp_path / "spare", notebooks=[spare], progress=False)
    run_notebook(alone, tmp_path / "alone")
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
    for name in ("spare", "alone"):
        *places, package = (tmp_path / name / "places").read_text().split("\n")
        assert str(hostile) not in places and Path(package) == ROOT / "alignkit" / "__init__.py"


def test_pandas_py_is_imported_by_no_process_of_the_command(tmp_path, hostile):
    source = notebook(hostile / "x.ipynb", "import pathlib, runpy, numpy\npathlib.Path(run, 'ready').touch()")
    job = started(source, tmp_path / "run", cwd=hostile)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_pandas_py_on_the_users_own_path_counts(tmp_path, hostile, monkeypatch):
    """PYTHONPATH is the user's word, also if it names the folder where the command is started."""
    for file in hostile.glob("*.py"):
        if file.stem not in ("my_rewards", "my_words"):
            file.unlink()
    monkeypatch.setenv("PYTHONPATH", f"{hostile}{os.pathsep}{ROOT}")
    source = notebook(hostile / "x.ipynb", "import my_words, sys\nassert sys.path[0] == place",
                      parameters=f"run = ''\nplace = {str(hostile)!r}")
    run_notebook(source, tmp_path / "run")


def test_pandas_py_does_not_stand_in_for_a_reward(tmp_path, hostile, monkeypatch):
    """The user names an installed module: it is that one; and what is not there is named."""
    (hostile / "colorsys.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    for name in ("colorsys", "my_rewards", "my_words"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    assert load_reward("colorsys:rgb_to_hls")(0, 0, 0) == (0, 0, 0) and not (tmp_path / "imported").exists()
    assert load_reward("my_rewards:score")([], []) == [1]
    with pytest.raises(ValueError, match="'no_such_rewards' could not be imported"):
        load_reward("no_such_rewards:score")
    assert sys.path == before
    for name in ("my_rewards", "my_words"):
        sys.modules.pop(name)
