"""A job that is sent to another machine and comes back: what is unpacked, what is published, what is refused."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time

import pytest

from alignkit.errors import MissingExtra, ParameterError, RunError
from alignkit.jobs import cli
from alignkit.jobs.notebooks import run_notebook
from alignkit.sweeps import node
from alignkit.sweeps.job import is_done, publish
from alignkit.sweeps.node import base_parcel, errand, receive, run_here
from alignkit.sweeps.parcel import pack, unpack
from alignkit.sweeps.plan import plan
from alignkit.sweeps.ray_engine import Cluster, connected
from tests.test_sweep import RESULT, WHOLE, notebook, reads, stage


# --- a folder as bytes -----------------------------------------------------------------------------------------------
def sealed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def archive(*members: tuple[str, bytes, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "../elsewhere"
            file.addfile(info, io.BytesIO(content))
    return sealed(stream.getvalue())


def test_a_folder_is_the_same_after_its_way(tmp_path):
    source = tmp_path / "ein Ordner"
    (source / "tief" / "leer").mkdir(parents=True)
    (source / "tief" / "größe.bin").write_bytes(bytes(range(256)) * 5000)
    (source / "leer.txt").touch()
    os.link(source / "leer.txt", source / "zweimal.txt")
    (source / "aside").mkdir()
    (source / "aside" / "old").write_text("x")
    unpack(pack(source, lambda name: name != "aside"), tmp_path / "there")
    shutil.rmtree(source / "aside")
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*"))
    assert names == sorted(path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*"))
    assert len(names) == 5 and all((source / name).is_dir() or (source / name).read_bytes() ==
                                   (tmp_path / "there" / name).read_bytes() for name in names)


@pytest.mark.parametrize("name, kind", [
    ("../out", tarfile.REGTYPE), ("in/../../out", tarfile.REGTYPE), ("/tmp/out", tarfile.REGTYPE),
    ("link", tarfile.SYMTYPE), ("link", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE),
    ("sparse", tarfile.GNUTYPE_SPARSE), ("in\\..\\out", tarfile.REGTYPE), ("..", tarfile.DIRTYPE),
    (".", tarfile.DIRTYPE), ("not/made", tarfile.REGTYPE),
])
def test_what_is_no_plain_file_below_its_folder_is_not_unpacked(tmp_path, name, kind):
    with pytest.raises(RunError, match="what was sent holds"):
        unpack(archive((name, kind, b"")), tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir()) and [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_changed_byte_and_a_name_twice_are_noticed(tmp_path):
    good = archive(("one", tarfile.REGTYPE, b"1"))
    unpack(good, tmp_path / "good")
    for at in (0, 40, len(good) - 1):
        changed = bytearray(good)
        changed[at] ^= 1
        with pytest.raises(RunError, match="does not have the SHA-256"):
            unpack(bytes(changed), tmp_path / f"changed {at}")
        assert not (tmp_path / f"changed {at}").exists()
    with pytest.raises(RunError, match="twice"):
        unpack(archive(("one", tarfile.REGTYPE, b"1"), ("one", tarfile.REGTYPE, b"2")), tmp_path / "twice")
    with pytest.raises(RunError, match="is no archive"):
        unpack(sealed(b"no archive at all"), tmp_path / "none")


def test_a_link_is_not_packed(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="link is a link"):
        pack(tmp_path)
    assert pack(tmp_path, lambda name: name != "link")


# --- a job on its way ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A job that was sent, run and came back, and one that begins with a shared job."""
    place = tmp_path_factory.mktemp("sent")
    source = notebook(place / "toy.ipynb", RESULT)
    out = place / "s"
    spec = plan(str(source), out, {"rate": "0.1,0.2", "seed": "3"}).jobs[0]
    return source, out, spec, run_here(errand(out, spec, f"{spec.id}.1", timeout=None, threads=1), None)


def test_a_job_that_was_sent_has_the_result_of_alignkit_run(sent, tmp_path):
    source, out, spec, answer = sent
    assert answer["record"]["status"] == "finished" and not out.exists(), answer["record"]
    receive(out, spec, f"{spec.id}.1", answer)
    place = publish(out, spec, f"{spec.id}.1", answer["record"])
    run_notebook(source, tmp_path / "run", {"rate": 0.1, "seed": 3}, progress=False)
    assert (place / "toy" / "results.json").read_bytes() == (tmp_path / "run" / "toy" / "results.json").read_bytes()
    assert is_done(place, spec) and not list((out / "attempts").iterdir())


