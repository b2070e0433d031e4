"""Load, make and save models: any Hugging Face causal LM, the tiny default, reward and value models, LoRA.

Weights are read from and written to safetensors only, and remote code is never run.
"""

import contextlib
import copy
import functools
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PhiConfig,
    PhiForCausalLM,
    PhiForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit import fast
from alignkit.world import desk_tokenizer, phrase_ids

NEVER = -1e4  # a logit that no other can be smaller than: its softmax is exactly 0 in every dtype


def pick_device(device: str = "auto") -> torch.device:
    """The device to train on: "auto" is a GPU where there is one, otherwise the CPU."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: str = "fp32"):
    """The one rule of precision that sampling, scoring and training share.

    bf16 autocast on a GPU; on a CPU if precision is "bf16", otherwise what is on already.
    """
    kind = torch.device(device).type
    if kind == "cuda" or (kind == "cpu" and precision == "bf16"):
        return torch.autocast(kind, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def checkpointed(model: nn.Module, wanted: bool = True):
    """In it, if `wanted`, the model's layers keep their inputs alone and are computed again in the backward pass.

    The layers that transformers would checkpoint are, but in any mode: train mode would switch dropout on.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)] if wanted else []
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def load_policy(model: str | Path, *, seed: int = 0, device: str = "auto"):
    """A causal LM and its tokenizer: `(policy, tokenizer)`.

    model: "tiny" (a fresh desk-world model, seeded by `seed`), a local directory, or a Hub id. Dropout is off, the
    dtype is float32. A tokenizer whose pad token is missing or is its EOS gets another one, so that EOS can be learned.
    Raises ValueError that says what to do if the model cannot be read safely.
    """
    if str(model) == "tiny":
        tokenizer = desk_tokenizer()
        return tiny_policy(tokenizer, seed=seed).to(pick_device(device)), tokenizer
    policy, tokenizer = _load(AutoModelForCausalLM, model)
    return policy.to(pick_device(device)), tokenizer


def load_reward_model(model: str | Path, *, device: str = "auto"):
    """A sequence classifier with one output, its tokenizer: `(reward_model, tokenizer)`. Raises as `load_policy`."""
    reward_model, tokenizer = _load(AutoModelForSequenceClassification, model, num_labels=1)
    _score_head(reward_model)
    return reward_model.to(pick_device(device)).eval(), tokenizer


