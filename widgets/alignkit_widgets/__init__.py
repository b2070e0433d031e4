"""Widgets for alignkit's notebooks: they show and steer what `alignkit` computes, and compute nothing themselves."""

from alignkit_widgets.cockpit import TrainingCockpit
from alignkit_widgets.runlog import replay

__all__ = ["TrainingCockpit", "replay"]
