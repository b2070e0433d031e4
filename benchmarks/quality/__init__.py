"""Time to quality: how soon PPO is as good as it has to be, beside TRL's PPO, and what makes it sooner.

`rules` says what is asked and tried, `reached` reads a course and compares two, `ours` and `trl_ppo` train, `race` lets
runs alternate and measures their policies exactly, `stages` makes the benchmark's parts, `page` writes them down.
"""