def test_what_this_machine_would_not_have_made_is_not_taken(sent, tmp_path, monkeypatch):
    source, _, spec, answer = sent

    def refused(changed: dict, says: str, wanted=spec) -> None:
        with pytest.raises(RunError, match=says):
            receive(tmp_path / "s", wanted, f"{spec.id}.1", changed)
        shutil.rmtree(tmp_path / "s", ignore_errors=True)

    def altered(name: str, old: bytes, new: bytes) -> dict:
        unpack(answer["content"], tmp_path / "altered")
        content = (tmp_path / "altered" / name).read_bytes()
        assert old in content
        (tmp_path / "altered" / name).write_bytes(content.replace(old, new))
        changed = {**answer, "content": pack(tmp_path / "altered")}
        shutil.rmtree(tmp_path / "altered")
        return changed

    refused(answer, r"rate was 0\.1, now 0\.2", plan(str(source), tmp_path / "s", {"rate": "0.2", "seed": "3"}).jobs[0])
    refused(altered("jobs.json", b'"finished"', b'"running"'), "interrupted before")
    refused({**answer, "unchanged": ["../../etc/passwd"]}, "is no file of None")
    monkeypatch.setattr("alignkit.jobs.job.code_hash", lambda: "another")
    refused(answer, "alignkit's code changed")


def test_a_job_begins_with_its_base_and_brings_back_only_what_it_made(tmp_path):
    series = [notebook(tmp_path / "01_sft.ipynb", stage("sft", "seed * 10"), parameters=WHOLE),
              notebook(tmp_path / "02_reward_model.ipynb", reads("sft"), stage("reward", "before + bonus"),
                       "(Path(run, 'sft', 'results.json')).write_text('{\"value\": 77}')",
                       parameters=f"{WHOLE}\nbonus = 1.0")]
    out = tmp_path / "s"
    planned = plan("course", out, {"bonus": "0.25,0.5", "seed": "2"}, series=series)
    (shared,) = planned.shared.values()
    answer = run_here(errand(out, shared, f"{shared.id}.1", timeout=None, threads=1), None)
    receive(out, shared, f"{shared.id}.1", answer)
    publish(out, shared, f"{shared.id}.1", answer["record"])
    for spec in planned.jobs:
        sent = errand(out, spec, f"{spec.id}.1", timeout=None, threads=1)
        answer = run_here(sent, base_parcel(out, spec.base))
        assert answer["unchanged"] == ["sft/weights.bin"], "weights travel once"
        unpack(answer["content"], tmp_path / spec.id)
        assert not (tmp_path / spec.id / "sft" / "weights.bin").exists()
        receive(out, spec, f"{spec.id}.1", answer)
        place = publish(out, spec, f"{spec.id}.1", answer["record"])
        assert is_done(place, spec)
        assert json.loads((place / "reward" / "results.json").read_text())["value"] == 20 + spec.shown["bonus"]
        assert json.loads((place / "sft" / "results.json").read_text())["value"] == 77  # a record that was added to
    assert json.loads((out / "shared" / shared.id / "sft" / "results.json").read_text())["value"] == 20
    weights = list(out.rglob("sft/weights.bin"))
    assert len(weights) == 3 and len({path.stat().st_ino for path in weights}) == 1
    with pytest.raises(RunError, match="is no file of"):
        receive(out, spec, f"{spec.id}.2", {**answer, "unchanged": ["sft/../sft/weights.bin"]})
    unpack(answer["content"], tmp_path / "changed")
    (tmp_path / "changed" / "reward" / "weights.bin").write_text("20.75")
    with pytest.raises(RunError, match=r"reward/weights\.bin is not what it wrote"):
        receive(out, spec, f"{spec.id}.2", {**answer, "content": pack(tmp_path / "changed")})


