"""PPO's iteration and its step, number by number, against the same arithmetic done slowly, one response at a time."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from alignkit import ppo as ppo_module
from alignkit.configs import PPOConfig
from alignkit.desk.world import World
from alignkit.errors import NonFinite
from alignkit.formulas import losses
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward.reading import response_logits, token_values
from alignkit.forward.rollout import encode_prompts, full_ids, rollout_from_ids
from alignkit.forward.sampling import sample
from alignkit.models.adapters import add_lora, frozen_copy
from alignkit.models.heads import SharedCritic, reward_model_from
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOBatch, PPOState, ppo_iteration, ppo_step

PROMPTS = [prompt.text * (1 + number % 2) for number, prompt in enumerate(World(0).train_prompts[::101])]  # ragged
CONFIG = PPOConfig(iterations=5, prompts_per_iteration=24, minibatch_size=24, epochs=1, max_new_tokens=4,
                   temperature=0.8, kl_coef=0.3, gamma=0.9, gae_lambda=0.8, missing_eos_penalty=0.5, score_clip=1.2,
                   lr_decay=False)


def noisy(model, seed, scale=0.2):
    """The model with weights large enough that prompts and earlier tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale, generator=generator)
    return model


def score(prompts, responses):
    return [math.sin(len(text)) * 2 for text in responses]


