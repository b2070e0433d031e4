"""The README's pictures, taken from a finished run: python docs/pictures.py runs/course

Each is the first PNG of the executed notebook's cell whose first line is the given caption's beginning; nothing is drawn here.
"""

import base64
import sys
from pathlib import Path

import nbformat

PICTURES = {  # file -> notebook, beginning of the cell's first line
    "behaviour.png": ("05_dpo", "# What each stage does"),
    "ppo.png": ("03_ppo", "# PPO's eight dials"),
    "over_optimisation.png": ("03_ppo", "# Over-optimisation"),
    "reliability.png": ("02_reward_model", "# Calibration"),
}


def picture(notebook: Path, caption: str) -> bytes:
    """The PNG that the cell starting with `caption` shows. Raises LookupError, listing the captions there are, if there is none."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    for cell in cells:
        if cell.source.startswith(caption):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    tagged = [cell.source.splitlines()[0] for cell in cells if "report" in cell.metadata.get("tags", [])]
    raise LookupError(f"{notebook} has no picture under {caption!r}; its captions: {tagged}")


def main(run: str) -> None:
    """Write docs/images/*.png from the run directory."""
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    for name, (notebook, caption) in PICTURES.items():
        (folder / name).write_bytes(picture(Path(run) / f"{notebook}.ipynb", caption))
        print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1])
