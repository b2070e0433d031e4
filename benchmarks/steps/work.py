"""The workload of the benchmark: model, data, sizes, and what is timed."""

import copy
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import tokenizers
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignkit.data.encoding import encode_pairs
from alignkit.formulas.randomness import seeded
from alignkit.models.heads import reward_model_from

TOLERANCE = 1e-4
BETA = 0.1
PROCESSES = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
PATIENCE = 180  # seconds that one measurement of memory may take


def clock() -> float:
    """Seconds: on one thread CPU time of this process, which other work hardly changes; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Different(RuntimeError):
    """Two sides of a row do not compute the same thing."""


@dataclass(frozen=True)
class Sizes:
    """The model, a tied Llama, and the work.

    prompt_tokens: of the longest prompt; they are ragged down to half. new_tokens: of every response. pairs: rows of a
    DPO, SFT and reward-model step. epochs, minibatches: of a PPO iteration.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 344
    vocabulary: int = 1024
    prompts: int = 128
    prompt_tokens: int = 24
    new_tokens: int = 32
    pairs: int = 32
    epochs: int = 4
    minibatches: int = 4


QUICK = Sizes(
    hidden=32,
    layers=2,
    heads=2,
    intermediate=64,
    vocabulary=64,
    prompts=8,
    prompt_tokens=6,
    new_tokens=5,
    pairs=4,
    epochs=2,
    minibatches=2,
)


class Work:
    """What all sides start from: tokenizer, models, texts. Sides copy the models before they train them.

    precision: of alignkit's best settings. policy, ref: two different policies, so that nothing that should be
    compared is 0. sampling_policy, sampling_ref: the same weights with a head that can say no special token, so
    that every response has full length.
    """

    def __init__(self, sizes: Sizes, seed: int = 0, precision: str = "fp32"):
        self.sizes, self.precision = sizes, precision
        self.tokenizer = word_tokenizer(sizes.vocabulary)
        self.policy, self.ref = (tied_llama(sizes, self.tokenizer, seed=seed + number) for number in (0, 1))
        self.sampling_policy, self.sampling_ref = (
            without_specials(model, self.tokenizer) for model in (self.policy, self.ref)
        )
        self.reward_model = reward_model_from(self.ref, seed)
        generator = seeded(seed, sizes.prompts)
        shortest = sizes.prompt_tokens // 2
        lengths = [
            sizes.prompt_tokens - number % (sizes.prompt_tokens - shortest + 1) for number in range(sizes.prompts)
        ]
        self.prompts = [self._text(length, generator) for length in lengths]
        self.pairs = [
            {
                "prompt": prompt,
                "chosen": self._text(sizes.new_tokens - 1, generator),
                "rejected": self._text(sizes.new_tokens - 1, generator),
            }
            for prompt in self.prompts[: sizes.pairs]
        ]
        self.demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in self.pairs]

    def _text(self, tokens: int, generator: torch.Generator) -> str:
        return "".join(
            f" w{number}" for number in torch.randint(3, self.sizes.vocabulary, (tokens,), generator=generator).tolist()
        )

    def encoded(self, side: str) -> list[list[int]]:
        """Token ids of prompt, response ("chosen" or "rejected") and EOS, a list a row."""
        pairs, _ = encode_pairs(
            self.tokenizer, [row["prompt"] for row in self.pairs], [row[side] for row in self.pairs]
        )
        return [[*prompt, *response, self.tokenizer.eos_token_id] for prompt, response in pairs]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` tokens: pad, EOS, unk, and words " w3", " w4" … that are one token each."""
    tokens = ["<pad>", "<eos>", "<unk>", *(f" w{number}" for number in range(3, vocabulary))]
    fast = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" w\d+"), behavior="isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tied_llama(sizes: Sizes, tokenizer, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2 * (sizes.prompt_tokens + sizes.new_tokens),
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def without_specials(policy: LlamaForCausalLM, tokenizer) -> LlamaForCausalLM:
    """A copy whose head has a fixed bias of −1e4 at pad, EOS and unk: what it samples always has full length."""
    policy = copy.deepcopy(policy)
    head = nn.Linear(policy.config.hidden_size, policy.config.vocab_size)
    head.weight = policy.get_input_embeddings().weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[tokenizer.all_special_ids] = -1e4
    head.bias.requires_grad_(False)
    policy.lm_head = head
    return policy


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet():
    """Without progress bars, and without the warnings that a loop would repeat hundreds of times."""
    level, bars = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _timed(function: Callable, spent: dict[str, float], name: str) -> Callable:
    def timed(*arguments, **options):
        start = clock()
        result = function(*arguments, **options)
        spent[name] += clock() - start
        return result

    return timed
