"""Named places at which a test can kill the process, to check that nothing is lost there.

`ALIGNKIT_KILL_AT=NAME` kills this process with SIGKILL when it reaches NAME; `NAME:3` when it does so for the third
time. Without the variable a kill point costs one comparison.
"""

import os
import signal

KILL_POINTS = {
    "ppo.begun": "an iteration of PPO begins",
    "ppo.sampled": "responses are sampled, nothing is scored",
    "ppo.scored": "the batch is scored and read, no step is made",
    "ppo.epoch": "an epoch over the batch begins",
    "ppo.half_step": "the policy's optimiser has stepped, the critic's has not",
    "ppo.done": "all steps of an iteration are made, nothing is logged",
    "dpo.step": "a step of DPO is made, nothing is logged",
    "trainer.step": "a step of SFT or of the reward model is made, nothing is logged",
    "metrics.row": "a row of metrics.jsonl is written",
    "folder.begun": "a folder that replaces another is empty yet",
    "folder.written": "its files are written, none is flushed to the disk",
    "folder.flushed": "all is on the disk, under the temporary name",
    "folder.between": "the old folder has its temporary name, the new one not yet its own (no exchange in one step)",
    "folder.exchanged": "the new folder has its name, the old one is not deleted",
    "checkpoint.weights": "the tensors of a checkpoint are written, nothing else",
    "checkpoint.prune": "a checkpoint is whole, older ones are not deleted",
    "freeze.copied": "the files are copied, there is no manifest",
    "freeze.manifest": "the manifest is written, the folder has no name",
    "stage.results": "the results of a stage are written, it is not in its place",
    "stage.aside": "the stage before is set aside, the new one is not in its place",
}
_name, _left = "", 0


def arm(place: str) -> None:
    """Kill this process when it reaches a kill point: "NAME", or "NAME:3" for the third time; "" for never.

    Raises ValueError on a name that is not in KILL_POINTS.
    """
    global _name, _left
    name, _, count = place.partition(":")
    if name and name not in KILL_POINTS:
        raise ValueError(f"ALIGNKIT_KILL_AT is {place!r}, expected one of {', '.join(KILL_POINTS)}")
    _name, _left = name, int(count) if count.isdecimal() else 1


def reached(name: str) -> None:
    """Declare that the program is at the kill point `name`."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


arm(os.environ.get("ALIGNKIT_KILL_AT", ""))