@pytest.fixture
def state():
    """A run past its first iteration: policy and reference differ, and the critic knows something."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    critic = noisy(reward_model_from(policy), 3)
    reference = frozen_copy(noisy(copy.deepcopy(policy), 2))
    state = PPOState.start(noisy(policy, 1), tokenizer, score, PROMPTS, CONFIG, critic=critic, ref_policy=reference)
    state.iteration = 1
    return state


def rows_of(rollout):
    """The real token ids of each prompt and of each response."""
    return [(ids[mask].tolist(), response[kept].tolist()) for ids, mask, response, kept in
            zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask, strict=True)]


@torch.no_grad()
def slow_logprobs(policy, prompt, response, temperature):
    logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
    return [float(logits[len(prompt) - 1 + t].log_softmax(-1)[token]) for t, token in enumerate(response)]


@torch.no_grad()
def slow_values(critic, prompt, response):
    """V at t sees the prompt and the tokens before t: each is the last position of a forward pass of its own."""
    body = getattr(critic, critic.base_model_prefix)
    ids = [torch.tensor([prompt + response[:t]]) for t in range(len(response))]
    return [float(critic.score(body(input_ids=row).last_hidden_state[0, -1])) for row in ids]


def slow_iteration(state, rollout, scores, config):
    """Old log-probs, values, advantages and returns of each response, as lists of numbers."""
    eos = state.tokenizer.eos_token_id
    found = []
    for (prompt, response), value in zip(rows_of(rollout), scores, strict=True):
        old, ref = (slow_logprobs(model, prompt, response, config.temperature)
                    for model in (state.policy, state.ref_policy))
        values = slow_values(state.critic, prompt, response)
        rewards = [-config.kl_coef * (a - b) for a, b in zip(old, ref, strict=True)]
        shaped = value - config.missing_eos_penalty * (response[-1] != eos)
        rewards[-1] += min(max(shaped, -config.score_clip), config.score_clip)
        found.append({"old": old, "ref": ref, "values": values, "rewards": rewards, "score": value})
    if config.whiten_rewards:  # to variance 1, with their mean left where it was
        every = torch.tensor([r for row in found for r in row["rewards"]], dtype=torch.float64)
        for row in found:
            row["rewards"] = [(r - float(every.mean())) / float(every.std(correction=0)) + float(every.mean())
                              for r in row["rewards"]]
    for row in found:
        v, n = [*row["values"], 0.0], len(row["rewards"])
        delta = [row["rewards"][t] + config.gamma * v[t + 1] - v[t] for t in range(n)]
        decay = config.gamma * config.gae_lambda
        row["advantages"] = [sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        row["returns"] = [a + b for a, b in zip(row["advantages"], row["values"], strict=True)]
    if config.whiten_advantages:
        every = torch.tensor([a for row in found for a in row["advantages"]], dtype=torch.float64)
        for row in found:
            row["advantages"] = [(a - float(every.mean())) / float(every.std(correction=0)) for a in row["advantages"]]
    return found


@pytest.mark.parametrize("options", [{}, {"whiten_rewards": True}, {"whiten_advantages": False},
                                     {"missing_eos_penalty": 0.0, "score_clip": math.inf, "temperature": 1.0}])
def test_an_iteration_hands_its_steps_the_numbers_of_a_slow_reference(state, monkeypatch, options):
    config = replace(CONFIG, **options)
    start = copy.deepcopy(state)
    batches = []
    step = ppo_module.ppo_step
    monkeypatch.setattr(ppo_module, "ppo_step", lambda state, batch, *args, **more: (
        batches.append(batch), step(state, batch, *args, **more))[1])
    stats = ppo_iteration(state, config)
    (batch,) = batches
    of_prompt = {tuple(prompt): number for number, (prompt, _) in enumerate(rows_of(state.last_rollout))}
    assert len(of_prompt) > 5 and not state.last_rollout.response_mask.all() and not state.last_rollout.finished.all()
    scores = score(None, [state.tokenizer.decode(response, skip_special_tokens=True)
                          for _, response in rows_of(batch.rollout)])
    slow = slow_iteration(start, batch.rollout, scores, config)
    for number, row in enumerate(slow):
        n = len(row["old"])
        for name, expected in (("old_logprobs", "old"), ("old_values", "values"), ("advantages", "advantages"),
                               ("returns", "returns")):
            tensor = getattr(batch, name)[number]
            assert tensor[:n].tolist() == pytest.approx(row[expected], abs=2e-4), name
            assert (tensor[n:] == 0).all(), name
    kl = [sum(row["old"]) - sum(row["ref"]) for row in slow]
    assert stats.kl_to_ref == pytest.approx(sum(kl) / len(kl), abs=1e-4)
    k3 = [sum(math.expm1(b - a) - (b - a) for a, b in zip(row["old"], row["ref"], strict=True)) for row in slow]
    assert stats.kl_to_ref_k3 == pytest.approx(sum(k3) / len(k3), abs=1e-3)
    assert stats.score == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert stats.length == pytest.approx(sum(len(row["old"]) for row in slow) / len(slow))
    assert stats.ratio_first == pytest.approx(1, abs=1e-5)
    if not config.whiten_rewards:
        total = [sum(row["rewards"]) for row in slow]
        assert stats.rlhf_reward == pytest.approx(sum(total) / len(total), abs=1e-4)
    returns, values = (torch.tensor([x for row in slow for x in row[name]]) for name in ("returns", "values"))
    explained = 1 - float((returns - values).var() / returns.var())
    assert stats.explained_variance == pytest.approx(explained, abs=1e-3)


def batch_of(state, rollout, seed=0, temperature=CONFIG.temperature):
    """A batch with random advantages, returns and old values, and old log-probs near the policy's own."""
    mask, generator = rollout.response_mask, torch.Generator().manual_seed(seed)
    noise = [torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0) for _ in range(4)]
    with torch.no_grad():
        logprobs = token_logprobs(response_logits(state.policy, rollout, temperature), rollout.response_ids)
    return PPOBatch(rollout, torch.where(mask, logprobs, 0.0) + 0.2 * noise[0], noise[1], noise[2], noise[3])


def draw(state, n=12):
    ids, mask = encode_prompts(state.tokenizer, PROMPTS[:n])
    return sample(state.policy, ids, mask, max_new_tokens=4, eos_token_id=state.tokenizer.eos_token_id,
                  pad_token_id=state.tokenizer.pad_token_id, generator=seeded(5), temperature=CONFIG.temperature)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


DEMONSTRATIONS = [([1, 15, 20], [4, 5, 2]), ([1, 16], [6, 2])]


