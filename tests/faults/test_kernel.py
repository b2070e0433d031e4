"""Kernels, signals and locks: faults 3, 4, 5, 8, 9, 13, 16, 52 of the list, and folders with a pandas.py."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from alignkit.errors import NotebookFailed, RunError, RunInUse
from alignkit.jobs import job as job_module
from alignkit.jobs import kernel
from alignkit.jobs.memory import memory_advice
from alignkit.jobs.notebooks import course, run_notebook
from alignkit.runs.lock import lock_handles, run_lock
from alignkit.storage import append_metrics, write_atomically

ROOT = Path(__file__).parents[2]
START = "import os, sys, time\nfrom pathlib import Path\nrun = Path(run)\n(run / 'kernel').write_text(str(os.getpid()))\n"
SAVES = START + """(run / 'child').write_text(str(__import__('subprocess').Popen(
    ['sh', '-c', 'trap "" INT; sleep 600']).pid))
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
LONG_CALL = START + """(run / 'ready').touch()
import re
re.match('(a+)+$', 'a' * 60 + 'b')"""  # in C, with the GIL, for years


@pytest.fixture(autouse=True)
def _same_code(monkeypatch):
    monkeypatch.setattr(job_module, "_code_hash", lambda: "code")


def notebook(path: Path, *cells: str, parameters: str = "run = ''") -> Path:
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)
    return path


def command(*arguments, cwd: Path | None = None, before: str = "", **options) -> subprocess.Popen:
    """The command in a process of its own, with its output in a pipe; before: code that runs first."""
    code = f"import sys\n{before}\nfrom alignkit.jobs.cli import main\nsys.exit(main())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'widgets'}", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-P", "-c", code, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def started(source: Path, out: Path, **options) -> subprocess.Popen:
    """`alignkit run`, when its cell is at work."""
    job = command("run", source, "--out", out, **options)
    wait_for(lambda: (out / "ready").exists() or job.poll() is not None, 60)
    assert job.poll() is None, job.stdout.read()
    return job


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


def status(out: Path) -> dict:
    (record,) = json.loads((out / "jobs.json").read_text()).values()
    return record


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_03_one_interrupt_and_time_to_save(tmp_path, number):
    """Whichever signal ends the command, the cell is interrupted once, saves, and the record says `interrupted`."""
    out = tmp_path / "run"
    job = started(notebook(tmp_path / "x.ipynb", SAVES), out)
    job.send_signal(getattr(signal, number))
    wait_for((out / "log").exists, 5)
    if number != "SIGINT":  # a terminal that closes sends more than one
        job.send_signal(signal.SIGHUP)
        job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=20)
    assert (out / "log").read_text().split("\n") == ["first", "saved", ""]
    assert job.returncode == 130 and status(out)["status"] == "interrupted", printed
    assert "was interrupted in cell 2" in printed and "Traceback" not in printed and "Task" not in printed, printed
    assert not alive((out / "kernel").read_text()) and wait_for(lambda: not alive((out / "child").read_text()), 5)
    cells = json.loads((out / "x.ipynb").read_text())["cells"]
    assert "KeyboardInterrupt" in str(cells[-1]["outputs"]), "the executed notebook shows how the cell ended"


def test_03_a_second_ctrl_c_ends_the_wait(tmp_path):
    out = tmp_path / "run"
    job = started(notebook(tmp_path / "x.ipynb", SAVES.replace("sleep(2)", "sleep(9)")), out)
    job.send_signal(signal.SIGINT)
    assert wait_for((out / "log").exists, 5)
    begun = time.monotonic()
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=20)
    assert time.monotonic() - begun < 5 and (out / "log").read_text() == "first\n"
    assert job.returncode == 130 and status(out)["status"] == "interrupted", printed
    assert "Traceback" not in printed and not alive((out / "kernel").read_text()), printed


