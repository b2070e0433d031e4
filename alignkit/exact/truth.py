"""Quantities computed from tables of all responses: optimum, frontier, best-of-n, KL, entropy, and the most probable
part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.formulas.losses import dpo_loss, same_shape


# ---- what the tables say
def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """E_π[v] = Σ_y π(y) v(y): (prompts,) for logps and values (prompts, N)."""
    same_shape("logps", logps, values=values)
    return (logps.exp() * values).sum(1)


def variance(logps: Tensor, values: Tensor) -> Tensor:
    """Var_π[v] = E_π[(v − E_π[v])²]: (prompts,)."""
    return expectation(logps, (values - expectation(logps, values)[:, None]).square())


def response_entropy(logps: Tensor) -> Tensor:
    """H(π) = −Σ_y π(y) log π(y): (prompts,), nats per response."""
    return -torch.where(logps > -torch.inf, logps.exp() * logps, 0.0).sum(1)


def response_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(π ‖ π_ref) = Σ_y π(y) (log π(y) − log π_ref(y)): (prompts,), nats per response; ∞ outside π_ref's support."""
    same_shape("logps", logps, ref_logps=ref_logps)
    return torch.where(logps > -torch.inf, logps.exp() * (logps - ref_logps), 0.0).sum(1)


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The policy that maximises E_π[r] − β KL(π ‖ π_ref): its logps (prompts, N), and log Z (prompts,).

    π*(y) = π_ref(y) e^{r(y)/β} / Z,  Z = Σ_y π_ref(y) e^{r(y)/β}.  The maximum is J* = β log Z.
    beta: β > 0, in units of reward per nat. Raises ValueError if it is not positive. (Rafailov et al. 2023, eq. 4)
    """
    same_shape("ref_logps", ref_logps, rewards=rewards)
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a positive number (the price of one nat of KL)")
    tilted = ref_logps + rewards / beta
    log_z = tilted.logsumexp(1)
    return tilted - log_z[:, None], log_z


def tabular_dpo(ref_logps: Tensor, first: Tensor, second: Tensor, wins: Tensor, beta: float, *,
                start: Tensor | None = None, loss_type: str = "sigmoid", steps: int = 500) -> Tensor:
    """DPO with a tabular policy: log-probs (N,) that minimise the loss of M pairs of responses to one prompt.

    Σ_m [w_m L(first ≻ second) + (1 − w_m) L(second ≻ first)] / M, with L = `dpo_loss`, by L-BFGS in float64.
    ref_logps: (N,). first, second: (M,) int64, indices of responses. wins: (M,) in [0, 1], the share of labels that
    prefer the first; with every pair of responses and w = σ(Δr), the minimiser is the optimum π* of r. start: (N,)
    initial log-probs, by default the reference. The start matters: the loss does not constrain responses that are in no
    pair, and has no minimum if a response wins (or loses) every comparison. In that case the result depends on `steps`.
    Raises ValueError on shapes that do not fit. (Rafailov et al. 2023, eq. 7)
    """
    if ref_logps.ndim != 1 or not first.shape == second.shape == wins.shape == (len(wins),):
        raise ValueError(f"ref_logps has shape {tuple(ref_logps.shape)}, first, second and wins {tuple(first.shape)}, "
                         f"{tuple(second.shape)}, {tuple(wins.shape)}; expected (N,) and three times (M,)")
    ref_logps = ref_logps.double()
    which, place, times = torch.stack([first, second]).unique(dim=1, return_inverse=True, return_counts=True)
    wins = torch.zeros(len(times), dtype=torch.float64).index_add(0, place, wins.double()) / times
    first, second = which  # the loss is linear in the labels: repeated pairs become one pair with a weight
    start = ref_logps if start is None else start.double()
    moved = torch.zeros_like(start, requires_grad=True)  # β (log π − log π_start) + a constant: well scaled for any β
    references = ref_logps[first], ref_logps[second]
    optimiser = torch.optim.LBFGS([moved], max_iter=steps, max_eval=4 * steps, tolerance_grad=1e-12,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        scores = start + moved / beta  # log π up to a constant, which no margin contains
        pair = scores[first], scores[second]
        forth = dpo_loss(*pair, *references, beta=beta, loss_type=loss_type)
        back = dpo_loss(*pair[::-1], *references[::-1], beta=beta, loss_type=loss_type)
        loss = (times * (wins * forth + (1 - wins) * back)).sum() / times.sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return (start + moved.detach() / beta).log_softmax(0)


@dataclass(frozen=True, eq=False)
class Frontier:
    """The highest mean reward of any policy at each mean KL to the reference: a concave curve, one point per β.

    It runs from the reference itself (β = ∞, first) to the policy that always gives a best response (β = 0, last), with
    increasing KL. Using one β for all prompts maximises the mean reward at a given mean KL. The slope d reward / d KL
    is β.
    """

    beta: Tensor  # (B,)
    kl: Tensor  # (B,) nats, mean over prompts
    reward: Tensor  # (B,) mean over prompts
    other: Tensor | None  # (B,) mean of another table under the same policies: gold along the proxy's frontier
    ref_variance: float  # mean over prompts of Var_ref[r]: the curve starts as r_ref + √(2 Var_ref KL)

    def reward_at(self, kl: Tensor | float) -> Tensor:
        """Reward of the frontier at these KLs (any shape): Hermite interpolation in √KL, between chord and tangents.

        Exact at the points, and never above the true curve's tangents. Beyond the last point the reward is that of the
        last point. Raises ValueError on a negative or NaN KL.
        """
        kl = torch.as_tensor(kl, dtype=torch.float64)
        if not (kl >= 0).all():
            raise ValueError(f"kl is {kl.min():.3g} at its smallest, expected nats ≥ 0")
        root = self.kl.sqrt()
        slope = torch.where(self.beta.isinf(), math.sqrt(2 * self.ref_variance), 2 * root * self.beta)
        right = torch.searchsorted(self.kl, kl.clamp(max=float(self.kl[-1]))).clamp(1, len(self.kl) - 1)
        left = right - 1
        width = (root[right] - root[left]).clamp(min=1e-300)
        s = ((kl.sqrt() - root[left]) / width).clamp(0, 1)
        curve = ((1 + 2 * s) * (1 - s) ** 2 * self.reward[left] + s * (1 - s) ** 2 * width * slope[left]
                 + s**2 * (3 - 2 * s) * self.reward[right] + s**2 * (s - 1) * width * slope[right])
        span = (self.kl[right] - self.kl[left]).clamp(min=1e-300)
        chord = self.reward[left] + (self.reward[right] - self.reward[left]) * ((kl - self.kl[left]) / span).clamp(0, 1)
        rise = torch.where(self.beta[left].isinf(), torch.inf, self.beta[left] * (kl - self.kl[left]))
        tangent = torch.minimum(self.reward[left] + rise, self.reward[right] + self.beta[right] * (kl - self.kl[right]))
        return torch.maximum(chord, torch.minimum(curve, tangent)).clamp(max=float(self.reward[-1]))


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Sequence[float], other: Tensor | None = None) -> Frontier:
    """The reward–KL frontier at these β, plus both ends (β = ∞ and 0).

    ref_logps, rewards, other: (prompts, N). Raises ValueError if a β is not positive.
    """
    greedy = torch.where(rewards >= rewards.amax(1, keepdim=True) - _rounding(rewards), ref_logps, -torch.inf)
    rows = []
    for beta in [math.inf, *sorted(betas, reverse=True), 0.0]:
        logps = {math.inf: ref_logps, 0.0: greedy - greedy.logsumexp(1, keepdim=True)}.get(beta)
        logps = optimum(ref_logps, rewards, beta)[0] if logps is None else logps
        rows.append([beta, response_kl(logps, ref_logps).mean(), expectation(logps, rewards).mean(),
                     torch.nan if other is None else expectation(logps, other).mean()])
    beta, kl, reward, along = torch.tensor(rows, dtype=torch.float64).T
    return Frontier(beta, kl.clamp(min=0), reward, None if other is None else along,
                    float(variance(ref_logps, rewards).mean()))


@dataclass(frozen=True)
class Gap:
    """Distance of a policy from the optimum at the policy's own KL. All fields except `share` and `kl` are in units of
    reward."""

    kl: float  # nats
    reward: float
    optimum: float  # reward of the exact optimum at the same KL
    reference: float  # reward of the reference
    gap: float  # optimum − reward: 0 is perfect; below 0 only by sampling error
    share: float  # (reward − reference) / (optimum − reference): 1 is perfect; NaN if the optimum gains nothing


def gap(kl: float, reward: float, frontier: Frontier) -> Gap:
    """Compare a policy's mean KL and mean reward with the frontier of the same prompts and the same reward."""
    best, reference = float(frontier.reward_at(kl)), float(frontier.reward[0])
    gain = best - reference
    share = (float(reward) - reference) / gain if gain > 0 else math.nan
    return Gap(float(kl), float(reward), best, reference, best - float(reward), share)