def test_a_step_is_that_of_a_slow_loop_over_tokens(state):
    """Loss: clipped surrogate, entropy bonus and ptx, each a mean over its real tokens; the critic's apart from it."""
    config = replace(CONFIG, entropy_coef=0.3, ptx_coef=0.7, clip_range=0.1, value_clip_range=0.4, max_grad_norm=0.5)
    batch = batch_of(state, draw(state))
    slow_policy, slow_critic = copy.deepcopy(state.policy), copy.deepcopy(state.critic)
    surrogate, entropies, errors, dead = [], [], [], 0
    for number, (prompt, response) in enumerate(rows_of(batch.rollout)):
        ids = torch.tensor([prompt + response])
        logprobs = (slow_policy(input_ids=ids).logits[0] / config.temperature).log_softmax(-1)
        hidden = slow_critic.model(input_ids=ids).last_hidden_state[0]
        for t, token in enumerate(response):
            a, row = float(batch.advantages[number, t]), logprobs[len(prompt) - 1 + t]
            ratio = (row[token] - batch.old_logprobs[number, t]).exp()
            surrogate.append(-torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a))
            dead += (a > 0 and float(ratio.detach()) > 1.1) or (a < 0 and float(ratio.detach()) < 0.9)
            entropies.append(-(row.exp() * row.clamp(min=-1e3)).sum())
            value, old, target = (slow_critic.score(hidden[len(prompt) - 1 + t])[0], float(batch.old_values[number, t]),
                                  float(batch.returns[number, t]))
            near = old + (value - old).clamp(-0.4, 0.4)
            errors.append(0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2))
    demonstrated = []
    for prompt, response in DEMONSTRATIONS:
        logprobs = slow_policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)  # no temperature
        demonstrated += [-logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
    means = {"policy_loss": sum(surrogate) / len(surrogate), "value_loss": sum(errors) / len(errors),
             "ptx_loss": sum(demonstrated) / len(demonstrated)}
    bonus = 0.3 * sum(entropies) / len(entropies)
    (means["policy_loss"] - bonus + 0.7 * means["ptx_loss"] + means["value_loss"]).backward()
    grads = {}
    for model, rate in ((slow_policy, CONFIG.learning_rate), (slow_critic, CONFIG.critic_learning_rate)):
        grads[model] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-5, weight_decay=0.0).step()

    before = weights(state.policy)
    demonstrations = rollout_from_ids(*zip(*DEMONSTRATIONS, strict=True), eos_token_id=2, pad_token_id=0)
    measured = ppo_step(state, batch, config, demonstrations=demonstrations)
    for name, value in means.items():
        assert measured[name] == pytest.approx(float(value.detach()), abs=1e-5), name
    assert measured["clip_fraction"] == pytest.approx(dead / len(surrogate)) and dead > 3
    assert measured["grad_norm"] == pytest.approx(grads[slow_policy], rel=1e-3) and grads[slow_policy] > 0.5
    assert (weights(state.policy) - before).abs().max() > 0.5 * CONFIG.learning_rate
    assert torch.allclose(weights(state.policy), weights(slow_policy), atol=2e-5)
    assert torch.allclose(weights(state.critic), weights(slow_critic), atol=2e-5)


def test_padding_a_minibatch_changes_neither_weights_nor_measurements(state):
    rollout = draw(state)
    batch = batch_of(state, rollout)
    prompts, responses = zip(*rows_of(rollout), strict=True)
    wide = rollout_from_ids([*prompts, [1] * 20], [*responses, [4] * 7], eos_token_id=2, pad_token_id=0)[: len(rollout)]
    tensors = (batch.old_logprobs, batch.old_values, batch.advantages, batch.returns)
    wide_batch = PPOBatch(wide, *(torch.nn.functional.pad(values, (0, 7 - values.shape[1])) for values in tensors))
    other = copy.deepcopy(state)
    measured = ppo_step(state, batch, CONFIG)
    assert ppo_step(other, wide_batch, CONFIG) == pytest.approx(measured, abs=1e-4)
    assert torch.allclose(weights(state.policy), weights(other.policy), atol=2e-5)
    assert torch.allclose(weights(state.critic), weights(other.critic), atol=2e-5)


def test_the_first_minibatch_of_a_warmed_or_cooled_policy_has_ratio_1(state):
    for temperature in (0.5, 2.0):
        stats = ppo_iteration(copy.deepcopy(state), replace(CONFIG, temperature=temperature, minibatch_size=8))
        assert stats.ratio_first == pytest.approx(1, abs=1e-4)


def test_minibatches_go_through_the_rollout_once_an_epoch_in_another_order(state, monkeypatch):
    seen = []
    names = ("policy_loss", "value_loss", "ptx_loss", "grad_norm", "clip_fraction", "kl_to_old", "ratio", "ratio_max")
    measured = dict.fromkeys(names, 0.0)
    monkeypatch.setattr(ppo_module, "ppo_step", lambda state, batch, config, **more: (
        seen.append(batch.returns), measured)[1])
    ppo_iteration(state, replace(CONFIG, epochs=2, minibatch_size=10))
    assert [len(part) for part in seen] == [10, 10, 4] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


