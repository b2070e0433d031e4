"""Widgets for alignkit's notebooks: they show and steer what `alignkit` computes, and compute nothing themselves.

A widget is loaded when it is first used.
"""

import importlib

_MODULES = {
    "annotator": ["PreferenceAnnotator"],
    "bradley_terry": ["BradleyTerryExplorer"],
    "clip": ["ClipExplorer"],
    "cockpit": ["TrainingCockpit"],
    "comparer": ["CheckpointComparer"],
    "dpo_beta": ["BetaExplorer"],
    "explorer": ["Explorer"],
    "frontier": ["FrontierExplorer"],
    "gae": ["GAEExplorer"],
    "kl_estimators": ["KLEstimatorsExplorer"],
    "runlog": ["replay"],
    "shift": ["ShiftViewer"],
    "step_through": ["StepThroughExplorer"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit_widgets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"alignkit_widgets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
