"""The tokens that end a reply, for sampling, rendering, SFT, reward model, DPO and evaluation.

A model may have several ends: the tokenizer's EOS, those listed in its generation config, and the token that its chat
template writes after an assistant message. Sampling stops at any of them. Training and scoring append exactly one: the
template's end in a conversation, EOS after any other text.
"""

import weakref

from alignkit.data.chat import chat_template_of
from alignkit.data.encoding import ChatText, encode_text, special_ids
from alignkit.data.files import Fault
from alignkit.errors import DataError

_REPLY = "Certainly"
_ASKED = ([{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": _REPLY}])
_ends: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer -> (its chat template, the template's end)


def end_ids(tokenizer, policy=None) -> tuple[int, ...]:
    """The ids that end a reply of `policy`, without duplicates, the tokenizer's EOS first.

    If the generation config was derived from the model's config, which has a default EOS, only its special tokens
    count. Without a policy: EOS and the template's end.
    """
    generation = getattr(policy, "generation_config", None)
    listed = _listed(generation)
    if getattr(generation, "_from_model_config", False):
        known = special_ids(tokenizer)
        listed = [end for end in listed if end in known]
    ends = (tokenizer.eos_token_id, *listed, template_end(tokenizer))
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def list_ends(policy, tokenizer) -> None:
    """Add all ends to the policy's generation config, so that other software that serves the saved model stops there
    too."""
    generation, ends = getattr(policy, "generation_config", None), end_ids(tokenizer, policy)
    if generation is not None and not set(ends) <= set(_listed(generation)):
        generation.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def end_after(tokenizer, prompt: str) -> int:
    """The id that follows a reply to `prompt`: the template's end after a `ChatText`, otherwise EOS."""
    end = template_end(tokenizer) if isinstance(prompt, ChatText) else None
    return tokenizer.eos_token_id if end is None else end


def template_end(tokenizer) -> int | None:
    """The first dedicated token (special or added) that the chat template writes after an assistant message.

    None if there is no template, if it cannot be rendered, or if it writes no such token.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    if tokenizer not in _ends or _ends[tokenizer][0] != template:
        _ends[tokenizer] = template, _written_end(tokenizer)
    return _ends[tokenizer][1]


def without_end(tokenizer, reply: str) -> str:
    """A reply as a chat template wrote it, without the ends after it and the spaces after those."""
    end = template_end(tokenizer)
    ends = [tokenizer.eos_token, None if end is None else tokenizer.convert_ids_to_tokens(end)]
    reply = reply.rstrip()
    while end := next((end for end in ends if end and reply.rstrip().endswith(end)), None):
        reply = reply.rstrip().removesuffix(end)
    return reply


def _listed(generation) -> list[int]:
    ends = getattr(generation, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _written_end(tokenizer) -> int | None:
    system = [{"role": "system", "content": "Be brief."}]
    try:
        answers = chat_template_of(tokenizer).render([_ASKED, (system + _ASKED[0], _ASKED[1])])
    except (Fault, DataError):
        return None
    written = next((answer[1] for answer in answers if not isinstance(answer, Fault)), "")
    behind = ChatText(written.rpartition(_REPLY)[2])
    own = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    return next((token for token in encode_text(tokenizer, behind, add_special_tokens=False) if token in own), None)
