"""Pages without Python: an explorer's grid of pictures, a recorded run, and the documentation site."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from alignkit_widgets import ClipExplorer, StepThroughExplorer, TrainingCockpit
from alignkit_widgets.cockpit.log import samples_file
from alignkit_widgets.cockpit.player import save_run
from alignkit_widgets.pages.live import live_page
from small_pages import HOSTILE, record_run, small

from alignkit.errors import RunError
from alignkit.jobs import notebooks
from alignkit.metrics import GLOSSARY
from alignkit.stages import CHAIN
from alignkit.storage import append_metrics, read_metrics

ROOT = Path(__file__).resolve().parents[1]

def data_of(page: Path) -> dict:
    """The JSON in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


def picture(data: dict, at: int) -> object:
    """The picture number `at`, put together again without the page's script."""
    def part(item):
        if not isinstance(item, list):
            return item
        node = data["nodes"][item[0]]
        if isinstance(node, str):
            return node
        items = [part(each) for each in node[1:]]
        if node[0] == "list":
            return items
        return [list(p) for p in zip(*items, strict=True)] if node[0] == "points" else dict(
            zip(data["shapes"][node[0]], items, strict=True))

    return part([data["roots"][at]])


# ---- explorers


@pytest.mark.parametrize("explorer, grid", [
    (small(), {"a": 3, "seed": (0, 3, 7)}), (ClipExplorer(), {"ratio": 3, "size": 2, "clip": 1}),
    (StepThroughExplorer(), {"stage": 3, "steps": 2, "kl_coef": 1, "clip": 2, "rate": 1})])
def test_a_page_has_the_picture_of_every_setting_of_its_grid(tmp_path, explorer, grid):
    before = explorer.state
    data = data_of(explorer.save_html(tmp_path / "page.html", grid=grid))
    assert explorer.state == before
    axes = data["axes"]
    assert [axis["name"] for axis in axes] == list(explorer.controls)
    settings = list(itertools.product(*(axis["values"] for axis in axes)))
    assert len(settings) == len(data["roots"]) > 3
    for at, values in enumerate(settings):
        explorer.set(**dict(zip(explorer.controls, values, strict=True)))
        found, expected = picture(data, at), json.loads(json.dumps(explorer.rows()))
        for ours, theirs in zip(blocks(found), blocks(expected), strict=True):
            if ours["kind"] == "chart":
                for curve, exact in zip(ours["series"], theirs["series"], strict=True):
                    for point, exact_point in zip(curve.pop("points"), exact.pop("points"), strict=True):
                        assert point == pytest.approx(exact_point, rel=6e-4, abs=1e-12)
            assert ours == theirs
    written = "&".join(f"{axis['name']}={axis['written'][axis['start']]}" for axis in axes)
    assert written == before, "the page begins where the explorer was, and its state is the explorer's"


def blocks(rows: list) -> list:
    return [part for row in rows for one in row for part in one.get("blocks", [one])]


def test_a_page_keeps_what_it_can_move_and_says_what_it_fixes(tmp_path):
    page = small(hide=["seed", "grid"], state="a=0.37").save_html(tmp_path / "p.html", grid={"a": 4, "seed": 2})
    data = data_of(page)
    axes = {axis["name"]: axis for axis in data["axes"]}
    assert axes["a"]["values"][axes["a"]["start"]] == 0.37 and len(axes["a"]["values"]) == 4
    assert axes["seed"]["values"] == [0, 3] or 3 in axes["seed"]["values"]
    assert axes["grid"]["values"] == [True], "hidden, and no button moves it"
    assert [control["name"] for control in data["config"]["controls"]] == ["a", "way", "again"], "train needs Python"
    assert data["moves"] == {"again": ["seed", 1, True]}
    text = page.read_text()
    assert "height: 4 values" in text and "grid = shown" in text and HOSTILE not in text
    assert "default-src 'none'" in text and not re.search(r"(src|href)=\"?https?:", text)


@pytest.mark.parametrize("grid, says", [
    ({"b": 2}, "grid names b, expected some of a, way, grid, seed"), ({"a": 0}, "grid gives 0 values"),
    ({"a": (0, 2)}, "a is 2, expected a number from 0 to 1"),
    ({"a": 11, "way": ("up", "down"), "grid": 2, "seed": 100}, "grid has 4,400 settings, expected at most 4,000")])
