"""Models: the tiny one's support, folders that come back bit by bit, what is refused, LoRA's reference, critics."""

import copy
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alignkit import folders
from alignkit.configs import DPOConfig, PPOConfig, SFTConfig
from alignkit.desk.tiny import desk_tokenizer, phrase_ids, tiny_policy, tiny_reward_model
from alignkit.desk.world import SENTENCES, World
from alignkit.dpo import dpo
from alignkit.folders import MARK
from alignkit.formulas.kl import exact_kl
from alignkit.formulas.randomness import seeded
from alignkit.forward.reading import token_values
from alignkit.forward.rollout import encode_prompts, position_ids
from alignkit.forward.sampling import sample
from alignkit.models.adapters import AdapterOff, add_lora, frozen_copy, merged, reference_policy
from alignkit.models.heads import body, reward_model_from, value_model_from
from alignkit.models.loading import load_policy, load_reward_model, pick_device, same_vocabulary, save_model
from alignkit.ppo import PPOState, ppo
from alignkit.sft import train_sft

STORIES = Path(__file__).resolve().parents[1].parent / "shared/models/stories260K"
WORLD = World(0)
PROMPTS = [prompt.text for prompt in WORLD.train_prompts[:16]]
PAIRS = [{"prompt": text, "chosen": SENTENCES["CLARIFY"], "rejected": SENTENCES["UNSAFE"]} for text in PROMPTS]


@pytest.fixture(scope="module")
def tiny():
    """The tiny policy, on which nobody trains, and its tokenizer."""
    return load_policy("tiny", seed=1, device="cpu")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """The tiny policy as a folder; tests that change it take a copy."""
    return save_model(*tiny, tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of one's own with the tiny policy in it."""
    copied = tmp_path / "model"
    copied.mkdir()
    for file in saved.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


@torch.no_grad()
def next_logits(policy, tokenizer, prompts=PROMPTS):
    """Next-token logits after each prompt: (B, V)."""
    ids, mask = encode_prompts(tokenizer, prompts)
    return policy(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, -1]


def moved(policy, tokenizer, steps=3):
    """Train a little by DPO, in place."""
    for _ in dpo(policy, tokenizer, PAIRS, DPOConfig(epochs=steps, learning_rate=1e-2, warmup=0.0)):
        pass
    return policy


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The tiny model.


def test_the_tiny_policy_is_an_ordinary_small_model_of_its_seed(tiny):
    policy, tokenizer = tiny
    assert 50_000 < sum(p.numel() for p in policy.parameters()) < 150_000
    assert not policy.training and policy.dtype == torch.float32
    same, other = (load_policy("tiny", seed=seed, device="cpu")[0].state_dict() for seed in (1, 2))
    assert all(torch.equal(value, same[name]) for name, value in policy.state_dict().items())
    assert any(not torch.equal(value, other[name]) for name, value in policy.state_dict().items())
    assert policy.config.pad_token_id == tokenizer.pad_token_id != policy.config.eos_token_id == tokenizer.eos_token_id


def test_making_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    policy, tokenizer = load_policy("tiny", seed=3, device="cpu")
    reward_model_from(policy), tiny_reward_model(tokenizer), add_lora(policy)
    assert torch.equal(torch.get_rng_state(), state)


def support(policy, tokenizer):
    """Tokens with a probability above 0 after some prompts and after each sentence."""
    texts = PROMPTS + [PROMPTS[0] + sentence for sentence in SENTENCES.values()]
    return set((next_logits(policy, tokenizer, texts).softmax(-1) > 0).any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("trained_by", ["nothing", "sft", "dpo", "ppo", "lora"])
def test_the_support_is_eleven_sentences_and_eos_and_stays_so(trained_by):
    policy, tokenizer = load_policy("tiny", device="cpu")
    twelve = {*phrase_ids(tokenizer), tokenizer.eos_token_id}
    if trained_by == "sft":
        train_sft(policy, tokenizer, WORLD.demonstrations(64), SFTConfig(epochs=2, batch_size=16, learning_rate=2e-2))
    elif trained_by == "ppo":
        config = PPOConfig(iterations=2, prompts_per_iteration=32, epochs=4, learning_rate=2e-2, entropy_coef=1.0)
        list(ppo(PPOState.start(policy, tokenizer, lambda p, r: [float(len(x)) for x in r], PROMPTS, config), config))
    elif trained_by == "lora":
        policy = moved(add_lora(policy), tokenizer)
    elif trained_by == "dpo":
        moved(policy, tokenizer)
    assert len(twelve) == 12 and support(policy, tokenizer) == twelve
    others = [token for token in range(len(tokenizer)) if token not in twelve]
    assert (next_logits(policy, tokenizer).softmax(-1)[:, others] == 0).all()


def test_the_tiny_tokenizer_and_the_size_can_be_chosen():
    tokenizer = desk_tokenizer()
    small = tiny_policy(tokenizer, hidden=16, layers=1)
    assert small.config.hidden_size == 16 and small.config.num_hidden_layers == 1
    assert support(small, tokenizer) == {*phrase_ids(tokenizer), tokenizer.eos_token_id}


def test_a_device_is_picked():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# Folders.


def test_a_saved_model_comes_back_bit_by_bit(tiny, saved):
    policy, tokenizer = tiny
    again, its = load_policy(saved, device="cpu")
    before, after = policy.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(next_logits(policy, tokenizer), next_logits(again, its))
    assert same_vocabulary(tokenizer, its) and not again.training
    text = PROMPTS[0] + SENTENCES["POLITE"]
    assert its(text).input_ids == tokenizer(text).input_ids and its.decode(its(text).input_ids[1:]) == text
    plain = AutoModelForCausalLM.from_pretrained(saved)  # an ordinary Hugging Face folder
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.items())
    assert AutoTokenizer.from_pretrained(saved)(text).input_ids == tokenizer(text).input_ids


def test_a_folder_has_safetensors_only_and_can_be_read_by_others(tiny, tmp_path):
    mask = os.umask(0o027)
    try:
        made = save_model(*tiny, tmp_path / "deep" / "model")
    finally:
        os.umask(mask)
    names = {file.name for file in made.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja"}
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()} == {0o640}


def test_saving_again_replaces_the_weights_and_keeps_what_a_stage_wrote_beside_them(tiny, tmp_path):
    made = save_model(*tiny, tmp_path / "model")
    (made / "results.json").write_text("{}")
    (made / "more").mkdir()
    (made / "more" / "a.txt").write_text("a")
    other = load_policy("tiny", seed=9, device="cpu")
    save_model(*other, made)
    assert torch.equal(load_policy(made, device="cpu")[0].lm_head.weight, other[0].lm_head.weight)
    assert (made / "results.json").read_text() == "{}" and (made / "more" / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["weights", "tokenizer", "rename"])
def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(tiny, tmp_path, monkeypatch, fails):
    made = save_model(*tiny, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    policy, tokenizer = load_policy("tiny", seed=9, device="cpu")

    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    if fails == "weights":
        monkeypatch.setattr(policy, "save_pretrained", full_disk)
    elif fails == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", full_disk, raising=False)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename",
                            lambda self, to: full_disk() if f"{MARK}-new" in self.name else rename(self, to))
        monkeypatch.setattr(folders, "_swap", lambda one, other: False)  # as where the system cannot exchange two names
    with pytest.raises(OSError, match="No space left"):
        save_model(policy, tokenizer, made)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before


# What is refused.


class Canary:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "model.pt"])
@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_folder_with_only_a_pickle_is_refused_and_not_opened(folder, tmp_path, name, write):
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        write({"lm_head.weight": Canary(tmp_path / "canary")}, file)
    with pytest.raises(ValueError, match=r"could not be read: .*model.safetensors.* \(expected a folder with config"):
        load_policy(folder, device="cpu")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("model_type", ["phi", "mine"])
