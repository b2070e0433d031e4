"""The dashboard without a browser: who gets in, what the server says, how runs begin and end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alignkit_widgets import FrontierExplorer, TrainingCockpit
from alignkit_widgets.app import server
from alignkit_widgets.app.measured import exact_points, measure_policies, measured_points
from alignkit_widgets.app.playground import LivePPO, Playground, make_desk_start, measured_file, open_playground
from alignkit_widgets.app.sweep_page import SweepPage
from alignkit_widgets.explorers.own_plane import OwnPlane
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from alignkit import exact
from alignkit.configs import RewardConfig, SFTConfig
from alignkit.data.encoding import encode_text
from alignkit.errors import DataError, RunError
from alignkit.exact.prompts import enumerate_world
from alignkit.formulas.intervals import Estimate
from alignkit.forward.rollout import decode_responses
from alignkit.jobs.cli import main
from alignkit.models.loading import load_policy
from alignkit.runs.lock import run_lock
from alignkit.runs.records import start_run
from alignkit.storage import append_metrics, branch_files, read_metrics, write_json

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def desk_start(tmp_path_factory) -> Path:
    """A run directory with a hastily trained SFT policy and reward model."""
    run = start_run(tmp_path_factory.mktemp("desk") / "run", "tiny", "desk", 0)
    make_desk_start(run, pairs=64, sft=SFTConfig(epochs=0.2), reward=RewardConfig(epochs=1))
    return run


@pytest.fixture
def playground(desk_start, tmp_path):
    """A playground of its own on the shared start."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("sft", "reward", "run.json"):
        os.symlink(desk_start / name, run / name)
    return open_playground(run)


