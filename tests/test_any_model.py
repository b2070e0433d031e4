"""Any model, judged once when it is loaded: thirty and more architectures through all that alignkit does with a policy,
and those that cannot be read exactly refused in one sentence before anything is trained."""

import copy
import json
import math
import re
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit import DPOConfig, PPOConfig, PPOState, RewardConfig, SFTConfig, add_lora, desk_tokenizer, load_policy
from alignkit.data.encoding import ChatText
from alignkit.dpo import dpo
from alignkit.errors import AlignkitError, InvariantError
from alignkit.formulas.randomness import seeded
from alignkit.forward.reading import response_logprobs
from alignkit.forward.rollout import encode_prompts, full_ids, to_device
from alignkit.forward.sampling import generate_texts, sample
from alignkit.forward.scoring import as_scores, check_reward_ids, check_reward_reads
from alignkit.models.fitness import context_length, judge
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_reward_model, save_model
from alignkit.ppo import ppo
from alignkit.reward import RewardScorer, load_reward, train_reward_model
from alignkit.sft import train_sft
from alignkit.task import file_task

TOKENIZER = desk_tokenizer()
SPECIAL = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
           "pad_token_id": TOKENIZER.pad_token_id, "vocab_size": len(TOKENIZER)}
PROMPTS = ["How do I reset my password?", "How do I bake some bread at home?"]
PAIRS = [{"prompt": prompt, "chosen": " Happy to help!", "rejected": " I can't help with that."} for prompt in PROMPTS]
USUAL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}
GROUPED = USUAL | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name: (config class, its options)
MODELS = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": ("GPTNeoConfig", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
                                 "attention_types": [[["global", "local"], 1]], "window_size": 4,
                                 "max_position_embeddings": 64}),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", USUAL),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_alibi": ("FalconConfig", USUAL | {"alibi": True}),
    "falcon_rope": ("FalconConfig", USUAL | {"alibi": False}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "opt": ("OPTConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
                          "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "biogpt": ("BioGptConfig", USUAL),
    "llama": ("LlamaConfig", GROUPED),
    "llama_tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "llama_dynamic": ("LlamaConfig", GROUPED | {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3_rope": ("LlamaConfig", GROUPED | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "mistral_sliding": ("MistralConfig", GROUPED | {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "mixtral_router": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "output_router_logits": True}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2_sliding": ("Qwen2Config", GROUPED | {"use_sliding_window": True, "sliding_window": 4,
                                                "max_window_layers": 1}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 8, "output_router_logits": True}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "phi": ("PhiConfig", USUAL),
    "phi3": ("Phi3Config", GROUPED),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "stablelm": ("StableLmConfig", GROUPED),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "glm4": ("Glm4Config", GROUPED | {"head_dim": 8}),
    "gpt_oss": ("GptOssConfig", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                           "sliding_window": 4}),
    "granite": ("GraniteConfig", GROUPED),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", GROUPED | {"sliding_window": 4}),
    "xglm": ("XGLMConfig", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
                            "max_position_embeddings": 64}),
}


UNSCORED = ("granite", "cohere", "cohere2", "xglm")  # no …ForSequenceClassification: no reward model, no own critic


def made(name: str):
    """A random policy of an architecture, its dropout as its config has it by default."""
    torch.manual_seed(0)
    kind, options = MODELS[name]
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options, **SPECIAL))