def test_a_failed_job_comes_back_with_its_notebook_and_a_link_is_said(tmp_path):
    source = notebook(tmp_path / "toy.ipynb", "if seed:\n    raise ValueError('no such luck')",
                      "import os\nos.symlink('/etc/passwd', run + '/link')")
    out = tmp_path / "s"
    linked, failed = plan(str(source), out, {"seed": "0,1"}).jobs
    answer = run_here(errand(out, failed, f"{failed.id}.1", timeout=None, threads=1), None)
    assert (answer["record"]["status"], answer["record"]["cell"]) == ("failed", 2)
    receive(out, failed, f"{failed.id}.1", answer)
    assert "no such luck" in (out / "attempts" / f"{failed.id}.1" / "toy.ipynb").read_text()
    answer = run_here(errand(out, linked, f"{linked.id}.1", timeout=None, threads=1), None)
    assert answer["record"]["status"] == "failed" and "link is a link" in answer["record"]["error"]


def test_another_alignkit_or_another_file_is_said_before_the_job_runs(tmp_path, monkeypatch):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    (tmp_path / "names.txt").write_text("a")
    out = tmp_path / "s"
    spec = plan(str(source), out, {"name": str(tmp_path / "names.txt")}).jobs[0]
    sent = errand(out, spec, f"{spec.id}.1", timeout=None, threads=1)
    monkeypatch.setattr(node, "run_job", lambda *_, **__: pytest.fail("the job was run"))
    for changed, says in (({"code": "0"}, "another source of alignkit"), ({"code": "0", "version": "9.9"}, "with 9.9")):
        record = run_here({**sent, **changed}, None)["record"]
        assert record["status"] == "failed" and says in record["error"] and "on all nodes" in record["error"]
    (tmp_path / "names.txt").write_text("b")
    assert "has another content of" in run_here(sent, None)["record"]["error"]
    (tmp_path / "names.txt").unlink()
    record = run_here(sent, None)["record"]
    assert "does not have" in record["error"] and "(name of toy)" in record["error"]


def test_the_folders_of_killed_jobs_are_deleted_and_those_of_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(node.tempfile, "tempdir", str(tmp_path))
    left, young, other = (tmp_path / name for name in ("alignkit-job-left", "alignkit-job-young", "elsewhere"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / ".lock").touch()
    before = time.time() - 1000
    os.utime(left, (before, before))
    os.utime(other, (before, before))
    with node._scratch() as first:
        os.utime(first, (before, before))
        with node._scratch() as second:
            assert first.is_dir() and second.is_dir() and young.is_dir() and other.is_dir() and not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignkit-job-young", "elsewhere"]


# --- options ---------------------------------------------------------------------------------------------------------
def test_options_of_a_cluster_are_checked_before_anything_starts(tmp_path, monkeypatch, capsys):
    source = notebook(tmp_path / "toy.ipynb", RESULT)
    out = tmp_path / "s"
    base = ["sweep", str(source), "-p", "seed=0", "--out", str(out)]
    for wrong, says in ((["--cpus", "2"], "--cpus says what a job asks a Ray cluster for: give --address"),
                        (["--gpus", "0.5"], "--gpus says what a job asks a Ray cluster for"),
                        (["--address", "6379"], "expected HOST:PORT"),
                        (["--address", "ray://127.0.0.1:10001"], "expected HOST:PORT"),
                        (["--address", "127.0.0.1:6379", "--gpus", "1.5"], "--gpus is 1.5"),
                        (["--address", "127.0.0.1:6379", "--cpus", "0"], "--cpus is 0"),
                        (["--address", "127.0.0.1:6379", "--job", "0"], "give it without --address")):
        assert cli.main([*base, *wrong]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*base, "--address", "127.0.0.1:6379", "--cpus", "-1"])
    capsys.readouterr()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert cli.main([*base, "--address", "127.0.0.1:6379"]) == 1
    assert "pip install 'alignkit[ray]'" in capsys.readouterr().err and not out.exists()
    assert cli.main([*base, "--address", "127.0.0.1:6379", "--dry-run"]) == 0 and not out.exists()
    with pytest.raises(MissingExtra), connected(Cluster("127.0.0.1:6379")):
        pass
    with pytest.raises(ParameterError):
        Cluster("127.0.0.1")