class Page:
    """A page of the dashboard: what it was told, and what it says."""

    def __init__(self, connection) -> None:
        self.connection, self.told = connection, []

    async def until(self, condition, seconds: float = 60.0):
        """Read messages until one of them makes `condition` true; returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = json.loads(await asyncio.wait_for(self.connection.read_message(), seconds))
            self.told.append(message)
            if condition(message):
                return message
        raise AssertionError(f"waited {seconds} s in vain; told {str(self.told)[-500:]}")

    def say(self, **message) -> None:
        self.connection.write_message(json.dumps(message))


def serving(served, test) -> None:
    """Run `await test(dashboard, page)` beside the dashboard of a playground, or beside another page."""

    async def run() -> None:
        dashboard = served if isinstance(served, server.PageServer) else server.Dashboard(served)
        dashboard.listen()
        try:
            page = Page(await websocket_connect(f"ws://127.0.0.1:{dashboard.port}/socket?token={dashboard.token}"))
            await test(dashboard, page)
        finally:
            await dashboard.close()
        assert not dashboard.busy

    asyncio.run(run())


def status(key, value):
    """A condition: the status says `value` for `key`."""
    return lambda message: message.get("status", {}).get(key) == value


def test_without_the_token_another_host_or_origin_it_says_403(playground):
    async def test(dashboard, page):
        client, here = AsyncHTTPClient(), f"http://127.0.0.1:{dashboard.port}"
        good = f"?token={dashboard.token}"

        async def code(path: str, **headers) -> int:
            request = HTTPRequest(here + path, headers={k.title(): v for k, v in headers.items()})
            return (await client.fetch(request, raise_error=False)).code

        for path in ("/", "/file/board.js", "/socket", "/nothing"):
            assert await code(path) == 403 and await code(path + "?token=x") == 403, path
            assert await code(path + good, host=f"evil.example:{dashboard.port}") == 403, path
            assert await code(path + good, origin="http://evil.example") == 403, path
        assert await code("/" + good) == 200 and await code("/file/board.js" + good) == 200
        assert await code("/" + good, host=f"localhost:{dashboard.port}") == 200
        assert await code("/file/board.py" + good) == 404 and await code("/file/..%2Fdashboard.py" + good) == 404
        for url, origin in ((f"ws://127.0.0.1:{dashboard.port}/socket", here),
                            (f"ws://127.0.0.1:{dashboard.port}/socket{good}", "http://evil.example"),
                            (f"ws://127.0.0.1:{dashboard.port}/socket{good}", "null")):
            with pytest.raises(HTTPClientError, match="403"):
                await websocket_connect(HTTPRequest(url, headers={"Origin": origin}))

    serving(playground, test)


def test_the_page_loads_nothing_from_elsewhere(playground):
    async def test(dashboard, page):
        answer = await AsyncHTTPClient().fetch(dashboard.url)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        for name in sorted(server.FILES):
            text = server.FILES[name].read_text(encoding="utf-8")
            assert not [a for a in re.findall(r"https?://[^\s\"'`]+", text) if a != "http://www.w3.org/2000/svg"], name
            assert "innerHTML" not in text and "insertAdjacentHTML" not in text, name
        assert dashboard.server is not None and dashboard.url.startswith("http://127.0.0.1:")

    serving(playground, test)


def test_a_run_is_steered_stopped_saved_and_compared(playground):
    async def test(dashboard, page):
        page.say(do="train", iterations=200)
        panel = (await page.until(lambda m: "mount" in m))["mount"]
        await page.until(lambda m: m.get("to") == panel and m["content"]["state"]["done"] >= 1)
        page.say(to=panel, content={"type": "set", "name": "kl_coef", "value": 0.7})
        await page.until(lambda m: m.get("to") == panel and m["content"]["state"]["controls"]["kl_coef"] == 0.7)
        page.say(do="train", iterations=3)  # one at a time: ignored
        page.say(to=panel, content={"type": "stop"})
        await page.until(status("busy", []))
        rows = read_metrics(playground.run / "app" / "ppo-1" / "metrics.jsonl")
        assert 2 <= len(rows) < 200 and rows[-1]["controls"]["kl_coef"] == 0.7
        assert list(playground.checkpoints()) == ["sft", "app/ppo-1"]
        load_policy(playground.checkpoints()["app/ppo-1"])

        page.say(do="compare", names=["app/ppo-1", "sft", "../../etc", 3])
        board = (await page.until(lambda m: m.get("kind") == "board"))["mount"]
        page.say(to=board, content={"type": "sync"})
        shown = (await page.until(lambda m: m.get("to") == board and m["content"]["item"]))["content"]["item"]
        page.say(to=board, content={"type": "press", "button": "vote 0", "item": shown["id"]})
        await page.until(lambda m: m.get("to") == board and m["content"]["done"] == 1)
        assert len(read_metrics(playground.run / "app" / "votes-sft-app.ppo-1.log.jsonl")) == 1

    serving(playground, test)


def test_a_run_is_rewound_to_its_start_and_what_it_did_is_kept(playground):
    async def test(dashboard, page):
        page.say(do="train", iterations=40)
        panel = (await page.until(lambda m: "mount" in m))["mount"]
        await page.until(lambda m: m.get("to") == panel and m["content"]["state"]["done"] >= 3)
        page.say(to=panel, content={"type": "pause"})
        paused = await page.until(lambda m: m.get("to") == panel and m["content"]["state"]["name"] == "paused")
        done = paused["content"]["state"]["done"]
        assert paused["content"]["state"]["snapshots"] == list(range(0, done, 2))
        page.say(to=panel, content={"type": "rewind", "iteration": 0})
        back = await page.until(lambda m: m.get("to") == panel and m["content"]["branches"])
        assert back["content"]["state"]["done"] == 0 and back["content"]["state"]["name"] == "paused"
        page.say(to=panel, content={"type": "stop"})
        await page.until(status("busy", []))
        log = playground.run / "app" / "ppo-1" / "metrics.jsonl"
        assert read_metrics(log) == []
        assert [row["step"] for row in read_metrics(branch_files(log)[0])] == list(range(1, done + 1))
        start, now = (load_policy(playground.run / name)[0] for name in ("sft", "app/ppo-1"))
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), now.parameters(), strict=True))

    serving(playground, test)


def test_the_page_gets_settings_and_earlier_runs_and_a_run_has_the_settings_that_were_chosen(playground):
    async def test(dashboard, page):
        first = (await page.until(lambda m: "status" in m))["status"]
        assert first["settings"] == {"kl_coef": 0.2, "seed": 0, "iterations": 40} and first["runs"] == []
        assert first["about"].count(". ") == 1 and "2,560" in first["about"] and first["shown"] == []
        page.say(do="train", iterations=2, kl_coef=-1)
        refused = await page.until(lambda m: m.get("status", {}).get("said", {}).get("train"))
        assert "kl_coef is -1, expected 0 or more" in refused["status"]["said"]["train"]
        assert not (playground.run / "app").exists(), "nothing is made for settings that cannot be"
        page.say(do="train", iterations=2, kl_coef=0.35, seed=7)
        panel = (await page.until(lambda m: "mount" in m))["mount"]
        inside = lambda m: (m.get("to") == panel and m["content"]["state"]["inside"]) or {}  # noqa: E731
        within = await page.until(lambda m: inside(m).get("share"))
        assert re.fullmatch(r"optimiser step \d of 8", inside(within)["words"])
        after = await page.until(lambda m: m.get("status", {}).get("runs"))
        (run,) = after["status"]["runs"]
        assert {name: run[name] for name in ("name", "kl_coef", "seed", "iterations", "done", "unfinished")} == {
            "name": "ppo-1", "kl_coef": 0.35, "seed": 7, "iterations": 2, "done": 2, "unfinished": False}
        row = read_metrics(playground.run / "app" / "ppo-1" / "metrics.jsonl")[-1]
        assert (run["kl"], run["proxy"]) == (row["objective/kl"], row["objective/scores"]) and "gold" in row
        shown = next(message["config"] for message in page.told if "mount" in message)
        assert shown["charts"][0]["keys"] == ["objective/scores", "gold"]

    serving(playground, test)


def test_a_step_has_the_gold_of_its_responses_in_units_of_sfts(playground, tmp_path):
    live = playground.start_ppo(1, prompts_per_iteration=128, minibatch_size=64)
    row, rollout = live.step({}), live.state.last_rollout
    prompts = [live.state.tokenizer.decode(ids[kept], skip_special_tokens=True)
               for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = decode_responses(live.state.tokenizer, rollout)
    golds = [float(playground.task.world.gold_scores([prompt], [response])[0])
             for prompt, response in zip(prompts, responses, strict=True)]
    mean, sd = playground.gold_scale
    assert row["gold"] == pytest.approx((sum(golds) / len(golds) - mean) / sd)
    assert abs(row["gold"]) < 0.35, "the first responses are SFT's, whose mean is 0"
    shutil.copytree(playground.run, tmp_path / "copy", ignore=shutil.ignore_patterns("app"))
    write_json(tmp_path / "copy" / "sft" / "results.json", {"gold_scale": [1.5, 2.0]})
    assert open_playground(tmp_path / "copy").gold_scale == (1.5, 2.0), "as notebook 01 measured it"


def test_the_runs_own_policies_stand_on_the_frontier_where_enumeration_puts_them(playground):
    run = playground.start_ppo(1, prompts_per_iteration=16, minibatch_size=16, kl_coef=0.35)
    run.step({})
    run.save()
    world, known = playground.task.world, {}
    prompts = [world.find(text) for text in playground.prompts(2)]
    policies = [load_policy(playground.run / name) for name in ("sft", "app/ppo-1")]
    truth = enumerate_world(*policies[0], playground.scorer, world, prompts)
    points = exact_points(playground, truth, known)
    assert [(point.job, point.setting) for point in points] == [("sft", ()), ("app/ppo-1", (("kl_coef", 0.35),))]
    assert exact_points(playground, truth, known)[1] is points[1], "computed once"
    logps = exact.response_logps(*policies[1], [prompt.text for prompt in prompts])
    for figure, table in (("kl", logps - truth.ref_logps), ("proxy", truth.proxy), ("gold", truth.gold)):
        slowly = sum(float(p.exp() @ values) for p, values in zip(logps, table, strict=True)) / 2
        assert getattr(points[1], figure).value == pytest.approx(slowly, abs=1e-9)
    assert points[1].kl.value > 0 == points[0].kl.value
    explorer = FrontierExplorer(truth=truth, points=points)
    chart, table = explorer.rows()[1]
    assert [series["points"] for series in chart["series"] if series["name"] == "PPO, gold"] == [
        [[pytest.approx(points[1].kl.value, rel=1e-5), pytest.approx(points[1].gold.value, rel=1e-5)]]]
    assert [row[:2] for row in table["rows"]] == [["best possible", table["rows"][0][1]], ["sft", ""],
                                                  ["app/ppo-1", "0.35"]]


def test_without_a_world_the_frontier_shows_what_was_measured_and_measures_the_rest(playground):
    run = playground.start_ppo(1, prompts_per_iteration=16, minibatch_size=16)
    run.step({})
    run.save()
    elsewhere = replace(playground, task=replace(playground.task, world=None))
    assert measured_points(elsewhere) == ([], ["sft", "app/ppo-1"])
    said = []
    measure_policies(elsewhere, ["sft", "app/ppo-1"], said.append)
    points, missing = measured_points(elsewhere)
    assert missing == [] and len(said) == 2 and "app/ppo-1, 2 of 2: 40 held-out prompts" in said[1]
    assert points[0].kl.value == 0 and points[1].kl.low < points[1].kl.value < points[1].kl.high
    stored = {"kl_to_sft": 0.5, "kl_to_sft_ci95": [0.4, 0.7], "proxy_mean": 1.5}
    write_json(playground.run / "app" / "ppo-1" / "results.json", stored)  # a stage's own figures come first
    (point,) = [point for point in measured_points(elsewhere)[0] if point.job == "app/ppo-1"]
    assert (point.kl, point.proxy) == (Estimate(0.5, 0.4, 0.7), Estimate(1.5, None, None))
    alone, both = (OwnPlane(each).rows()[0][0]["text"] for each in (points[:1], points))  # the last one is chosen
    assert "and that of sft is" in both and "that of" not in alone, "a policy is not compared with itself"
    chart, table = OwnPlane(points, missing=["dpo"]).rows()[1]
    assert "Not measured yet: dpo" in OwnPlane(points, missing=["dpo"]).rows()[0][0]["text"]
    spans = [series["spans"] for series in chart["series"] if series["name"] == "PPO, proxy"]
    assert spans[0][0][:2] == [pytest.approx(points[1].kl.low, rel=1e-5), pytest.approx(points[1].kl.high, rel=1e-5)]
    assert len(table["rows"]) == 2
    again = playground.start_ppo(1, prompts_per_iteration=16, minibatch_size=16)
    write_json(measured_file(playground.run, "app/ppo-2"), stored)
    again.step({})
    again.save()
    assert measured_points(elsewhere)[1] == ["app/ppo-2"], "a policy that was trained on has to be measured again"


@pytest.mark.parametrize("answers, made", [("n\n", False), ("", False), ("y\n", True)])
def test_a_path_that_is_not_there_gets_a_world_only_if_that_is_meant(tmp_path, monkeypatch, capsys, answers, made):
    (tmp_path / "runs" / "course" / "sft").mkdir(parents=True)
    opened = []
    monkeypatch.setattr("alignkit_widgets.app._open", lambda run, port, data: opened.append(run))
    monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    run = tmp_path / "runs" / "cuorse"
    assert main(["app", str(run)]) == (0 if made else 1)
    said = capsys.readouterr()
    assert "cuorse is not there" in said.out and "Runs in" in said.out and "course." in said.out
    assert run.exists() == made and opened == [run] * made
    if not made:
        assert "nothing was made" in said.err and "--new" in said.err
        assert main(["app", str(run), "--new"]) == 0 and opened == [run]
    assert main(["app", str(tmp_path / "runs" / "course")]) == 0, "a run is opened without a question"


def test_the_folder_of_a_sweep_is_opened_without_its_lock_and_gets_no_run(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("alignkit_widgets.app._open", lambda run, port, data: opened.append("run"))
    monkeypatch.setattr("alignkit_widgets.app._open_sweep", lambda folder, port: opened.append(folder))
    (tmp_path / "sweep.json").write_text("{}")
    for option in (["--new"], ["--data", "desk"]):
        assert main(["app", str(tmp_path), *option]) == 1 and opened == []
        assert "folder of a sweep" in (said := capsys.readouterr().err) and "leave out --new and --data" in said
    with run_lock(tmp_path):  # a sweep that is running
        assert main(["app", str(tmp_path)]) == 0 and opened == [tmp_path]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "sweep.json"]


def test_a_sweeps_page_shows_what_has_finished_and_reads_the_folder_again(tmp_path):
    def write(*finished: float) -> None:
        rows = [{"job": f"j{coef}", "kl_coef": coef, "seed": 0, "status": "finished" if coef in finished else "not run",
                 "host": "", "seconds": 1.0, "attempts": 1, "error": None,
                 **({"ppo.kl_to_sft": 1 / coef, "ppo.proxy_mean": 0.5} if coef in finished else {})}
                for coef in (0.5, 1.0, 2.0)]
        (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def test(page, reader):
        first = await reader.until(lambda m: "status" in m)
        assert first["status"]["tabs"] == ["frontier"] and first["status"]["sweep"].startswith("Each job that")
        reader.say(do="frontier")
        await reader.until(lambda m: "No job has finished yet" in m["status"]["said"]["frontier"])
        for finished, says in (((), "0 of 3 jobs of 03b_ppo have finished."), ((1.0,), "1 of 3 jobs"),
                               ((0.5, 1.0), "2 of 3 jobs")):
            write(*finished)
            reader.say(do="frontier")
            if finished:
                mounted = await reader.until(lambda m: m.get("kind") == "explorer")
                job = next(c for c in mounted["config"]["controls"] if c["name"] == "point")
                assert [words for _, words in job["options"]] == [f"PPO, kl_coef {c:g}, seed 0" for c in finished]
            await reader.until(lambda m, says=says: says in m.get("status", {}).get("said", {}).get("frontier", ""))
        (tmp_path / "table.jsonl").write_text("{\n")
        reader.say(do="frontier")
        await reader.until(lambda m: "line 1 is no row" in m.get("status", {}).get("said", {}).get("frontier", ""))
        for message in ({"do": "train", "kl_coef": 1}, {"do": "compare", "names": ["sft"]}, {"do": 3}):
            reader.say(**message)
        reader.say(to="x", content={"type": "set"})
        reader.say(do="frontier")
        await reader.until(lambda m: m.get("status", {}).get("busy") == [])

    (tmp_path / "sweep.json").write_text('{"notebook": "03b_ppo", "grids": [], "jobs": {}}')
    serving(SweepPage(tmp_path), test)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "table.jsonl"], "nothing is written"


def test_the_frontier_starts_a_run_at_its_price(playground):
    async def test(dashboard, page):
        page.say(do="frontier")
        panel = (await page.until(lambda m: m.get("kind") == "explorer"))["mount"]
        page.say(to=panel, content={"type": "set", "n": 1, "values": {"beta": 0.7}})
        await page.until(lambda m: m.get("to") == panel and m["content"]["n"] == 1)
        page.say(to=panel, content={"type": "press", "n": 2, "name": "train"})
        cockpit = await page.until(lambda m: m.get("kind") == "cockpit")
        assert {c["name"]: c["start"] for c in cockpit["config"]["controls"]}["kl_coef"] == 0.7

    serving(playground, test)  # closing ends the run


@pytest.mark.parametrize("slow, steps", [("start_ppo", []), ("step", [1]), ("save", [1])])
def test_an_app_that_is_ended_logs_exactly_the_iterations_whose_policy_it_saves(playground, monkeypatch, slow, steps):
    begun, owner = threading.Event(), Playground if slow == "start_ppo" else LivePPO
    call = getattr(owner, slow)

    def slowly(*arguments, **options):
        begun.set()
        time.sleep(0.3)  # the app is ended meanwhile
        return call(*arguments, **options)

    async def test(dashboard, page):
        page.say(do="train", iterations=1 if slow == "save" else 200)
        await asyncio.to_thread(begun.wait, 60)

    monkeypatch.setattr(owner, slow, slowly)
    serving(playground, test)
    folder = playground.run / "app" / "ppo-1"
    assert folder.exists() == bool(steps) == ("app/ppo-1" in playground.checkpoints())
    assert [row["step"] for row in (read_metrics(folder / "metrics.jsonl") if steps else [])] == steps
    assert [(run["done"], run["unfinished"]) for run in playground.runs()] == [(1, slow == "step")] * bool(steps)
    if slow == "step":
        assert playground.continue_ppo("ppo-1").checkpoints.latest()[0] == 1


def test_the_log_of_an_earlier_run_is_read_again_only_after_it_changed(playground, monkeypatch):
    run = playground.start_ppo(4, prompts_per_iteration=16, minibatch_size=16)
    log, read = run.folder / "metrics.jsonl", []
    monkeypatch.setattr("alignkit_widgets.app.playground.read_metrics",
                        lambda path: read.append(path) or read_metrics(path))
    assert [each["done"] for each in playground.runs()] == [0]  # it has no log yet
    append_metrics(log, {"step": 1, "objective/kl": 0.25})
    assert [(each["done"], each["kl"]) for each in (playground.runs() + playground.runs())] == [(1, 0.25)] * 2
    append_metrics(log, {"step": 2, "objective/kl": 0.5})
    assert playground.runs()[0]["done"] == playground.runs()[0]["done"] == 2
    assert read == [log] * 3
    (run.folder / "checkpoints").mkdir()
    assert playground.runs()[0]["unfinished"] and len(read) == 3
    said = server.Dashboard(playground).status()["status"]
    assert "unfinished" not in said and said["runs"] == playground.runs()


def test_what_makes_no_sense_is_ignored_and_an_error_is_said(playground):
    async def test(dashboard, page):
        for text in ("", "[", "3", "null", '{"do": "drop"}', '{"to": [], "content": {}}', '{"to": "x", "content": {}}'):
            page.connection.write_message(text)
        page.say(do="compare", names="sft")
        message = await page.until(lambda m: m.get("status", {}).get("said", {}).get("compare"))
        assert "expected two to six" in message["status"]["said"]["compare"]
        assert server._whole("9", 1, 5) is None and server._whole(9, 1, 5) == 5

    serving(playground, test)


def test_half_a_run_is_refused_with_a_reason(desk_start, tmp_path):
    (tmp_path / "half").mkdir()
    os.symlink(desk_start / "sft", tmp_path / "half" / "sft")
    with pytest.raises(RunError, match="has no reward/"):
        open_playground(tmp_path / "half")


def test_the_data_is_fitted_as_the_run_s_notebooks_fitted_it(playground, tmp_path):
    data, parameters = tmp_path / "pairs.jsonl", {"max_length": 9, "max_new_tokens": 3, "skip_bad": True}
    rows = [{"prompt": f"How do I open the {i} door ?", "chosen": "a", "rejected": "b"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    (playground.run / "run.json").unlink()
    start_run(playground.run, "tiny", str(data), 0)
    with pytest.raises(DataError, match="1 of 31 rows cannot be used"):
        open_playground(playground.run)
    record = {"status": "finished", "seconds": 1, "made": {}, "key": {"parameters": parameters}}
    write_json(playground.run / "jobs.json", {"01_sft": record, "later": {"key": {"parameters": {"max_length": "9"}}}})
    opened = open_playground(playground.run)
    assert opened.task.max_new_tokens == 3 and "unfiltered" in opened.about
    lengths = [len(encode_text(load_policy(playground.run / "sft")[1], prompt)) for prompt in opened.task.train_prompts]
    assert max(lengths) == 9 - 3 - 1  # its end and a whole response fit too


def test_a_stopped_run_is_continued_to_what_an_unstopped_one_is(playground):
    async def trained(iterations: int, run) -> None:
        cockpit = TrainingCockpit("PPO", [("KL", ["objective/kl"])], iterations, log=run.folder / "metrics.jsonl")
        await cockpit.run(run.step, checkpoints=run.checkpoints)

    small = {"prompts_per_iteration": 16, "minibatch_size": 16}
    whole = playground.start_ppo(4, **small)
    asyncio.run(trained(4, whole))
    whole.save()
    stopped = playground.start_ppo(4, **small)
    asyncio.run(trained(2, stopped))
    stopped.save()
    assert playground.unfinished() == [stopped.folder.name]
    again = playground.continue_ppo(stopped.folder.name)
    asyncio.run(trained(4, again))
    again.save()
    assert playground.unfinished() == []
    assert read_metrics(again.folder / "metrics.jsonl") == read_metrics(whole.folder / "metrics.jsonl")
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_a_run_that_cannot_be_continued_is_left_as_it_was(playground, monkeypatch):
    run = playground.start_ppo(4, prompts_per_iteration=16, minibatch_size=16)
    run.step({})
    run.checkpoints.save(1)
    run.save()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("alignkit.runs.checkpoints.code_hash", lambda: "another version")
    with pytest.raises(RunError, match="code was"):
        playground.continue_ppo(run.folder.name)
    monkeypatch.undo()
    assert playground.continue_ppo(run.folder.name).save() is None, "nothing was trained"
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    for name in ("ppo-7", "../sft", "", "ppo-1/.."):
        with pytest.raises(RunError, match="no unfinished run"):
            playground.continue_ppo(name)


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_cleanly(desk_start, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("sft", "reward", "run.json"):
        os.symlink(desk_start / name, run / name)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'widgets'}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "alignkit", "app", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as app:
        said = ""
        while "Ctrl-C" not in said:
            line = app.stdout.readline()
            assert line, said
            said += line
        assert re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{30,}", said)
        app.send_signal(signal.SIGINT)
        said += app.stdout.read()
        assert app.wait(60) == 0 and "Traceback" not in said, said
