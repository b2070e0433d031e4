"""What a checkpoint does, measured on a frozen set of prompts, and what the figures ask for next."""

from alignkit.evaluate.evaluation import Evaluation, EvaluationSet, difference, evaluate, evaluation_set, win_rate

__all__ = ["Evaluation", "EvaluationSet", "difference", "evaluate", "evaluation_set", "win_rate"]