def test_03_a_kernel_that_ignores_all_signals_is_gone_within_the_bound(tmp_path):
    cell = START + """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run / 'ready').touch()
while True: time.sleep(1)"""
    out = tmp_path / "run"
    short = "import alignkit.jobs.kernel as kernel; kernel.SAVE_SECONDS = 1"
    job = started(notebook(tmp_path / "x.ipynb", cell), out, before=short)
    begun = time.monotonic()
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=20)
    assert time.monotonic() - begun < 1 + kernel.STOP_SECONDS + 4 and kernel.SAVE_SECONDS == 10
    assert job.returncode == 130 and status(out)["status"] == "interrupted", printed
    assert not alive((out / "kernel").read_text()) and "Traceback" not in printed


def test_03_what_nohup_ignores_stays_ignored(tmp_path):
    out = tmp_path / "run"
    cell = START + "(run / 'ready').touch()\ntime.sleep(2)"
    job = started(notebook(tmp_path / "x.ipynb", cell), out, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    job.send_signal(signal.SIGHUP)
    printed, _ = job.communicate(timeout=20)
    assert job.returncode == 0 and status(out)["status"] == "finished", printed


def test_03_an_interrupt_while_the_kernel_starts_leaves_none(tmp_path):
    """From Python too, where the process that started it lives on."""
    code = f"""import os, signal, sys, threading, time, psutil
from alignkit.jobs import job, notebooks
import alignkit.jobs.kernel
def interrupt():
    while not psutil.Process().children(): time.sleep(0.01)
    time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try: notebooks.run_notebook({str(notebook(tmp_path / 'x.ipynb', 'pass'))!r}, {str(tmp_path / 'run')!r})
except BaseException as error: print(type(error).__name__, getattr(error, "status", ""))
print([child.status() for child in psutil.Process().children(recursive=True)])"""
    job = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                         text=True, timeout=60)
    assert job.stdout.splitlines()[-2:] == ["NotebookFailed interrupted", "[]"], (job.stdout, job.stderr)
    assert status(tmp_path / "run")["status"] == "interrupted"


def test_04_the_last_words_of_a_dead_kernel_are_its_own(tmp_path):
    source = notebook(tmp_path / "x.ipynb", "import os\nos.write(2, b'my last words\\n')\nos.kill(os.getpid(), 9)")
    with pytest.raises(NotebookFailed, match=r"SIGKILL.*it last wrote: my last words") as caught:
        run_notebook(source, tmp_path / "run")
    assert "encryption" not in str(caught.value) and "IPKernelApp" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_05_a_kernel_in_a_long_call_is_killed_with_its_parent(tmp_path):
    out = tmp_path / "run"
    job = started(notebook(tmp_path / "x.ipynb", LONG_CALL), out)
    time.sleep(0.5)
    job.kill()
    job.communicate()
    assert wait_for(lambda: not alive((out / "kernel").read_text()), 10)
    with run_lock(out):
        pass


def test_05_a_kernel_that_outlives_its_parent_holds_the_lock(tmp_path):
    """As on a system that cannot end it: the cell itself takes that back."""
    out = tmp_path / "run"
    stays = LONG_CALL.replace("(run / 'ready')", "__import__('ctypes').CDLL(None).prctl(1, 0)\n(run / 'ready')")
    source = notebook(tmp_path / "x.ipynb", stays)
    job = started(source, out)
    pid = int((out / "kernel").read_text())
    try:
        time.sleep(0.5)
        job.kill()
        job.communicate()
        time.sleep(2)
        assert alive(pid)
        with pytest.raises(RunInUse, match=f"in use by pid {job.pid} since .*was killed; its kernel is still at work"):
            run_notebook(source, out)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not alive(pid), 5)
    with run_lock(out):
        assert len(lock_handles(out)) == 1
    assert lock_handles(out) == ()


def test_05_a_spare_kernel_holds_the_lock_of_its_run(tmp_path):
    cell = "import os, sys\nfrom pathlib import Path\n" \
           "Path(run, name).write_text(str([os.path.basename(os.readlink(f'/proc/self/fd/{fd}')) " \
           "for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]))"
    series = [notebook(tmp_path / f"{name}.ipynb", f"name = {name!r}\n{cell}") for name in "ab"]
    course(tmp_path / "run", notebooks=series, progress=False)
    assert all("'.lock'" in (tmp_path / "run" / name).read_text() for name in "ab")


