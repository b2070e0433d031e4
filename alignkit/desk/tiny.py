"""The desk world's tokenizer and tiny models, made in memory in milliseconds."""

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    PhiForSequenceClassification,
    PreTrainedTokenizerFast,
)

from alignkit.desk.world import (
    CONTEXTS,
    DUAL_VERBS,
    ORDINARY_OBJECTS,
    ORDINARY_VERBS,
    PEOPLE_AND_PLACES,
    SAFE_TARGETS,
    SENTENCES,
    TEMPLATES,
)
from alignkit.formulas.randomness import seeded_weights

NEVER = -1e4  # far below every other logit: its softmax is exactly 0 in every dtype


def tiny_policy(tokenizer, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> PhiForCausalLM:
    """The desk world's policy: an ordinary Phi model of about 100k parameters that generates eleven phrases and EOS.

    Its head has a bias (the reason for choosing Phi) of −1e4 at every other token. The probability of these tokens is
    exactly 0 and stays 0, because they are never a label. So all responses can be enumerated and their probabilities
    sum to 1.
    """
    with seeded_weights(seed):
        policy = PhiForCausalLM(_tiny_config(tokenizer, hidden, layers))
    allowed = [*phrase_ids(tokenizer), tokenizer.eos_token_id]
    with torch.no_grad():
        policy.lm_head.bias.fill_(NEVER)
        policy.lm_head.bias[allowed] = 0.0
    return policy.eval()


def tiny_reward_model(tokenizer, *, hidden: int = 32, layers: int = 1, seed: int = 0) -> PhiForSequenceClassification:
    """A new, untrained reward model for the desk world; `hidden` and `layers` set its size."""
    config = _tiny_config(tokenizer, hidden, layers)
    config.num_labels = 1
    with seeded_weights(seed):
        return PhiForSequenceClassification(config).eval()


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


def desk_tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face fast tokenizer: every sentence of a response, and every part of a prompt template, is one token.

    "How do I| fix| my phone| from work|?": with `<bos>` every prompt has six tokens, which makes the desk world fast.
    decode(encode(text)) == text for every text of the desk world; other words become `<unk>`. Pad, bos, eos and unk are
    four different tokens.
    """
    slots = [
        f" {word}"
        for word in ORDINARY_VERBS + DUAL_VERBS + ORDINARY_OBJECTS + SAFE_TARGETS + PEOPLE_AND_PLACES + CONTEXTS
    ]
    frame = [part for text in TEMPLATES for part in text.split(" {verb} {object} {context}")]
    tokens = [*SENTENCES.values(), *dict.fromkeys(frame), *slots]
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + r"| ?[^\s.,?!]+|."
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", model_max_length=64, clean_up_tokenization_spaces=False)


def phrase_ids(tokenizer) -> list[int]:
    """Token ids of the eleven phrases, in the order of PHRASES. Raises ValueError if `tokenizer` is not the desk
    world's."""
    ids = [tokenizer.convert_tokens_to_ids(sentence) for sentence in SENTENCES.values()]
    if any(token is None or token == tokenizer.unk_token_id for token in ids):
        raise ValueError("tokenizer does not have the desk world's sentences as tokens; use desk_tokenizer()")
    return ids
