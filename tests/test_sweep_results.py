"""What a sweep found: points, the ranking against plain loops, the page, and what reads it."""

import itertools
import json
import math
import re
import shlex

import numpy as np
import pytest
from alignkit_widgets import FrontierExplorer
from small_sweep import VALUES, small_sweep

import alignkit as ak
from alignkit.errors import RunError
from alignkit.jobs import cli
from alignkit.sweeps.grid import axis
from alignkit.sweeps.page import build_page, compared
from alignkit.sweeps.results import (
    Point,
    as_axis,
    by_setting,
    estimate_of,
    figure_of,
    load_results,
    ranking,
    ranking_words,
)
from alignkit.sweeps.sampled import sampled_frontier

GOLD = {(0.1, 0): 0.5, (0.1, 1): 0.7, (0.1, 2): 0.6, (0.2, 0): 0.8, (0.2, 1): 1.0, (0.2, 2): 0.9,
        (0.4, 0): 0.8, (0.4, 1): 0.9, (0.4, 2): 1.0}
HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"


@pytest.fixture
def folder(tmp_path):
    """A sweep's folder as `alignkit sweep` writes it: nine policies, one job that failed, one that did not run."""
    place, rows = tmp_path / "kl sweep", []
    for (coef, seed), gold in GOLD.items():
        job = f"kl_coef={coef}_seed={seed}_{len(rows):010x}"
        rows.append({"job": job, "kl_coef": coef, "seed": seed, "note": "a,b", "status": "finished", "host": "h",
                     "seconds": 4.0, "attempts": 1, "error": None, "ppo.kl_to_sft": 0.5 / coef,
                     "ppo.kl_to_sft_ci95.0": 0.4 / coef, "ppo.kl_to_sft_ci95.1": 0.6 / coef,
                     "ppo.proxy_mean": 1.2 - coef, "ppo.gold_mean": gold,
                     "ppo.gold_ci95.0": gold - 0.1, "ppo.gold_ci95.1": gold + 0.2})
        (place / "jobs" / job / "sft").mkdir(parents=True)
    for name, status in (("kl_coef=9_dead", "failed"), ("kl_coef=9_open", "not run")):
        rows.append({"job": name, "kl_coef": 9.0, "seed": 0, "note": "a,b", "status": status, "host": None,
                     "seconds": None, "attempts": None, "error": HOSTILE if status == "failed" else None})
    (place / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "sweep.json").write_text(json.dumps({
        "notebook": "03b_ppo", "jobs": {row["job"]: {"kl_coef": 1, "seed": 1, "note": ""} for row in rows},
        "grids": [{"command": f"alignkit sweep 03b_ppo -p 'note={HOSTILE}'"}]}), encoding="utf-8")
    return place


def test_points_have_their_setting_seed_and_intervals(folder):
    results = load_results(folder)
    points = results.points()
    assert results.varied == ["kl_coef"] and results.seeds == [0, 1, 2] and len(points) == 9
    one = points[3]
    assert (one.method, one.setting, one.seed, one.label) == ("ppo", (("kl_coef", 0.2),), 0, "kl_coef 0.2")
    assert (one.kl.value, one.kl.low, one.kl.high) == (2.5, 2.0, 0.6 / 0.2) and one.proxy.low is None
    assert (one.gold.value, one.gold.low) == (0.8, 0.8 - 0.1) and one.run.name.startswith("kl_coef=0.2_seed=0")
    assert [row["status"] for row in results.failed] == ["failed"]
    moved = folder.parent / "table.jsonl"
    moved.write_bytes((folder / "table.jsonl").read_bytes())
    alone = load_results(moved)
    assert len(alone.points()) == 9 and alone.points()[0].run is None
    assert load_results(folder).command_of(points[3].job, "runs/x") == (
        "alignkit sweep 03b_ppo -p kl_coef=0.2 -p seed=0 -p 'note='\"'\"'a,b'\"'\"'' --out runs/x")


@pytest.mark.parametrize("value", [0.1, 3, True, "plain", "a,b", "it's", '"', "", " x ", "0..3", [1, "a,b"], {"a": 1}])
def test_a_copied_value_is_read_as_the_same_value(value):
    read, = axis("x", as_axis(value))
    assert read == value if isinstance(value, str) else json.loads(read) == value


