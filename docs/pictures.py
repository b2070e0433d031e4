"""The README's pictures, taken from a finished run: python docs/pictures.py runs/course

Each is the first PNG of the executed notebook's cell whose first line is the given caption's beginning; nothing is
drawn here. The last one is a film: `alignkit app` trains PPO from that run, is rewound, and goes on with another price
of KL. Only a part of the panel is filmed, so that it can be read in 830 pixels: without the charts of entropy and
critic, the sliders of learning rate and clip range, and what an iteration is doing. It needs Playwright and Chromium.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from PIL import Image

CHEAP = "0.02"  # kl_coef after the rewind; the run begins with 0.2
LEFT_AFTER, BACK_TO, LAST = 14, 6, 30  # iterations
WIDTH = 830  # pixels: GitHub's column
PART = """document.querySelectorAll('.akc-grid figure').forEach((figure, i) => i > 1 && figure.remove());
document.querySelectorAll('.akc-control').forEach((row) => {
    if (/learning_rate|clip_range/.test(row.textContent)) row.remove();
});
document.querySelectorAll('.akc-log, .akc-inside, .akc-save').forEach((node) => node.remove());
document.querySelector('.akc-pairs').open = true;
document.head.append(Object.assign(document.createElement('style'), { textContent: `
    .akc-pairs > div { height: 104px !important; overflow: hidden !important }
    .akc-samples td { white-space: nowrap !important; overflow: hidden; text-overflow: ellipsis }` }));"""
PICTURES = {  # file -> notebook, beginning of the cell's first line
    "behaviour.png": ("05_dpo", "# What each stage does"),
    "over_optimisation.png": ("03b_ppo", "# Over-optimisation"),
}


def picture(notebook: Path, caption: str) -> bytes:
    """The PNG that the cell starting with `caption` shows. Raises LookupError if there is none."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    for cell in cells:
        if cell.source.startswith(caption):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    tagged = [cell.source.splitlines()[0] for cell in cells if "report" in cell.metadata.get("tags", [])]
    raise LookupError(f"{notebook} has no picture under {caption!r}; its captions: {tagged}")


def app_film(run: Path) -> bytes:
    """A GIF of the app's panel, a frame an iteration: PPO with kl_coef 0.2 until LEFT_AFTER, rewound to BACK_TO, and on
    to LAST at a lower price of KL. Without any price the run would run away and stop. The app is ended however this
    ends."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("ALIGNKIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    command = [sys.executable, "-u", "-m", "alignkit", "app", os.fspath(run)]
    frames = []
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as server, sync_playwright() as driver:
        address = next(line.strip() for line in server.stdout if "http://127.0.0.1" in line)
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": WIDTH + 40, "height": 800})
        page.set_default_timeout(300_000)
        page.goto(address)
        panel = page.locator(".akc")

        def frame(seconds: float) -> None:
            frames.append((Image.open(io.BytesIO(panel.screenshot())).convert("RGB"), seconds))

        def until(first: int, last: int) -> None:
            for iteration in range(first, last + 1):
                _at(page, iteration)
                frame(0.35)

        page.get_by_label("Iterations", exact=True).fill(str(LAST))
        page.get_by_role("button", name="Start a run").click()
        page.locator(".akc-grid figure").nth(3).wait_for()
        page.evaluate(PART)
        until(1, LEFT_AFTER)
        panel.get_by_role("button", name="Pause").click()
        page.wait_for_selector(".akc-state[data-state=paused]")
        frame(1)
        page.get_by_label("back to iteration").select_option(str(BACK_TO))
        frame(1)
        panel.get_by_role("button", name="Rewind").click()
        page.locator(".akc-place", has_text=f"iteration {BACK_TO} ").wait_for()
        frame(1)
        price = page.locator("input[type=number][data-control=kl_coef]")
        price.fill(CHEAP)
        price.press("Enter")
        page.get_by_text("from the next iteration on").wait_for()
        frame(1.5)
        panel.get_by_role("button", name="Play").click()
        until(BACK_TO + 1, LAST - 1)
        page.wait_for_selector(".akc-state[data-state=finished]")
        frame(4)
        page.get_by_text("it can be compared now").wait_for()
    film = io.BytesIO()
    palette = frames[-1][0].quantize(256, Image.Quantize.FASTOCTREE)  # one for all: a line keeps its colour
    images, seconds = zip(*((image.quantize(palette=palette, dither=Image.Dither.NONE), each)
                            for image, each in frames), strict=True)
    images[0].save(film, "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=[round(1000 * each) for each in seconds])
    return film.getvalue()


@contextmanager
def _ended(server: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """The server inside the block, and none after it."""
    try:
        yield server
    finally:
        server.terminate()
        server.wait()


def _at(page, iteration: int) -> None:
    """Wait until the run is at an iteration, or beyond it."""
    page.wait_for_function("""(least) => {
        const place = document.querySelector('.akc-place')?.textContent ?? '';
        return Number(/iteration (\\d+)/.exec(place)?.[1] ?? 0) >= least;
    }""", arg=iteration)


def main(run: str) -> None:
    """Write docs/images/*.png from the run directory."""
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    for name, (notebook, caption) in PICTURES.items():
        (folder / name).write_bytes(picture(Path(run) / f"{notebook}.ipynb", caption))
        print(folder / name)
    (folder / "app.gif").write_bytes(app_film(Path(run)))
    print(folder / "app.gif")


if __name__ == "__main__":
    main(sys.argv[1])
