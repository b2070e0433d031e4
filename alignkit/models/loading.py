"""Load, make and save models: any Hugging Face causal LM, the tiny default, reward and value models, LoRA.

Only safetensors weights are read and written, and remote code is never run.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file

from alignkit.desk.tiny import desk_tokenizer, tiny_policy
from alignkit.errors import AlignkitError, ManifestError, NonFinite
from alignkit.folders import recover, replacing
from alignkit.models import gate
from alignkit.models.adapters import merged, with_adapter
from alignkit.models.fitness import context_length, judged, set_switches
from alignkit.models.heads import score_head
from alignkit.sources import local_path
from alignkit.storage import read_json, write_json

_KINDS = {AutoModelForCausalLM: "class that continues a text (…ForCausalLM)",
          AutoModelForSequenceClassification: "class that scores a text (…ForSequenceClassification)"}


def pick_device(device: str = "auto") -> torch.device:
    """The device for training: "auto" means a GPU if there is one, otherwise the CPU."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_policy(model: str | Path, *, seed: int = 0, device: str = "auto"):
    """A causal LM and its tokenizer: `(policy, tokenizer)`.

    model: "tiny" (a new desk-world model, initialised from `seed`), a local directory, or a Hub id. Dropout is off, the
    dtype is float32. If the tokenizer has no pad token, or uses EOS as pad, it gets a new pad token, so that EOS can be
    learned. Raises ValueError that says what to do if the model cannot be read safely.
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


def adapted_policy(folder: str | Path, *, device: str = "cpu"):
    """A policy with the LoRA adapter in `folder`, not merged, and its tokenizer: `(policy, tokenizer)`.

    The base model that the adapter names must be a local folder. Raises as `load_policy`.
    """
    folder = Path(folder)
    contents, base = _adapter(folder)
    policy, tokenizer = load_policy(base, device=device)
    try:
        with gate.confined(contents):
            adapted, expected = with_adapter(policy, folder)
    except (AlignkitError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ManifestError(f"the adapter in {folder} does not fit {base!r}: {gate.reason(error)}") from error
    if missing := sorted(expected - contents.tensors.keys()):  # peft would silently leave them at 0
        raise ManifestError(f"{contents.files[0]} has no {missing[0]!r}, which its {gate.ADAPTER} asks for",
                            [gate.ADAPTER_WEIGHTS])
    if (broken := gate.first_not_finite(gate.weights_of(adapted))) is not None:
        raise NonFinite(f"the adapter in {folder} has NaN or infinity in {broken!r} ({gate.ADAPTER_WEIGHTS})")
    return adapted, tokenizer


def check_model(model: str | Path, *, scored: bool = False) -> None:
    """Raise as `load_policy` does, as far as the model's records and file sizes show; no weight is read.

    scored: also check that a reward model can be made of it (`reward_model_from`): ManifestError if transformers has no
    sequence classifier for its architecture.
    """
    if str(model) == "tiny":
        return
    with _telling(model) as path:
        if path is not None and _is_adapter(path):
            check_model(_adapter(path)[1], scored=scored)
            return
        contents = _passed(str(model), path)
        with gate.confined(contents) if contents else contextlib.nullcontext():
            config = _config(AutoModelForCausalLM, str(path or model), {})
        scores = AutoModelForSequenceClassification._model_mapping
        if scored and type(config) not in scores and type(config.get_text_config()) not in scores:
            raise ManifestError(f"model {str(model)!r} cannot become a reward model: {config.model_type} models have "
                                "no class that scores a text (…ForSequenceClassification) in transformers; use another "
                                "architecture, or run notebook 03b without 02, with a function as reward (-p "
                                "reward=module:function)", ["config.json"])


def save_model(model: nn.Module, tokenizer, directory: str | Path) -> Path:
    """Write a model (adapter merged) and its tokenizer as an ordinary Hugging Face folder, atomically.

    Another model in `directory` is replaced; the records of its stage are kept. A saved model can always be loaded:
    raises NonFinite on weights with NaN or infinity, ValueError on a tokenizer that does not fit, ManifestError on a
    model that the gate would refuse (such as a quantised one). `directory` is then unchanged.
    """
    model, directory = merged(model), Path(directory)
    if (name := gate.first_not_finite(gate.weights_of(model))) is not None:
        raise NonFinite(f"{name} has NaN or infinity in it, so the model is not saved to {directory}; what trained it "
                        "diverged (lower the learning rate), go back to its last checkpoint")
    gate.check_vocabulary(model, tokenizer)
    with replacing(directory, keep=lambda name: not gate.of_a_model(name)) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _drop_auto_map(new)
        try:
            gate.check_model_folder(new)
        except ManifestError as error:
            raise ManifestError(f"the model cannot be saved to {directory}, since it could not be loaded again: "
                                f"{str(error).replace(str(new), str(directory))}", error.files) from error
    return directory


def same_vocabulary(tokenizer, other) -> bool:
    """Whether two tokenizers give every token the same id, so that ids can be passed between their models."""
    return tokenizer is other or (other is not None and tokenizer.get_vocab() == other.get_vocab())


def _load(auto, model, **config_options):
    name = str(model)
    with _telling(model) as path:
        if path is not None and _is_adapter(path):
            return _merged_adapter(auto, path)
        contents = _passed(name, path)
        with gate.confined(contents) if contents else contextlib.nullcontext():
            loaded, tokenizer, report = _open(auto, str(path or name), config_options)
    labels = {key: shape for key, shape, _ in report["mismatched_keys"] if key == "score.weight" and shape[0] > 1}
    if labels and config_options:
        count, names = labels["score.weight"][0], contents.records["config.json"].get("id2label") if contents else None
        names = f" ({', '.join(map(str, names.values()))[:200]})" if isinstance(names, dict) else ""
        raise ValueError(f"model {name!r} has {count} labels{names}, a reward model says one number: keep one label's "
                         "row of score.weight and save it with num_labels=1, or give a function as the reward that "
                         "weighs the labels")
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:  # transformers would fill them with random numbers
        raise ValueError(
            f"model {name!r} has no weights of the right shape for {lacking[0]!r}{' and others' * (len(lacking) > 1)}; "
            f"expected a checkpoint that was saved as {type(loaded).__name__}"
        )
    if surplus := gate.left_over(loaded, report["unexpected_keys"]):
        raise ValueError(f"model {name!r} has weights that its config does not use ({surplus!r} and others); expected "
                         "as many layers as it was saved with")
    if (broken := gate.first_not_finite(gate.weights_of(loaded))) is not None:
        file = contents.tensors.get(broken, contents.files[0]).name if contents else "its weights"
        raise NonFinite(f"model {name!r} has NaN or infinity in {broken!r} ({file}); what trained it diverged, use an "
                        "earlier checkpoint")
    tokenizer.padding_side = "right"
    try:
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)
        if not empty:
            gate.check_vocabulary(loaded, tokenizer)
            _give_pad_token(loaded, tokenizer)
            tokenizer.decode(tokenizer(" a").input_ids)  # settings of the wrong type raise here
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"model {name!r} has a tokenizer that cannot be used: {gate.reason(error)}") from error
    if empty:
        raise ValueError(f"model {name!r} has no tokenizer files beside its weights; save its tokenizer to the same "
                         "folder")
    limit = context_length(loaded)
    if limit is not None:  # texts are truncated to the tokenizer's limit, so store the model's context there
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    for module in loaded.modules():  # dropout off: the policy that is scored must be the policy that sampled
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loaded.eval()
    if auto is AutoModelForCausalLM or hasattr(loaded, "score"):
        try:
            judged(loaded)
        except ValueError as error:
            raise ValueError(f"model {name!r} cannot be used: {error}") from error
    set_switches(loaded.config)
    return loaded, tokenizer


@contextlib.contextmanager
def _telling(model: str | Path) -> Iterator[Path | None]:
    """The folder that a model's name refers to, None for a Hub id; errors in the block name the model."""
    name, path = str(model), None
    expected = ("expected a folder with config.json, tokenizer files and *.safetensors, a Hub id that is cached or "
                "online, or 'tiny'")
    try:
        recover(Path(name).expanduser())
        path = local_path(model, "model", error=ManifestError)
        if path is None:
            expected = f"there is no such folder here, so it was taken for a Hub id; {expected}"
        yield path
    except ManifestError as error:
        if str(error).startswith(("model is ", f"model {name!r}")):
            raise
        raise ManifestError(f"model {name!r} could not be read: {error} ({expected})", error.files) from error
    except (AlignkitError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} needs code of its own (auto_map), which is never run; expected an architecture that "
                "transformers has"
            ) from error
        raise ValueError(f"model {name!r} could not be read: {gate.reason(error)} ({expected})") from error


