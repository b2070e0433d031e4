"""The benchmark's tables, in a terminal and on the speed page."""

import statistics
from pathlib import Path

import trl

from benchmarks.steps.trl_ppo import VERSION

NOT_MEASURED = {
    "TRL PPO": f"trl {trl.__version__} has no PPO; {VERSION}, the last that had it, is measured with --trl-ppo FOLDER"
}
ROWS = {
    "rollout": "PPO: rollout",
    "scoring": "PPO: scoring",
    "update": "PPO: update",
    "iteration": "PPO: whole iteration",
    "dpo": "DPO step",
    "dpo_precomputed": "DPO step, reference precomputed",
    "sft": "SFT step",
    "reward": "reward-model step",
}
PPO_PARTS = ("rollout", "scoring", "update", "iteration")


def table(results: dict) -> str:
    """The results as Markdown."""
    machine, sizes = results["machine"], results["sizes"]
    lines = [
        f"{results['parameters'] / 1e6:.2f} M parameters, fp32, {machine['threads']} of {machine['cores']} cores, load "
        f"{machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after (one-minute averages). "
        f"Measured limit: {machine['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s (medians; best {machine['matmul_best'] / 1e9:.0f} and "
        f"{machine['bytes_best'] / 1e9:.1f}). {sizes['prompts']} prompts of at most {sizes['prompt_tokens']} tokens, "
        f"{sizes['new_tokens']} new tokens; {sizes['pairs']} rows or pairs a DPO, SFT or reward step.",
        "",
        f"Seconds of {machine['clock']}: median of {results['rounds']} interleaved rounds (min–max). "
        "Ratio: theirs / alignkit's, median of the rounds' ratios (min–max). "
        "Limit: the time that the FLOPs or bytes would take at the measured rate, as a "
        "share of alignkit's. Peak: MB over the imports, alignkit / bare / TRL.",
        "",
        "| step | alignkit, s | tokens/s | limit | bare, s | bare / alignkit | TRL, s | TRL / alignkit | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        for mine, ratios, what in (("alignkit", row["ratios"], ""), ("best", row["best_ratios"], ", best settings")):
            if mine not in row["sides"]:
                continue
            own = row["sides"][mine]
            cells = [
                row["what"] + what,
                _range(own),
                f"{own['tokens_per_second']:,.0f}".replace(",", " "),
                f"{own['share_of_limit']:.0%}",
            ]
            for side in ("bare", "trl"):
                cells += (
                    [_range(row["sides"][side]), _range(ratios[side], 2)]
                    if side in row["sides"]
                    else ["not measured"] * 2
                )
            peaks = [row["sides"].get(side, {}).get("peak_mb") for side in (mine, "bare", "trl")]
            cells.append(" / ".join("–" if peak is None else f"{peak:.0f}" for peak in peaks))
            lines.append(f"| {' | '.join(cells)} |")
    worst = max(row["difference"] for row in results["checks"])
    rates = results["best"]["flops_per_second"]
    lines += [
        "",
        f'Best settings: `shared_trunk=True`, `precision="{results["best"]["precision"]}"` (a product of the model\'s '
        f"shapes runs at {rates['fp32'] / 1e9:.0f} GFLOP/s in fp32 and at {rates['bf16'] / 1e9:.0f} in bf16 here; DPO "
        "and rollout have no other setting that makes them faster).",
        f"Same numbers on all sides: {len(results['checks'])} comparisons, largest difference {worst:.1g}.",
    ]
    if results["trl_ppo"]:
        alike = results["trl_ppo"]
        lines += [
            f"TRL's PPO is that of trl {alike['versions']['trl']}, in a process of its own: {alike['steps']} optimiser "
            f"steps as alignkit's, KL of its rollout {alike['kl_trl']:.1f} nats (alignkit's {alike['kl']:.1f}). "
            "It does not clip gradients."
        ]
    lines += [f"Not measured: {what}: {why}." for what, why in results["not_measured"].items()]
    lines += [
        "alignkit's SFT and reward training are TRL's trainers with batches from lists; collators and data loaders are "
        "timed on no side.",
    ]
    if not results["growth"]:
        return "\n".join(lines)
    lines += [
        "",
        "How the cost grows, one size at a time (alignkit, default settings; the second run of each, so only "
        "differences of a fifth and more mean something):",
        "",
        "| changed | parameters | PPO iteration, s | new tokens/s | DPO step, s |",
        "|---|---|---|---|---|",
    ]
    for row in results["growth"]:
        changed = "nothing" if row["changed"] is None else f"{row['changed'].replace('_', ' ')}: {row['value']}"
        rate = f"{row['iteration_tokens'] / row['iteration']:,.0f}".replace(",", " ")
        lines.append(
            f"| {changed} | {row['parameters'] / 1e6:.2f} M | {row['iteration']:.2f} | {rate} | {row['dpo']:.3f} |"
        )
    return "\n".join(lines)


def write_page(page: Path, name: str, made: str) -> None:
    """Put the table of the results in file `name` between its marks in a Markdown page; ValueError if it has none."""
    text, mark = page.read_text(encoding="utf-8"), f"<!-- {name} -->\n"
    try:
        before, rest = text.split(mark)
        after = rest.split("<!-- end -->\n", 1)[1]
    except (ValueError, IndexError):
        raise ValueError(
            f"{page} has no place for the table, expected {mark.strip()} and <!-- end --> on their lines"
        ) from None
    page.write_text(f"{before}{mark}{made}\n<!-- end -->\n{after}", encoding="utf-8")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _range(spread: dict[str, float], digits: int = 3) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}–{spread['max']:.{digits}f})"