def test_code_in_a_folder_is_never_run(folder, tmp_path, model_type):
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_json(folder / "config.json", auto_map=classes, model_type=model_type)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Slow", "code.Fast"]})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n"
                                    "from transformers import PhiConfig as Config, PhiForCausalLM as Model\n")
    with pytest.raises(ValueError, match=r"points to model code of its own \(auto_map\), which is never run"):
        load_policy(folder, device="cpu")  # also where transformers has code of its own (phi)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name,message", [
    ("", "has no config.json; expected a Hugging Face model folder, a Hub id or 'tiny'"),
    ("no/such/folder/here", r"^model is 'no/such/folder/here', and there is no such file or folder"),
    ("nobody/nothing", r"model 'nobody/nothing' could not be read: .* \(there is no such folder here, so it was taken "
     r"for a Hub id; expected a folder with config.json, .* a Hub id that is cached or online, or 'tiny'\)"),
])
def test_a_model_that_is_not_there_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load_policy(name or tmp_path, device="cpu")


def broken(what, folder):
    weights = folder / "model.safetensors"
    if what == "torn":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "a missing layer":
        edit_json(folder / "config.json", num_hidden_layers=3)
    elif what == "another shape":
        edit_json(folder / "config.json", hidden_size=32)
    elif what == "config":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()


