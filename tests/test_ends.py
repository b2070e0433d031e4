"""One notion of what ends a reply, and of the ids that a reply is: sampler, SFT, reward model, DPO and PPO agree."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit import PPOConfig, PPOState, RewardConfig, SFTConfig, desk_tokenizer, sample, seeded
from alignkit.data.encoding import ChatText, encode_pair
from alignkit.data.ends import end_after, end_ids, without_end
from alignkit.data.rows import load_rows
from alignkit.desk.tiny import tiny_policy
from alignkit.forward.rollout import decode_responses, encode_prompts, encode_rows, rollout_from_ids
from alignkit.forward.sampling import generate_texts
from alignkit.models.heads import reward_model_from

STORIES = Path(__file__).resolve().parents[1].parent / "shared/models/stories260K"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
ZEPHYR = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
TWO_ENDS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_END = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}assistant: {% endif %}")


def bytes_tokenizer(template=None, own=("<|im_start|>", "<|im_end|>"), **options):
    """Bytes as tokens; EOS is not what ends a turn."""
    names = ["<pad>", "<s>", "<eos>", *own, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="<eos>",
                                   additional_special_tokens=list(own), clean_up_tokenization_spaces=False, **options)
    made.chat_template = template
    return made


def metaspace_tokenizer(template=None, own=("<|user|>", "<|assistant|>")):
    """Like Llama 2 and Phi-3: a space in front of every section of text, which decoding drops again."""
    letters = list("▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!")
    merges = [("▁", "y"), ("▁y", "e"), ("y", "e"), ("ye", "s"), ("▁ye", "s"), ("▁", "n"), ("▁n", "o"), ("n", "o")]
    names = ["<pad>", "<s>", "</s>", "<unk>", *own, *letters, *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges,
                               unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", additional_special_tokens=list(own),
                                   clean_up_tokenization_spaces=False)
    made.chat_template = template
    return made


def policy_of(tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **options)).eval()


def saying(policy, ids):
    """The policy so changed that it says these ids one after the other, whatever it is asked; each must differ."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
        policy.model.norm.weight.fill_(1.0)
        size = policy.config.hidden_size
        policy.model.embed_tokens.weight[:, size - 1] = 1.0  # what is asked
        for place, (before, now) in enumerate(zip([None, *ids[:-1]], ids, strict=True)):
            row = size - 1 if before is None else place
            if before is not None:
                policy.model.embed_tokens.weight[before] = torch.eye(size)[row]
            policy.lm_head.weight[now, row] = 50.0
    return policy


def chat_pairs(tmp_path, n=8):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({
        "chosen": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "yes it is"}],
        "rejected": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "no never"}],
    }) + "\n" for i in range(n)))
    return path


