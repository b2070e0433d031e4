"""Measure a checkpoint on a frozen set of prompts, and suggest the next step from the figures."""

from alignkit.evaluate.evaluation import Evaluation, EvaluationSet, difference, evaluate, evaluation_set, win_rate

__all__ = ["Evaluation", "EvaluationSet", "difference", "evaluate", "evaluation_set", "win_rate"]