def _passed(name: str, path: Path | None) -> gate.Contents | None:
    """The gate's result for a model folder; None for a Hub id whose records pass the gate."""
    if path is None:
        _check_hub_records(name)
        return None
    if not (path / "config.json").exists() and not (path / "config.json").is_symlink():
        raise ManifestError(f"model {name!r} has no config.json; expected a Hugging Face model folder, a Hub id or "
                            "'tiny'")
    return gate.check_model_folder(path)


def _config(auto, name: str, options: dict):
    """The config of a name that passed the gate; ValueError if transformers has no class of the kind `auto` for it."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    if type(config) not in auto._model_mapping:
        raise ValueError(f"{config.model_type} models have no {_KINDS[auto]} in transformers; expected another "
                         "architecture" + ("" if auto is AutoModelForCausalLM else ", or a function as the reward"))
    return config


def _open(auto, name: str, config_options: dict) -> tuple:
    """Open a name that passed the gate with transformers: model, tokenizer, and a report of missing weights."""
    config = _config(auto, name, config_options)
    gate.drop_attention(config)
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
    return loaded, tokenizer, report


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and not a whole model."""
    config = folder / "config.json"
    return not config.exists() and not config.is_symlink() and (folder / gate.ADAPTER).exists()


def _adapter(folder: Path) -> tuple[gate.Contents, str]:
    """The gate's result for an adapter, and the folder of the base model that it names."""
    contents = gate.check_model_folder(folder, adapter=True)
    base = contents.records[gate.ADAPTER].get("base_model_name_or_path") or ""
    if not isinstance(base, str) or not gate.is_folder(base):
        raise ManifestError(f"{folder} is an adapter on {str(base)[:200]!r}, which is not a folder here; pass the "
                            "adapted model as model=…, or merge it first (peft's merge_and_unload, then "
                            "save_pretrained)")
    return contents, base


