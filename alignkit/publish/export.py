"""Export a run to another tool: its data in that tool's format, and its settings under that tool's names.

The files contain the training rows as they are in the source (a conversation stays one, and the tool's chat template
renders it). Prompts that the run holds out are not exported, so the run's evaluation remains on unseen prompts. The
README.md beside the files lists everything without a counterpart in the tool.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.configs import DPOConfig, RewardConfig, SFTConfig, preset
from alignkit.errors import DataError, RunError
from alignkit.publish.settings import LLAMA_FACTORY, TRL, Mapped
from alignkit.runs.records import run_facts
from alignkit.safe_text import one_line
from alignkit.storage import read_json, settings, write_atomically, write_json

TOOLS = ("llama-factory", "trl")
STAGES = {  # stage -> its notebook, its config
    "sft": ("01_sft", SFTConfig),
    "reward": ("02_reward_model", RewardConfig),
    "dpo": ("05_dpo", DPOConfig),
}
COLUMNS = {"sft": ("completion",), "reward": ("chosen", "rejected"), "dpo": ("chosen", "rejected")}


@dataclass(frozen=True)
class Exported:
    """The result of `export`: the folder, rows by stage, and sentences about settings without a counterpart in the
    tool."""

    folder: Path
    tool: str
    rows: dict[str, int]
    commands: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{stage}: {count:,} rows" for stage, count in self.rows.items()]
        return "\n".join((*lines, f"written to {one_line(self.folder, 1000)}; start there:",
                          *(f"  {command}" for command in self.commands),
                          *(f"not carried over: {note}" for note in self.notes)))


def export(run: str | Path, tool: str, out: str | Path) -> Exported:
    """Write the data and the settings of a run for `tool`, "llama-factory" or "trl", into the folder `out`.

    The rows are those of the run's training part: demonstrations for SFT, pairs for the reward model and DPO, if its
    data has them (the desk world's pairs are sampled again from the run's own checkpoints). The settings are those
    recorded in the stages' results.json, otherwise the presets for the model. Raises RunError if `run` is not a run
    directory, DataError if its data can no longer be read or contains something that the tool cannot read,
    FileExistsError if `out` is not empty.
    """
    run, out = Path(run), Path(out)
    if tool not in TOOLS:
        raise ValueError(f"tool is {tool!r}, expected one of {', '.join(TOOLS)}")
    facts = run_facts(run)
    if facts.keys() < {"model", "data", "seed"}:
        raise RunError(f"{run} is no run directory: it has no run.json with model, data and seed")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is there already and not empty; choose another folder, or delete this one")
    given = _parameters(run)
    rows = _desk_rows(run, facts, given) if facts["data"] == "desk" else _file_rows(run, facts, given)
    out.mkdir(parents=True, exist_ok=True)
    models = _models(run, facts, given, out)
    write = _write_trl if tool == "trl" else _write_llama_factory
    commands, notes = [], []
    counts = {}
    for stage, its_rows in rows.items():
        recorded = _config(run, facts, stage)
        command, its_notes, counts[stage] = write(out, stage, its_rows, recorded, models[stage])
        commands.append(command)
        notes += its_notes
    if tool == "llama-factory":
        _finish_llama_factory(out, rows, models, commands, notes)
    exported = Exported(out, tool, counts, tuple(commands), tuple(dict.fromkeys(notes)))
    write_atomically(out / "README.md", _readme(exported))
    return exported


# --- what a run holds ------------------------------------------------------------------------------------------------
def _parameters(run: Path) -> dict[str, dict]:
    """Notebook -> its parameters, as recorded in RUN/jobs.json."""
    try:
        jobs = read_json(run / "jobs.json")
    except FileNotFoundError:
        return {}
    keys = {name: job.get("key") for name, job in jobs.items() if isinstance(job, dict)}
    return {name: key["parameters"] for name, key in keys.items()
            if isinstance(key, dict) and isinstance(key.get("parameters"), dict)}


def _config(run: Path, facts: Mapping, stage: str) -> dict:
    """The settings with which a stage was trained; the preset for the model if it was not trained, or by another
    version."""
    kind = STAGES[stage][1]
    try:
        recorded = read_json(run / stage / "results.json").get("config")
    except FileNotFoundError:
        recorded = None
    defaults = settings(preset(kind, str(facts["model"])))
    return {**defaults, **(recorded if isinstance(recorded, dict) else {})}


def _file_rows(run: Path, facts: Mapping, given: Mapping) -> dict[str, list[dict]]:
    """Stage -> the rows of its training part: texts, or lists of messages."""
    from alignkit.data.rows import load_rows
    from alignkit.task import is_heldout

    choices = next(iter(given.values()), {})
    reading = {name: choices[name] for name in ("kind", "split", "columns") if isinstance(choices.get(name), str)}
    loaded = load_rows(facts["data"], skip_bad=choices.get("skip_bad") is True, messages=True, **reading)
    if loaded.kind == "prompts":
        raise DataError(f"{loaded.source}: has prompts only; an export needs demonstrations or pairs")
    asked = _as_asked(run, facts, choices, [row["prompt"] for row in loaded])
    rows = [row for row, prompt in zip(loaded, asked, strict=True)
            if prompt is not None and not is_heldout(prompt, int(facts["seed"]))]
    if loaded.kind == "demonstrations":
        return {"sft": rows}
    liked = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return {"sft": liked, "reward": rows, "dpo": rows}


def _as_asked(run: Path, facts: Mapping, choices: Mapping, prompts: list) -> list[str | None]:
    """The prompts as the run used them to decide what to hold out: messages rendered by the chat template, truncated to
    the model's context; None if the template refuses a prompt, which was then never trained on."""
    from transformers import AutoTokenizer

    from alignkit.data.chat import chat_template_of
    from alignkit.data.encoding import ChatText
    from alignkit.data.files import Fault
    from alignkit.data.fitting import fit_prompt, prompt_room
    from alignkit.models.gate import check_model_folder

    chats = [place for place, prompt in enumerate(prompts) if isinstance(prompt, list)]
    place = run / "sft" if (run / "sft" / "config.json").exists() else Path(str(facts["model"]))
    if not place.is_dir():
        if not chats:
            return prompts
        raise RunError(f"{run} has no trained stage, and its model {one_line(facts['model'])} is no folder; run "
                       "notebook 01_sft first: its tokenizer says which conversations are held out")
    check_model_folder(place)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    asked = list(prompts)
    for start in range(0, len(chats), 64):
        batch = chats[start : start + 64]
        texts = chat_template_of(tokenizer).render([(prompts[each], []) for each in batch])
        for each, text in zip(batch, texts, strict=True):
            asked[each] = None if isinstance(text, Fault) else ChatText(text[0])
    limit = min(choices.get("max_length") or 512, tokenizer.model_max_length)
    room = prompt_room(limit, choices.get("max_new_tokens") or 32)
    return [prompt and fit_prompt(tokenizer, prompt, room) for prompt in asked]