@pytest.mark.parametrize("what,message", [
    ("torn", "could not be read: .*not fully covered"), ("empty", "could not be read: .*header too small"),
    ("a missing layer", r"has no weights of the right shape for 'model.layers.2.*' and others; expected a checkpoint"),
    ("another shape", "has no weights of the right shape for 'lm_head.weight' and others"),
    ("config", "could not be read: .*config.json is not valid JSON"),
    ("tokenizer", "has no tokenizer files beside its weights"),
])
def test_a_broken_folder_is_refused_and_the_model_named(folder, what, message):
    broken(what, folder)
    with pytest.raises(ValueError, match=f"^model '{folder}' {message}"):
        load_policy(folder, device="cpu")


def test_a_policy_is_not_a_reward_model_nor_the_other_way_round(saved, tmp_path):
    """transformers would invent the missing head."""
    with pytest.raises(ValueError, match=r"for 'score.weight'; expected .* saved as PhiForSequenceClassification"):
        load_reward_model(saved, device="cpu")
    scorer = save_model(tiny_reward_model(desk_tokenizer()), desk_tokenizer(), tmp_path / "reward")
    assert load_reward_model(scorer, device="cpu")[0].score.out_features == 1
    with pytest.raises(ValueError, match="for 'lm_head.bias' and others; expected .* saved as PhiForCausalLM"):
        load_policy(scorer, device="cpu")


# Tokens that a model lacks.


def gpt2_folder(path, **special):
    """A tiny GPT-2 with words as tokens; `special` is what its tokenizer has of special tokens."""
    words = ["<|endoftext|>", "once", "upon", "a", "time", "there", "was", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
                                       eos_token_id=0))
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize("special", [
    {"eos_token": "<|endoftext|>"}, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}])
def test_a_model_whose_padding_is_missing_or_eos_gets_another(tmp_path, special):
    policy, tokenizer = load_policy(gpt2_folder(tmp_path, **special), device="cpu")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert policy.config.pad_token_id == tokenizer.pad_token_id and policy.config.eos_token_id == tokenizer.eos_token_id
    assert (tokenizer.pad_token == "<unk>") == ("unk_token" in special)  # a token that is there before a new one
    assert policy.get_input_embeddings().num_embeddings == policy.lm_head.out_features == len(tokenizer)
    ids, mask = encode_prompts(tokenizer, ["once upon a time", "there"])
    rollout = sample(policy, ids, mask, max_new_tokens=5, eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id, generator=seeded(0))
    assert rollout.response_mask.any(1).all()
    again, its = load_policy(save_model(policy, tokenizer, tmp_path / "again"), device="cpu")
    assert its.pad_token_id == tokenizer.pad_token_id and same_vocabulary(tokenizer, its)
    assert torch.equal(next_logits(policy, tokenizer, ["once"]), next_logits(again, its, ["once"]))


def test_without_eos_a_response_could_never_end(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has no EOS token, so a response could never end"):
        load_policy(gpt2_folder(tmp_path, unk_token="<unk>"), device="cpu")


def test_dropout_is_off(tmp_path):
    """GPT-2 has it on by default; then π / π_old would not be 1 at the first step."""
    policy = load_policy(gpt2_folder(tmp_path, eos_token="<|endoftext|>"), device="cpu")[0].train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(policy(input_ids=ids).logits, policy(input_ids=ids).logits)


@pytest.mark.shared
def test_a_real_llama_loads_in_float32_with_padding_of_its_own():
    policy, tokenizer = load_policy(STORIES, device="cpu")
    assert policy.dtype == torch.float32 and tokenizer.padding_side == "right"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert float(next_logits(policy, tokenizer, ["Once upon a"]).softmax(-1).max()) > 0.5  # it knows how stories begin


# LoRA and the reference.


def test_a_fresh_adapter_s_reference_is_the_base_and_stays_it(tiny):
    base, tokenizer = tiny
    policy = add_lora(copy.deepcopy(base))
    assert torch.allclose(next_logits(policy, tokenizer), next_logits(base, tokenizer), atol=1e-6)
    reference = reference_policy(policy)
    assert isinstance(reference, AdapterOff) and not list(reference.parameters())
    moved(policy, tokenizer)
    assert float(exact_kl(next_logits(policy, tokenizer), next_logits(base, tokenizer)).mean()) > 0.01
    assert torch.allclose(next_logits(reference, tokenizer), next_logits(base, tokenizer), atol=1e-6)


def test_a_trained_adapter_s_reference_is_the_policy_of_that_moment_not_the_base(tiny):
    base, tokenizer = tiny
    policy = moved(add_lora(copy.deepcopy(base)), tokenizer)
    then = next_logits(policy, tokenizer)
    reference = reference_policy(policy)
    assert not isinstance(reference, AdapterOff)
    moved(policy, tokenizer)
    assert torch.allclose(next_logits(reference, tokenizer), then, atol=1e-5)
    for other in (policy, base):
        assert float(exact_kl(next_logits(other, tokenizer), then).mean()) > 0.01


def test_only_the_adapter_is_trained(tiny):
    base, tokenizer = tiny
    policy = add_lora(copy.deepcopy(base), rank=2)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    moved(policy, tokenizer)
    changed = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_merging_makes_a_model_of_its_own_and_leaves_the_adapter(tiny, tmp_path):
    base, tokenizer = tiny
    policy = moved(add_lora(copy.deepcopy(base)), tokenizer)
    logits, before = next_logits(policy, tokenizer), {name: value.clone() for name, value in policy.named_parameters()}
    plain = merged(policy)
    assert torch.allclose(next_logits(plain, tokenizer), logits, atol=1e-5)
    assert not any("lora" in name for name, _ in plain.named_parameters()) and type(plain) is type(base)
    assert before.keys() == dict(policy.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.named_parameters())
    again, its = load_policy(save_model(policy, tokenizer, tmp_path / "merged"), device="cpu")
    assert torch.allclose(next_logits(again, its), logits, atol=1e-5)
    assert merged(base) is base


def test_a_frozen_copy_shares_nothing_and_cannot_be_trained(tiny):
    policy, tokenizer = copy.deepcopy(tiny[0]).train(), tiny[1]
    frozen = frozen_copy(policy)
    before = next_logits(frozen, tokenizer)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in policy.parameters()) and policy.training
    moved(policy, tokenizer)
    assert torch.equal(next_logits(frozen, tokenizer), before)


