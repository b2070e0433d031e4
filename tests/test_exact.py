"""The enumeration is compared with ordinary forward passes and the real sampler; everything else with identities."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MistralConfig

from alignkit import exact
from alignkit.desk.tiny import phrase_ids, tiny_reward_model
from alignkit.desk.world import PHRASES, World, phrase_counts, render
from alignkit.exact import cache, enumeration
from alignkit.formulas.kl import k1, k3
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import sequence_logps, token_logprobs
from alignkit.forward.reading import response_logits
from alignkit.forward.rollout import Rollout, encode_prompts, position_ids
from alignkit.forward.sampling import sample
from alignkit.models.adapters import add_lora
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.reward import RewardScorer

SPACE = exact.response_space()
WORLD = World(0)


def noisy_policy(seed: int, scale: float = 0.2):
    """A tiny policy whose weights are random enough that prompts and prefixes matter."""
    policy, tokenizer = load_policy("tiny", seed=seed, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale, generator=generator)
        policy.lm_head.bias[[*phrase_ids(tokenizer), tokenizer.eos_token_id]] += torch.randn(12, generator=generator)
    return policy, tokenizer


@pytest.fixture(scope="module")
def desk():
    """A reference, a policy near it, the tokenizer, six prompts and their ids, of which the last two are shortened."""
    reference, tokenizer = noisy_policy(1)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    prompts = [WORLD.heldout_prompts[i] for i in (0, 101, 202, 333, 404, 515)]
    ids, mask = encode_prompts(tokenizer, [prompt.text for prompt in prompts])
    for row, length in ((4, 4), (5, 3)):  # the world's prompts are all as long: these two lose their first tokens
        ids[row, :-length], mask[row, :-length] = tokenizer.pad_token_id, False
    where = {"phrase_ids": phrase_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    logps, ref_logps = (exact.trie_logps(model, ids, mask, **where) for model in (policy, reference))
    return {"reference": reference, "policy": policy, "tokenizer": tokenizer, "prompts": prompts, "ids": ids,
            "mask": mask, "where": where, "logps": logps, "ref_logps": ref_logps,
            "gold": exact.gold_table(WORLD, prompts, SPACE),
            "rewards": torch.randn(6, len(SPACE), generator=generator).double()}


def table(prompts: int = 3, responses: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logps and rewards (prompts, responses)."""
    generator = torch.Generator().manual_seed(seed)
    logps = (2 * torch.randn(prompts, responses, generator=generator, dtype=torch.float64)).log_softmax(1)
    return logps, torch.randn(prompts, responses, generator=generator, dtype=torch.float64)


def draw(logps: torch.Tensor, *shape: int, seed: int = 0) -> torch.Tensor:
    """Indices of responses drawn from logps (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logps.exp(), math.prod(shape), replacement=True, generator=generator).view(shape)


def plane(logps: torch.Tensor, ref_logps: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """A policy's point in the plane: mean KL and mean reward."""
    return exact.response_kl(logps, ref_logps).mean().item(), exact.expectation(logps, rewards).mean().item()


def uncached_logps(policy, ids, mask, response_ids, response_mask) -> torch.Tensor:
    """log π of responses (B, T) by one ordinary forward pass."""
    rollout = Rollout(ids, mask, response_ids, response_mask, torch.zeros(response_ids.shape), response_mask[:, 0])
    return sequence_logps(token_logprobs(response_logits(policy, rollout), response_ids), response_mask)


# ---- the space of responses


def test_space_has_every_response_once_shortest_first():
    space = exact.response_space(3, 2)
    listed = [tuple(x for x in row if x >= 0) for row in space.sequences.tolist()]
    assert listed == [(), *itertools.product(range(3)), *itertools.product(range(3), repeat=2)]
    assert space.length.tolist() == [len(row) for row in listed]
    for i, row in enumerate(listed[1:], 1):
        assert listed[space.parent[i]] == row[:-1] and space.last[i] == row[-1]
    assert [listed[i] for i in range(len(space))[space.level(2)]] == listed[4:]
    assert torch.equal(space.index(space.sequences), torch.arange(13))
    assert len(exact.response_space(11, 5)) == 177_156