def _desk_rows(run: Path, facts: Mapping, given: Mapping) -> dict[str, list[dict]]:
    """The desk world's rows, sampled again as in the notebooks; pairs only if their policy was trained."""
    from dataclasses import replace

    from alignkit.models.loading import load_policy
    from alignkit.task import desk_task

    seed = int(facts["seed"])
    asked = {stage: given.get(notebook, {}) for stage, (notebook, _) in STAGES.items()}
    task = replace(desk_task(seed), messiness=asked["sft"].get("messiness", 0.7))
    count = asked["sft"].get("demonstrations", 8000)
    rows = {"sft": task.demonstrations(count, seed=seed)[max(1, count // 16):]}  # the notebook holds out the first ones
    places = {"reward": ("sft", 6000, seed, "default"),
              "dpo": (asked["dpo"].get("reference", "frozen"), 3000, seed + 7, "expert")}
    for stage, (source, pairs, number, annotator) in places.items():
        if (run / source / "config.json").exists():
            policy, tokenizer = load_policy(run / source, device="cpu")
            rows[stage] = task.preference_pairs(
                policy, tokenizer, asked[stage].get("pairs", pairs), seed=number, noise=asked[stage].get("noise"),
                annotator=asked[stage].get("annotator", annotator))
    return rows


def _models(run: Path, facts: Mapping, given: Mapping, out: Path) -> dict[str, str]:
    """Stage -> its initial model, a Hub id or a path relative to `out`; the tiny model is written there."""
    model = str(facts["model"])
    if model == "tiny":
        from alignkit.models.loading import load_policy, save_model

        save_model(*load_policy("tiny", seed=int(facts["seed"]), device="cpu"), out / "model")
        model = "model"
    elif os.path.exists(model):
        model = os.path.relpath(model, out)
    trained = {stage: os.path.relpath(run / stage, out) for stage in ("sft", "frozen")
               if (run / stage / "config.json").exists()}
    reference = given.get("05_dpo", {}).get("reference", "frozen")
    return {"sft": model, "reward": trained.get("sft", model), "dpo": trained.get(reference, trained.get("sft", model))}


# --- what the tools read ---------------------------------------------------------------------------------------------
def _mapped(table: Mapping[str, Mapped], config: Mapping, stage: str) -> tuple[dict, list[str]]:
    """The settings under the tool's names, and a sentence for each setting without a counterpart."""
    values, notes = {}, []
    for name, value in config.items():
        mapped = table.get(name)
        if mapped is None:
            notes.append(f"{stage}: {name} = {value!r}, an unknown setting")
        elif mapped.name:
            ours = mapped.values.get(value, value) if mapped.values and isinstance(value, str) else value
            if mapped.values and isinstance(value, str) and value not in mapped.values:
                notes.append(f"{stage}: {name} = {value!r} ({mapped.about})")
            elif value is not None:
                values[mapped.name] = ours
        elif value != mapped.neutral:
            notes.append(f"{stage}: {name} = {value!r} ({mapped.about})")
    return values, notes


def _write_trl(out: Path, stage: str, rows: list[dict], config: Mapping, model: str) -> tuple[str, list[str], int]:
    """STAGE.jsonl, in TRL's prompt-completion or preference form, and STAGE.yaml for its command."""
    _write_lines(out / f"{stage}.jsonl", [{**row, **{name: row[name] if isinstance(row["prompt"], str) else [row[name]]
                                                     for name in COLUMNS[stage]}} for row in rows])
    table = TRL[stage]
    values, notes = _mapped(table.settings, config, stage)
    content = {"model_name_or_path": model, "datasets": [{"path": "json", "data_files": f"{stage}.jsonl"}],
               "output_dir": f"trained/{stage}", **table.fixed, **values}
    _write_yaml(out / f"{stage}.yaml", content)
    return f"trl {stage} --config {stage}.yaml", notes, len(rows)


def _write_llama_factory(out: Path, stage: str, rows: list[dict], config: Mapping,
                         model: str) -> tuple[str, list[str], int]:
    """data/STAGE.json in LLaMA-Factory's alpaca format (sharegpt format for conversations), and STAGE.yaml."""
    chat = any(isinstance(row["prompt"], list) for row in rows)
    kept = [row for row in rows if not chat or _alternates(row["prompt"])]
    notes = [f"{stage}: {len(rows) - len(kept)} conversations whose turns do not alternate between user and assistant, "
             "which LLaMA-Factory leaves out"] if len(kept) < len(rows) else []
    write = _sharegpt if chat else _alpaca
    (out / "data").mkdir(exist_ok=True)
    write_json(out / "data" / f"{stage}.json", [write(row, COLUMNS[stage]) for row in kept])
    table = LLAMA_FACTORY[stage]
    values, more = _mapped(table.settings, config, stage)
    _write_yaml(out / f"{stage}.yaml", {
        "model_name_or_path": model, "dataset_dir": "data", "dataset": stage, **({} if chat else {"template": "empty"}),
        "output_dir": f"trained/{stage}", **table.fixed, **values})
    if not chat:
        notes.append(f"{stage}: the end of a reply: LLaMA-Factory's template `empty` writes plain text as it is, and "
                     "no end-of-text token after it")
    return f"llamafactory-cli train {stage}.yaml", notes + more, len(kept)


def _finish_llama_factory(out: Path, rows: Mapping, models: Mapping, commands: list[str], notes: list[str]) -> None:
    """dataset_info.json, and ppo.yaml, for which the tool must train its own reward model first."""
    info = {}
    for stage, its_rows in rows.items():
        chat = any(isinstance(row["prompt"], list) for row in its_rows)
        ranking = len(COLUMNS[stage]) == 2
        replies = {"chosen": "chosen", "rejected": "rejected"} if ranking else {} if chat else {"response": "output"}
        info[stage] = {
            "file_name": f"{stage}.json", **({"formatting": "sharegpt"} if chat else {}),
            **({"ranking": True} if ranking else {}),
            "columns": {**({"messages": "messages"} if chat else {"prompt": "instruction"}), **replies},
            **({"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                         "assistant_tag": "assistant", "system_tag": "system"}} if chat else {})}
    write_json(out / "data" / "dataset_info.json", info)
    if "reward" in rows:
        _write_yaml(out / "ppo.yaml", {
            "model_name_or_path": "trained/sft", "reward_model": "trained/reward", "dataset_dir": "data",
            "dataset": "sft", **({"template": "empty"} if "formatting" not in info["sft"] else {}),
            "output_dir": "trained/ppo", **LLAMA_FACTORY["ppo"].fixed})
        commands.append("llamafactory-cli train ppo.yaml  # after sft.yaml and reward.yaml; needs the TRL that its "
                        "documentation names")
        notes.append("ppo: the reward model of this run (LLaMA-Factory reads its own only), kl_coef, clip_range, "
                     "gae_lambda and the critic's learning rate (it has no such settings)")


def _alternates(prompt: list[dict]) -> bool:
    turns = [message["role"] for message in prompt]
    turns = turns[1:] if turns[:1] == ["system"] else turns
    return len(turns) % 2 == 1 and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(turns))


def _alpaca(row: dict, names: Iterable[str]) -> dict:
    return {"instruction": row["prompt"], **{"output" if name == "completion" else name: row[name] for name in names}}


def _sharegpt(row: dict, names: Iterable[str]) -> dict:
    for message in (*row["prompt"], *(row[name] for name in names)):
        if more := sorted(message.keys() - {"role", "content"}):
            raise DataError(f"a message has {', '.join(map(one_line, more))}, which LLaMA-Factory's form of a "
                            "conversation has no place for; export to trl, or leave it out of the data")
    if tuple(names) == ("completion",):
        return {"messages": [*row["prompt"], row["completion"]]}
    return {"messages": row["prompt"], **{name: row[name] for name in names}}


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_yaml(path: Path, content: Mapping) -> None:
    """YAML with JSON values, one setting per line, which every YAML reader parses in the same way."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in content.items()]
    write_atomically(path, "# from alignkit; paths count from this folder\n" + "".join(lines))


def _readme(exported: Exported) -> str:
    commands = "\n".join(f"    {command}" for command in exported.commands)
    lost = "\n".join(f"* {note}" for note in exported.notes) or "* nothing"
    return (f"# A run of alignkit, for {exported.tool}\n\nIn this folder:\n\n{commands}\n\nThe prompts that the run "
            f"holds out are not in these files.\n\nNot carried over:\n\n{lost}\n")
