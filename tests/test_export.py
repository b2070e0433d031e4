"""Exports: the tools' own readers take the files, alignkit's reader gives the same rows back, what is lost is told."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from test_ends import CHATML, bytes_tokenizer, policy_of

from alignkit.configs import DPOConfig, RewardConfig, SFTConfig
from alignkit.data.rows import load_rows
from alignkit.errors import DataError, RunError
from alignkit.jobs.cli import main
from alignkit.models.loading import load_policy, save_model
from alignkit.publish import export as module
from alignkit.publish.export import export
from alignkit.publish.settings import LLAMA_FACTORY, TRL
from alignkit.storage import settings, write_json
from alignkit.task import is_heldout, load_task

TEXTS = [{"prompt": f"Question {i}: ünïcode \"quoted\"\nsecond line", "chosen": f" good {i}", "rejected": f" bad {i}"}
         for i in range(30)]
HELLO = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."})
CHATS = [
    {"prompt": [*([{"role": "system", "content": f"Be brief, {i}."}] if i % 2 else []),
                *(HELLO if i % 3 else ()),
                {"role": "user", "content": f"Question {i}"}],
     "chosen": [{"role": "assistant", "content": f"good {i}"}],
     "rejected": [{"role": "assistant", "content": f"bad {i}"}]} for i in range(30)]


def run_on(folder: Path, rows: list[dict], model: str = "tiny", parameters: dict | None = None, **configs) -> Path:
    """A run directory whose data are these rows, and whose stages were trained with these settings."""
    (folder / "run").mkdir(parents=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "run" / "run.json", {"model": model, "data": str(data), "seed": 0})
    write_json(folder / "run" / "jobs.json", {"01_sft": {"key": {"parameters": parameters or {}}}})
    for stage, config in configs.items():
        (folder / "run" / stage).mkdir()
        write_json(folder / "run" / stage / "results.json", {"config": settings(config)})
    return folder / "run"


@pytest.fixture
def by_template(monkeypatch):
    """Prompts of messages are told apart by their JSON: no tokenizer is needed to divide them."""
    monkeypatch.setattr(module, "_as_asked", lambda run, facts, said, prompts: [
        prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts])


def plain(rows) -> list[dict]:
    return [dict(row) for row in rows]


@pytest.mark.parametrize("tool", module.TOOLS)
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "conversations"])
def test_alignkits_reader_gives_the_same_rows_back(tmp_path, by_template, tool, rows):
    run = run_on(tmp_path, rows)
    exported = export(run, tool, tmp_path / "out")
    was = load_rows(tmp_path / "data.jsonl", messages=True)
    kept = [row for row in was
            if not is_heldout(row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"]), 0)]
    assert 0 < len(kept) < len(was) and exported.rows == dict.fromkeys(("sft", "reward", "dpo"), len(kept))
    for stage in ("reward", "dpo", "sft"):
        path = tmp_path / "out" / (f"{stage}.jsonl" if tool == "trl" else f"data/{stage}.json")
        back = plain(load_rows(path, messages=True))
        if stage == "sft":
            assert back == [{"prompt": row["prompt"], "completion": row["chosen"]} for row in kept]
        else:
            assert back == plain(kept)


def test_demonstrations_are_exported_for_sft_alone_and_prompts_not_at_all(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": f" a {i}"} for i in range(20)]
    assert export(run_on(tmp_path / "a", rows), "trl", tmp_path / "a" / "out").rows.keys() == {"sft"}
    with pytest.raises(DataError, match="has prompts only; an export needs demonstrations or pairs"):
        export(run_on(tmp_path / "b", [{"prompt": f"q {i}"} for i in range(20)]), "trl", tmp_path / "b" / "out")


def test_the_columns_that_the_run_was_told_are_used(tmp_path):
    rows = [{"ask": row["prompt"], "yes": row["chosen"], "no": row["rejected"]} for row in TEXTS]
    run = run_on(tmp_path, rows, parameters={"columns": "prompt=ask,chosen=yes,rejected=no", "kind": None})
    export(run, "trl", tmp_path / "out")
    assert load_rows(tmp_path / "out" / "dpo.jsonl")[0]["prompt"].startswith("Question")


def test_every_setting_is_mapped_or_told(tmp_path):
    for table in (TRL, LLAMA_FACTORY):
        for stage, config in {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}.items():
            assert table[stage].settings.keys() == {setting.name for setting in fields(config)}, stage
    dpo = DPOConfig(loss_type="robust", label_smoothing=0.1, length_normalised=True, beta=0.25, precision="bf16")
    run = run_on(tmp_path, TEXTS, dpo=dpo, reward=RewardConfig(centre=0.02))
    notes = "\n".join(export(run, "llama-factory", tmp_path / "lf").notes)
    assert "loss_type = 'robust' (it has no robust loss)" in notes and "length_normalised = True" in notes
    assert "centre = 0.02" in notes and "kl_coef" in notes and "no end-of-text token" in notes
    assert notes in (tmp_path / "lf" / "README.md").read_text().replace("\n* ", "\n")
    values = yaml.safe_load((tmp_path / "lf" / "dpo.yaml").read_text())
    assert values["pref_beta"] == 0.25 and "pref_loss" not in values and values["bf16"] is True
    exported = export(run, "trl", tmp_path / "trl")
    values = yaml.safe_load((tmp_path / "trl" / "dpo.yaml").read_text())
    assert values["loss_type"] == "robust" and values["beta"] == 0.25 and values["bf16"] is True
    assert "max_new_tokens = 4" in str(exported) and "loss_type = " not in "\n".join(exported.notes)


def test_a_turned_setting_arrives(tmp_path):
    """Every setting that has a counterpart changes the file by the name that the table says."""
    base = {"sft": SFTConfig(), "reward": RewardConfig(), "dpo": DPOConfig()}
    other = {"epochs": 7, "batch_size": 3, "learning_rate": 0.5, "max_length": 77, "seed": 9, "centre": 0.5,
             "beta": 0.75, "loss_type": "hinge", "label_smoothing": 0.2, "max_grad_norm": 3.5, "warmup": 0.5,
             "precision": "bf16", "precompute_reference": False, "gradient_checkpointing": True}
    for table in (TRL, LLAMA_FACTORY):
        for stage, config in base.items():
            before, _ = module._mapped(table[stage].settings, settings(config), stage)
            for name, mapped in table[stage].settings.items():
                if mapped.name:
                    after, _ = module._mapped(table[stage].settings, {**settings(config), name: other[name]}, stage)
                    assert {key for key in after if after[key] != before.get(key)} == {mapped.name}, (stage, name)


@pytest.mark.slow
def test_trls_own_parser_and_trainer_start_on_what_is_written(tmp_path, monkeypatch):
    """`trl sft`, `trl reward` and `trl dpo` with two steps of the tiny model."""
    import importlib

    from trl import scripts  # noqa: F401

    run = run_on(tmp_path, TEXTS, sft=SFTConfig(batch_size=4), reward=RewardConfig(batch_size=4, centre=0.02),
                 dpo=DPOConfig(batch_size=4, beta=0.25))
    export(run, "trl", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    for stage in ("sft", "reward", "dpo"):
        path = Path(f"{stage}.yaml")
        path.write_text(path.read_text() + "max_steps: 2\nuse_cpu: true\nsave_strategy: \"no\"\n"
                        if "save_strategy" not in path.read_text() else
                        path.read_text().replace('"epoch"', '"no"') + "max_steps: 2\nuse_cpu: true\n")
        script = importlib.import_module(f"trl.scripts.{stage}")
        parts = script.make_parser().parse_args_and_config(args=["--config", str(path)])
        arguments = parts[1]
        assert arguments.per_device_train_batch_size == 4 and arguments.bf16 is False
        if stage == "dpo":
            assert arguments.beta == 0.25 and arguments.precompute_ref_log_probs is True
        if stage == "reward":
            assert arguments.center_rewards_coefficient == 0.02
        script.main(*parts)
        assert (Path("trained") / stage / "config.json").exists()


# what its training arguments, transformers' own, have of the names that the files use
TRAINING = {"output_dir", "do_train", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed",
            "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
            "report_to", "logging_steps", "save_strategy"}
# LLaMA-Factory's documented names (data README and hparams of 0.9.5)
INFO = {"file_name", "formatting", "ranking", "columns", "tags"}
NAMES = TRAINING | {"model_name_or_path", "dataset_dir", "dataset", "template", "cutoff_len", "stage",
                    "finetuning_type", "pref_beta", "pref_loss",
                    "dpo_label_smoothing", "reward_model", "reward_model_type", "ppo_epochs"}


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "conversations"])
def test_what_is_written_for_llama_factory_has_its_documented_names(tmp_path, by_template, rows):
    folder = tmp_path / "out"
    export(run_on(tmp_path, rows), "llama-factory", folder)
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    assert info.keys() == {"sft", "reward", "dpo"}
    for entry in info.values():
        assert entry.keys() <= INFO
        first = json.loads((folder / "data" / entry["file_name"]).read_text())[0]
        assert set(entry["columns"].values()) == first.keys()
    assert info["dpo"]["ranking"] is True and "ranking" not in info["sft"]
    stages = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert {name: each["stage"] for name, each in stages.items()} == {"sft": "sft", "reward": "rm", "dpo": "dpo",
                                                                       "ppo": "ppo"}
    assert all(each.keys() <= NAMES for each in stages.values())
    assert all(("template" in each) == (rows is TEXTS) for each in stages.values())


def test_conversations_that_llama_factory_cannot_read_are_counted_or_refused(tmp_path, by_template):
    twice = {**CHATS[0], "prompt": [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]}
    exported = export(run_on(tmp_path / "a", [*CHATS, twice]), "llama-factory", tmp_path / "a" / "out")
    assert "sft: 1 conversations whose turns do not alternate" in "\n".join(exported.notes)
    thinks = {**CHATS[0], "chosen": [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]}
    with pytest.raises(DataError, match="a message has reasoning_content"):
        export(run_on(tmp_path / "b", [*CHATS, thinks, thinks | {"prompt": CHATS[4]["prompt"]}]), "llama-factory",
               tmp_path / "b" / "out")


@pytest.mark.slow
def test_the_desk_worlds_rows_are_those_that_the_notebooks_draw(tmp_path):
    run = tmp_path / "run"
    save_model(*load_policy("tiny"), run / "sft")
    write_json(run / "run.json", {"model": "tiny", "data": "desk", "seed": 0})
    write_json(run / "jobs.json", {"01_sft": {"key": {"parameters": {"demonstrations": 160, "messiness": 0.3}}},
                                   "02_reward_model": {"key": {"parameters": {"pairs": 40, "annotator": "expert"}}}})
    exported = export(run, "trl", tmp_path / "out")
    assert exported.rows == {"sft": 150, "reward": 40}  # no frozen checkpoint yet, so no pairs for DPO
    from dataclasses import replace

    from alignkit.task import desk_task

    task = replace(desk_task(0), messiness=0.3)
    assert plain(load_rows(tmp_path / "out" / "sft.jsonl")) == plain(task.demonstrations(160, seed=0)[10:])
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_what_is_no_run_or_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no run\.json with model, data and seed"):
        export(tmp_path / "empty", "trl", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    run = run_on(tmp_path / "a", TEXTS)
    assert main(["export", str(run), "--to", "trl", "--out", str(tmp_path / "full")]) == 1
    assert "not empty; choose another folder" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "llama-factory", "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    assert "llamafactory-cli train sft.yaml" in told and "not carried over:" in told


def test_prompts_that_the_run_cut_are_held_out_as_it_held_them_out(tmp_path):
    tokenizer = bytes_tokenizer()
    policy_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} " + "a long story " * 8 + f"number {i}", "chosen": f" {i}", "rejected": f" no{i}"}
            for i in range(60)]
    sizes = {"max_length": 60, "max_new_tokens": 8}
    run = run_on(tmp_path, rows, str(tmp_path / "model"), sizes)
    export(run, "trl", tmp_path / "out")
    task = load_task(tmp_path / "data.jsonl", tokenizer, **sizes)
    assert any("lost its beginning" in note for note in task.notes)
    assert {row["chosen"] for row in load_rows(tmp_path / "out" / "dpo.jsonl")} == {
        row["chosen"] for row in task.train_rows}


def test_a_conversation_that_the_chat_template_refuses_was_not_trained_on_and_is_not_exported(tmp_path):
    tokenizer = bytes_tokenizer(CHATML.replace("{% for", "{{ raise_exception('no system') if messages[0].role == "
                                               "'system' }}{% for", 1))
    policy_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(run_on(tmp_path, CHATS, str(tmp_path / "model"), {"skip_bad": True}), "trl", tmp_path / "out")
    assert "Question" in (written := (tmp_path / "out" / "dpo.jsonl").read_text()) and "Be brief" not in written
