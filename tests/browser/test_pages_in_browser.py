"""Pages without Python, in a browser: moved by keyboard and mouse, their state in the URL, and nothing asked for."""

from __future__ import annotations

import pytest
from alignkit_widgets.cockpit.player import save_run
from lab_page import ARTIFACTS, PATIENCE, until
from small_pages import HOSTILE, record_run, small

pytestmark = pytest.mark.browser
WATCH = """() => { // what was shown, however short
    const text = (name) => document.querySelector(name).textContent, root = document.querySelector('.akc');
    window.seen = [];
    new MutationObserver(() => window.seen.push(`${text('.akc-state')}: ${text('.akc-place')}`.split(' · ')[0]))
        .observe(root, { subtree: true, childList: true, characterData: true });
}"""
PLAY_AND_PAUSE = """() => new Promise((done) => { // by the clock of the page, which a busy machine cannot overtake
    const button = document.querySelector('#bar button');
    button.click();
    const timer = setInterval(() => {
        if (!/iteration [1-4] of 6/.test(document.querySelector('.akc-place').textContent)) return;
        clearInterval(timer);
        button.click();
        done();
    }, 5);
})"""


@pytest.fixture(scope="module")
def explorer_page(tmp_path_factory):
    """A saved explorer with every kind of control."""
    return small().save_html(tmp_path_factory.mktemp("pages") / "explorer.html", grid={"a": 6, "seed": (3, 4)})


@pytest.fixture(scope="module")
def player_page(tmp_path_factory):
    """The page of a run that was rewound twice."""
    folder = tmp_path_factory.mktemp("run")
    return save_run(record_run(folder), folder / "play.html")


@pytest.fixture
def open_page(chromium, request):
    """open_page(file, state) -> a page read from the disk; fails on errors, and on a request for anything else."""
    opened, wrong = [], []

    def open_one(file, state: str = "", theme: str = "light", width: int = 1366):
        page = chromium.new_page(viewport={"width": width, "height": 768}, color_scheme=theme)
        opened.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(e.stack or str(e)))
        page.on("request", lambda r: None if r.url.startswith(file.as_uri()) else wrong.append(f"asked for {r.url}"))
        page.goto(file.as_uri() + (f"#{state}" if state else ""))
        return page

    yield open_one
    for number, page in enumerate(opened):
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / f"{request.node.name}_{number}.png", full_page=True)
        page.close()
    assert wrong == []


def open_folds(page) -> None:
    """Open what stands below the charts, by keyboard."""
    for name in ("What the policy does", "Samples"):
        page.locator(".akc-fold summary", has_text=name).press("Enter")


def test_an_explorers_page_is_moved_by_keyboard_and_mouse_and_its_state_is_in_the_url(open_page, explorer_page):
    page = open_page(explorer_page)
    says = page.locator("p.lead")
    page.get_by_text("a is 0.5, up, True, seed 3.").wait_for()
    slider = page.get_by_role("slider", name="height")
    slider.focus()
    page.keyboard.press("End")
    page.get_by_text("a is 1, up, True, seed 3.").wait_for()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    page.get_by_text("a is 0, up, True, seed 3.").wait_for()
    assert slider.get_attribute("aria-valuetext") == "0"
    page.get_by_label("grid").press("Space")
    page.get_by_label("way").select_option("down")
    page.get_by_role("button", name="again").press("Enter")
    page.get_by_text("a is 0, down, False, seed 4.").wait_for()
    until(page, "location.hash === '#a=0&way=down&grid=0&seed=4'", "the state in the address")
    page.get_by_role("button", name="reset").click()
    page.get_by_text("a is 0.5, up, True, seed 4.").wait_for()  # reset keeps a seed
    assert page.get_by_role("button", name="train").count() == 0
    assert HOSTILE in says.inner_text() and page.evaluate("window.hacked") is None


@pytest.mark.parametrize("theme, width", [("dark", 390), ("light", 1366)])
def test_a_link_restores_an_explorer_and_the_page_says_what_it_lacks(open_page, explorer_page, theme, width):
    page = open_page(explorer_page, "a=0.8&way=down&grid=0&seed=4", theme, width)
    page.get_by_text("a is 0.8, down, False, seed 4.").wait_for()
    assert page.locator(".ake-note").inner_text() == ""
    page.evaluate("location.hash = 'a=0.31&way=left&seed=4'")
    page.get_by_text("a is 0.2, down, False, seed 4.").wait_for()
    assert "does not have a=0.31, way=left" in page.locator(".ake-note").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")


def test_a_recorded_run_plays_pauses_and_scrubs_and_shows_its_other_ways(open_page, player_page):
    page = open_page(player_page, "step=3")
    place, scrub = page.locator(".akc-place"), page.get_by_label("iteration", exact=True)
    page.get_by_text("iteration 3 of 10").wait_for()
    open_folds(page)
    page.get_by_text("prompt 3", exact=True).wait_for()
    assert scrub.input_value() == "3" and page.get_by_role("button", name="Play").count() == 1
    scrub.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("iteration 4 of 10").wait_for()
    box = scrub.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    page.get_by_text("iteration 10 of 10").wait_for()
    assert page.get_by_label("one iteration on").is_disabled()
    page.get_by_label("one iteration back").click()
    page.get_by_role("cell", name=f"way 2 {HOSTILE}").wait_for()
    until(page, "location.hash === '#step=9&way=2'", "the state in the address")
    page.get_by_label("branch").select_option("0")
    page.get_by_text("iteration 6 of 6").wait_for()
    page.get_by_role("cell", name=f"way 0 {HOSTILE}").wait_for()
    assert "rewind" not in page.locator(".akc-grid").first.inner_text().replace("before the rewind", "")
    page.evaluate(WATCH)
    page.get_by_label("speed").select_option("fast")
    page.get_by_role("button", name="Play").press("Enter")  # from the start, since it stood at the end
    until(page, "window.seen.includes('playing: iteration 1 of 6')", "the first iteration")
    page.locator(".akc-state[data-state=finished]").wait_for()
    page.get_by_label("speed").select_option("slow")
    page.evaluate(PLAY_AND_PAUSE)
    page.locator(".akc-state[data-state=paused]").wait_for()
    stopped = place.inner_text()
    page.wait_for_timeout(1500)  # two beats in which nothing may move
    assert place.inner_text() == stopped and not stopped.startswith("iteration 6")
    assert page.locator("path.past").count() >= 2, "the branches that are not shown are dotted"
    assert page.evaluate("window.hacked") is None and page.locator(".akc script, .akc img").count() == 0


@pytest.mark.parametrize("theme, width", [("dark", 390), ("light", 1366)])
def test_a_link_restores_a_recorded_run_on_its_way(open_page, player_page, theme, width):
    page = open_page(player_page, "step=4&way=1", theme, width)
    page.get_by_text("iteration 4 of 5").wait_for()
    open_folds(page)
    page.get_by_text("risky prompts: % of responses").wait_for()
    page.locator(".marktext", has_text="rewind 6 → 2").first.wait_for()
    assert page.get_by_label("branch").input_value() == "1"
    page.evaluate("location.hash = 'step=99&way=7'")  # what is not there: the end of the way that is shown
    page.get_by_text("iteration 5 of 5").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