@pytest.mark.parametrize("cell, error", [
    ("raise MemoryError", "MemoryError"),
    ("import torch\nraise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "CUDA out of memory"),
    ("import numpy as np\nnp.empty(2**55)", "Unable to allocate"),
    ("import os\nos.kill(os.getpid(), 9)", "SIGKILL"),
])
def test_08_out_of_memory_says_what_to_lower(tmp_path, cell, error):
    knobs = "run = ''\nprompts_per_iteration = 128\nminibatch_size: int = None\nmax_length = 512\nseed = 7"
    source = notebook(tmp_path / "x.ipynb", cell, parameters=knobs)
    with pytest.raises(NotebookFailed) as caught:
        run_notebook(source, tmp_path / "run", {"max_length": 300})
    message = str(caught.value)
    assert error in message and "prompts_per_iteration is 128: try 64" in message and "lower minibatch_size" in message
    assert "max_length is 300: try 150" in message and "seed" not in message
    assert message.endswith("or a smaller model") and status(tmp_path / "run")["status"] == "failed"


def test_08_advice_names_the_preset_and_is_given_once():
    advice = memory_advice(ROOT / "notebooks" / "03_ppo.ipynb", {"model": "some/model"})
    assert "prompts_per_iteration is 64: try 32" in advice and "minibatch_size is 16: try 8" in advice
    assert memory_advice(ROOT / "notebooks" / "03_ppo.ipynb", {}, "out of memory; lower minibatch_size to 4") == ""
    assert "minibatch_size" in memory_advice(Path("none.ipynb"), {})


def test_08_an_error_of_another_kind_has_no_advice(tmp_path):
    source = notebook(tmp_path / "x.ipynb", "raise ValueError('no memory of that')")
    with pytest.raises(NotebookFailed, match="no memory of that$"):
        run_notebook(source, tmp_path / "run")


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


def small_files(size: int = 2000) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_13_a_full_disk_is_named(tmp_path):
    """With a limit on the size of files in place of a full disk: both fail in `write`, which knows no path."""
    for write in (lambda path: write_atomically(path, b"x" * 5000), lambda path: append_metrics(path, {"x": "y" * 5000})):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        small_files()
        try:
            with pytest.raises(OSError, match=f"too large: '{tmp_path}/here.json'"):
                write(tmp_path / "here.json")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_atomically(tmp_path / "gone.json", "{}")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/gone\.json'"):
        write_atomically(tmp_path / "nowhere" / "gone.json", "{}")


def test_13_the_command_names_the_file(tmp_path):
    out = tmp_path / "run"
    source = notebook(tmp_path / "x.ipynb", "print('x' * 5000)")
    job = command("run", source, "--out", out, preexec_fn=small_files)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and "File too large" in printed and str(out) in printed and "Traceback" not in printed


def test_16_the_app_and_a_job_hold_the_same_lock(tmp_path):
    run = tmp_path / "run"
    with run_lock(run):
        for folder in (run, link(run, tmp_path / "link")):
            app = command("app", folder)
            printed, _ = app.communicate(timeout=60)
            assert app.returncode == 1 and "Traceback" not in printed
            assert f"in use by pid {os.getpid()} since 20" in printed, printed
    before = """import asyncio, alignkit_widgets.app.playground as playground, alignkit_widgets.app.server as server
from types import SimpleNamespace
playground.open_playground = lambda run: SimpleNamespace(run=run, model='tiny')"""
    app, printed = command("app", run, before=before), ""
    try:
        while "Ctrl-C" not in printed:
            printed += (line := app.stdout.readline())
            assert line, printed
        with pytest.raises(RunInUse, match=f"in use by pid {app.pid} since 20"):
            run_notebook(notebook(tmp_path / "x.ipynb", "pass"), run)
        with pytest.raises(RunInUse):
            course(run, notebooks=[tmp_path / "x.ipynb"])
        app.send_signal(signal.SIGHUP)
        printed += app.communicate(timeout=20)[0]
    finally:
        app.kill()
    assert app.returncode == 0 and "Traceback" not in printed, printed
    with run_lock(run):
        pass


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


def test_52_a_port_in_use_is_named_and_the_default_is_one_that_is_free(tmp_path):
    before = """import alignkit_widgets.app.playground as playground
from types import SimpleNamespace
playground.open_playground = lambda run: SimpleNamespace(run=run, model='tiny')"""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        app = command("app", tmp_path / "run", "--port", port, before=before)
        printed, _ = app.communicate(timeout=60)
    assert app.returncode == 1 and "Traceback" not in printed, printed
    assert f"port {port} of 127.0.0.1" in printed and "choose another --port" in printed
    apps = [command("app", tmp_path / name, before=before) for name in "ab"]
    try:
        ports = set()
        for app in apps:
            while not (match := re.search(r"http://127\.0\.0\.1:(\d+)/\?token=", line := app.stdout.readline())):
                assert line or app.poll() is None
            with socket.create_connection(("127.0.0.1", int(match[1])), 5):
                ports.add(match[1])
        assert len(ports) == 2
    finally:
        for app in apps:
            app.kill()
            app.communicate()


# --- what a kernel imports -------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path, monkeypatch) -> Path:
    """A folder with modules that must not be imported, and the user's own reward; the command is started in it."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("pandas", "ipykernel", "runpy", "pathlib", "numpy", "IPython", "alignkit", "torch", "matplotlib_inline",
                 "ipykernel_launcher", "sitecustomize", "usercustomize", "ipython_config"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name + ' '!r})\n")
    (folder / "my_rewards.py").write_text("import my_words\ndef score(prompts, responses): return [my_words.ONE]\n")
    (folder / "my_words.py").write_text("ONE = 1\n")
    monkeypatch.chdir(folder)
    return folder


LOOKS = """import pandas, sys, os, alignkit
from alignkit import load_reward
before = list(sys.path)
assert load_reward(reward)(['a'], ['b']) == [1] and sys.path == before
Path = __import__('pathlib').Path
Path(run, name).write_text('\\n'.join(str(Path(p).absolute() if p else Path.cwd()) for p in sys.path) + f'\\n{alignkit.__file__}')"""


def test_pandas_py_where_a_kernel_starts_is_not_imported_and_a_reward_is(tmp_path, hostile):
    """In a kernel, in a spare one, and with the notebook in the same folder."""
    parameters = "run = ''\nreward = 'my_rewards:score'"
    series = [notebook(hostile / f"{name}.ipynb", f"name = {name!r}\n{LOOKS}", parameters=parameters) for name in "ab"]
    course(tmp_path / "run", notebooks=series, progress=False)
    run_notebook(notebook(hostile / "c.ipynb", f"name = 'c'\n{LOOKS}", parameters=parameters), tmp_path / "alone")
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
    for made in (tmp_path / "run" / "a", tmp_path / "run" / "b", tmp_path / "alone" / "c"):
        *places, package = made.read_text().split("\n")
        assert str(hostile) not in places and Path(package) == ROOT / "alignkit" / "__init__.py"


def test_pandas_py_is_imported_by_no_process_of_the_command(tmp_path, hostile):
    source = notebook(hostile / "x.ipynb", "import pandas, pathlib, runpy")
    job = command("run", source, "--out", tmp_path / "run", cwd=hostile)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 0, printed
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_pandas_py_on_the_users_own_path_counts(tmp_path, hostile, monkeypatch):
    """PYTHONPATH is the user's word, also if it names the folder where the command is started."""
    for file in hostile.glob("*.py"):
        if file.stem not in ("my_rewards", "my_words"):
            file.unlink()
    monkeypatch.setenv("PYTHONPATH", f"{hostile}{os.pathsep}{ROOT}")
    source = notebook(hostile / "x.ipynb", "import my_words, sys\nassert sys.path[0] == place", parameters=f"run = ''\nplace = {str(hostile)!r}")
    run_notebook(source, tmp_path / "run")


def test_pandas_py_does_not_stand_in_for_a_reward(tmp_path, hostile):
    """The user names an installed module: it is that one; and what is not there is named."""
    code = "from alignkit.reward import load_reward\nload_reward('pandas:DataFrame')\nload_reward('my_rewards:score')\n" \
           "try: load_reward('no_such_rewards:score')\nexcept ValueError as error: print(error)"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], cwd=hostile, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert loaded.returncode == 0 and "'no_such_rewards' could not be imported" in loaded.stdout, loaded.stderr
    assert not (tmp_path / "imported").exists()
