"""Dials: what a coefficient, a reference, the number of labels, the number of steps and a term of the loss change.

`runs.py` trains the policies, `rules.py` says which claims they decide, `__main__.py` is the command.
"""