@pytest.mark.parametrize(("template", "own", "end"), [
    (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    (ZEPHYR, ("<|user|>", "<|assistant|>"), "<eos>"),
    (TWO_ENDS, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    (NO_END, (), "<eos>"),
    (None, (), "<eos>"),
])
def test_the_template_says_what_stands_behind_a_reply(template, own, end):
    tokenizer = bytes_tokenizer(template, own)
    wanted = tokenizer.convert_tokens_to_ids(end)
    assert end_after(tokenizer, ChatText("x")) == wanted
    assert end_after(tokenizer, "x") == tokenizer.eos_token_id  # plain text is no conversation
    assert end_ids(tokenizer) == tuple(dict.fromkeys([tokenizer.eos_token_id, wanted]))


def test_what_a_reply_ends_with_is_taken_off_and_nothing_else():
    tokenizer = bytes_tokenizer(TWO_ENDS)
    assert without_end(tokenizer, "yes \n<|im_end|>\n<eos>") == "yes \n"
    assert without_end(tokenizer, "yes<|im_end|>") == without_end(tokenizer, "yes  \n") == "yes"
    assert without_end(tokenizer, "<|im_end|> yes") == "<|im_end|> yes"


def test_every_id_of_the_generation_config_ends_a_reply_but_not_a_default_that_is_a_word():
    tokenizer = bytes_tokenizer()
    policy = policy_of(tokenizer)
    assert end_ids(tokenizer, policy) == (2,)
    policy.generation_config.eos_token_id = [4, 2]
    assert end_ids(tokenizer, policy) == (2, 4)
    policy.generation_config.eos_token_id = 100  # a word: from the config's defaults it means nothing
    assert end_ids(tokenizer, policy) == (2,)
    policy.generation_config._from_model_config = False
    assert end_ids(tokenizer, policy) == (2, 100)


def test_a_template_that_cannot_be_rendered_has_no_end():
    tokenizer = bytes_tokenizer("{{ raise_exception('never') }}")
    assert end_ids(tokenizer) == (tokenizer.eos_token_id,)
    tokenizer.chat_template = CHATML  # set later, it counts
    assert end_ids(tokenizer) == (2, 4)


@pytest.mark.parametrize(("template", "own"), [(CHATML, ("<|im_start|>", "<|im_end|>")),
                                               (GEMMA, ("<start_of_turn>", "<end_of_turn>"))])
@pytest.mark.parametrize("listed", [False, True])
def test_the_sampler_stops_at_the_end_of_a_turn(template, own, listed):
    tokenizer = bytes_tokenizer(template, own)
    four, end, start = (tokenizer.convert_tokens_to_ids(token) for token in ("4", own[1], own[0]))
    policy = saying(policy_of(tokenizer), [four, end, start, 10, 11, 12])
    if listed:  # as generation_config.json has it
        policy.generation_config.eos_token_id, tokenizer.chat_template = [end, tokenizer.eos_token_id], None
    ids, mask = encode_prompts(tokenizer, ["a", "bb"])
    rollout = sample(policy, ids, mask, max_new_tokens=24, eos_token_id=end_ids(tokenizer, policy), pad_token_id=0,
                     generator=seeded(0))
    assert rollout.response_mask.sum(1).tolist() == [2, 2] and rollout.finished.all()
    assert decode_responses(tokenizer, rollout) == ["4", "4"]
    assert generate_texts(policy, tokenizer, ["a", "bb"], max_new_tokens=24, seed=0) == [["4"], ["4"]]
    given = []
    config = PPOConfig(iterations=1, prompts_per_iteration=4, minibatch_size=4, max_new_tokens=24)
    state = PPOState.start(policy, tokenizer, lambda prompts, responses: given.extend(responses) or [0.0] * 4, ["a"],
                           config)
    from alignkit.ppo import collect
    _, measured = collect(state, config)
    assert given == ["4"] * 4 and measured["eos_rate"] == 1.0 and measured["length"] == 2.0


def test_one_end_or_several_that_never_come_draw_the_same_tokens():
    tokenizer = desk_tokenizer()
    policy = tiny_policy(tokenizer)
    ids, mask = encode_prompts(tokenizer, ["How do I reset my password?"] * 8)
    made = [sample(policy, ids, mask, max_new_tokens=4, eos_token_id=ends, pad_token_id=0, generator=seeded(0))
            for ends in (2, [2], (2, 0, 3))]
    for other in made[1:]:
        for name, value in vars(made[0]).items():
            assert torch.equal(value, vars(other)[name])
    assert end_ids(tokenizer, policy) == (2,)


def test_finished_is_true_of_each_end():
    made = rollout_from_ids([[5]] * 3, [[8, 2], [8, 4], [8]], eos_token_id=(2, 4), pad_token_id=0)
    assert made.finished.tolist() == [True, True, False]


def test_an_end_that_is_no_special_token_is_not_said_to_the_reward():
    tokenizer = bytes_tokenizer()
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    made = rollout_from_ids([[1, a]], [[a, b]], eos_token_id=b, pad_token_id=0)
    assert decode_responses(tokenizer, made) == ["a"]


@pytest.fixture
def trained_ids(monkeypatch):
    """Calls of TRL's trainers: the rows of ids that they would be given."""
    rows = []

    def kept(trainer, model, args, encoded, *rest):
        rows.extend(encoded)
        return []

    monkeypatch.setattr("alignkit.sft.run_trainer", kept)
    monkeypatch.setattr("alignkit.reward.run_trainer", kept)
    return rows


@pytest.mark.parametrize(("make", "template", "own"), [
    (bytes_tokenizer, CHATML, ("<|im_start|>", "<|im_end|>")),
    (bytes_tokenizer, TWO_ENDS, ("<|im_start|>", "<|im_end|>")),
    (bytes_tokenizer, GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    (bytes_tokenizer, NO_END, ()),
    (metaspace_tokenizer, ZEPHYR, ("<|user|>", "<|assistant|>")),
    (metaspace_tokenizer, ZEPHYR.replace("|>\\n", "|>"), ("<|user|>", "<|assistant|>")),
])
def test_sft_reward_model_dpo_and_ppo_see_the_same_ids_for_a_reply(make, template, own, tmp_path, trained_ids):
    from alignkit.reward import RewardScorer, train_reward_model
    from alignkit.sft import train_sft

    tokenizer = make(template, own)
    policy = policy_of(tokenizer)
    row = load_rows(chat_pairs(tmp_path), tokenizer=tokenizer)[0]
    assert row["chosen"] == "yes it is" and type(row["prompt"]) is ChatText
    train_sft(policy, tokenizer, [{"prompt": row["prompt"], "completion": row["chosen"]}], SFTConfig())
    train_reward_model(policy, tokenizer, [row], RewardConfig())
    expected = trained_ids[1]["chosen_ids"]
    assert trained_ids[0]["input_ids"] == expected
    assert sum(token in end_ids(tokenizer) for token in expected[-3:]) == 1  # one end, and not two
    dpo = encode_rows(tokenizer, [row], "chosen", 64)
    assert dpo.prompt_ids[0].tolist() + dpo.response_ids[0].tolist() == expected and dpo.finished.all()
    seen = []
    scorer = RewardScorer(reward_model_from(policy), tokenizer)
    scorer.model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]),
                                                 with_kwargs=True)
    scorer([row["prompt"]], decode_responses(tokenizer, dpo))
    assert seen[-1][0].tolist() == expected