def best_of_n(ref_logps: Tensor, rewards: Tensor, n: float) -> Tensor:
    """Log-probs (prompts, N) of best-of-n: draw n responses from π_ref, keep the one with the highest reward.

    π_n(y) = (F(r)ⁿ − F₋(r)ⁿ) · π_ref(y) / π_ref(reward = r(y)), with F(r) = π_ref(reward ≤ r) and F₋(r) = π_ref(reward
    < r): ties are broken as π_ref draws. n ≥ 1 need not be an integer. Raises ValueError if n < 1.
    """
    same_shape("ref_logps", ref_logps, rewards=rewards)
    if not n >= 1:
        raise ValueError(f"n is {n}, expected at least 1 draw")
    ref_logps = ref_logps - ref_logps.logsumexp(1, keepdim=True)
    order, group = _reward_groups(rewards)
    ordered = ref_logps.gather(1, order)
    mass = torch.zeros_like(ref_logps).scatter_add_(1, group, ordered.exp())  # of each group, lowest reward first
    at_most = mass.cumsum(1)
    above = mass.flip(1).cumsum(1).flip(1) - mass
    log_at_most = torch.where(at_most < 0.5, at_most.log(), torch.log1p(-above.clamp(0, 0.5)))
    log_share = torch.log1p(-(mass / log_at_most.exp()).clamp(max=1.0))
    log_win = n * log_at_most + torch.log(-torch.expm1(n * log_share))
    log_factor = torch.where(mass > 0, log_win - mass.log(), 0.0).gather(1, group)
    return torch.empty_like(ref_logps).scatter_(1, order, ordered + log_factor)


