"""Load, make and save models: any Hugging Face causal LM, the tiny default, reward and value models, LoRA.

Weights are read from and written to safetensors only, and remote code is never run.
"""

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from alignkit.desk.tiny import desk_tokenizer, tiny_policy
from alignkit.models.adapters import merged
from alignkit.models.heads import score_head


def pick_device(device: str = "auto") -> torch.device:
    """The device to train on: "auto" is a GPU where there is one, otherwise the CPU."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    score_head(reward_model)
    return reward_model.to(pick_device(device)).eval(), tokenizer


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
        loaded, report = auto.from_pretrained(
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
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
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