@pytest.mark.parametrize("prompt", ["ask me", "", "What?", ChatText("<|user|>ask<|assistant|>"),
                                    ChatText("<|user|>ask<|assistant|>\n")])
@pytest.mark.parametrize("reply", ["yes", " yes", "  yes", "\nyes", "no. yes ", " no no"])
@pytest.mark.parametrize("make", [metaspace_tokenizer, lambda: bytes_tokenizer(None, ("<|user|>", "<|assistant|>"))])
def test_a_reply_that_was_decoded_is_encoded_to_the_same_ids(prompt, reply, make):
    """Decoders of Llama 2's kind drop the space before the first word: the reward would read another word."""
    tokenizer = make()
    rollout = encode_rows(tokenizer, [{"prompt": prompt, "reply": reply}], "reply", 64)
    text = decode_responses(tokenizer, rollout)[0]
    assert encode_pair(tokenizer, prompt, text)[1] == rollout.response_ids[0].tolist()[:-1]


def test_special_tokens_in_what_a_policy_wrote_stay_text_in_a_conversation():
    tokenizer = bytes_tokenizer(CHATML)
    prompt = ChatText("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert encode_pair(tokenizer, prompt, "yes") == encode_pair(tokenizer, prompt, ChatText("yes"))
    hostile = encode_pair(tokenizer, prompt, "a<|im_end|>b")[1]
    assert not {3, 4} & set(hostile) and len(hostile) == len("a<|im_end|>b")


@pytest.mark.parametrize(("make", "template", "own"), [
    (bytes_tokenizer, CHATML, ("<|im_start|>", "<|im_end|>")),
    (metaspace_tokenizer, ZEPHYR, ("<|user|>", "<|assistant|>")),
])
@pytest.mark.parametrize("chat", [True, False])
def test_ppo_with_a_reward_model_begins_and_every_reply_is_scored_on_the_ids_that_were_written(
        make, template, own, chat, tmp_path):
    from alignkit.ppo import ppo
    from alignkit.reward import RewardScorer

    tokenizer = make(template, own)
    policy = policy_of(tokenizer)
    rows = load_rows(chat_pairs(tmp_path), tokenizer=tokenizer)
    prompts = [row["prompt"] for row in rows] if chat else ["ask", "why"]
    scorer = RewardScorer(reward_model_from(policy), tokenizer)
    config = PPOConfig(iterations=1, prompts_per_iteration=8, minibatch_size=8, max_new_tokens=6)
    state = PPOState.start(policy, tokenizer, scorer, prompts, config)
    assert len(list(ppo(state, config))) == 1
    rollout, texts = state.last_rollout, decode_responses(tokenizer, state.last_rollout)
    end, same = end_after(tokenizer, prompts[0]), 0
    for row, text in enumerate(texts):
        head = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        said = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        said = said[:-1] if rollout.finished[row] else said
        prompt = ChatText(tokenizer.decode(head)) if chat else prompts[0]
        same += scorer.ids([prompt], [text])[0][-len(said) - 1 :] == [*said, end]
    assert same > 0  # what is written in unusual pieces, or is no text, is read as the text is


@pytest.mark.shared
def test_a_real_llama_s_replies_keep_the_space_they_begin_with():
    from alignkit import load_policy

    _, tokenizer = load_policy(STORIES, device="cpu")
    rows = [{"prompt": "Once upon a time", "reply": " he was"}, {"prompt": "Once upon a time", "reply": "ly he was"}]
    rollout = encode_rows(tokenizer, rows, "reply", 16)
    assert decode_responses(tokenizer, rollout) == [" he was", "ly he was"]


def test_a_trained_policy_that_is_saved_stops_at_all_its_ends_wherever_it_is_served(tmp_path, trained_ids):
    from alignkit import load_policy
    from alignkit.models.loading import save_model
    from alignkit.sft import train_sft

    tokenizer = bytes_tokenizer(CHATML)
    four, end = (tokenizer.convert_tokens_to_ids(token) for token in ("4", "<|im_end|>"))
    policy = saying(policy_of(tokenizer), [four, end, 10, 11])
    train_sft(policy, tokenizer, [{"prompt": "a", "completion": "4"}], SFTConfig())
    again, _ = load_policy(save_model(policy, tokenizer, tmp_path / "saved"), device="cpu")
    assert set(again.generation_config.eos_token_id) == {end, tokenizer.eos_token_id}
    made = again.generate(torch.tensor([[1, 50]]), attention_mask=torch.ones(1, 2), max_new_tokens=10, do_sample=False)
    assert made[0, 2:].tolist() == [four, end]
    plain = desk_tokenizer()
    tiny = tiny_policy(plain)
    train_sft(tiny, plain, [{"prompt": "a", "completion": "b"}], SFTConfig())
    assert tiny.generation_config.eos_token_id == plain.eos_token_id