def test_space_renders_counts_and_tokenises_as_the_world_does(desk):
    tokenizer, texts = desk["tokenizer"], SPACE.texts()
    assert len(set(texts)) == len(texts) == 16_105
    some = [0, 5, 77, 1000, 5000, 16_104]
    for i in some:
        assert texts[i] == render(PHRASES[x] for x in SPACE.sequences[i].tolist() if x >= 0)
    assert (phrase_counts([texts[i] for i in some]) == SPACE.counts[some].numpy()).all()
    ids, mask = SPACE.token_ids(desk["where"]["phrase_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id)
    phrases = mask & (ids != tokenizer.eos_token_id)
    assert torch.equal(SPACE.index_of_tokens(ids, phrases, desk["where"]["phrase_ids"]), torch.arange(len(SPACE)))
    for i in some:
        ends = [tokenizer.eos_token_id] if SPACE.length[i] < 4 else []
        assert ids[i][mask[i]].tolist() == tokenizer(texts[i], add_special_tokens=False).input_ids + ends


def test_space_refuses_what_is_no_response():
    with pytest.raises(ValueError, match="phrases 0 … 10"):
        SPACE.index(torch.tensor([[-1, 3, -1, -1]]))
    with pytest.raises(ValueError, match="phrases 0 … 10"):
        SPACE.index(torch.tensor([[11, -1, -1, -1]]))
    with pytest.raises(ValueError, match=r"\(M, 4\)"):
        SPACE.index(torch.tensor([[1, 2]]))


# ---- enumerating a policy


def test_probabilities_sum_to_one(desk):
    for logps in (desk["logps"], desk["ref_logps"]):
        assert logps.shape == (6, 16_105) and logps.dtype == torch.float64
        assert (logps.exp().sum(1) - 1).abs().max() < 1e-5


def test_each_response_has_the_logp_of_an_uncached_forward_pass(desk):
    response_ids, response_mask = SPACE.token_ids(*desk["where"].values(), desk["tokenizer"].pad_token_id)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.cat([torch.arange(40), torch.randint(len(SPACE), (200,), generator=generator)])
    for row in range(6):
        with torch.no_grad():
            logps = uncached_logps(desk["policy"], desk["ids"][row].expand(240, -1), desk["mask"][row].expand(240, -1),
                                   response_ids[chosen], response_mask[chosen])
        assert (logps - desk["logps"][row, chosen]).abs().max() < 1e-4


def test_batch_padding_and_chunks_change_nothing(desk, monkeypatch):
    alone = exact.response_logps(desk["policy"], desk["tokenizer"], desk["prompts"][2:3])
    assert (alone[0] - desk["logps"][2]).abs().max() < 1e-4
    monkeypatch.setattr(enumeration, "QUERIES", 50)
    chunked = exact.trie_logps(desk["policy"], desk["ids"][:2], desk["mask"][:2], **desk["where"], max_phrases=3)
    monkeypatch.undo()
    whole = exact.trie_logps(desk["policy"], desk["ids"][:2], desk["mask"][:2], **desk["where"], max_phrases=3)
    assert (chunked - whole).abs().max() < 1e-4


def test_each_prefix_is_computed_once(desk):
    """The prompt, then 1, 11, 121 rows of eleven siblings, then one path. Before that a trial of the first levels."""
    shapes = []
    hook = desk["policy"].register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    exact.response_logps(desk["policy"], desk["tokenizer"], desk["prompts"][:1])
    hook.remove()
    length = int(desk["mask"][0].sum())
    trial = [(1, length), (1, 11), (11, 11), (1, length + 2)]
    assert shapes == [*trial, (1, length), (1, 11), (11, 11), (121, 11), (1, length + 3)]


GROUPED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 48, "vocab_size": 40}


@pytest.mark.parametrize("config", [
    LlamaConfig(**GROUPED),
    MistralConfig(**GROUPED, sliding_window=6),
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40),
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=40),
], ids=lambda config: config.model_type)
def test_other_architectures_agree_with_their_own_forward_pass(config):
    """Grouped heads, a window shorter than the prompt (no shared rows), learned positions, ALiBi (no 4-D mask)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    ids = torch.randint(10, 40, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    ids[1, :3], mask[1, :3] = 0, False
    space = exact.response_space(4, 3)
    logps = exact.trie_logps(model, ids, mask, phrase_ids=[3, 4, 5, 6], eos_token_id=2, max_phrases=3, tolerance=1)
    response_ids, response_mask = space.token_ids([3, 4, 5, 6], 2, 0)
    for row in range(2):
        repeated = ids[row].expand(len(space), -1), mask[row].expand(len(space), -1)
        full, seen = (torch.cat(parts, 1) for parts in zip(repeated, (response_ids, response_mask), strict=True))
        extra = {} if config.model_type == "bloom" else {"position_ids": position_ids(seen)}
        with torch.no_grad():
            logits = model(input_ids=full, attention_mask=seen.long(), use_cache=False, **extra).logits[:, 8:-1]
        expected = sequence_logps(token_logprobs(logits, response_ids), response_mask)
        assert (logps[row] - expected).abs().max() < 1e-4


def test_a_policy_with_an_adapter_can_be_enumerated(desk):
    policy = add_lora(copy.deepcopy(desk["policy"]))
    logps = exact.response_logps(policy, desk["tokenizer"], desk["prompts"][:2], max_phrases=2)
    expected = exact.response_logps(desk["policy"], desk["tokenizer"], desk["prompts"][:2], max_phrases=2)
    assert (logps - expected).abs().max() < 1e-5  # an untrained adapter changes nothing


def test_missing_probability_is_refused(desk):
    with pytest.raises(ValueError, match=r"of the policy's probability is on tokens other than the 10 phrases"):
        exact.trie_logps(desk["policy"], desk["ids"], desk["mask"], phrase_ids=desk["where"]["phrase_ids"][:10],
                         eos_token_id=desk["where"]["eos_token_id"], max_phrases=2)
    with pytest.raises(ValueError, match="different tokens"):
        exact.trie_logps(desk["policy"], desk["ids"], desk["mask"], phrase_ids=[4, 4], eos_token_id=2)
    with pytest.raises(ValueError, match="padded on the left"):
        exact.trie_logps(desk["policy"], desk["ids"].flip(1), desk["mask"].flip(1), **desk["where"])


def test_dropout_is_off_and_modes_are_kept(desk):
    policy = copy.deepcopy(desk["policy"])
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy.train()
    policy.lm_head.eval()
    logps = exact.trie_logps(policy, desk["ids"][:1], desk["mask"][:1], **desk["where"])
    assert (logps - desk["logps"][:1]).abs().max() < 1e-5
    assert policy.training and not policy.lm_head.training


def test_a_cache_that_does_not_agree_is_refused(desk):
    policy = copy.deepcopy(desk["policy"])
    forward = policy.forward

    def wrong(input_ids=None, attention_mask=None, past_key_values=None, position_ids=None, **options):
        late = 0 if past_key_values is None else 1  # positions off by one behind the cache
        return forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                       position_ids=position_ids + late, **options)

    policy.forward = wrong
    with pytest.raises(RuntimeError, match="with a KV cache and without differ"):
        exact.trie_logps(policy, desk["ids"], desk["mask"], **desk["where"])


# ---- rewards of every response


def test_gold_table_is_the_world_s_gold(desk):
    texts = SPACE.texts()
    chosen = torch.randint(len(SPACE), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for row, prompt in enumerate(desk["prompts"]):
        expected = WORLD.gold_scores([prompt.text] * 300, [texts[i] for i in chosen])
        assert torch.equal(desk["gold"][row, chosen], torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["tiny", "from policy"])
def test_proxy_table_is_what_the_scorer_says(desk, kind):
    tokenizer = desk["tokenizer"]
    model = tiny_reward_model(tokenizer, seed=3) if kind == "tiny" else reward_model_from(desk["policy"], seed=3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    scorer = RewardScorer(model, tokenizer, mean=0.3, std=1.7)
    small = exact.response_space(11, 2)
    read = exact.proxy_table(scorer, desk["prompts"], small)
    scored = exact.proxy_table(lambda prompts, responses: scorer(prompts, responses), desk["prompts"], small)
    assert read.shape == (6, 133) and (read - scored).abs().max() < 1e-5
    assert enumeration._trie_scores(scorer, [prompt.text for prompt in desk["prompts"]], small) is not None
    texts, whole = SPACE.texts(), exact.proxy_table(scorer, desk["prompts"][:1], SPACE)
    chosen = torch.randint(len(SPACE), (100,), generator=torch.Generator().manual_seed(0))
    own = scorer([desk["prompts"][0].text] * 100, [texts[i] for i in chosen.tolist()])
    assert (whole[0, chosen] - own).abs().max() < 1e-5 and not whole.isnan().any()


# ---- identities of the optimum, the frontier and best-of-n


@pytest.mark.parametrize("beta", [0.02, 0.3, 1.0, 20.0])
def test_the_optimum_s_objective_is_beta_log_z(desk, beta):
    for ref_logps, rewards in (table(), (desk["ref_logps"], desk["gold"])):
        logps, log_z = exact.optimum(ref_logps, rewards, beta)
        objective = exact.expectation(logps, rewards) - beta * exact.response_kl(logps, ref_logps)
        assert (objective - beta * log_z).abs().max() < 1e-5
        assert (logps.exp().sum(1) - 1).abs().max() < 1e-9


def test_a_reward_that_depends_on_the_prompt_only_changes_nothing(desk):
    shift = torch.tensor([[-3.0], [5.0], [0.0], [1.0], [2.0], [100.0]], dtype=torch.float64)
    logps, log_z = exact.optimum(desk["ref_logps"], desk["gold"], 0.5)
    shifted, shifted_log_z = exact.optimum(desk["ref_logps"], desk["gold"] + shift, 0.5)
    assert (logps - shifted).abs().max() < 1e-9
    assert (shifted_log_z - log_z - shift[:, 0] / 0.5).abs().max() < 1e-9


def test_the_optimum_is_better_than_its_neighbours():
    """J(π) = J* − β KL(π ‖ π*), so every other policy loses exactly that."""
    ref_logps, rewards = table()
    best, log_z = exact.optimum(ref_logps, rewards, 0.4)
    other = (best + 0.3 * table(seed=9)[1]).log_softmax(1)
    objective = exact.expectation(other, rewards) - 0.4 * exact.response_kl(other, ref_logps)
    assert (0.4 * log_z - objective - 0.4 * exact.response_kl(other, best)).abs().max() < 1e-12


def test_reward_rises_with_inverse_beta_at_the_rate_of_its_variance(desk):
    step = 1e-4
    for inverse in (0.5, 2.0, 8.0):
        up, down = (exact.optimum(desk["ref_logps"], desk["gold"], 1 / (inverse + s))[0] for s in (step, -step))
        slope = (exact.expectation(up, desk["gold"]) - exact.expectation(down, desk["gold"])) / (2 * step)
        here = exact.optimum(desk["ref_logps"], desk["gold"], 1 / inverse)[0]
        assert torch.allclose(slope, exact.variance(here, desk["gold"]), rtol=1e-5, atol=1e-9)


def test_far_from_greedy_kl_is_half_the_variance_over_beta_squared(desk):
    for beta, rtol in ((30.0, 0.05), (300.0, 0.005)):
        kl = exact.response_kl(exact.optimum(desk["ref_logps"], desk["gold"], beta)[0], desk["ref_logps"])
        assert torch.allclose(kl, exact.variance(desk["ref_logps"], desk["gold"]) / (2 * beta**2), rtol=rtol)


def test_kl_and_entropy_of_known_distributions():
    """KL((½, ½, 0) ‖ (¼, ¼, ½)) = log 2; entropy of the first is log 2; a reference without the support gives ∞."""
    half = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    quarter = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert exact.response_kl(half, quarter).item() == pytest.approx(math.log(2))
    assert exact.response_entropy(half).item() == pytest.approx(math.log(2))
    assert exact.response_kl(half, half).item() == 0
    assert exact.response_kl(quarter, half).item() == math.inf
    with pytest.raises(ValueError, match=r"rewards has shape \(1, 3\), expected \(1, 2\) \(the shape of ref_logps\)"):
        exact.optimum(half[:, :2], half, 1.0)
    with pytest.raises(ValueError, match="beta is 0"):
        exact.optimum(half, half, 0)


BETAS = [0.03 * 1.3**i for i in range(22)]


def test_frontier_is_concave_rises_and_has_slope_beta(desk):
    curve = exact.frontier(desk["ref_logps"], desk["gold"], BETAS, other=desk["rewards"])
    assert curve.beta[0] == math.inf and curve.beta[-1] == 0 and curve.kl[0] == 0
    assert (curve.kl.diff() >= 0).all() and (curve.reward.diff() >= -1e-12).all()
    slopes = curve.reward.diff() / curve.kl.diff()
    assert (slopes.diff() <= 1e-9).all()
    assert (slopes <= curve.beta[:-1] + 1e-9).all() and (slopes >= curve.beta[1:] - 1e-9).all()
    assert curve.reward[0] == pytest.approx(exact.expectation(desk["ref_logps"], desk["gold"]).mean())
    assert curve.reward[-1] == pytest.approx(desk["gold"].max(1).values.mean())
    middle = exact.optimum(desk["ref_logps"], desk["gold"], float(curve.beta[7]))[0]
    assert curve.other[7] == pytest.approx(exact.expectation(middle, desk["rewards"]).mean().item())


def test_frontier_between_its_points(desk):
    """Against optima at other β than the curve was made of; and never below a chord or above a tangent."""
    curve = exact.frontier(desk["ref_logps"], desk["gold"], BETAS)
    for beta in (40.0, 3.3, 0.71, 0.2, 0.09, 0.041):
        logps = exact.optimum(desk["ref_logps"], desk["gold"], beta)[0]
        kl, reward = plane(logps, desk["ref_logps"], desk["gold"])
        assert curve.reward_at(kl) == pytest.approx(reward, abs=1e-4)
    assert torch.allclose(curve.reward_at(curve.kl), curve.reward)
    assert curve.reward_at(1e6) == curve.reward[-1]
    fine = curve.reward_at(torch.linspace(0, float(curve.kl[-1]), 500))
    assert (fine.diff() >= -1e-12).all()
    with pytest.raises(ValueError, match="nats ≥ 0"):
        curve.reward_at(-0.1)


def test_no_policy_is_above_the_frontier(desk):
    curve = exact.frontier(desk["ref_logps"], desk["gold"], BETAS)
    generator = torch.Generator().manual_seed(4)
    gaps = []
    for _ in range(60):
        scale = 10 ** float(torch.empty(1).uniform_(-2, 1, generator=generator))
        noise = torch.randn(desk["gold"].shape, generator=generator) * float(torch.rand(1, generator=generator))
        logps = (desk["ref_logps"] + (desk["gold"] + noise) * scale).log_softmax(1)
        gaps.append(exact.gap(*plane(logps, desk["ref_logps"], desk["gold"]), curve))
    for n in (2, 5, 20):
        logps = exact.best_of_n(desk["ref_logps"], desk["gold"], n)
        gaps.append(exact.gap(*plane(logps, desk["ref_logps"], desk["gold"]), curve))
    assert min(gap.gap for gap in gaps) > -1e-6
    assert max(gap.share for gap in gaps) < 1 + 1e-6


def test_gap_of_the_optimum_the_reference_and_a_waste(desk):
    curve = exact.frontier(desk["ref_logps"], desk["gold"], BETAS)
    best = exact.gap(curve.kl[10], curve.reward[10], curve)
    assert best.gap == pytest.approx(0, abs=1e-9) and best.share == pytest.approx(1)
    waste = exact.gap(curve.kl[10], curve.reward[0], curve)
    assert waste.share == pytest.approx(0) and waste.gap == pytest.approx(float(curve.reward[10] - curve.reward[0]))
    assert math.isnan(exact.gap(0.0, curve.reward[0], curve).share)


def test_best_of_one_is_the_reference(desk):
    assert (exact.best_of_n(desk["ref_logps"], desk["gold"], 1) - desk["ref_logps"]).abs().max() < 1e-9


@pytest.mark.parametrize("n", [2, 3, 16, 1024, 10**6])
def test_best_of_n_sums_to_one_and_its_kl_is_bounded(desk, n):
    for rewards in (desk["gold"], desk["rewards"]):  # many ties, and none
        logps = exact.best_of_n(desk["ref_logps"], rewards, n)
        assert (logps.exp().sum(1) - 1).abs().max() < 1e-9
        assert (exact.response_kl(logps, desk["ref_logps"]) <= exact.best_of_n_kl_bound(n) + 1e-9).all()


def test_best_of_n_in_closed_form_with_ties():
    """π_ref = (.1, .2, .3, .4), rewards (1, 0, 1, 2), n = 2: F = .2, .6, 1; masses .04, .36 − .04 = .32, 1 − .36 = .64.
    The tie of .32 is shared .1 : .3."""
    ref_logps = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    logps = exact.best_of_n(ref_logps, torch.tensor([[1.0, 0.0, 1.0, 2.0]], dtype=torch.float64), 2)
    assert torch.allclose(logps.exp(), torch.tensor([[0.08, 0.04, 0.24, 0.64]], dtype=torch.float64))
    for same in ([0.0, 0.0, 0.0, 0.0], [0.3, 0.1 + 0.2, 0.3, 0.3]):  # equal up to rounding is equal
        equal = exact.best_of_n(ref_logps, torch.tensor([same], dtype=torch.float64), 50)
        assert torch.allclose(equal, ref_logps)
        assert exact.frontier(ref_logps, torch.tensor([same], dtype=torch.float64), []).kl[-1] < 1e-12


def test_best_of_n_is_what_drawing_gives():
    ref_logps, rewards = table(1, 12)
    rewards = rewards.mul(2).round() / 2  # ties
    draws = draw(ref_logps[0], 200_000, 4)
    winner = draws.gather(1, rewards[0][draws].argmax(1, keepdim=True))[:, 0]  # the first best: ties as π_ref draws
    frequency = torch.bincount(winner, minlength=12) / len(winner)
    expected = exact.best_of_n(ref_logps, rewards, 4)[0].exp()
    assert ((frequency - expected).abs() < 5 * (expected / len(winner)).sqrt() + 1e-5).all()


def test_best_of_n_with_impossible_responses():
    ref_logps = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    logps = exact.best_of_n(ref_logps, torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), 3)
    assert torch.allclose(logps.exp(), torch.tensor([[0.125, 0.875, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="n is 0"):
        exact.best_of_n(ref_logps, ref_logps, 0)


# ---- KL estimators against the exact KL


@pytest.mark.parametrize("estimator", [k1, k3])
def test_exact_kl_is_inside_the_estimators_interval(desk, estimator):
    """In ≥ 95 % of 200 repetitions, with 1,000 responses each and a 99 % interval."""
    kl, inside = float(exact.response_kl(desk["logps"], desk["ref_logps"])[0]), 0
    values = estimator(desk["logps"][0], desk["ref_logps"][0])
    assert float((desk["logps"][0].exp() * values).sum()) == pytest.approx(kl, abs=1e-9)  # both are unbiased
    for drawn in values[draw(desk["logps"][0], 200, 1000, seed=7)]:
        inside += abs(float(drawn.mean()) - kl) < 2.576 * float(drawn.std()) / 1000**0.5
    assert inside >= 190


def test_the_real_sampler_draws_the_enumerated_distribution(desk):
    """Frequencies of the likeliest responses, and the KL by k1 and k3 on what `sample` returns."""
    tokenizer, row, draws = desk["tokenizer"], 1, 4000
    rollout = sample(desk["policy"], desk["ids"][row].expand(draws, -1), desk["mask"][row].expand(draws, -1),
                     max_new_tokens=4, eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id, generator=seeded(3))
    phrases = rollout.response_mask & (rollout.response_ids != tokenizer.eos_token_id)
    index = SPACE.index_of_tokens(rollout.response_ids, phrases, desk["where"]["phrase_ids"])
    logps, ref_logps = desk["logps"][row], desk["ref_logps"][row]
    assert (rollout.logprobs.sum(1) - logps[index]).abs().max() < 1e-4
    frequency = torch.bincount(index, minlength=len(SPACE)) / draws
    likely = logps.exp() > 0.002
    assert likely.sum() > 20
    error = (frequency - logps.exp())[likely] / (logps.exp()[likely] / draws).sqrt()
    assert error.square().mean() < 1.6 and error.abs().max() < 4.5
    kl = exact.response_kl(logps[None], ref_logps[None]).item()
    for estimator in (k1, k3):
        values = estimator(logps[index], ref_logps[index])
        assert abs(float(values.mean()) - kl) < 3.3 * float(values.std()) / draws**0.5


# ---- the exact gradient


def exact_objective(policy, desk, beta: float) -> torch.Tensor:
    """J on the first two prompts and responses of at most two phrases, differentiably and without a tree."""
    space = exact.response_space(11, 2)
    ids, mask = space.token_ids(*desk["where"].values(), desk["tokenizer"].pad_token_id)
    total = 0.0
    for row in range(2):
        n = len(space)
        logps = uncached_logps(policy, desk["ids"][row].expand(n, -1), desk["mask"][row].expand(n, -1), ids, mask)
        total = total + (logps.exp() * (desk["small_rewards"][row] - beta * (logps - desk["small_ref"][row]))).sum()
    return total / 2


@pytest.fixture(scope="module")
def small(desk):
    where = {**desk["where"], "max_phrases": 2}
    ref_logps = exact.trie_logps(desk["reference"], desk["ids"][:2], desk["mask"][:2], **where)
    return {**desk, "small_rewards": desk["rewards"][:2, :133], "small_ref": ref_logps, "small_where": where}


def test_exact_gradient_is_autograd_s(small):
    policy = copy.deepcopy(small["policy"])
    gradient = exact.exact_gradient(policy, small["ids"][:2], small["mask"][:2], small["small_rewards"],
                                    small["small_ref"], 0.3, **small["small_where"])
    exact_objective(policy, small, 0.3).backward()
    for name, parameter in policy.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(gradient[name], expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()) + 1e-7), name


def test_exact_gradient_is_the_finite_difference(small):
    policy = copy.deepcopy(small["policy"]).double()
    arguments = (small["ids"][:2], small["mask"][:2], small["small_rewards"], small["small_ref"], 0.3)
    gradient = exact.exact_gradient(policy, *arguments, **small["small_where"])
    generator = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(parameter.shape, generator=generator).double()
                 for name, parameter in policy.named_parameters()}

    def objective(step: float) -> float:
        moved = copy.deepcopy(policy)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += step * direction[name]
        logps = exact.trie_logps(moved, *arguments[:2], **small["small_where"])
        kl = exact.response_kl(logps, small["small_ref"])
        return float((exact.expectation(logps, small["small_rewards"]) - 0.3 * kl).mean())

    slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
    assert slope == pytest.approx(sum(float((gradient[name] * direction[name]).sum()) for name in gradient), rel=1e-5)


def test_reinforce_estimates_the_exact_gradient(small):
    """Mean of 60 REINFORCE gradients of 64 samples each, along the exact gradient and along random directions."""
    policy, tokenizer, beta = copy.deepcopy(small["policy"]), small["tokenizer"], 0.3
    gradient = exact.exact_gradient(policy, small["ids"][:2], small["mask"][:2], small["small_rewards"],
                                    small["small_ref"], beta, **small["small_where"])
    flat = torch.cat([part.flatten() for part in gradient.values()])
    random = torch.randn(3, len(flat), generator=torch.Generator().manual_seed(0)) / 50
    directions = torch.stack([flat / flat.norm(), *random])
    space, projections = exact.response_space(11, 2), []
    prompt = torch.arange(2).repeat(32)
    for repetition in range(60):
        rollout = sample(policy, small["ids"][prompt], small["mask"][prompt], max_new_tokens=2,
                         eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, generator=seeded(11, repetition))
        phrases = rollout.response_mask & (rollout.response_ids != tokenizer.eos_token_id)
        index = space.index_of_tokens(rollout.response_ids, phrases, small["where"]["phrase_ids"])
        logprobs = token_logprobs(response_logits(policy, rollout), rollout.response_ids)
        logps = sequence_logps(logprobs, rollout.response_mask)
        gain = small["small_rewards"][prompt, index] - beta * (logps.detach() - small["small_ref"][prompt, index])
        parts = torch.autograd.grad((gain * logps).mean(), list(policy.parameters()), allow_unused=True)
        sampled = torch.cat([(torch.zeros_like(parameter) if part is None else part).flatten()
                             for parameter, part in zip(policy.parameters(), parts, strict=True)])
        projections.append(directions @ sampled)
    projections = torch.stack(projections)
    error = (projections.mean(0) - directions @ flat) / (projections.std(0) / 60**0.5)
    assert error.abs().max() < 3.5
    assert projections.mean(0)[0] > 5 * projections.std(0)[0] / 60**0.5  # there is something to estimate


def test_a_step_along_the_exact_gradient_raises_the_objective(small):
    policy = copy.deepcopy(small["policy"])
    arguments = (small["ids"][:2], small["mask"][:2], small["small_rewards"], small["small_ref"], 0.3)
    before = exact_objective(policy, small, 0.3).item()
    gradient = exact.exact_gradient(policy, *arguments, **small["small_where"])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter += 1e-3 * gradient[name]
    assert exact_objective(policy, small, 0.3).item() > before


def test_score_gradient_refuses_weights_of_another_shape(small):
    with pytest.raises(ValueError, match=r"weights has shape \(2, 5\), expected \(2, 133\)"):
        exact.score_gradient(small["policy"], small["ids"][:2], small["mask"][:2], torch.zeros(2, 5),
                             **small["small_where"])


# ---- DPO in the table world


def all_pairs(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of responses (N,), and the Bradley–Terry probability that the first wins."""
    first, second = torch.combinations(torch.arange(len(rewards))).T
    return first, second, torch.sigmoid(rewards[first] - rewards[second])


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_population_dpo_reaches_the_optimum(beta):
    ref_logps, rewards = table(1, 40)
    best = exact.optimum(ref_logps, rewards, beta)[0]
    found = exact.tabular_dpo(ref_logps[0], *all_pairs(rewards[0]), beta)
    assert exact.response_kl(found[None], best).item() < 1e-8
    assert exact.response_kl(ref_logps, best).item() > 0.01
    assert torch.allclose(found.exp().sum(), torch.ones((), dtype=torch.float64))