@pytest.mark.parametrize("name", ["old_values", "returns"])
def test_a_critic_loss_that_is_not_finite_leaves_the_weights(state, name):
    batch = batch_of(state, draw(state))
    batch = replace(batch, **{name: torch.where(batch.rollout.response_mask, math.inf, 0.0)})
    before = weights(state.policy), weights(state.critic)
    with pytest.raises(NonFinite, match="the weights were left as they were"):
        ppo_step(state, batch, CONFIG)
    assert torch.equal(weights(state.policy), before[0]) and torch.equal(weights(state.critic), before[1])


def test_the_reward_sees_each_response_s_own_text_without_eos_and_padding(state):
    seen = []

    def watch(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    state.reward = watch
    ppo_iteration(state, CONFIG)
    for (prompt, response), (prompt_ids, response_ids) in zip(seen, rows_of(state.last_rollout), strict=True):
        assert state.tokenizer(prompt).input_ids == prompt_ids
        assert state.tokenizer(response, add_special_tokens=False).input_ids == [t for t in response_ids if t != 2]


# One trunk for both.


@pytest.fixture
def shared(state):
    """The same run with a critic that is a head on the policy, and knows something."""
    made = PPOState.start(state.policy, state.tokenizer, score, PROMPTS, replace(CONFIG, shared_trunk=True),
                          ref_policy=state.ref_policy)
    made.iteration = 1
    with torch.no_grad():
        made.critic.score.weight.normal_(0, 0.3, generator=seeded(8))
    return made


def test_a_shared_critic_is_a_head_that_is_0_and_trains_no_weight_of_its_own_but_that(state):
    made = PPOState.start(state.policy, state.tokenizer, score, PROMPTS, replace(CONFIG, shared_trunk=True))
    assert isinstance(made.critic, SharedCritic) and made.critic.trunk is state.policy.model
    assert [tuple(p.shape) for p in made.critic.parameters()] == [(1, state.policy.config.hidden_size)]
    assert (made.critic.score.weight == 0).all()
    with pytest.raises(ValueError, match="critic is a PhiForSequenceClassification, expected None with shared_trunk"):
        PPOState.start(state.policy, state.tokenizer, score, PROMPTS, replace(CONFIG, shared_trunk=True),
                       critic=state.critic)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_shared_critic_s_values_are_its_head_on_the_policy_s_last_hidden_states(shared, adapter):
    rollout = draw(shared)
    if adapter:  # read by the generic forward pass
        shared.policy = add_lora(shared.policy)
        critic = SharedCritic(shared.policy)
        critic.score.load_state_dict(shared.critic.score.state_dict())
        shared.critic = critic
    with torch.no_grad():
        logprobs, _, values = ppo_module._read_policy(shared, rollout, CONFIG, False)
        mask = rollout.response_mask
        apart = token_values(shared.critic, *full_ids(rollout), mask.shape[1])
        expected = response_logits(shared.policy, rollout, CONFIG.temperature)
        expected = token_logprobs(expected, rollout.response_ids)
        assert torch.allclose(logprobs[mask], expected[mask], atol=1e-5)
        body = shared.critic.trunk
        rows = [prompt + response[:t] for prompt, response in rows_of(rollout) for t in range(len(response))]
        slow = [float(shared.critic.score(body(input_ids=torch.tensor([row])).last_hidden_state[0, -1]))
                for row in rows]
    assert values[mask].tolist() == pytest.approx(slow, abs=1e-4)
    assert torch.allclose(apart[mask], values[mask], atol=1e-5) and (values[~mask] == 0).all()


@pytest.mark.parametrize("value_coef", [0.0, 0.7, 3.0])
def test_value_coef_weighs_the_value_loss_in_a_shared_trunk_and_nothing_else(shared, state, value_coef):
    config = replace(CONFIG, shared_trunk=True, value_coef=value_coef, max_grad_norm=0.5)
    batch = batch_of(shared, draw(shared))
    mask, slow, head = batch.rollout.response_mask, copy.deepcopy(shared.policy), copy.deepcopy(shared.critic.score)
    ids, attention = full_ids(batch.rollout)
    positions = (attention.long().cumsum(1) - 1).clamp(min=0)
    hidden = slow.model(input_ids=ids, attention_mask=attention, position_ids=positions).last_hidden_state
    hidden = hidden[:, -mask.shape[1] :]
    logprobs = token_logprobs(slow.lm_head(hidden) / config.temperature, batch.rollout.response_ids)[mask]
    surrogate = losses.policy_loss(logprobs, batch.old_logprobs[mask], batch.advantages[mask], 0.2).mean()
    error = losses.value_loss(head(hidden).squeeze(-1)[mask], batch.old_values[mask], batch.returns[mask]).mean()
    (surrogate + value_coef * error).backward()
    for module, rate in ((slow, config.learning_rate), (head, config.critic_learning_rate)):
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        torch.optim.AdamW(module.parameters(), lr=rate, eps=1e-5, weight_decay=0.0).step()
    measured = ppo_step(shared, batch, config)
    assert measured["value_loss"] == pytest.approx(float(error.detach()), abs=1e-5)
    assert measured["policy_loss"] == pytest.approx(float(surrogate.detach()), abs=1e-5)
    assert torch.allclose(weights(shared.policy), weights(slow), atol=2e-5)
    assert torch.allclose(weights(shared.critic), weights(head), atol=2e-5)
    apart = [copy.deepcopy(state) for _ in range(2)]  # a critic of its own leaves the policy alone
    for one, coef in zip(apart, (value_coef, 1.0), strict=True):
        ppo_step(one, batch_of(one, draw(one)), replace(CONFIG, value_coef=coef))
    assert torch.equal(*(weights(one.policy) for one in apart))


def test_one_forward_pass_a_step_serves_policy_and_shared_critic(shared, monkeypatch):
    from alignkit.forward import cpu

    read, reader = [], cpu.Reader._read
    cpu.reader(shared.policy)
    monkeypatch.setattr(cpu.Reader, "_read", lambda self, *rest: (read.append(self.model), reader(self, *rest))[1])
    ppo_step(shared, batch_of(shared, draw(shared)), replace(CONFIG, shared_trunk=True))
    assert len(read) == 3  # drawing, the old log-probs of the test's batch, the step


def test_a_shared_trunk_learns_and_its_copy_is_a_run_of_its_own(shared):
    config = replace(CONFIG, shared_trunk=True)
    other = copy.deepcopy(shared)
    assert other.critic.policy is other.policy and other.policy is not shared.policy
    assert ppo_iteration(other, config) == ppo_iteration(shared, config)
    assert torch.equal(weights(other.policy), weights(shared.policy))


# bf16.


def test_bf16_is_near_fp32_and_its_first_iteration_holds(state):
    rollout, config = draw(state), replace(CONFIG, precision="bf16")
    mask = rollout.response_mask
    with torch.no_grad():
        logprobs, low = (ppo_module._read_policy(state, rollout, each, False)[0] for each in (CONFIG, config))
        values, low_values = (ppo_module._read_critic(state, rollout, each) for each in (CONFIG, config))
    for exact, rounded in ((logprobs[mask], low[mask]), (values[mask], low_values[mask])):
        exact, rounded = exact[exact > -1e3], rounded[exact > -1e3]
        assert 1e-5 < float((rounded - exact).norm() / exact.norm()) < 0.03
        assert rounded.dtype == torch.float32
    for options in ({}, {"shared_trunk": True}):
        started = PPOState.start(copy.deepcopy(state.policy), state.tokenizer, score, PROMPTS,
                                 replace(config, **options))
        stats = ppo_iteration(started, replace(config, **options))
        assert stats.ratio_first == pytest.approx(1, abs=0.05) and stats.kl_to_ref == 0 and stats.steps == 1


def test_gradients_in_bf16_are_near_those_in_fp32(state):
    rollout, weight = draw(state), list(state.policy.parameters())
    direction = torch.randn(rollout.response_ids.shape, generator=seeded(3))
    found = []
    for precision in ("fp32", "bf16"):
        chosen = ppo_module._read_policy(state, rollout, replace(CONFIG, precision=precision), False)[0]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad((chosen * direction).sum(), weight)]))
    assert 1e-5 < float((found[0] - found[1]).norm() / found[0].norm()) < 0.05


def test_a_model_that_is_read_by_the_generic_pass_can_be_trained_in_bf16_too(state):
    config = replace(CONFIG, precision="bf16")
    policy = add_lora(load_policy("tiny", device="cpu")[0])
    started = PPOState.start(policy, state.tokenizer, score, PROMPTS, config)
    assert ppo_iteration(started, config).ratio_first == pytest.approx(1, abs=0.05)


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16', expected one of fp32, bf16"):
        PPOConfig(precision="fp16")
