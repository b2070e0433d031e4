"""What a step costs at least: multiplications, and the rate at which this machine makes them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.steps.work import Work, clock


# the machine's limit
@dataclass(frozen=True)
class Cost:
    """The least that a row must do. tokens: what tokens/s counts. phases: (FLOPs, bytes) of parts in sequence."""

    tokens: int
    phases: tuple[tuple[float, float], ...]

    def limit(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds at the measured matmul rate and bandwidth, whichever takes longer in each phase."""
        return sum(max(flops / flops_per_second, moved / bytes_per_second) for flops, moved in self.phases)


def costs(work: Work, shared_trunk: bool = False) -> dict[str, Cost]:
    """Each row's cost: 2 FLOPs a weight and token forward, 6 with backward.

    A critic that shares the policy's trunk costs nothing of its own.

    Padding is not counted, and the head only where a token is scored. Attention's own FLOPs, activations and everything
    elementwise are left out. Decoding reads all weights and the KV cache at every token; an optimiser step reads or
    writes 7 numbers a weight.
    """
    sizes = work.sizes
    head = sizes.vocabulary * sizes.hidden
    body = sum(parameter.numel() for parameter in work.policy.parameters()) - head
    kv_bytes = 2 * sizes.layers * sizes.hidden * 4  # a token
    prompt, new, batch = sum(text.count(" w") for text in work.prompts), sizes.new_tokens, sizes.prompts
    whole = prompt + batch * new
    policy, value = 2 * (body * whole + head * batch * new), 0 if shared_trunk else 2 * body * whole
    decode = tuple(
        (2 * (body + head) * batch, 4 * (body + head) + kv_bytes * (prompt + batch * step)) for step in range(1, new)
    )
    rollout = ((2 * (body * prompt + head * batch), 4 * (body + head)), *decode)
    scoring = ((2 * policy + value + 2 * body * (whole + batch), 4 * ((3 if shared_trunk else 4) * body + 2 * head)),)
    moved = 7 * 4 * ((1 if shared_trunk else 2) * body + head)
    update = ((sizes.epochs * 3 * (policy + value), sizes.epochs * sizes.minibatches * moved),)
    rows = sum(text["prompt"].count(" w") for text in work.pairs) + sizes.pairs * new
    forward = 2 * (body * rows + head * sizes.pairs * new)  # of one side of the pairs
    step = 7 * 4 * (body + head)
    return {
        "rollout": Cost(batch * new, rollout),
        "scoring": Cost(whole, scoring),
        "update": Cost(sizes.epochs * whole, update),
        "iteration": Cost(batch * new, rollout + scoring + update),
        "dpo": Cost(2 * rows, ((8 * forward, step),)),
        "dpo_precomputed": Cost(2 * rows, ((6 * forward, step),)),
        "sft": Cost(rows, ((3 * forward, step),)),
        "reward": Cost(2 * rows, ((6 * 2 * body * rows, step),)),
    }


def probe(quick: bool) -> tuple[float, float]:
    """This machine now: fp32 matmul FLOP/s, and bytes/s read plus written by a copy."""
    size, length = (256, 2**20) if quick else (2048, 2**26)
    left, right, product = (torch.ones(size, size) for _ in range(3))
    source, target = torch.ones(length), torch.ones(length)
    fastest = []
    for job in (lambda: torch.mm(left, right, out=product), lambda: target.copy_(source)):
        job()
        taken = []
        for _ in range(3):
            start = clock()
            job()
            taken.append(clock() - start)
        fastest.append(min(taken))
    return 2 * size**3 / fastest[0], 8 * length / fastest[1]


def bf16_rates(quick: bool) -> dict[str, float]:
    """FLOP/s of a product as the models make them (1792 tokens, 128 to 688), in fp32 and in bf16."""
    rows, rates = (64 if quick else 1792), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(rows, 128, dtype=dtype), torch.ones(688, 128, dtype=dtype)
        taken = []
        for _ in range(5):
            start = clock()
            F.linear(left, right)
            taken.append(max(clock() - start, 1e-6))
        rates[name] = 2 * rows * 128 * 688 / min(taken)
    return rates