# Reward and value models.


def test_a_reward_model_starts_from_the_policy_s_body_with_a_head_of_its_own(tiny):
    policy, tokenizer = tiny
    model, other = reward_model_from(policy, seed=1), reward_model_from(policy, seed=2)
    for name, value in body(policy).state_dict().items():
        assert torch.equal(value, body(model).state_dict()[name])
    assert not torch.equal(model.score.weight, other.score.weight)
    assert float(model.score.weight.detach().std()) == pytest.approx((64 + 1) ** -0.5, rel=0.3)
    assert body(model).embed_tokens.weight.data_ptr() != body(policy).embed_tokens.weight.data_ptr()
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id and not model.training


def test_a_reward_model_of_a_policy_with_an_adapter_has_the_adapter_in_it(tiny):
    policy = moved(add_lora(copy.deepcopy(tiny[0])), tiny[1])
    weight = body(reward_model_from(policy)).layers[0].mlp.fc1.weight
    assert torch.equal(weight, merged(policy).model.layers[0].mlp.fc1.weight)
    assert not torch.equal(weight, tiny[0].model.layers[0].mlp.fc1.weight)


def test_a_critic_is_a_copy_of_the_reward_model_or_starts_at_0(tiny):
    policy, tokenizer = tiny
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    reward_model = tiny_reward_model(tokenizer).requires_grad_(False)
    critic = value_model_from(reward_model)
    assert torch.allclose(token_values(critic, ids, mask, 3), token_values(reward_model, ids, mask, 3), atol=1e-6)
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in reward_model.parameters())
    assert critic.score.weight.data_ptr() != reward_model.score.weight.data_ptr()
    assert (token_values(value_model_from(policy), ids, mask, 3) == 0).all()


@torch.no_grad()
def test_token_values_are_the_head_at_each_position_whatever_the_padding(tiny):
    model, tokenizer = tiny_reward_model(tiny[1], seed=4).double(), tiny[1]
    ids, mask = encode_prompts(tokenizer, [PROMPTS[0], PROMPTS[1] + PROMPTS[2]])
    assert not mask.all(), "the prompts should need padding"
    values = token_values(model, ids, mask, 4)
    assert values.shape == (2, 4) and values.dtype == torch.float32
    for row in range(2):
        hidden = body(model)(input_ids=ids[row][mask[row]][None]).last_hidden_state
        assert torch.allclose(values[row].double(), model.score(hidden)[0, -4:, 0], atol=1e-6)


def test_a_model_without_a_score_head_of_one_output_is_refused(tiny):
    wrong = tiny_reward_model(tiny[1])
    wrong.score = torch.nn.Linear(32, 2)
    for model in (tiny[0], wrong):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no `score` head with one output; expected"):
            token_values(model, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), 1)


def test_vocabularies_are_compared_by_their_ids():
    one, other = desk_tokenizer(), desk_tokenizer()
    assert same_vocabulary(one, other)
    other.add_tokens(["more"])
    assert not same_vocabulary(one, other)


def test_positions_count_real_tokens():
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
