"""The lab that measures what the articles claim: claims with rules fixed in advance, arms, and experiments.

`python -m experiments.claims` runs it; `registry.py` holds the claims, `arms.py` the ways to train, `order.py` the
experiment on PPO, DPO and their combinations.
"""