def tiny_policy(tokenizer, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> PhiForCausalLM:
    """The desk world's policy: an ordinary Phi of about 100k parameters that can say eleven phrases and EOS.

    The head has a bias (that is why it is a Phi): −1e4 at every other token, so that their probability is exactly 0
    and, since they are never a label, stays 0. So all responses can be enumerated and their probabilities sum to 1.
    """
    with _seeded(seed):
        policy = PhiForCausalLM(_tiny_config(tokenizer, hidden, layers))
    allowed = [*phrase_ids(tokenizer), tokenizer.eos_token_id]
    with torch.no_grad():
        policy.lm_head.bias.fill_(NEVER)
        policy.lm_head.bias[allowed] = 0.0
    return policy.eval()


def tiny_reward_model(tokenizer, *, hidden: int = 32, layers: int = 1, seed: int = 0) -> PhiForSequenceClassification:
    """A fresh small reward model for the desk world; `hidden` and `layers` are its size."""
    config = _tiny_config(tokenizer, hidden, layers)
    config.num_labels = 1
    with _seeded(seed):
        return PhiForSequenceClassification(config).eval()


def reward_model_from(policy: nn.Module, seed: int = 0) -> nn.Module:
    """A sequence classifier with the policy's body and a new linear head of standard deviation 1/√(hidden + 1)."""
    policy = merged(policy)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with _seeded(seed):
        reward_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    body(reward_model).load_state_dict(body(policy).state_dict())
    head = _score_head(reward_model)
    with _seeded(seed), torch.no_grad():
        head.weight.normal_(0, (head.in_features + 1) ** -0.5)
    return reward_model.to(policy.device).eval()


def value_model_from(model: nn.Module) -> nn.Module:
    """A critic: a copy of a reward model, or, if `model` is a policy, its body with a head that is 0."""
    if hasattr(model, "score"):
        return copy.deepcopy(model).requires_grad_(True)
    critic = reward_model_from(model)
    with torch.no_grad():
        _score_head(critic).weight.zero_()
    return critic


class SharedCritic(nn.Module):
    """A critic that is a value head, 0 at first, on the policy's own body. Its parameters are the head's alone.

    `token_values` reads it as any other critic, with a forward pass of its own.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: nn.Module):
        super().__init__()
        self._policy = [policy]  # in a list, so that its parameters are not this module's
        self.score = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False, device=policy.device,
                               dtype=policy.dtype)
        nn.init.zeros_(self.score.weight)

    @property
    def policy(self) -> nn.Module:
        return self._policy[0]

    @property
    def trunk(self) -> nn.Module:
        return body(self.policy.get_base_model() if _has_adapter(self.policy) else self.policy)


def token_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """What a sequence classifier's head says at each of the last `keep` positions: (B, keep), float32.

    At padding it means nothing.
    """
    head, reader = _score_head(model), fast.reader(model.policy if isinstance(model, SharedCritic) else model)
    if reader is not None:
        wanted = attention_mask.bool().clone()
        wanted[:, :-keep] = False
        hidden = reader(input_ids, attention_mask, wanted)
        with torch.autocast("cpu", enabled=False):
            return fast.spread(head(hidden), wanted[:, -keep:]).squeeze(-1).float()
    hidden = body(model)(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask),
                         use_cache=False).last_hidden_state
    return head(hidden[:, -keep:]).squeeze(-1).float()


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that count real tokens only, so that left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def distinct_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (N, P) of the prompts that are there, each once, and which of them each row (B,) is."""
    both, which = torch.unique(torch.cat([prompt_ids, prompt_mask.long()], 1), dim=0, return_inverse=True)
    ids, mask = both.chunk(2, 1)
    return ids, mask.bool(), which


def body(model: nn.Module) -> nn.Module:
    """The transformer without its head."""
    return getattr(model, model.base_model_prefix)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that no optimiser can change: merged if it has an adapter, in eval mode, without gradients."""
    return copy.deepcopy(merged(model)).eval().requires_grad_(False)


def add_lora(policy: nn.Module, *, rank: int = 8, alpha: int = 16, seed: int = 0) -> nn.Module:
    """`policy` with a fresh LoRA adapter on every linear layer (peft); only the adapter is trained."""
    from peft import LoraConfig, get_peft_model

    with _seeded(seed):
        return get_peft_model(
            policy, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        )


def merged(model: nn.Module) -> nn.Module:
    """The model itself, or, if it has an adapter, a copy with the adapter merged in."""
    return copy.deepcopy(model).merge_and_unload() if _has_adapter(model) else model


def reference_policy(policy: nn.Module) -> nn.Module:
    """The policy as it is now, to measure KL against.

    With an adapter that has not been trained yet the reference is the same model with the adapter switched off, which
    costs no memory; in every other case it is a frozen copy. (A trained adapter switched off would be the *base*, not
    this policy.)
    """
    if _has_adapter(policy) and all(
        (weight == 0).all() for name, weight in policy.named_parameters() if "lora_B" in name
    ):
        return AdapterOff(policy)
    return frozen_copy(policy)


class AdapterOff(nn.Module):
    """A PEFT model read with its adapter switched off."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self._policy = [policy]  # in a list, so that its parameters are not this module's
        self.config = policy.config

    @property
    def device(self) -> torch.device:
        return self._policy[0].device

    def get_base_model(self) -> nn.Module:
        return self._policy[0].get_base_model()

    def forward(self, *args, **kwargs):
        with torch.no_grad(), self._policy[0].disable_adapter():
            return self._policy[0](*args, **kwargs)


def save_model(model: nn.Module, tokenizer, directory: str | Path) -> Path:
    """Write a model (adapter merged) and its tokenizer as an ordinary Hugging Face folder, all or nothing.

    The folder is written under a temporary name and renamed; an older one is replaced only then.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.tmp-", dir=directory.parent))
    old = directory.with_name(f"{directory.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        merged(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in temporary.rglob("*"):  # safetensors writes 0600; a shared run folder must be readable
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        if directory.exists():
            for kept in directory.iterdir():  # a stage's metrics and results stay
                if not (temporary / kept.name).exists():
                    (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, temporary / kept.name)
            directory.rename(old)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return directory


def same_vocabulary(tokenizer, other) -> bool:
    """Whether two tokenizers give every token the same id, so that ids can be passed between their models."""
    return tokenizer is other or tokenizer.get_vocab() == other.get_vocab()


def _load(auto, model, **config_options):
    name = str(model)
    path = Path(name)
    if path.exists() and not (path / "config.json").exists():
        raise ValueError(f"model {name!r} has no config.json; expected a Hugging Face model folder, a Hub id or 'tiny'")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **config_options)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded, found = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model {name!r} could not be read: {str(error).splitlines()[0]} (expected a folder with config.json, "
            "tokenizer files and *.safetensors, a Hub id that is cached or online, or 'tiny')"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"model {name!r} needs code of its own (auto_map), which is never run; expected an architecture that "
            "transformers has"
        ) from error
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:  # transformers would fill them with random numbers
        raise ValueError(
            f"model {name!r} has no weights of the right shape for {lacking[0]!r}{' and others' * (len(lacking) > 1)}; "
            f"expected a checkpoint that was saved as {type(loaded).__name__}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"model {name!r} has no tokenizer files beside its weights; save its tokenizer to the same folder"
        )
    _give_pad_token(loaded, tokenizer)
    tokenizer.padding_side = "right"
    for module in loaded.modules():  # dropout off: the policy that is scored must be the policy that sampled
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded.eval(), tokenizer


def _give_pad_token(model: nn.Module, tokenizer) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a response could never end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [number for number in (model.config.pad_token_id, tokenizer.unk_token_id)
                 if number is not None and number != tokenizer.eos_token_id]
        if spare:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
        else:  # a new row, the mean of all others, so that its logit is an average one: about never sampled
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id


def _score_head(model: nn.Module) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(f"{type(model).__name__} has no `score` head with one output; expected a causal "
                         "…ForSequenceClassification model with num_labels=1")
    return head


def _has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def _tiny_config(tokenizer, hidden: int, layers: int) -> PhiConfig:
    return PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act="relu",
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@contextlib.contextmanager
def _seeded(seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
