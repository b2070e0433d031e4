"""Sample responses to choose between, and mark the words in which two differ."""

import difflib
import re
from collections.abc import Mapping, Sequence

from alignkit.forward.sampling import generate_texts
from alignkit.models.loading import load_policy


def sample_pairs(policy, tokenizer, prompts: Sequence[str], *, max_new_tokens: int, seed: int = 0,
                 temperature: float = 1.0, tries: int = 8) -> list[dict]:
    """Rows {"prompt", "a", "b"}: two different responses of a policy to each prompt.

    Equal and empty responses are drawn again, at most `tries` times; a prompt without two different responses is
    skipped.
    """
    differing: dict[int, dict] = {}
    for attempt in range(tries):
        left = [place for place in range(len(prompts)) if place not in differing]
        drawn = generate_texts(policy, tokenizer, [prompts[place] for place in left], max_new_tokens=max_new_tokens,
                               samples=2, seed=seed + 7919 * attempt, temperature=temperature) if left else []
        for place, (a, b) in zip(left, drawn, strict=True):
            if a.strip() != b.strip() and a.strip() and b.strip():
                differing[place] = {"prompt": prompts[place], "a": a, "b": b}
    return [differing[place] for place in sorted(differing)]


def sample_side_by_side(checkpoints: Mapping[str, object], prompts: Sequence[str], *, max_new_tokens: int,
                        seed: int = 0, temperature: float = 1.0, world=None) -> list[dict]:
    """Rows {"prompt", "responses": {checkpoint: text}, "notes": {checkpoint: behaviour}} with the same prompts and
    seed.

    checkpoints: name -> a folder, a Hub id, or (policy, tokenizer); folders are loaded one at a time. world: the desk
    world, which classifies the behaviour of each response; without it there are no notes.
    """
    responses, notes = {}, {}
    for name, checkpoint in checkpoints.items():
        policy, tokenizer = checkpoint if isinstance(checkpoint, tuple) else load_policy(checkpoint)
        drawn = generate_texts(policy, tokenizer, list(prompts), max_new_tokens=max_new_tokens, seed=seed,
                               temperature=temperature)
        responses[name] = [texts[0] for texts in drawn]
        notes[name] = world.behaviours(list(prompts), responses[name]) if world is not None else None
    return [{"prompt": prompt, "responses": {name: responses[name][place] for name in responses},
             "notes": {name: notes[name][place] for name in responses if notes[name]}}
            for place, prompt in enumerate(prompts)]


def word_differences(texts: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """Each text as pieces (piece, differs) whose concatenation is the text; a word differs if another text lacks it
    there.

    Words include the space before them, which is not compared. Words are aligned by Python's `difflib`, text by text.
    """
    words = [re.findall(r"\s*\S+|\s+$", text) for text in texts]
    pieces = []
    for line_words in words:
        common = [True] * len(line_words)
        for other in words:
            same = [False] * len(line_words)
            bare = [[word.strip() for word in line] for line in (line_words, other)]
            for start, _, size in difflib.SequenceMatcher(None, *bare, autojunk=False).get_matching_blocks():
                same[start : start + size] = [True] * size
            common = [a and b for a, b in zip(common, same, strict=True)]
        joined: list[tuple[str, bool]] = []
        for word, kept in zip(line_words, common, strict=True):
            if joined and joined[-1][1] is not kept:
                joined[-1] = (joined[-1][0] + word, not kept)
            else:
                joined.append((word, not kept))
        pieces.append(joined)
    return pieces