def test_population_dpo_finds_the_same_optimum_from_anywhere_and_without_a_reference_another():
    ref_logps, rewards = table(1, 25)
    pairs, beta = all_pairs(rewards[0]), 0.5
    elsewhere = exact.tabular_dpo(ref_logps[0], *pairs, beta, start=table(1, 25, seed=7)[0][0])
    assert exact.response_kl(elsewhere[None], exact.optimum(ref_logps, rewards, beta)[0]).item() < 1e-8
    uniform = torch.full_like(ref_logps, 1 / 25).log()
    without = exact.tabular_dpo(uniform[0], *pairs, beta)
    assert exact.response_kl(without[None], exact.optimum(uniform, rewards, beta)[0]).item() < 1e-8
    assert exact.response_kl(without[None], exact.optimum(ref_logps, rewards, beta)[0]).item() > 0.1


def test_tabular_dpo_leaves_what_no_pair_names_to_its_start():
    """Xu et al. 2024, table 1: π_ref = (½, ½, 0), one pair, and a third response that the loss does not see."""
    ref_logps = torch.tensor([0.5, 0.5, 1e-9], dtype=torch.float64).log()
    pair = torch.tensor([0]), torch.tensor([1]), torch.tensor([0.8])
    from_reference = exact.tabular_dpo(ref_logps, *pair, 1.0).exp()
    assert torch.allclose(from_reference, torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64), atol=1e-6)
    elsewhere = exact.tabular_dpo(ref_logps, *pair, 1.0, start=torch.tensor([0.1, 0.1, 0.8]).log()).exp()
    assert torch.allclose(elsewhere, torch.tensor([0.2, 0.05, 0.8], dtype=torch.float64) / 1.05, atol=1e-6)


