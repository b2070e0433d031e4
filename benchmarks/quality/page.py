"""docs/quality.md and its picture, from the record."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from alignkit.plots import Chart, Picture, plot_progress, save_figure
from alignkit.storage import write_atomically
from benchmarks.quality.race import LEVELS
from benchmarks.quality.reached import UNITS, Ratio, Reached, ratio
from benchmarks.quality.stages import levels

AIM = 3.0  # times sooner than TRL's PPO
NAMES = {"alignkit": "alignkit", "trl": "TRL 1.12", "alignkit, changed": "alignkit, changed"}
LEVEL_NAMES = {"proxy": "95 % of the optimum in proxy", "gold": "90 % of the optimum's gold"}
UNIT_NAMES = {"cpu": "CPU seconds", "wall": "wall seconds", "samples": "samples"}


def load(path: Path) -> dict:
    """The record."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(record: dict, page: Path, picture: Path) -> None:
    """Write the page and its picture."""
    save_figure(drawn(record), picture)
    write_atomically(page, text(record))


def text(record: dict) -> str:
    """The whole page."""
    rules, version = record["rules"], record["versions"].get("trl_ppo", "")
    first, last = (f"{load:.1f}" for load in record["machine"]["load"])
    return f"""# Time to quality

<!-- made by: {record["command"]} -->
How soon is PPO as good as it has to be? A step that costs less helps only if no more steps are needed, so this page
measures seconds and samples until a run reaches a level, beside the PPO of TRL {version}, the last TRL that
had one: on the same desk worlds, with the same SFT policy, reward model, prompts, price of KL (`kl_coef`
{rules["price"]:g}) and machine. The command above makes the page from
[quality.json](../benchmarks/results/quality.json), and a test compares the two.

**The levels.** *Proxy*: what the policy gained in proxy over SFT is at least {_percent(rules["share"])} of what the
exact optimum at the policy's own KL gains, at a KL of at most {rules["most_kl"]:g} nats. *Gold*: its gain in gold is at
least {_percent(rules["gold"])} of that of the exact optimum at this price (not of the run's own best: a bad run would
have a low bar). Both are exact: all 16,105 responses to {rules["prompts"]} held-out prompts are enumerated, every
{rules["every"]} iterations, outside of every clock; between two measurements the course is taken to be linear.

**The runs.** One thread an operation; the sides alternate iteration by iteration, so a busy moment falls on both (load
{first} and {last} on {record["machine"]["cores"]} cores, first and last). CPU seconds are those of the process:
other work changes them less, and the verdict is about them. Wall seconds depend on what else the machine did; alignkit
uses both cores for policy and critic, TRL one. Loading models and making the trainer count on no side.

**The tries.** Both sides got the same {len(record["tries"])} tries on the seeds {_listed(record["tuning"])}. The one
that reached the proxy level on most seeds and soonest was evaluated on the seeds {_listed(record["evaluation"])}:
another world, SFT policy, reward model and run each. The tries were written down after a pilot on seed 10, and all
rules (`benchmarks/quality/rules.py`) before a change or an evaluation ran.

## The answer

{answer(record)}

![Course of proxy and gold against CPU seconds](images/quality.png)

{tables(record)}

{DIFFERENCES}
"""


def tables(record: dict) -> str:
    """The page's tables, with their headings."""
    parts = ["## Evaluation", evaluation(record), ratios(record), "## The tries", tried(record),
             "## What makes it sooner", changed(record)]
    return "\n\n".join(parts + (["## What growth costs", grown(record)] if record["growth"] else []))


# ---- the answer
def compared(record: dict, theirs: str, ours: str, level: str = "proxy", unit: str = "cpu") -> Ratio:
    """How many times sooner `ours` is than `theirs` on the evaluation's seeds."""
    rows = record["evaluation"]
    return ratio(levels(rows, theirs, level), levels(rows, ours, level), unit)


