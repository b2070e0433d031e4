"""The README's pictures, taken from a finished run: python docs/pictures.py runs/course

Each is the first PNG of the executed notebook's cell whose first line is the given caption's beginning; nothing is
drawn here. The last one is a film: `alignkit app` trains PPO from that run, is rewound, and goes on without a price on
KL; one frame is taken at each iteration. It needs Playwright and Chromium.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from PIL import Image

PICTURES = {  # file -> notebook, beginning of the cell's first line
    "behaviour.png": ("05_dpo", "# What each stage does"),
    "ppo.png": ("03b_ppo", "# PPO's eight dials"),
    "over_optimisation.png": ("03b_ppo", "# Over-optimisation"),
    "reliability.png": ("02_reward_model", "# Calibration"),
}

FRAME, PAUSE = 250, 1500  # milliseconds that a frame of the film stands


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
    """The app's page during a PPO run: rewound to iteration 10 after 25, and on from there without KL; a GIF."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("ALIGNKIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    command = [sys.executable, "-u", "-m", "alignkit", "app", os.fspath(run)]
    frames = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        address = next(line.strip() for line in server.stdout if "http://127.0.0.1" in line)
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": 1100, "height": 760})
        page.set_default_timeout(300_000)

        def film(first: int, last: int) -> None:
            for iteration in range(first, last + 1):
                _at(page, iteration)
                frames.append((page.screenshot(), FRAME))

        page.goto(address)
        page.get_by_label("Iterations").fill("40")
        page.get_by_role("button", name="Start a run").click()
        film(1, 25)
        page.get_by_role("button", name="Pause").click()
        page.wait_for_selector(".akc-state[data-state=paused]")
        page.get_by_label("back to iteration").select_option("10")
        frames.append((page.screenshot(), PAUSE))
        page.get_by_role("button", name="Rewind").click()
        page.locator("input[type=number][data-control=kl_coef]").fill("0")
        page.locator("input[type=number][data-control=kl_coef]").press("Enter")
        page.get_by_text("from the next iteration on").wait_for()
        frames.append((page.screenshot(), PAUSE))
        page.locator(".akc").get_by_role("button", name="Play").click()
        film(11, 24)
        frames[-1] = (frames[-1][0], 2 * PAUSE)
        page.locator(".akc").get_by_role("button", name="Stop").click()
        server.terminate()
    return gif(frames)


def gif(frames: list[tuple[bytes, int]]) -> bytes:
    """PNGs and the milliseconds that each stands, as one GIF of 64 colours that repeats."""
    pictures = [Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE) for png, _ in frames]
    film = io.BytesIO()
    pictures[0].save(film, "GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=True,
                     duration=[shown for _, shown in frames])
    return film.getvalue()


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