def test_deterministic_labels_have_no_minimum_with_dpo_and_one_with_ipo():
    """Azar et al. 2023, §5.2: with y₁ ≻ y₂ certain DPO goes to π(y₁) = 1 for every β, IPO to σ(1/β)."""
    ref_logps = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    pair = torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0])
    for beta in (0.2, 1.0, 5.0):
        assert exact.tabular_dpo(ref_logps, *pair, beta, steps=200).exp()[0] > 0.98
        ipo = exact.tabular_dpo(ref_logps, *pair, beta, loss_type="ipo").exp()[0]
        assert ipo.item() == pytest.approx(1 / (1 + math.exp(-1 / (2 * beta))), abs=1e-6)


def test_tabular_dpo_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"first, second and wins \(2,\), \(3,\), \(2,\)"):
        exact.tabular_dpo(torch.zeros(4), torch.arange(2), torch.arange(3), torch.zeros(2), 1.0)


def test_below_sums_over_all_continuations():
    space = exact.response_space(3, 3)
    values = torch.randn(2, len(space), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = space.below(values)
    for i in range(len(space)):
        start = space.sequences[i, : space.length[i]]
        under = (space.sequences[:, : len(start)] == start).all(1)
        assert torch.allclose(sums[:, i], values[:, under].sum(1))
    with pytest.raises(ValueError, match=r"values has shape \(5,\), expected \(…, 40\)"):
        space.below(torch.zeros(5))


# ---- pruning


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.999])
def test_pruning_bounds_hold(desk, mass):
    logps, rewards = desk["ref_logps"], desk["gold"]
    pruned = exact.prune(logps, mass)
    kept = torch.where(pruned.keep, logps, -torch.inf)
    assert torch.allclose(kept.exp().sum(1) + pruned.dropped, torch.ones(6, dtype=torch.float64))
    assert (pruned.dropped <= 1 - mass + 1e-12).all()
    assert (torch.where(pruned.keep, logps, torch.inf).min(1).values >= kept_out(pruned, logps)).all()
    error = exact.expectation(logps, rewards) - exact.expectation(kept.log_softmax(1).nan_to_num(neginf=-1e4), rewards)
    assert (error.abs() <= pruned.expectation_bound(float(rewards.min()), float(rewards.max()))).all()
    for beta in (0.2, 1.0):
        log_z, full = ((table_ + rewards / beta).logsumexp(1) for table_ in (kept, logps))
        bound = pruned.log_z_bound(log_z, beta, float(rewards.max()))
        assert (full - log_z >= 0).all() and (full - log_z <= bound).all()
        assert (bound <= pruned.dropped * torch.exp(float(rewards.max()) / beta - log_z) + 1e-12).all()


