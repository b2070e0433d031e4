"""Render conversations with a reward model's own chat template if it belongs to another family than the policy.

A policy's prompts are rendered by its chat template. A reward model of another family knows neither that template nor
its special tokens. Therefore its own template renders the messages, which a `ChatText` keeps.
"""

from collections.abc import Sequence

from alignkit.data.chat import chat_template_of, template_text
from alignkit.data.encoding import ChatText
from alignkit.data.ends import without_end
from alignkit.data.fields import _special_pattern, left_out_of
from alignkit.data.files import Fault


def written_by_another(tokenizer, prompt: str) -> bool:
    """Whether a prompt is a conversation with known messages that another template than `tokenizer`'s rendered.

    False if the tokenizer has no template that could render it.
    """
    if not isinstance(prompt, ChatText) or prompt.messages is None or not getattr(tokenizer, "chat_template", None):
        return False
    try:
        return template_text(tokenizer).strip() != (prompt.template or "").strip()
    except Fault:
        return False


def in_own_template(tokenizer, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts and responses; conversations rendered by another template are rendered with the tokenizer's own.

    A response is the text that the template writes for an assistant message after the prompt, without its end. It is
    kept unchanged if the template would drop a part of it, or would turn special tokens spelled out in it into real
    ones. Raises ValueError, naming the prompt, if the template refuses a conversation or drops its system prompt or its
    question.
    """
    prompts, responses = list(prompts), list(responses)
    places = [place for place, prompt in enumerate(prompts) if written_by_another(tokenizer, prompt)]
    if not places:
        return prompts, responses
    special, own = _special_pattern(tokenizer), template_text(tokenizer)
    chats = [(prompts[place].messages, [{"role": "assistant", "content": str(responses[place])}]) for place in places]
    for place, (messages, _), texts in zip(places, chats, chat_template_of(tokenizer).render(chats), strict=True):
        fault = texts.reason if isinstance(texts, Fault) else ""
        if not fault and (role := left_out_of(messages, texts[0])):
            fault = f"the chat template leaves out the {role} message"
        if fault:
            raise ValueError(f"the reward model cannot read prompt {place} in its own chat template: {fault}; set its "
                             "tokenizer's chat_template to one that writes it, or give a function as the reward")
        prompts[place] = ChatText(texts[0], messages, own)
        if responses[place].strip() in texts[1] and not special.search(responses[place]):
            responses[place] = ChatText(without_end(tokenizer, texts[1]))
    return prompts, responses