def verdict(found: Ratio) -> str:
    """Whether the aim is reached, by the interval."""
    if found.bound in ("unknown", "at most"):
        return "**open**: some of alignkit's runs ended first"
    if found.low is None:
        return "**open**: one seed has no interval"
    if found.low >= AIM:
        return "**reached**"
    if found.bound == "at least":
        return "**open**: some of TRL's runs ended first, so the ratio is a lower bound"
    return "**missed**" if found.high < AIM else f"**open**: {AIM:g} lies inside the interval"


def answer(record: dict) -> str:
    """The verdict against the aim, and where the difference comes from."""
    if "trl" not in record["chosen"]:
        return "TRL's PPO was not measured here."
    lines = [f"The aim was {AIM:g} × sooner than TRL's PPO, in CPU seconds to the proxy level:", ""]
    for side, what in (("alignkit", "the same tries on both sides, a critic on both"),
                       ("alignkit, changed", _soonest(record))):
        found = compared(record, "trl", side)
        lines.append(f"- {what}: **{shown(found)}** × sooner; the aim is {verdict(found)}.")
    costs = [f"{1000 * _per_sample(record, side):.2f} ms" for side in ("trl", "alignkit", "alignkit, changed")]
    fewer = [shown(compared(record, "trl", side, unit="samples")) for side in ("alignkit", "alignkit, changed")]
    lines += ["", f"Sooner can be fewer samples or cheaper ones: TRL needs {fewer[0]} × alignkit's samples, and "
                  f"{fewer[1]} × those with the change. A sample, with all that is done to it, takes {costs[0]} of CPU "
                  f"time in TRL, {costs[1]} in alignkit and {costs[2]} with the change (means over the runs). Where "
                  "both sides run the same algorithm, samples differ by chance and by what the last section lists; "
                  "what is left is the cost of a sample; [speed.md](speed.md) says what limits alignkit's."]
    return "\n".join(lines)


def _soonest(record: dict) -> str:
    """What the changed run is, and what it had that TRL's did not."""
    other = "; without a critic, so another algorithm than TRL's" * (
        "advantage" in record["changes"][record["soonest"]])
    return (f"alignkit's soonest of {len(record['changes'])} settings on other seeds, *{record['soonest']}* (more "
            f"tries than TRL had{other})")


def _per_sample(record: dict, side: str) -> float:
    runs = [row["runs"][side] for row in record["evaluation"]]
    return statistics.mean(run["cpu"][-1] / run["samples"][-1] for run in runs)