def kept_out(pruned, logps) -> torch.Tensor:
    return torch.where(pruned.keep, -torch.inf, logps).max(1).values


def test_pruning_keeps_few_responses_or_all(desk):
    assert exact.prune(desk["ref_logps"], 1.0).keep.float().mean() > 0.99
    few = exact.prune(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), 0.9)
    assert few.keep.tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="mass is 0"):
        exact.prune(desk["ref_logps"], 0)


# ---- the cache on disk


def test_cache_hits_misses_and_survives_a_torn_file(desk, tmp_path, monkeypatch):
    policy, tokenizer, prompts = copy.deepcopy(desk["policy"]), desk["tokenizer"], desk["prompts"][:2]
    calls = []
    enumerate_policy = exact.trie_logps
    monkeypatch.setattr(
        enumeration, "trie_logps", lambda *args, **named: calls.append(1) or enumerate_policy(*args, **named)
    )

    def read(which=prompts, deep=2):
        return exact.response_logps(policy, tokenizer, which, max_phrases=deep, directory=tmp_path)

    first = read()
    assert torch.equal(read(), first) and len(calls) == 1
    read(prompts[::-1])
    read(deep=1)
    assert len(calls) == 3  # other prompts, another T
    with torch.no_grad():
        policy.lm_head.bias[tokenizer.eos_token_id] += 1e-3
    changed = read()
    assert len(calls) == 4 and not torch.equal(changed, first)
    with torch.no_grad():
        policy.lm_head.bias[tokenizer.eos_token_id] -= 1e-3
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert torch.allclose(read(), first, atol=1e-6) and len(calls) == 5

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cache.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        read(deep=3)
    assert all(file.suffix == ".npy" for file in tmp_path.iterdir())  # nothing half-written stays


