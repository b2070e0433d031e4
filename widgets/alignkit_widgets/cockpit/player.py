"""A recorded PPO run as one HTML file that plays, pauses and scrubs, with the branches that rewinds abandoned."""

from __future__ import annotations

import json
from pathlib import Path

from alignkit.errors import RunError
from alignkit.safe_text import one_line, visible
from alignkit.storage import read_json, read_metrics, write_atomically
from alignkit_widgets.cockpit.log import checked, marks_of, samples_file, ways_of
from alignkit_widgets.looks import looks
from alignkit_widgets.pages.live import live_page

MOST_BYTES = 3_000_000
CHARTS = [  # as PPO_CHARTS and GOLD_CHARTS, which would load torch
    ("reward, SFT-sd", ["objective/scores", "gold", "objective/rlhf_reward"]),
    ("KL to SFT, nats per response", ["objective/kl"]),
    ("entropy, nats per response", ["objective/entropy"]),
    ("critic: explained variance", ["val/explained_variance"]),
]
HERE = Path(__file__).parent


def save_run(run: str | Path, path: str | Path) -> Path:
    """Write the page of a recorded PPO run to `path`, which it returns.

    run: a run directory (its ppo/metrics.jsonl is read), or a folder with a metrics.jsonl. The page contains the charts
    of the cockpit, the shares of behaviours where they are known, the samples of each iteration if the run recorded
    them, and the branches that rewinds abandoned. If the page would have more than 3 MB, only the samples of every
    second (fourth, …) iteration are kept. Its state is in the URL: page.html#step=12&way=1.

    Raises RunError if there is no log of a PPO run, or if the page would have more than 3 MB without samples.
    """
    log = _log(Path(run))
    rows = checked(read_metrics(log), log)
    if not any("objective/kl" in row for row in rows):
        raise RunError(f"{log} has no row with objective/kl, so it is not the log of a PPO run")
    data, every = _data(Path(run), log, rows), 1
    page = _page(data)
    while len(page.encode()) > MOST_BYTES and data["samples"]:
        every *= 2
        data["samples"] = {key: pairs for key, pairs in data["samples"].items() if not int(key.split(":")[1]) % every}
        page = _page(data)
    if len(page.encode()) > MOST_BYTES:
        raise RunError(f"{log} has {len(rows):,} iterations, too many for a page of {MOST_BYTES / 1e6:g} MB")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _log(run: Path) -> Path:
    for log in (run / "metrics.jsonl", run / "ppo" / "metrics.jsonl"):
        if log.exists():
            return log
    raise RunError(f"{run} has no recorded PPO run: expected {run / 'ppo' / 'metrics.jsonl'}, written by notebook 03b")


def _data(run: Path, log: Path, rows: list[dict]) -> dict:
    """What the page's script reads: each way as its rows, marks and name; rows that several ways share stand once."""
    ways, known, table = ways_of(log, rows), {}, []
    found = {key for row in rows for key in row}
    found -= {"objective/rlhf_reward"} if "gold" in found else set()  # two lines are read, three are not
    charts = [{"title": title, "keys": kept} for title, every in CHARTS
              if (kept := [key for key in every if key in found])]
    keys = [key for chart in charts for key in chart["keys"]]
    described, rewinds = [], []
    for number, way in enumerate(ways):
        for row in way:
            if id(row) not in known:
                known[id(row)] = len(table)
                table.append({"step": row["step"], "values": [row.get(key) for key in keys],
                              "controls": row.get("controls", {}), "shares": _plain_shares(row.get("shares"))})
        name, last = "the run that was kept", way[-1]["step"] if way else 0
        described.append({"rows": [known[id(row)] for row in way], "marks": marks_of(way) + rewinds})
        if number + 1 < len(ways):
            after = {id(row) for row in ways[number + 1]}
            at = max((row["step"] for row in way if id(row) in after), default=0)
            rewinds = [*rewinds, {"step": at, "name": "rewind", "old": last, "new": at}]
            name = f"abandoned at {last}, rewound to {at}"
        described[-1]["name"] = name
    facts = next(filter(None, map(_facts, (run, *log.resolve().parents[1:3]))), "")
    config = {"title": "PPO, recorded" + f": {facts}" * bool(facts), "charts": charts, "mode": "recorded",
              "total": max(row["step"] for row in table), "unit": "iteration", "controls": [], "log": ""}
    samples = _samples(log, len(ways))
    return {"config": config | looks(), "keys": keys, "rows": table, "ways": described, "samples": samples}


def _plain_shares(shares: dict | None) -> dict | None:
    return shares and {
        one_line(kind): {one_line(name): round(share, 4) for name, share in part.items() if share is not None}
        for kind, part in shares.items()
    }


def _samples(log: Path, ways: int) -> dict[str, list]:
    """{"way:step": [[prompt, response], …]}; way: the number of rewinds before the iteration."""
    found = {}
    for row in read_metrics(samples_file(log)):
        way, step, pairs = row.get("way"), row.get("step"), row.get("pairs")
        good = type(way) is int and 0 <= way < ways and type(step) is int and isinstance(pairs, list)
        if good and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            found[f"{way}:{step}"] = [[visible(prompt), visible(response)] for prompt, response in pairs]
    return found


def _facts(run: Path) -> str:
    """"model tiny, data desk, seed 0", from run.json; empty if there is none."""
    try:
        facts = read_json(run / "run.json")
    except (OSError, RunError):
        return ""
    return ", ".join(f"{name} {one_line(facts[name], 60)}" for name in ("model", "data", "seed") if name in facts)


def _page(data: dict) -> str:
    about = "Recorded by alignkit. Dotted: before a rewind." if len(data["ways"]) > 1 else "Recorded by alignkit."
    if not data["samples"]:
        about += " This run recorded no samples."
    return live_page(data["config"]["title"], about, HERE / "cockpit.js", HERE / "cockpit.css", "player.js",
                     json.loads(json.dumps(data, allow_nan=False)))