def _merged_adapter(auto, folder: Path) -> tuple:
    """The base model of an adapter, with the adapter merged in, and its tokenizer; for policies only."""
    if auto is not AutoModelForCausalLM:
        raise ManifestError(f"model {str(folder)!r} is an adapter, not a whole reward model; merge it first (peft's "
                            "merge_and_unload, then save_pretrained)")
    adapted, tokenizer = adapted_policy(folder)
    return merged(adapted).eval().requires_grad_(True), tokenizer


def _check_hub_records(name: str) -> None:
    """The gate for a model of the Hub: its records are checked before its weights are read from the Hub's cache.

    OSError at the first record if the Hub cannot be reached and nothing is cached; each attempt takes half a minute.
    """
    try:
        cached_file(name, "config.json")
    except OSError as error:
        if "connect" in str(error):
            raise
    for record in ("config.json", "tokenizer_config.json", gate.INDEX, gate.ADAPTER):
        file = cached_file(name, record, _raise_exceptions_for_missing_entries=False)
        if file and record == gate.ADAPTER:
            raise ManifestError(f"model {name!r} is an adapter; expected a whole model (merge it first)")
        if file:
            gate.check_record(read_json(file, error=ManifestError), Path(file), code=False)


def _drop_auto_map(folder: Path) -> None:
    """Remove `auto_map` from a Hub model that came with code but for which transformers now has its own code."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            record = read_json(folder / name, error=ManifestError)
            if record.pop("auto_map", None) is not None:
                write_json(folder / name, record)


def _give_pad_token(model: nn.Module, tokenizer) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a response could never end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = [number for number in (model.config.pad_token_id, tokenizer.unk_token_id)
                 if number is not None and number != tokenizer.eos_token_id]
        if spare:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
        else:  # a new row, the mean of all others, has an average logit and is almost never sampled
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