def test_the_reward_table_is_cached_by_weights_and_normalisation(desk, tmp_path):
    model, space = tiny_reward_model(desk["tokenizer"], seed=1), exact.response_space(11, 1)
    scorers = [RewardScorer(model, desk["tokenizer"], mean, 1.0) for mean in (0.0, 0.0, 0.5)]
    tables = [exact.proxy_table(scorer, desk["prompts"], space, directory=tmp_path) for scorer in scorers]
    assert torch.equal(tables[0], tables[1]) and torch.allclose(tables[0] - 0.5, tables[2])
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_hash_sees_weights_configuration_and_adapters(desk):
    policy = copy.deepcopy(desk["policy"])
    plain = exact.weights_hash(policy)
    assert exact.weights_hash(desk["policy"]) == plain
    policy.config.rope_parameters["rope_theta"] = 1234.0
    assert exact.weights_hash(policy) != plain
    adapted = add_lora(copy.deepcopy(desk["policy"]))
    on = exact.weights_hash(adapted)
    with adapted.disable_adapter():
        assert exact.weights_hash(adapted) != on
    with pytest.raises(ValueError, match="no weights"):
        from alignkit.models.adapters import AdapterOff

        exact.weights_hash(AdapterOff(adapted))


# ---- from samples


def test_sampled_best_of_n_is_unbiased_for_the_exact_one(desk):
    """Nakano's estimator from 64 samples, 1,500 times, for the reward itself and for another score."""
    ref_logps, rewards, other = desk["ref_logps"][:1], desk["gold"][:1], desk["rewards"][:1]
    draws = draw(ref_logps[0], 1500, 64)
    for n in (1, 2, 8, 64):
        exact_n = exact.best_of_n(ref_logps, rewards, n)
        for table_, along in ((rewards, None), (other, other[0][draws])):
            estimate = exact.sampled_best_of_n(rewards[0][draws], n, along)
            error = float(estimate.mean() - exact.expectation(exact_n, table_)) / float(estimate.std() / 1500**0.5)
            assert abs(error) < 3.5, (n, along is None)


