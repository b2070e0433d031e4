"""A PPO run that is steered by a script, for the site's player: at a low price of KL, then rewound."""

from __future__ import annotations

import asyncio
from pathlib import Path

from alignkit_widgets import PPO_CHARTS, TrainingCockpit
from alignkit_widgets.app.playground import open_playground

ITERATIONS, LEFT_AFTER, BACK_TO = 40, 12, 6
CHEAP, EXPENSIVE = 0.02, 0.2  # prices of KL, kl_coef


class _Nobody:
    """A panel that nobody sees; a run with a panel keeps the snapshots that a rewind needs."""

    def send(self, message: dict) -> None:
        """Nothing to show."""

    def replace(self, picture: tuple, text: str) -> None:
        """Nothing to show."""


def steered_run(run: str | Path, iterations: int = ITERATIONS, left_after: int = LEFT_AFTER,
                back_to: int = BACK_TO) -> Path:
    """Train PPO from RUN/sft with kl_coef 0.02, rewind it to iteration `back_to` after iteration `left_after`, or where
    it runs away, and go on with kl_coef 0.2. Returns the folder of the record, RUN/app/ppo-N."""
    live = open_playground(run).start_ppo(iterations, kl_coef=CHEAP)
    cockpit = TrainingCockpit("PPO", PPO_CHARTS, iterations, controls=live.controls, log=live.folder / "metrics.jsonl")
    remote = cockpit.open("control")
    remote.session.show_on(_Nobody())
    cockpit.open = lambda *args, **options: remote
    rewound = []

    def step(controls: dict) -> dict:
        row = live.step(controls)
        if not rewound and (row["stop"] or live.state.iteration >= left_after):
            rewound.append(row.pop("stop"))  # where it would run away, it is rewound instead of stopped
            remote.receive({"type": "rewind", "iteration": back_to})
            remote.receive({"type": "set", "name": "kl_coef", "value": EXPENSIVE})
        return row

    asyncio.run(cockpit.run(step, state=live.state))
    return live.folder