def best_of_n_kl_bound(n: float) -> float:
    """log n − (n − 1)/n ≥ KL(best-of-n ‖ π_ref), nats: tight if no response is likely. (Beirami et al. 2025)"""
    return math.log(n) - (n - 1) / n


def _reward_groups(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Order (prompts, N) by increasing reward, and for each position the number of its group of equal rewards.

    Rewards are equal up to rounding: 0.1 + 0.2 and 0.3 are one reward.
    """
    ordered, order = rewards.sort(dim=1, stable=True)
    steps = torch.zeros_like(order)
    steps[:, 1:] = (ordered.diff(dim=1) > _rounding(rewards)).long()
    return order, steps.cumsum(1)


def _rounding(rewards: Tensor) -> Tensor:
    return 8 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)


# ---- pruning
@dataclass(frozen=True, eq=False)
class Pruned:
    """The likeliest responses, and the exact missing probability. The `…_bound` methods turn it into error bounds."""

    keep: Tensor  # (prompts, N) bool
    dropped: Tensor  # (prompts,) δ: probability of the dropped responses

    def expectation_bound(self, low: float, high: float) -> Tensor:
        """|E_π[v] − Σ_kept π v / (1 − δ)| ≤ δ (high − low) for any v with values in [low, high]: (prompts,)."""
        return self.dropped * (high - low)

    def log_z_bound(self, log_z: Tensor, beta: float, highest: float) -> Tensor:
        """log Z − log Z_kept ≤ log(1 + δ e^{r_max/β} / Z_kept) ≤ δ e^{r_max/β} / Z_kept: (prompts,), the tighter one.

        log_z: log Z_kept (prompts,), the log-sum-exp over the kept responses. highest: r_max, an upper bound on all
        rewards.
        """
        return torch.nn.functional.softplus(self.dropped.log() + highest / beta - log_z)


def prune(logps: Tensor, mass: float = 0.999) -> Pruned:
    """Keep the fewest responses per prompt that hold at least `mass` of the probability.

    Enumerating a policy is cheap, but scoring 16,105 responses with a large reward model is not: score only the kept
    ones. Raises ValueError unless 0 < mass ≤ 1.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}, expected a share of the probability in (0, 1]")
    ordered, order = logps.exp().sort(1, descending=True)
    before = ordered.cumsum(1) - ordered
    kept = before < mass * ordered.sum(1, keepdim=True) * (1 - 1e-15)
    keep = torch.zeros_like(kept).scatter_(1, order, kept)
    return Pruned(keep, torch.where(keep, 0.0, logps.exp()).sum(1))