def test_sampled_best_of_n_by_hand():
    """Samples 1, 2, 3 and n = 2: the subsets {1,2}, {1,3}, {2,3} have maxima 2, 3, 3. With 1, 3, 3 and others 0, 1, 5
    the winners are the first 3, the second 3 and either, so the other score is (1 + 5 + 3) / 3."""
    assert exact.sampled_best_of_n(torch.tensor([[3.0, 1.0, 2.0]]), 2).item() == pytest.approx(8 / 3)
    tied = exact.sampled_best_of_n(torch.tensor([[1.0, 3.0, 3.0]]), 2, torch.tensor([[0.0, 1.0, 5.0]]))
    assert tied.item() == pytest.approx(3.0)
    assert exact.sampled_best_of_n(torch.tensor([[3.0, 1.0, 2.0]]), 3).item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="n is 4, expected 1 … 3"):
        exact.sampled_best_of_n(torch.tensor([[3.0, 1.0, 2.0]]), 4)


def test_sampled_optimum_agrees_with_the_exact_one(desk):
    """At a moderate β from the reference's samples, and from another policy's with importance weights."""
    beta, row = 1.0, 0
    best, log_z = exact.optimum(desk["ref_logps"], desk["gold"], beta)
    kl = exact.response_kl(best, desk["ref_logps"])
    for sampler in ("ref_logps", "logps"):
        draws = draw(desk[sampler][row], 200, 4000)
        weights = {} if sampler == "ref_logps" else {name: desk[name][row][draws] for name in ("logps", "ref_logps")}
        found = exact.sampled_optimum(desk["gold"][row][draws], beta, other=desk["rewards"][row][draws], **weights)
        for estimate, truth in ((found.log_z, log_z[row]), (found.reward, exact.expectation(best, desk["gold"])[row]),
                                (found.other, exact.expectation(best, desk["rewards"])[row]), (found.kl, kl[row])):
            assert abs(float(estimate.mean() - truth)) < 4 * float(estimate.std()) / 200**0.5 + 2e-3
        assert (found.kl <= found.ceiling + 1e-9).all()
        assert (found.effective > 20).all() and (found.effective <= 4000).all()


