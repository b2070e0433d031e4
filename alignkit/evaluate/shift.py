"""Changes between checkpoints of one model on a few prompts: next-token probabilities, KL by position, and
responses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignkit.data.ends import end_ids
from alignkit.formulas.kl import exact_kl
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import masked_mean
from alignkit.forward.reading import response_logits
from alignkit.forward.rollout import decode_responses, encode_prompts
from alignkit.forward.sampling import sample


@dataclass(frozen=True, eq=False)
class Shift:
    """C checkpoints on P prompts. All values are computed when the object is made.

    names (C,), prompts (P,). tokens: per prompt, K texts, the next tokens that are likeliest in any checkpoint. chances
    [prompt][checkpoint]: their K probabilities. kl [prompt][checkpoint]: at each of T positions, the KL of its
    next-token distribution from the first checkpoint's, nats, mean over its own sampled responses; NaN if no response
    is that long. responses [prompt][checkpoint]: the sampled texts.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    chances: list[list[list[float]]]
    kl: list[list[list[float]]]
    responses: list[list[list[str]]]


@torch.no_grad()
def measure_shift(checkpoints: Sequence[tuple[str, torch.nn.Module]], tokenizer, prompts: Sequence[str], *,
                  max_new_tokens: int = 4, samples: int = 8, top: int = 10, seed: int = 0) -> Shift:
    """Read every checkpoint on every prompt; the first one is the reference.

    checkpoints: (name, policy), in the order of training; all share `tokenizer`. samples: responses per prompt, drawn
    with the same random numbers for all checkpoints. Raises ValueError if there are fewer than two checkpoints,
    repeated names, or no prompts.
    """
    names = tuple(name for name, _ in checkpoints)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"checkpoints are {list(names)}, expected at least two with names of their own")
    if not prompts:
        raise ValueError("prompts is empty, expected at least one")
    ids, mask = encode_prompts(tokenizer, [prompt for prompt in prompts for _ in range(samples)])
    first, likely, kl, responses = checkpoints[0][1], [], [], []
    for _, policy in checkpoints:
        rollout = sample(policy, ids, mask, max_new_tokens=max_new_tokens, eos_token_id=end_ids(tokenizer, policy),
                         pad_token_id=tokenizer.pad_token_id, generator=seeded(seed, 9))
        logits, ref_logits = response_logits(policy, rollout), response_logits(first, rollout)
        likely.append(logits[::samples, 0].float().softmax(-1))  # after the prompt alone: the same for all its samples
        there = rollout.response_mask
        mean = torch.where(there.view(len(prompts), samples, -1).any(1),
                           masked_mean(exact_kl(logits, ref_logits).view(len(prompts), samples, -1),
                                       there.view(len(prompts), samples, -1), 1), torch.nan)
        kl.append(torch.nn.functional.pad(mean, (0, max_new_tokens - mean.shape[1]), value=torch.nan).tolist())
        texts = decode_responses(tokenizer, rollout)
        responses.append([texts[i : i + samples] for i in range(0, len(texts), samples)])
    table = torch.stack(likely)  # (C, P, V)
    shown = table.amax(0).topk(min(top, table.shape[-1])).indices  # (P, K)
    chances = table.gather(2, shown.expand(len(names), -1, -1)).transpose(0, 1).tolist()
    tokens = tuple(tuple(tokenizer.decode([i]) for i in row) for row in shown.tolist())
    return Shift(names, tuple(prompts), tokens, chances, _by_prompt(kl), _by_prompt(responses))


def _by_prompt(of_checkpoints: list[list]) -> list[list]:
    return [list(each) for each in zip(*of_checkpoints, strict=True)]
