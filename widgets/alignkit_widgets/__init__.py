"""Widgets for alignkit's notebooks. They display and steer the computations of `alignkit`, and compute nothing
themselves.

A widget is loaded on first use.
"""

import importlib

_MODULES = {
    "boards.annotator": ["PreferenceAnnotator"],
    "boards.comparer": ["CheckpointComparer"],
    "cockpit.cockpit": ["TrainingCockpit"],
    "cockpit.log": ["replay"],
    "cockpit.ppo_run": ["PPO_CHARTS", "ppo_controls", "ppo_row"],
    "explorers.bradley_terry": ["BradleyTerryExplorer"],
    "explorers.clip": ["ClipExplorer"],
    "explorers.dpo_beta": ["BetaExplorer"],
    "explorers.explorer": ["Explorer"],
    "explorers.frontier": ["FrontierExplorer"],
    "explorers.gae": ["GAEExplorer"],
    "explorers.kl_estimators": ["KLEstimatorsExplorer"],
    "explorers.shift": ["ShiftViewer"],
    "explorers.step_through": ["StepThroughExplorer"],
    "explorers.worked_numbers": ["read_response"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit_widgets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"alignkit_widgets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
