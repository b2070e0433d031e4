"""Small things to make pages of: an explorer with every kind of control, and a recorded run; a record of nothing."""

from __future__ import annotations

from pathlib import Path

from alignkit_widgets import TrainingCockpit
from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Text
from alignkit_widgets.explorers.explorer import Along, Button, Choice, Explorer, Slider, Toggle

from alignkit.storage import write_json

HOSTILE = "</script><script>window.hacked = 1</script>"


def small(**options) -> Explorer:
    """Every kind of control; a curve, and text that wants to be markup."""
    seed = Slider("seed", range(100), 3, kept=True, between=False)
    controls = [Slider("a", [i / 10 for i in range(11)], 0.5, "height"),
                Choice("way", {"up": HOSTILE, "down": "down"}, "up"), Toggle("grid"), seed,
                Button("again", "again", Along(seed, 1, around=True)),
                Button("train", "train", lambda state: "trained")]

    def draw(state):
        curve = [(x / 7, state["a"] * x / 7 + state["seed"]) for x in range(8)]
        says = f"a is {state['a']:g}, {state['way']}, {state['grid']}, seed {state['seed']:g}. {HOSTILE}"
        return [[Text(says, lead=True)], [Chart("A line", Axis("x", 0, 1), Axis("y", 0, 9), [Series("line", curve)])]]

    return Explorer("A line", controls, draw, **options)


def record_run(folder: Path) -> Path:
    """A run of ten iterations in `folder`, rewound twice: 1–6, back to 2, 3–5, back to 4, 5–10."""
    write_json(folder / "run.json", {"model": "tiny", "data": HOSTILE, "seed": 0})
    cockpit = TrainingCockpit("PPO", [("KL", ["objective/kl"])], 10, controls={"kl_coef": (0.0, 1.0, 0.2)},
                              log=folder / "ppo" / "metrics.jsonl")
    remote = cockpit.open("control")
    session = remote.session
    session.keep = lambda state: None

    class Snapshots:
        kept = dict.fromkeys(range(11))
        restore = take = staticmethod(lambda iteration: None)

    session.snapshots = Snapshots()
    for stop, back in ((6, 2), (5, 4), (10, None)):
        for iteration in range(session.done + 1, stop + 1):
            way = len(session.branches)
            session.record(iteration, {"objective/kl": 0.1 * iteration + way, "objective/scores": 1.0,
                                       "samples": [(f"prompt {iteration}", f"way {way} {HOSTILE}")],
                                       "shares": {"risky": {"refuse": 0.25, "answer": 0.75}}})
        if back is not None:
            session.rewind(back)
    session.close("finished")
    return folder