def test_the_ranking_is_what_plain_loops_give(folder):
    places = ranking(load_results(folder).points(), "gold")
    assert [dict(place.setting)["kl_coef"] for place in places] == [0.2, 0.4, 0.1]
    t = 4.30265  # Student's 97.5 % point, 2 degrees of freedom
    for place in places:
        coef = place.setting[0][1]
        values = [GOLD[coef, seed] for seed in range(3)]
        mean = sum(values) / 3
        sd = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
        assert place.mean.value == pytest.approx(mean) and place.mean.low == pytest.approx(mean - t * sd / math.sqrt(3))
        if coef != 0.2:
            leads = [GOLD[0.2, seed] - GOLD[coef, seed] for seed in range(3)]
            middle = sum(leads) / 3
            half = t * math.sqrt(sum((lead - middle) ** 2 for lead in leads) / 2 / 3)
            assert (place.lead.value, place.lead.low) == pytest.approx((middle, middle - half), abs=1e-9)
    assert [place.told for place in places] == [False, False, True]
    words = ranking_words(places, "gold")
    assert words.startswith("kl_coef 0.2 has the highest mean gold, +0.90") and "over 3 seeds" in words
    assert "cannot be told from kl_coef 0.4 (lead +0.00 [-0.25, +0.25])" in words and "above 1 other setting" in words


def test_leads_are_paired_over_the_seeds_that_both_have_and_one_seed_tells_nothing():
    def point(coef, seed, gold):
        return Point("j", "ppo", (("kl_coef", coef),), seed, ak.Estimate(1.0, None, None), None,
                     ak.Estimate(gold, None, None))

    places = ranking([point(1, 0, 5.0), point(1, 1, 9.0), point(2, 1, 1.0), point(2, 2, 3.0)])
    assert places[1].lead.value == 8.0 and places[1].lead.low is None and not places[1].told
    apart = ranking([point(1, 0, 5.0), point(2, 1, 1.0)])
    assert apart[1].lead is None and not apart[1].told
    assert "No seed is common to all settings" in ranking_words(apart, "gold")
    alone = ranking([point(1, 0, 5.0), point(2, 0, 1.0)])
    assert "One seed is no evidence" in ranking_words(alone, "gold")
    with pytest.raises(ValueError, match="expected one method"):
        ranking([point(1, 0, 1.0), Point("j", "dpo", (), 0, ak.Estimate(1.0, None, None), None, None)])
    assert ranking([]) == [] and figure_of([]) == "proxy"


def test_settings_are_compared_on_the_seeds_that_all_of_them_have():
    def point(coef, seed, gold, name="kl_coef"):
        return Point("j", "ppo", ((name, coef),), seed, ak.Estimate(1.0, None, None), None,
                     ak.Estimate(gold, None, None))

    places = ranking([point(1, 7, 0.04), point(1, 9, 0.9), point(2, 7, 0.12), point(2, 5, -0.8)])
    assert [place.setting for place in places] == [(("kl_coef", 2),), (("kl_coef", 1),)], "the better in world 7"
    assert places[1].lead.value == pytest.approx(0.08) and [place.left_out for place in places] == [1, 1]
    places = ranking([point(coef, seed, coef + seed / 10) for coef in (1, 2) for seed in range(3 + coef)])
    assert "over 4 seeds. Compared on the 4 seeds that all settings have." in ranking_words(places, "gold")
    stages = [point(coef, seed, coef + seed**2 / 10, "sft.epochs") for coef in (1, 2) for seed in range(3)]
    assert "sft.epochs changes the SFT policy" in ranking_words(ranking(stages), "gold")
    assert "changes the SFT policy" not in ranking_words(places, "gold")


def test_a_figure_that_is_no_number_is_no_point(folder):
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    rows[0]["ppo.kl_to_sft"] = math.nan
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_results(folder).points()) == 8


