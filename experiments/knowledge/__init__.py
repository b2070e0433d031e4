"""What training on preferences teaches, what it cannot teach, what it costs elsewhere, and how it is undone.

`facts.py`: facts that SFT never showed, and a second task that no reward knows. `undoing.py`: messy demonstrators, the
ranking along DPO's path, a wrong direction and its repair. `rules.py`: the claims, fixed before the run.
"""