# ---- the tables
def evaluation(record: dict) -> str:
    """When each run reached each level: a row a side and level, a column a seed."""
    rows, sides = record["evaluation"], _sides(record)
    lines = ["CPU seconds, and thousands of samples in brackets; > : the run ended first.", "",
             f"| to | side | try | {' | '.join('seed ' + str(row['seed']) for row in rows)} |",
             "|---" * (3 + len(rows)) + "|"]
    for level in LEVELS:
        for side in sides:
            cells = [_spent(one) for one in levels(rows, side, level)]
            lines.append(f"| {LEVEL_NAMES[level]} | {NAMES[side]} | {_try(record, side)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(record: dict) -> str:
    """How many times sooner, in each unit, with intervals."""
    sides = _sides(record)
    pairs = [("trl", "alignkit"), ("trl", "alignkit, changed"), ("alignkit", "alignkit, changed")]
    lines = ["How many times sooner: the geometric mean over the seeds, with Student's 95 % interval of the paired log "
             "ratio.", "", f"| to | sooner | than | {' | '.join(UNIT_NAMES[unit] for unit in UNITS)} |",
             "|---" * 6 + "|"]
    for level in LEVELS:
        for theirs, ours in pairs:
            if theirs in sides:
                cells = [shown(compared(record, theirs, ours, level, unit)) for unit in UNITS]
                lines.append(f"| {LEVEL_NAMES[level]} | {NAMES[ours]} | {NAMES[theirs]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tried(record: dict) -> str:
    """The tries of both sides: CPU seconds to the proxy level on each tuning seed."""
    rows, sides = record["tuning"], [side for side in ("alignkit", "trl") if side in record["chosen"]]
    lines = [f"CPU seconds to the proxy level on the seeds {_listed(rows)}; > : the run ended first; **bold**: chosen.",
             "",
             f"| try | iterations | epochs | rate | {' | '.join(NAMES[side] for side in sides)} |",
             "|---" * (4 + len(sides)) + "|"]
    for name, setting in record["tries"].items():
        cells = []
        for side in sides:
            cell = ", ".join(_seconds(one) for one in levels([row for row in rows if row["try"] == name], side))
            cells.append(f"**{cell}**" if record["chosen"][side] == name else cell)
        lines.append(f"| {name} | {setting['iterations']} | {setting['epochs']} | {setting['learning_rate']:g} | "
                     f"{' | '.join(cells)} |")
    sizes = next(iter(record["tries"].values()))
    return "\n".join([*lines, "", f"{sizes['prompts']} prompts an iteration in minibatches of {sizes['minibatch']}; "
                      "the critic's rate is twice the policy's, and both fall linearly to 0."])


def changed(record: dict) -> str:
    """The changes of alignkit's try: how many times sooner each is than the try without it."""
    rows = record["varied"]
    lines = [f"alignkit's try *{record['chosen']['alignkit']}* with one change, then with the best of several groups "
             f"together, on the seeds {_listed(rows)}: CPU seconds and thousands of samples to the proxy level (> : "
             "the run ended first, or was ended when it was late), and how many times sooner than without a change, "
             "paired. With few seeds the intervals are wide; what was soonest (**bold**) is evaluated on other seeds "
             "in the first table. No default of the course was changed: every recorded figure would change too.", "",
             "| change | PPOConfig | CPU seconds | samples, thousands | times sooner | to gold, times sooner |",
             "|---" * 6 + "|"]
    for name, fields in record["changes"].items():
        runs = levels(rows, name)
        gains = [shown(ratio(levels(rows, "no change", level), levels(rows, name, level))) if fields else "1"
                 for level in LEVELS]
        given = ", ".join(f"`{field}={value!r}`" for field, value in fields.items()) or "–"
        label = f"**{name}**" if name == record["soonest"] else name
        lines.append(f"| {label} | {given} | {', '.join(map(_seconds, runs))} | "
                     f"{', '.join(f'{one.samples / 1000:.1f}' for one in runs)} | {' | '.join(gains)} |")
    fields = {"kl_coef": record["rules"]["price"], **record["changes"][record["soonest"]]}
    given = ", ".join(f"{field}={value!r}" for field, value in fields.items())
    sooner = [shown(compared(record, "alignkit", "alignkit, changed", level)) for level in LEVELS]
    lines += ["", f"What a user can set, by this table: `PPOConfig({given})`. On the evaluation's seeds it was "
                  f"{sooner[0]} × sooner to the proxy level than the try without it, {sooner[1]} × to the gold level."]
    return "\n".join(lines)


def grown(record: dict) -> str:
    """What an iteration costs as prompts and model grow."""
    rows = record["growth"]
    sides = list(rows[0]["seconds"])
    lines = ["CPU seconds of one iteration with untrained models of the desk world's kind (512 prompts, hidden size "
             "64, 2 layers, 2 epochs in 4 minibatches each, unless the row says otherwise); the mean of two, so only "
             "differences of a fifth and more mean something.", "",
             f"| changed | policy's parameters | {' | '.join(NAMES.get(side, side) for side in sides)} |",
             "|---" * (2 + len(sides)) + "|"]
    for row in rows:
        what = ", ".join(f"{name}: {value}" for name, value in row["changed"].items()) or "nothing"
        cells = " | ".join(f"{row['seconds'][side]:.2f}" for side in sides)
        lines.append(f"| {what} | {row['parameters'] / 1e6:.2f} M | {cells} |")
    return "\n".join([*lines, "", "What more jobs cost is in [sweeps.md](sweeps.md), and how a step's cost grows with "
                      "lengths and layers in [speed.md](speed.md)."])


# ---- the picture
def drawn(record: dict) -> Picture:
    """Share of the optimum, and gold as a share of its level's optimum, against CPU seconds: a line a run."""
    figure = Picture(figsize=(10.4, 3.6), facecolor="white", layout="constrained")
    rows, rules = record["evaluation"], record["rules"]
    panels = (("share", rules["share"], "proxy: share of the optimum at the run's KL", "Proxy"),
              ("gold", rules["gold"], "gold: share of the optimum's at this price", "Gold"))
    for place, (column, level, ylabel, title) in enumerate(panels, start=1):
        runs = {NAMES[side]: [(row["runs"][side]["cpu"], [value / (row["gold_best"] if column == "gold" else 1)
                                                          for value in row["runs"][side][column]]) for row in rows]
                for side in _sides(record)}
        ax = figure.add_subplot(1, 2, place, axes_class=Chart)
        plot_progress(runs, level, ax, xlabel="CPU seconds of training", ylabel=ylabel, title=title)
    return figure


# ---- cells
def shown(found: Ratio) -> str:
    """A ratio with its interval; of a bound, the end of the interval that holds."""
    if found.bound == "unknown":
        return "unknown: runs of both ended first"
    if found.low is None:
        return f"{found.bound} {found.value:.2f}".lstrip()
    interval = {"": f"{found.low:.2f}–{found.high:.2f}", "at least": f"from {found.low:.2f}",
                "at most": f"to {found.high:.2f}"}[found.bound]
    return f"{found.bound} {found.value:.2f} ({interval})".lstrip()


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _seconds(one: Reached) -> str:
    return f"{'> ' * one.censored}{one.cpu:.1f}"


def _spent(one: Reached) -> str:
    return f"{_seconds(one)} ({one.samples / 1000:.1f})"


def _sides(record: dict) -> list[str]:
    return [side for side in NAMES if side in record["evaluation"][0]["runs"]]


def _try(record: dict, side: str) -> str:
    if side == "alignkit, changed":
        return f"{record['chosen']['alignkit']}; {record['soonest']}"
    return record["chosen"][side]


def _listed(rows: Sequence[dict]) -> str:
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


DIFFERENCES = """## What differs between the sides, and what does not

The same: SFT policy, reference, reward model with its scale, the prompts of every iteration in their order, at most 4
tokens a response, temperature 1, `kl_coef` with k1 in the token rewards, γ, λ, clip ranges, whitened advantages,
minibatches, epochs, fused AdamW (eps 1e-5) with one rate for the policy and twice that for the critic, both falling
linearly to 0; both critics begin as copies of the reward model. Before each run TRL's reward is compared with
alignkit's on responses of every length; a difference above 1e-4 stops the benchmark.

What was done to TRL 1.12 so that it is the same task:

- Its `get_reward` reads the reward model at the last token; alignkit's scorer always reads it at EOS. So a response
  that was cut off gets an EOS for the reward model, and scores get the scorer's mean and scale.
- Its data loader does not shuffle, so that both sides read the same prompts; the optimiser with two rates goes in
  through `optimizers=`; numpy is seeded, which TRL does not do.

What stays TRL's own:

- gradients are not clipped (`max_grad_norm` is ignored by its PPO);
- the score is charged one token after EOS, so that returns of finished responses go through one more value;
- sampling is `generate`, and its log-probs are the old ones; the value and policy losses are one backward pass;
- statistics in each minibatch, `gc.collect()` in each iteration, accelerate, a log line.

Not compared: other TRL trainers (GRPO, RLOO), other models, a GPU, more than one thread an operation. One world family
of short responses says little about long ones; what a step costs at other sizes is in [speed.md](speed.md).
"""
