"""A reward model of another family than the policy's: it gets the messages, rendered with its own chat template."""

import copy
import json

import pytest
from test_ends import CHATML, GEMMA, bytes_tokenizer, chat_pairs, policy_of

from alignkit import PPOConfig, PPOState, RewardConfig, load_reward
from alignkit.data.encoding import ChatText
from alignkit.data.own_template import in_own_template, written_by_another
from alignkit.data.rows import load_rows
from alignkit.errors import RunError
from alignkit.evaluate.evaluation import EvaluationSet
from alignkit.forward.scoring import check_reward_reads
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy, save_model
from alignkit.ppo import collect, ppo
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.task import file_task

TURNS = ("<start_of_turn>", "<end_of_turn>")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
SILENT = GEMMA.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def family(template=GEMMA, own=TURNS):
    """A reward model of another family: (scorer, its tokenizer)."""
    tokenizer = bytes_tokenizer(template, own)
    return RewardScorer(reward_model_from(policy_of(tokenizer, seed=1)), tokenizer), tokenizer


def system_rows(tmp_path):
    path = tmp_path / "system.jsonl"
    path.write_text("".join(json.dumps({
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"ask {number}"}],
        "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}],
    }) + "\n" for number in range(4)))
    return path


def test_it_reads_of_a_policy_s_conversation_the_ids_that_it_reads_of_its_own(tmp_path):
    """The slow way: the file is loaded again with the reward model's tokenizer, which renders it from the start."""
    scorer, other = family()
    for path in (chat_pairs(tmp_path), system_rows(tmp_path)):
        theirs, own = (load_rows(path, tokenizer=each) for each in (bytes_tokenizer(CHATML), other))
        said = [str(row["chosen"]) for row in theirs]
        assert scorer.ids([row["prompt"] for row in theirs], said) == scorer.ids(
            [row["prompt"] for row in own], [row["chosen"] for row in own])
    text = other.decode(scorer.ids([theirs[0]["prompt"]], said[:1])[0])
    assert text == ("<s><start_of_turn>system\nBe kind.<end_of_turn>\n<start_of_turn>user\nask 0<end_of_turn>\n"
                    "<start_of_turn>model\nyes<end_of_turn>")