def folder_of(policy, path):
    policy.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def plain_logprobs(policy, prompt: list[int], response: list[int]) -> torch.Tensor:
    """One row by itself, without padding, cache or position ids."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def check_logprobs(policy):
    ids, mask = encode_prompts(TOKENIZER, [*PROMPTS, PROMPTS[0][:8]])
    rollout = sample(policy, ids, mask, max_new_tokens=6, eos_token_id=2, pad_token_id=0, generator=seeded(0))
    assert torch.allclose(response_logprobs(policy, rollout), rollout.logprobs, atol=1e-5)
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        assert torch.allclose(rollout.logprobs[row, : len(response)], plain_logprobs(policy, prompt, response),
                              atol=1e-5)


def iterate(policy, **options):
    config = PPOConfig(iterations=1, prompts_per_iteration=4, minibatch_size=4, max_new_tokens=4, epochs=1, **options)
    state = PPOState.start(policy, TOKENIZER, lambda prompts, responses: [len(text) / 50 for text in responses],
                           PROMPTS, config)
    stats = list(ppo(state, config))
    assert len(stats) == 1 and stats[0].ratio_first == pytest.approx(1, abs=1e-4)


LIKE_OTHERS = ("gptj", "falcon_rope", "biogpt", "llama_tied", "qwen2_sliding", "qwen2_moe", "olmo", "cohere2")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS))
                                  for name in MODELS])
def test_an_architecture_goes_through_everything(name, tmp_path):
    policy, tokenizer = load_policy(folder_of(made(name), tmp_path / "policy"), device="cpu")
    check_logprobs(policy)
    first = next(dpo(copy.deepcopy(policy), tokenizer, PAIRS, DPOConfig(epochs=1, batch_size=2)))
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    iterate(copy.deepcopy(policy), shared_trunk=True)
    if name in UNSCORED:
        with pytest.raises(ValueError, match=r"models have no class that scores a text .* shared_trunk=True") as raised:
            reward_model_from(policy)
        assert len(str(raised.value)) < 400
    else:
        iterate(copy.deepcopy(policy))
        scorer = RewardScorer(reward_model_from(policy), tokenizer)
        prompts, responses = [PROMPTS[0], PROMPTS[0][:8]], [" Happy to help!", " I can't help with that."]
        together = scorer(prompts, responses)
        alone = torch.cat([scorer([prompt], [response]) for prompt, response in zip(prompts, responses, strict=True)])
        assert torch.allclose(together, alone, atol=1e-5)
        scorer.save(tmp_path / "reward")
        again = RewardScorer.load(tmp_path / "reward", device="cpu")(prompts, responses)
        assert torch.allclose(again, together, atol=1e-5)
    adapted = add_lora(copy.deepcopy(policy))
    before = next(dpo(adapted, tokenizer, PAIRS, DPOConfig(epochs=1, batch_size=2, learning_rate=1e-2)))
    assert before.loss == pytest.approx(math.log(2), abs=1e-5)
    again, _ = load_policy(save_model(adapted, tokenizer, tmp_path / "again"), device="cpu")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
        assert not torch.allclose(again(ids).logits, policy(ids).logits, atol=1e-5)  # it was trained


# What cannot be read exactly.

REFUSED = {
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
             "no cache of keys|padded batch"),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "no cache of keys"),
    "bert": ("BertConfig", USUAL, "no cache of keys|padded batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_read_is_refused_in_one_sentence_when_it_is_loaded_and_when_it_is_first_used(
        name, tmp_path):
    kind, options, reason = REFUSED[name]
    policy = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options, **SPECIAL)).eval()
    uses = [lambda: load_policy(folder_of(policy, tmp_path / "model"), device="cpu"),
            lambda: generate_texts(policy, TOKENIZER, PROMPTS, max_new_tokens=2, seed=0)]
    if name != "mamba":  # Mamba reads padded rows rightly; RWKV and BERT do not read as a policy must
        uses.append(lambda: next(dpo(policy, TOKENIZER, PAIRS, DPOConfig(epochs=1))))
    for use in uses:
        with pytest.raises(ValueError, match=reason) as raised:
            use()
        assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


class Wrong(torch.nn.Module):
    """A GPT-2 that has one thing wrong."""

    def __init__(self, fault):
        super().__init__()
        self.inner, self.fault = made("gpt2").eval(), fault
        self.config, self.dtype, self.device = self.inner.config, torch.float32, torch.device("cpu")

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask, position_ids, **options):
        if self.fault == "padding":
            attention_mask, position_ids = None, None
        if self.fault == "cache" and options.get("past_key_values") is not None:
            position_ids = position_ids - 1
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)
        if self.fault == "dropout":
            output.logits = torch.nn.functional.dropout(output.logits, 0.1, self.training)
        return output


@pytest.mark.parametrize(("fault", "sentence"), [
    ("padding", "a row in a padded batch otherwise than in the row alone"),
    ("cache", "with its cache otherwise than without"),
    ("dropout", None), (None, None)])
def test_padding_and_cache_are_tried_and_dropout_is_no_fault(fault, sentence):
    model = Wrong(fault).train()
    model.inner.transformer.h[0].attn.eval()
    if sentence is None:
        judge(model)
        assert model.training and model.inner.transformer.h[0].attn.training is False  # each as it was
    else:
        with pytest.raises(ValueError, match=sentence):
            judge(model)


def test_weights_that_have_diverged_are_not_the_model_s_wiring():
    policy = made("gpt2").eval()
    with torch.no_grad():
        policy.transformer.ln_f.weight.fill_(math.nan)
    judge(policy)


def test_the_trial_costs_little():
    policy = made("llama").eval()
    judge(policy)
    costs = []
    for _ in range(7):
        begun = time.process_time()
        judge(policy)
        costs.append(time.process_time() - begun)
    assert min(costs) < 0.05  # about 10 ms; what else the machine does is not the trial's


# Context.


def long_rows(path, words=100):
    rows = [{"prompt": "How do I reset my password? " * (words // 6) + "?" * number, "chosen": " Happy to help!",
             "rejected": " I can't help with that."} for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_the_tokenizer_of_a_loaded_model_carries_its_context_so_that_a_task_is_cut_to_it(tmp_path):
    unlimited = copy.deepcopy(TOKENIZER)
    unlimited.model_max_length = int(1e30)
    folder = tmp_path / "gpt2"
    made("gpt2").save_pretrained(folder)
    unlimited.save_pretrained(folder)
    policy, tokenizer = load_policy(folder, device="cpu")
    assert tokenizer.model_max_length == 64
    rows = long_rows(tmp_path / "rows.jsonl")
    task = file_task(tmp_path / "rows.jsonl", tokenizer, max_new_tokens=8)
    assert any("lost its beginning" in note for note in task.notes)
    assert max(len(ids) for ids in tokenizer(task.train_prompts)["input_ids"]) <= 56
    train_sft(policy, tokenizer, task.demonstrations(), SFTConfig(epochs=1))
    assert len(list(dpo(policy, tokenizer, task.preference_pairs(None, tokenizer), DPOConfig(epochs=1)))) > 0
    # rows that nobody cut
    with pytest.raises(ValueError, match="6 of 6 prompts do not fit .* context of 64 tokens"):
        next(dpo(policy, tokenizer, rows, DPOConfig(epochs=1)))
    with pytest.raises(ValueError, match="max_length is 64, and every row is longer"):
        train_sft(policy, tokenizer, [{"prompt": row["prompt"], "completion": " x"} for row in rows], SFTConfig())
    with pytest.raises(ValueError, match="max_length is 64, and every row is longer"):
        train_reward_model(reward_model_from(policy), tokenizer, rows, RewardConfig())
    with pytest.raises(ValueError, match="the reward model's context is 64"):
        RewardScorer(reward_model_from(policy), tokenizer)([rows[0]["prompt"]], [" x"])
    with pytest.raises(ValueError, match="do not fit .* context of 64 tokens"):
        PPOState.start(policy, tokenizer, len, [row["prompt"] for row in rows], PPOConfig(max_new_tokens=4))


@pytest.mark.parametrize(("name", "context"), [("gpt2", 64), ("gptj", 64), ("mpt", 64), ("llama", 64), ("bloom", None)])
def test_the_context_is_read_under_each_of_its_names(name, context):
    assert context_length(made(name)) == context


# Config, tokenizer, adapters, labels.


@pytest.mark.parametrize("switches", [{"use_cache": False}, {"return_dict": False}, {"output_hidden_states": True},
                                      {"output_router_logits": True}])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_switches_of_a_config_that_change_outputs_are_set_when_it_is_loaded(name, switches, tmp_path):
    folder = folder_of(made(name), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | switches))
    policy, _ = load_policy(folder, device="cpu")
    check_logprobs(policy)


def test_a_mixture_that_was_not_loaded_here_is_sampled_too():
    assert generate_texts(made("mixtral_router").eval(), TOKENIZER, PROMPTS, max_new_tokens=3, seed=0)


def test_a_tokenizer_with_tokens_that_the_model_has_no_rows_for_is_refused_and_not_saved(tmp_path):
    larger = copy.deepcopy(TOKENIZER)
    larger.add_special_tokens({"additional_special_tokens": ["[PAD]", "<|im_start|>"]})
    policy = made("llama")
    policy.save_pretrained(tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="the tokenizer does not fit the model"):
        load_policy(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match="the tokenizer does not fit the model"):
        save_model(policy, larger, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def adapter_on(base, folder):
    policy, _ = load_policy(base, device="cpu")
    adapted = add_lora(policy)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_alone_is_merged_into_its_base_and_beside_a_model_it_is_refused(tmp_path):
    base = folder_of(made("llama"), tmp_path / "base")
    adapted = adapter_on(base, tmp_path / "adapter")
    policy, _ = load_policy(tmp_path / "adapter", device="cpu")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(policy(ids).logits, adapted(ids).logits, atol=1e-5)
    assert all(weight.requires_grad for weight in policy.parameters())
    next(dpo(policy, TOKENIZER, PAIRS, DPOConfig(epochs=1)))
    with pytest.raises(AlignkitError, match="adapter, not a whole reward model"):
        load_reward_model(tmp_path / "adapter", device="cpu")
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(record | {"base_model_name_or_path": "somebody/model"}))
    with pytest.raises(AlignkitError, match="is an adapter on 'somebody/model', which is not a folder here"):
        load_policy(tmp_path / "adapter", device="cpu")
    adapted.save_pretrained(base)
    with pytest.raises(AlignkitError, match="has adapter_config.json beside a config.json.*merge"):
        load_policy(base, device="cpu")


def test_a_reward_model_with_several_labels_says_how_many_and_what_to_do(tmp_path):
    kind, options = MODELS["llama"]
    config = getattr(transformers, kind)(**options, **SPECIAL, id2label={0: "helpful", 1: "honest", 2: "kind"})
    model = AutoModelForSequenceClassification.from_config(config)
    folder = folder_of(model, tmp_path / "labels")
    with pytest.raises(ValueError, match=r"has 3 labels \(helpful, honest, kind\).*num_labels=1") as raised:
        load_reward(folder)
    assert len(str(raised.value)) < 500
    # what it says works
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"][1:2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    record["id2label"], record["label2id"] = {"0": "honest"}, {"honest": 0}
    (folder / "config.json").write_text(json.dumps(record))
    assert load_reward(folder)(PROMPTS, [" a", " b"]).shape == (2,)


@pytest.mark.parametrize(("kind", "auto", "load", "match"), [
    ("T5Config", "AutoModelForSeq2SeqLM", load_policy, "t5 models have no class that continues a text"),
    ("MambaConfig", "AutoModelForCausalLM", load_reward, "mamba models have no class that scores a text"),
    ("BertConfig", "AutoModelForSequenceClassification", load_reward, "no `score` head"),
])
def test_families_that_do_not_fit_are_named_in_one_sentence(kind, auto, load, match, tmp_path):
    options = {"T5Config": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
               "MambaConfig": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8},
               "BertConfig": USUAL | {"num_labels": 1}}[kind]
    model = getattr(transformers, auto).from_config(getattr(transformers, kind)(**options, **SPECIAL))
    with pytest.raises(ValueError, match=match) as raised:
        load(folder_of(model, tmp_path / "model"), device="cpu")
    assert len(str(raised.value)) < 500


# Rewards.


class Series:
    """A column of a table: it iterates over its values."""

    def __iter__(self):
        return iter([1.0, 2.0])


@pytest.mark.parametrize("returned", [
    [1, 2], (1.0, 2.0), [True, False], np.array([1, 2]), np.array([1.0, 2.0], dtype=object),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [torch.tensor(1.0), torch.tensor(2.0)], (x for x in (1.0, 2.0)),
    map(float, (1, 2)), Series(), [torch.tensor([1.0]), torch.tensor([2.0])], torch.ones(2, requires_grad=True)])
def test_scores_of_every_sensible_type_are_taken(returned):
    scores = as_scores(returned, 2)
    assert scores.shape == (2,) and scores.dtype == torch.float32


@pytest.mark.parametrize("returned", [
    None, [1.0, None], ["good", "bad"], "good", {"a": 1.0, "b": 2.0}, object(), [[1.0], [2.0, 3.0]], 1.0,
    np.array([1.0, None], dtype=object), torch.ones(2, 1), [1.0], lambda: 1, b"ab",
    (x for x in ("a", "b")), {1.0, 2.0}])
def test_scores_of_any_other_are_one_error_that_names_the_reward(returned):
    with pytest.raises(ValueError, match=r"^reward returned .*expected .* one score a response") as raised:
        as_scores(returned, 2)
    assert len(str(raised.value)) < 300


def chat_tokenizer(own: tuple[str, str], template: str = "{{ messages }}"):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(own)})
    tokenizer.chat_template = template
    return tokenizer


def test_a_reward_model_that_does_not_know_the_policy_s_turns_is_refused_and_another_template_is_warned_about():
    policy_s, other = chat_tokenizer(("<|im_start|>", "<|im_end|>")), chat_tokenizer(("<start>", "<end>"))
    scorer = RewardScorer(reward_model_from(made("llama")), other)
    prompts = [ChatText("<|im_start|>user\nHi<|im_end|>")]
    with pytest.raises(ValueError, match=re.escape("does not know '<|im_start|>'")):
        check_reward_reads(scorer, policy_s, prompts)
    scorer.tokenizer = chat_tokenizer(("<|im_start|>", "<|im_end|>"), "{{ other }}")
    with pytest.warns(UserWarning, match="another chat template"):
        check_reward_reads(scorer, policy_s, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_reward_reads(scorer, policy_s, ["plain text"])
        check_reward_reads(RewardScorer(scorer.model, policy_s), policy_s, prompts)
        check_reward_reads(len, policy_s, prompts)


def test_ppo_stops_at_its_start_if_the_reward_model_reads_other_tokens():
    policy = made("llama").eval()

    class Forgetful(RewardScorer):
        """It reads replies without their first word."""

        def ids(self, prompts, responses):
            return super().ids(prompts, [" Happy to help!" for _ in responses])

    config = PPOConfig(iterations=1, prompts_per_iteration=4, minibatch_size=4, max_new_tokens=4)
    for kind, fits in ((RewardScorer, True), (Forgetful, False)):
        state = PPOState.start(copy.deepcopy(policy), TOKENIZER, kind(reward_model_from(policy), TOKENIZER), PROMPTS,
                               config)
        if fits:
            next(ppo(state, config))
            continue
        before = copy.deepcopy(state.policy.state_dict())
        with pytest.raises(InvariantError, match="the reward model reads other tokens than the policy wrote"):
            next(ppo(state, config))
        assert all(torch.equal(before[name], weight) for name, weight in state.policy.state_dict().items())


def test_the_check_of_ids_sees_two_ends_and_a_lost_prompt():
    policy = made("llama").eval()
    scorer = RewardScorer(reward_model_from(policy), TOKENIZER)
    ids, mask = encode_prompts(TOKENIZER, PROMPTS)
    rollout = sample(policy, ids, mask, max_new_tokens=3, eos_token_id=2, pad_token_id=0, generator=seeded(0))
    rollout = to_device(rollout, "cpu")
    from alignkit.forward.rollout import decode_responses
    texts = decode_responses(TOKENIZER, rollout)
    check_reward_ids(rollout, TOKENIZER, scorer, PROMPTS, texts)
    rows = scorer.ids(PROMPTS, texts)
    assert rows[0][: int(mask[0].sum())] == full_ids(rollout)[0][0][: len(mask[0])][mask[0]].tolist()
    for wrong in (lambda row: row[1:], lambda row: [*row, 2], lambda row: row[:-1]):
        scorer.ids = lambda prompts, responses, wrong=wrong: [wrong(row) for row in rows]
        with pytest.raises(InvariantError):
            check_reward_ids(rollout, TOKENIZER, scorer, PROMPTS, texts)