def test_a_recorded_sweep_has_the_same_points_and_curves():
    sweep = small_sweep()
    results = load_results(sweep)
    assert results.exact and len(results.points("ppo")) == len(results.points("dpo")) == 2 * len(VALUES["ppo"])
    for point in results.points():
        run, = sweep.select(point.method, point.setting[0][1], point.seed)
        assert (point.kl.value, point.proxy.value, point.gold.value) == (run.kl, run.proxy, run.gold)
    assert results.frontiers[1] is sweep.worlds[1].frontier and results.command_of("any") == sweep.command
    assert load_results().seeds == ak.load_sweep().seeds


def test_what_is_no_sweep_is_refused_by_name(tmp_path, folder):
    with pytest.raises(RunError, match=r"holds no sweep: there is no table\.jsonl"):
        load_results(tmp_path)
    (folder / "table.jsonl").write_text('{"job": "a", "status": "finished"}\n[]\n', encoding="utf-8")
    with pytest.raises(RunError, match="line 2 is no row"):
        load_results(folder)


def test_the_page_is_whole_escaped_and_its_points_link_to_their_runs(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("sweep.html")
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    spot = r'<a href="([^"]+)" title="([^"]+)" aria-label="[^"]+" style="left:([\d.]+)%;top:([\d.]+)%">'
    links = re.findall(spot, page)
    assert len(links) == 18 and {link for link, *_ in links} == {
        f"jobs/{path.name.replace('=', '%3D')}/" for path in (folder / "jobs").iterdir()}
    assert all(0 < float(x) < 100 and 0 < float(y) < 100 for *_, x, y in links)
    proxies = [(float(x), float(y)) for link, words, x, y in links if "proxy" in words]
    golds = [(float(x), float(y)) for link, words, x, y in links if "gold" in words]
    assert proxies[0][0] == golds[0][0] > proxies[3][0] > proxies[6][0] > 0, "a higher price is farther left"
    assert proxies[0][1] < golds[0][1] and golds[3][1] < golds[0][1], "a higher reward is farther up"
    assert "cannot be told from kl_coef 0.4" in page and "1 failed" in page and "kl_coef 9" in page
    assert not re.search(r"(src|href)=\"?https?:", page)


def test_a_sweep_that_trains_no_policy_has_a_page_too(tmp_path):
    rows = [{"job": f"j{i}", "rate": i / 4, "seed": i % 2, "status": "finished", "host": "", "seconds": 1.0,
             "attempts": 1, "error": None, "toy.score": i * 2.0} for i in range(4)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = build_page(tmp_path).read_text(encoding="utf-8")
    assert "none is ranked" in page and "Reward against KL" not in page and page.count("<img") == 1
    assert "none measured KL and reward" in compared(load_results(tmp_path))
    with pytest.raises(ValueError, match="no job with a measured KL"):
        FrontierExplorer(tmp_path)
    (tmp_path / "table.jsonl").write_text(json.dumps({**rows[0], "status": "died"}) + "\n", encoding="utf-8")
    assert "1 failed" in build_page(tmp_path).read_text(encoding="utf-8")


def test_compare_prints_the_settings_of_a_sweep(folder, tmp_path, capsys):
    assert cli.main(["compare", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "PPO" and "<script>" in said and "\x1b[31m" not in said
    line = next(line for line in said.splitlines() if line.startswith("kl_coef 0.1"))
    assert line.split("  ")[-1] == "+0.30 [+0.30, +0.30]" and "not told apart" not in line
    assert "not told apart" in next(line for line in said.splitlines() if line.startswith("kl_coef 0.4"))
    for arguments, says in (([str(folder), str(tmp_path)], "compare its settings alone"),
                            ([str(tmp_path)], "--out DIR is missing")):
        assert cli.main(["compare", *arguments]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("given, copied", [("my notes/03b_ppo.ipynb", "'my notes/03b_ppo.ipynb'"),
                                           ("03b_ppo", "03b_ppo"), ("3b", "03b_ppo"), ("other.ipynb", "03b_ppo"),
                                           ("'", "03b_ppo")])
def test_a_copied_command_names_the_notebook_by_the_path_that_was_given(folder, given, copied):
    record = json.loads((folder / "sweep.json").read_text())
    command = "alignkit sweep '" if given == "'" else shlex.join(["alignkit", "sweep", given, "--out", "runs/x"])
    (folder / "sweep.json").write_text(json.dumps({**record, "grids": [7, {"command": None}, {"command": command}]}))
    results = load_results(folder)
    assert results.command_of(results.points()[0].job).startswith(f"alignkit sweep {copied} -p ")


def test_the_explorer_shows_any_sweep_and_its_copy_is_the_command_of_the_point(folder):
    one = FrontierExplorer(folder, state="seed=all&point=3")
    blocks = [block for row in one.rows() for block in row]
    chart = next(block for block in blocks if block["kind"] == "chart")
    means = next(series for series in chart["series"] if series["name"] == "PPO, gold")
    assert np.array(means["points"]) == pytest.approx(np.array([(5, 0.6), (2.5, 0.9), (1.25, 0.9)]))
    assert means["spans"][0] == pytest.approx([5, 5, 0.5, 0.7])
    copies = [block["text"] for block in blocks if block["kind"] == "copy"]
    job = load_results(folder).points()[3].job
    assert copies[0].startswith("alignkit sweep 03b_ppo -p kl_coef=0.2 -p seed=0 ") and copies[1].endswith(job)
    assert one.parameters() == {"kl_coef": 0.2}
    single = FrontierExplorer(folder, state="seed=1").rows()[1][0]
    cross = next(series for series in single["series"] if series["name"] == "PPO, gold")["spans"][1]
    assert cross == pytest.approx([2, 3, 0.9, 1.2]), "a job keeps the interval of its evaluation"
    recorded = FrontierExplorer(load_results(small_sweep()), state="seed=1&beta=0.3")
    series = [each["name"] for each in recorded.rows()[1][0]["series"]]
    assert "most proxy possible, world 1" in series and recorded.rows()[1][0]["marks"][0][2] == "β = 0.3"


def test_the_frontier_from_stored_responses_is_the_estimate_from_samples(folder):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(6, 4)), rng.normal(3, 2, size=(6, 4))
    stored = {"name": "SFT", "gold_scale": [3.0, 2.0], "set": {"samples": 4},
              "columns": {"proxy": proxy.ravel().tolist(), "gold": gold.ravel().tolist()}}
    results = load_results(folder)
    assert sampled_frontier(results, 0) is None
    for point in results.points():
        (point.run / "sft" / "evaluation.json").write_text(json.dumps(stored), encoding="utf-8")
    found = sampled_frontier(results, 0)
    assert found["samples"] == 4 and found["ceiling"] == math.log(4) and max(found["kl"]) <= math.log(4)
    for place, beta in itertools.islice(enumerate(found["beta"]), 0, None, 7):
        weights = np.exp(proxy / beta - (proxy / beta).max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        assert found["proxy"][place] == pytest.approx((weights * proxy).sum(1).mean())
        assert found["gold"][place] == pytest.approx((weights * (gold - 3) / 2).sum(1).mean())
        assert found["kl"][place] == pytest.approx((weights * np.log(4 * np.maximum(weights, 1e-300))).sum(1).mean())
    chart = FrontierExplorer(folder).rows()[1][0]
    assert any("estimated from 4 responses" in series["name"] for series in chart["series"])
    assert "log 4" in [mark[2] for mark in chart["marks"]]
    run = results.points()[0].run
    stored["columns"]["proxy"][0] += 1
    (run / "sft" / "evaluation.json").write_text(json.dumps(stored), encoding="utf-8")
    assert sampled_frontier(results, 0) is None, "two SFT policies or reward models have no common frontier"


def test_one_seed_keeps_the_interval_of_its_evaluation_in_a_group(folder):
    results = load_results(folder)
    groups = by_setting([point for point in results.points() if point.seed == 0])
    assert groups[0]["gold_ci95"] == pytest.approx((0.4, 0.7)) and "proxy_ci95" not in groups[0]
    assert "gold_ci95" not in by_setting(results.points())[0]
    row = {"x": 1.0, "x_ci95.0": 0.5, "x_ci95.1": 2}
    assert estimate_of(row, "x") == ak.Estimate(1.0, 0.5, 2) and estimate_of(row, "y") is None