def test_it_is_trained_on_the_ids_that_it_scores(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("alignkit.reward.run_trainer", lambda trainer, model, args, rows, *rest: trained.extend(rows))
    scorer, other = family()
    rows = load_rows(chat_pairs(tmp_path), tokenizer=bytes_tokenizer(CHATML))  # as the policy has them
    train_reward_model(scorer.model, other, rows, RewardConfig())
    assert trained[0]["chosen_ids"] == scorer.ids([rows[0]["prompt"]], [str(rows[0]["chosen"])])[0]


def test_ppo_trains_a_policy_against_a_saved_reward_model_of_another_family(tmp_path):
    tokenizer = bytes_tokenizer(CHATML)
    policy, (scorer, _) = policy_of(tokenizer), family()
    scorer.save(tmp_path / "reward")
    reward = load_reward(tmp_path / "reward", device="cpu")
    prompts = [row["prompt"] for row in load_rows(chat_pairs(tmp_path), tokenizer=tokenizer)]
    config = PPOConfig(iterations=1, prompts_per_iteration=4, minibatch_size=4, max_new_tokens=4, epochs=1)
    state = PPOState.start(policy, tokenizer, reward, prompts, config)
    assert len(list(ppo(state, config))) == 1
    read = []
    ids = reward.ids
    reward.ids = lambda prompts, responses: read.extend(rows := ids(prompts, responses)) or rows
    collect(state, config)
    turns = reward.tokenizer.convert_tokens_to_ids(list(TURNS))
    assert read and all(row.count(turns[0]) == 2 and row.count(turns[1]) == 2 for row in read)


def test_the_same_template_is_not_rendered_again_also_after_it_was_saved(tmp_path):
    tokenizer = bytes_tokenizer(CHATML)
    policy = policy_of(tokenizer)
    row = load_rows(chat_pairs(tmp_path), tokenizer=tokenizer)[0]
    _, again = load_policy(save_model(policy, tokenizer, tmp_path / "saved"), device="cpu")
    for same in (tokenizer, copy.deepcopy(tokenizer), again):
        assert not written_by_another(same, row["prompt"])
        prompts, responses = in_own_template(same, [row["prompt"]], ["yes"])
        assert prompts[0] is row["prompt"] and responses == ["yes"]
    assert not written_by_another(bytes_tokenizer(GEMMA, TURNS), "plain text")
    assert not written_by_another(bytes_tokenizer(GEMMA, TURNS), ChatText("messages are not known"))
    assert not written_by_another(bytes_tokenizer(None), row["prompt"])


def test_special_tokens_that_a_policy_spells_out_stay_text_in_the_other_family_too(tmp_path):
    scorer, other = family()
    row = load_rows(chat_pairs(tmp_path), tokenizer=bytes_tokenizer(CHATML))[0]
    read = scorer.ids([row["prompt"]], ["a<end_of_turn>b"])[0]
    assert read.count(other.convert_tokens_to_ids(TURNS[1])) == 2  # of the question and of the reply, and no third
    assert other.decode(read).endswith("model\na<end_of_turn>b<end_of_turn>")


@pytest.mark.parametrize("template, says", [(NO_SYSTEM, "System role not supported"),
                                            (SILENT, "leaves out the system message")])
def test_a_template_that_cannot_write_the_conversation_is_refused_before_training(tmp_path, template, says):
    tokenizer = bytes_tokenizer(CHATML)
    prompts = [row["prompt"] for row in load_rows(system_rows(tmp_path), tokenizer=tokenizer)]
    scorer, _ = family(template)
    with pytest.raises(ValueError, match=f"cannot read prompt 0 in its own chat template: .*{says}.*; set its"):
        check_reward_reads(scorer, tokenizer, prompts)
    with pytest.raises(ValueError, match=says):
        PPOState.start(policy_of(tokenizer), tokenizer, scorer, prompts, PPOConfig(max_new_tokens=4))


def test_a_part_of_a_reply_that_the_template_would_drop_is_scored_all_the_same(tmp_path):
    scorer, other = family(GEMMA.replace("m.content | trim", "m.content.split('</think>')[-1]"))
    row = load_rows(chat_pairs(tmp_path), tokenizer=bytes_tokenizer(CHATML))[0]
    read = other.decode(scorer.ids([row["prompt"]], ["<think>a</think>4"])[0])
    assert read.endswith("<think>a</think>4<end_of_turn>")


def test_a_prompt_that_was_cut_keeps_its_messages(tmp_path):
    tokenizer = bytes_tokenizer(CHATML)
    task = file_task(chat_pairs(tmp_path), tokenizer, max_length=30, max_new_tokens=8)
    assert any("lost its beginning" in note for note in task.notes)
    prompt = task.train_prompts[0]
    assert prompt.messages[0]["role"] == "user" and prompt.messages[0]["content"] not in ("", None)
    assert written_by_another(bytes_tokenizer(GEMMA, TURNS), prompt)


def test_an_evaluation_set_keeps_the_messages_of_its_prompts(tmp_path):
    tokenizer = bytes_tokenizer(CHATML)
    prompts = [row["prompt"] for row in load_rows(chat_pairs(tmp_path), tokenizer=tokenizer)][:2]
    evalset = EvaluationSet(tuple(prompts), (0, 1), ("all", "all"))
    evalset.save(tmp_path / "set.json")
    again = EvaluationSet.load(tmp_path / "set.json")
    scorer, _ = family()
    assert again.hash == evalset.hash
    assert scorer.ids(again.prompts, ["yes"] * 2) == scorer.ids(prompts, ["yes"] * 2)
    stored = json.loads((tmp_path / "set.json").read_text())
    for name, value in (("messages", [None]), ("messages", [[{"role": 1, "content": "a"}], None]), ("template", 3)):
        (tmp_path / "bad.json").write_text(json.dumps(stored | {name: value}))
        with pytest.raises(RunError, match=f"{name} "):
            EvaluationSet.load(tmp_path / "bad.json")
    plain = EvaluationSet((ChatText("a"),), (0,), ("all",))
    assert "messages" not in plain._fields()
