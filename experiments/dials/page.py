"""docs/dials.md: the verdicts on the claims, and the curves behind them."""

from alignkit.evaluate.dials import REFERENCES, Dials
from alignkit.formulas.intervals import mean_estimate
from experiments.claims.lab import MEANING, claim_cells, claims_table, counted, table

ABOUT = """A claim is a sentence of the articles with a quantity that decides it and a rule; the rules stand in
`experiments/dials/rules.py` and were committed before the runs. """ + MEANING

COEFFICIENT = """DPO with all labels, two epochs. The optimum is π* ∝ π_ref exp(s / β), where s is the score of the
reward model that learned from the same labels: where DPO would end with endless labels of an annotator whose reward is
s. Below it PPO, whose price is in units of the normalised score."""

LABELS = """DPO and PPO with the same labels, read at the KL at which PPO ends. Fewer labels get more passes: 16 times
fewer get {passes} times as many, in DPO and in the reward model."""

STEPS = """DPO at β = {beta:g}, followed to epoch {last}. The KL-regularised optimum at this β has a KL of {promised}
nats."""

REFERENCE = """PPO at the same price, {price:g}, with another reference, and with no price. *One block before*: after
each block the reference becomes the policy. *Moving average*: it becomes the mean of itself and the policy."""

REJECTED = """DPO at β = {beta:g} without the gradient of the rejected responses, which still decide a pair's weight,
and the likelihood of the chosen responses alone."""

LIMITS = """- PPO has {iterations} iterations here, with a learning rate that falls to 0; DPO's learning rate stays.
  That difference is part of what varies between trainings (C18).
- {epochs} epochs of DPO need not be convergence: the table of steps says whether loss and gold still change. The other
  runs of DPO with all labels have two epochs.
- Figures at a KL between two runs are interpolated, linearly in √KL, never between SFT and a run. A first run of this
  lab had no β above 0.3 with few labels, read DPO between SFT and its nearest run, and so was too hard on it; then
  larger β were added and this rule was fixed, before they were run. The other runs are those of the first.
- The best of three β (C23) is above their mean, and the last epoch below the best (C31c), by the noise of training
  alone.
- One annotator, one policy size: the desk world. Whether a real model is as sensitive to β is not measured."""


def curve_table(record: Dials, curve: str, name: str, metrics: dict[str, str]) -> str:
    """A row for each setting, a column for each metric: the mean over worlds with its interval."""
    columns = {metric: record.curve(curve, metric) for metric in metrics}
    settings = sorted({setting for column in columns.values() for setting in column})
    return table([name, *metrics.values()], [
        [f"{setting:,g}", *(f"{column[setting]:.2f}" if setting in column else "–" for column in columns.values())]
        for setting in settings])


def rejected_table(record: Dials) -> str:
    """A row for each treatment of the rejected responses: KL and gold."""
    names = {"weighs": "no gradient", "ignored": "ignored"}
    found = {name: [run for world in record.worlds.values() for run in world["rejected"]["runs"]
                    if run["rejected"] == name] for name in names}
    rows = [["trained (DPO)", *(f"{record.curve('beta', metric)[record.settings['plan']['beta']]:.2f}"
                                for metric in ("kl", "gold"))]]
    rows += [[names[name], *(f"{mean_estimate([run[metric] for run in runs]):.2f}" for metric in ("kl", "gold"))]
             for name, runs in found.items()]
    return table(["rejected responses", "KL, nats", "gold"], rows)


def page(record: Dials) -> str:
    """The page."""
    plan, worlds = record.settings["plan"], list(record.worlds)
    references = table(["reference", "KL at the end, nats", "gold at the end", "largest gold on the way"], [
        [name, *(f"{mean_estimate(list(column)):.2f}" for column in zip(
            *((kl[-1], gold[-1], max(gold)) for kl, gold in record.paths(name).values()), strict=True))]
        for name in REFERENCES])
    promised = mean_estimate([world["steps"]["promised"]["kl"] for world in record.worlds.values()])
    figures = {"kl": "KL, nats", "gold": "gold", "proxy": "proxy", "risky_failures": "risky failures"}
    shifts = {"chosen_shift": "log π − log π_ref, chosen", "rejected_shift": "the same, rejected"}
    parts = [
        "# Dials: what the coefficient, the reference, the labels and the steps change", f"Made by `{record.command}`.",
        ABOUT, f"Worlds: {', '.join(map(str, worlds))}. {counted(record.claims)} Means over worlds, [95 % interval]. "
        "Gold and proxy are in SFT-sd; every figure is exact on 32 held-out prompts.",
        claims_table([claim_cells(claim) for claim in record.claims]),
        "## The coefficient", COEFFICIENT, "DPO:", curve_table(record, "beta", "β", figures | shifts),
        "The optimum:", curve_table(record, "optimum", "β", {name: figures[name] for name in ("kl", "gold", "proxy")}),
        "PPO:", curve_table(record, "price", "price", figures),
        "## The number of labels", LABELS.format(passes=plan["passes"]),
        curve_table(record, "labels", "labels", {"kl": "KL, nats", "dpo": "gold, DPO", "ppo": "gold, PPO"}),
        "## The steps", STEPS.format(beta=plan["beta"], last=plan["epochs"][-1], promised=f"{promised:.2f}"),
        curve_table(record, "epoch", "epoch", {**figures, "loss": "loss", **shifts}),
        "## The rejected term", REJECTED.format(beta=plan["beta"]), rejected_table(record),
        "## The reference of PPO", REFERENCE.format(price=plan["price"]), references,
        "## What this does not show",
        LIMITS.format(iterations=2 * plan["blocks"], epochs=plan["epochs"][-1])]
    return "\n\n".join(parts) + "\n"