def test_a_grid_that_cannot_be_is_refused(tmp_path, grid, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        small().save_html(tmp_path / "p.html", grid=grid)
    assert not (tmp_path / "p.html").exists()


def test_a_grid_that_is_not_given_is_thinned_and_a_page_that_is_too_large_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("alignkit_widgets.explorers.saved.MOST_STATES", 150)
    data = data_of(small().save_html(tmp_path / "p.html"))
    lengths = {axis["name"]: len(axis["values"]) for axis in data["axes"]}
    assert lengths == {"a": 6, "way": 2, "grid": 2, "seed": 4} and len(data["roots"]) == 96
    assert [axis["values"][end] for axis in data["axes"] for end in (0, -1)][:2] == [0, 1]
    assert all(axis["values"][axis["start"]] == small().values[axis["name"]] for axis in data["axes"])
    monkeypatch.setattr("alignkit_widgets.explorers.saved.MOST_BYTES", 20_000)
    with pytest.raises(ValueError, match="the page would have .* bytes, expected at most 20,000"):
        small().save_html(tmp_path / "q.html", grid={"a": 3})


def test_a_widget_without_a_default_export_is_refused(tmp_path):
    (tmp_path / "w.js").write_text("const a = 1;")
    with pytest.raises(ValueError, match="0 lines that begin with `export default`"):
        live_page("t", "", tmp_path / "w.js", tmp_path / "w.js", "player.js", {})


# ---- a recorded run


@pytest.fixture
def recorded(tmp_path):
    """A run that was rewound twice."""
    return record_run(tmp_path)


def test_a_recorded_run_has_all_its_ways_with_their_rows_and_samples(recorded):
    page = save_run(recorded, recorded / "pages" / "play.html")
    data = data_of(page)
    ways = [[data["rows"][i] for i in way["rows"]] for way in data["ways"]]
    assert [[row["step"] for row in way] for way in ways] == [[*range(1, 7)], [*range(1, 6)], [*range(1, 11)]]
    kl = data["keys"].index("objective/kl")
    assert [round(row["values"][kl] - 0.1 * row["step"]) for row in ways[2]] == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [round(row["values"][kl] - 0.1 * row["step"]) for row in ways[1]] == [0, 0, 1, 1, 1]
    assert [way["name"] for way in data["ways"]] == ["abandoned at 6, rewound to 2", "abandoned at 5, rewound to 4",
                                                     "the run that was kept"]
    assert data["samples"]["2:7"] == [["prompt 7", f"way 2 {HOSTILE}"]] and len(data["samples"]) == 6 + 3 + 6
    assert [chart["keys"] for chart in data["config"]["charts"]][1] == ["objective/kl"]
    assert data["rows"][0]["shares"] == {"risky": {"refuse": 0.25, "answer": 0.75}}
    assert HOSTILE not in page.read_text() and page.stat().st_size < 200_000
    assert data_of(save_run(recorded / "ppo", recorded / "q.html"))["rows"] == data["rows"], "or the folder of the log"


def test_a_run_that_goes_on_keeps_the_samples_of_ways_that_were_left_and_a_new_run_begins_without(recorded):
    log = recorded / "ppo" / "metrics.jsonl"
    def cockpit():
        return TrainingCockpit("PPO", [("KL", ["objective/kl"])], 10, log=log)

    cockpit().open("control", 8)
    assert {(row["way"], row["step"]) for row in read_metrics(samples_file(log))} == {
        *((0, s) for s in range(1, 7)), *((1, s) for s in range(3, 6)), *((2, s) for s in range(5, 9))}
    cockpit().open("control")
    assert not samples_file(log).exists()


def test_a_large_recording_keeps_fewer_samples_and_what_is_no_run_is_refused(recorded, monkeypatch):
    import alignkit_widgets.cockpit.player as player

    whole = save_run(recorded, recorded / "p.html").stat().st_size
    monkeypatch.setattr(player, "MOST_BYTES", whole - 400)
    data = data_of(save_run(recorded, recorded / "p.html"))
    assert data["samples"] and all(int(key.split(":")[1]) % 2 == 0 for key in data["samples"])
    monkeypatch.setattr(player, "MOST_BYTES", 1000)
    with pytest.raises(RunError, match="too many for a page"):
        save_run(recorded, recorded / "p.html")
    with pytest.raises(RunError, match="has no recorded PPO run: expected"):
        save_run(recorded / "nothing", recorded / "p.html")
    append_metrics(recorded / "sft" / "metrics.jsonl", {"step": 1, "loss": 2.0})
    with pytest.raises(RunError, match="no row with objective/kl"):
        save_run(recorded / "sft", recorded / "p.html")


def test_a_recorded_run_with_gold_shows_it_beside_the_proxy(tmp_path):
    log = tmp_path / "metrics.jsonl"
    row = {"objective/scores": 0.5, "objective/rlhf_reward": 0.4, "objective/kl": 0.5}
    for step, gold in ((1, 0.1), (2, 0.3)):
        append_metrics(log, {"step": step, **row, "gold": gold})
    data = data_of(save_run(tmp_path, tmp_path / "p.html"))
    assert data["config"]["charts"][0]["keys"] == ["objective/scores", "gold"]
    assert [row["values"][data["keys"].index("gold")] for row in data["rows"]] == [0.1, 0.3]
    append_metrics(tmp_path / "none" / "metrics.jsonl", {"step": 1, **row})
    [first, *_] = data_of(save_run(tmp_path / "none", tmp_path / "q.html"))["config"]["charts"]
    assert first["keys"] == ["objective/scores", "objective/rlhf_reward"], "where gold is unknown, what PPO maximises"


# ---- the words


def test_the_glossary_page_and_the_tooltips_say_the_same():
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    written = [re.fullmatch(r"\* \*\*(.+?)\*\*: (.+)", line).groups() for line in lines if line.startswith("* ")]
    assert dict(written) == GLOSSARY and len(written) == len(GLOSSARY)


def test_the_readme_is_short_says_its_words_before_it_uses_them_and_its_lines_of_code_fit():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1500
    top, _, below = (" ".join(part.split()) for part in text.partition("!["))
    for word in ("supervised fine-tuning (SFT)", "proximal policy optimisation (PPO)",
                 "direct preference optimisation (DPO)", "**Gold**", "**Proxy**", "**KL**", "**SFT-sd**"):
        assert word in top and word not in below
    assert max(len(line) for block in text.split("```")[1::2] for line in block.splitlines()) <= 95
    assert (ROOT / "docs" / "images" / "app.gif").stat().st_size < 2_000_000


def test_every_notebook_has_one_row_in_the_list_of_notebooks():
    listed = re.findall(r"^\|.*\]\(\.\./notebooks/(\w+)\.ipynb\) \|", (ROOT / "docs" / "notebooks.md").read_text(
        encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


# ---- the site


@pytest.fixture(scope="module")
def build():
    """docs/site/build.py as a module."""
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "site" / "build.py")
    module = sys.modules["site_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_notebook_of_the_site_replaces_the_policies_of_the_course(build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "steered", SimpleNamespace(steered_run=lambda run: ran.append((run, "steered"))))
    monkeypatch.setattr(notebooks, "course", lambda run: ran.append((run, "course")))
    monkeypatch.setattr(notebooks, "run_notebook", lambda path, run, given: ran.append((run, path.stem)))
    ran, run = [], tmp_path / "run"
    build.execute(run)
    assert ran[:2] == [(run, "course"), (run, "steered")], "the steered run begins with the course's SFT"
    apart = {name for place, name in ran if place != run}
    assert {name for _, name in ran} - apart >= {"06_reward_vs_kl", "claims"} and len(ran) > 12
    trains = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")
              if path.stem not in CHAIN and "save_model(" in path.read_text(encoding="utf-8")}
    assert apart == trains == {"your_model"}
    assert build.run_of("your_model", run) == tmp_path / "run_your_model"


def test_every_link_in_the_docs_and_notebooks_leads_somewhere(build):
    files = (*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb"))
    pages = [path.relative_to(ROOT).as_posix() for path in files]
    links = build.Links({*pages, *build.PROJECT})
    for page in [*pages, *build.PROJECT]:
        text = (ROOT / page).read_text(encoding="utf-8")
        cells = json.loads(text)["cells"] if page.endswith(".ipynb") else []
        for part in ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"] or [text]:
            links.rewritten(part, page)


def test_links_lead_to_pages_or_to_the_repository(build, monkeypatch):
    links = build.Links({"docs/speed.md", "notebooks/01_sft.ipynb"})
    text = ("[a](speed.md#x) [b](../notebooks/01_sft.ipynb) [c](../alignkit/ppo.py) [d](https://x.y) [e](../README.md) "
            "`[f](g)`")
    assert links.rewritten(text, "docs/speed.md") == (
        "[a](speed.md#x) [b](../notebooks/01_sft.ipynb) c [d](https://x.y) [e](../index.md) `[f](g)`")
    monkeypatch.setenv("ALIGNKIT_REPOSITORY", "https://example.org/a/b/blob/main")
    there = build.Links({"docs/speed.md"}).rewritten("[c](../alignkit/ppo.py)", "docs/speed.md")
    assert there == "[c](https://example.org/a/b/blob/main/alignkit/ppo.py)"
    with pytest.raises(ValueError, match=r"docs/speed.md links to nowhere.md, which is not there"):
        links.rewritten("[c](nowhere.md)", "docs/speed.md")


def test_the_site_is_built_and_nothing_in_it_comes_from_elsewhere(build, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipExplorer, "page_grid", {"ratio": 3, "size": 1, "clip": 1})
    html = build.build_site(tmp_path, None, notebooks=["03a_ppo_by_hand"], explorers=["clip"], api=["alignkit_widgets"])
    pages = [page for page in html.rglob("*.html") if "_static" not in page.parts]  # the theme has a template there
    assert {"index.html", "notebooks/03a_ppo_by_hand.html", "docs/teaching.html", "try/clip.html"} <= {
        page.relative_to(html).as_posix() for page in pages}
    assert data_of(html / "live" / "clip.html")["config"]["title"] == ClipExplorer().title, "and no page of the site"
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag, address in re.findall(r"<(script|link|img|iframe)\b[^>]*?(?:src|href|data-page)=\"([^\"]+)\"", text):
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {tag} loads {address}"
            target = address.partition("#")[0].partition("?")[0]
            assert target.startswith("data:") or (page.parent / target).exists(), f"{page.name}: {address} is not there"
        for address in re.findall(r"<a\b[^>]*?href=\"([^\"#?]+)", text):
            assert re.match(r"(https?|mailto):", address) or (page.parent / address).exists(), f"{page.name}: {address}"
    assert "<math" in (html / "notebooks/03a_ppo_by_hand.html").read_text()
    assert "advantage" in (html / "searchindex.js").read_text()
