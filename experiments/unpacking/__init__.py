"""Data, algorithm, reward model or prompts: what matters most for a policy? (the question of Ivison et al. 2024)

`python -m experiments.unpacking` runs it; `cells.py` trains and measures every combination of the four factors,
`rules.py` holds the claims about them.
"""