def test_sampled_kl_cannot_pass_its_ceiling(desk):
    """At a tiny β the true KL is far above log N; the estimate stops there and one sample holds all the weight."""
    ref_logps, rewards = desk["ref_logps"][:1], desk["rewards"][:1]
    kl = exact.response_kl(exact.optimum(ref_logps, rewards, 0.05)[0], ref_logps).item()
    found = exact.sampled_optimum(rewards[:, draw(ref_logps[0], 32)], 1e-3)
    assert kl > math.log(32) and found.kl.item() <= math.log(32) + 1e-9
    assert found.ceiling.item() == pytest.approx(math.log(32)) and found.effective.item() < 3
    index = draw(desk["logps"][0], 32)[None]  # from another policy: one sample again, and its log π/π_ref on top
    found = exact.sampled_optimum(rewards[0][index], 1e-4, logps=desk["logps"][0][index], ref_logps=ref_logps[0][index])
    assert found.effective.item() == pytest.approx(1) and found.kl.item() == pytest.approx(found.ceiling.item())
    with pytest.raises(ValueError, match="go together"):
        exact.sampled_optimum(rewards, 1.0, logps=ref_logps)
    with pytest.raises(ValueError, match="beta is -1"):
        exact.sampled_optimum(rewards, -1)


# ---- the benchmark


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    import json

    from benchmarks import exact as benchmark

    monkeypatch.setattr("sys.argv", ["exact", "--quick", "--json", str(tmp_path / "out.json")])
    benchmark.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["what"] for row in rows} >= {"enumerate", "enumerate, no cache"} and "T=3" in capsys.readouterr().out
    assert all(row["seconds"] > 0 and row["peak_mb"] >= 0 for row in rows)
