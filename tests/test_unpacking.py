"""The factorial of unpacking: one KL for all, effects and shares against slow references, and a record that agrees."""

import itertools
import math

import numpy as np
import pytest
import torch

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.world import phrase_counts
from alignkit.evaluate import unpacking
from alignkit.evaluate.ivison import Ivison, load_ivison
from alignkit.evaluate.unpacking import DATA, DPO, MIXES, PARTS, PPO, REWARDS, Unpacking, decompose, world_table
from experiments.claims.lab import DOCS
from experiments.unpacking import __main__ as lab
from experiments.unpacking import cells, rules

TINY = cells.Size(demonstrations=400, labels=128, few=64, normalise=64, keys=1, n=4, asked=4, kl=0.05,
                  sft=SFTConfig(epochs=1), reward=RewardConfig(epochs=1, batch_size=64),
                  ppo=PPOConfig(iterations=1, prompts_per_iteration=32, minibatch_size=16, kl_coef=0.35),
                  dpo=DPOConfig(beta=0.1, batch_size=32, epochs=1, learning_rate=1e-3))
EFFECTS = {**dict(zip(DATA, (0.0, 0.4, -0.6, 0.2), strict=True)), DPO: 0.0, PPO: 0.3, None: 0.0,
           **dict(zip(REWARDS, (-0.5, -0.1, 0.0), strict=True)), **dict(zip(MIXES, (0.0, 0.05), strict=True))}


AIMED = (REWARDS[-1], MIXES[1])


def made_world(noise=0.0, seed=0, together=0.0):
    """A world whose policies are the sum of the effects of their levels; together: what AIMED adds on top."""
    rng, rows = np.random.default_rng(seed), []
    recipes = [(data, DPO, None, None) for data in DATA] + [(data, PPO, REWARDS[-1], MIXES[0]) for data in DATA[1:]]
    for levels in recipes + [(DATA[0], PPO, *pair) for pair in itertools.product(REWARDS, MIXES)]:
        value = sum(EFFECTS[level] for level in levels) + noise * rng.normal() + together * (levels[2:] == AIMED)
        at = {name: value for name in (*lab.METRICS,)}
        rows.append({"data": levels[0], "algorithm": levels[1], "reward model": levels[2], "prompts": levels[3],
                     "at": at, "power": 1.0, "share": 0.9})
    rewards = {name: {"accuracy": 0.7 + EFFECTS[name] / 10, "best_of_n": 1 + 2 * EFFECTS[name]} for name in REWARDS}
    return {"cells": rows, "start": {}, "rewards": rewards}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return cells.Ground(5, tmp_path_factory.mktemp("unpacking"), TINY, "code")


# ---- effects and shares
def by_least_squares(table):
    """The same sums of squares from nested regressions on indicator columns, a factor set at a time."""
    places, y = list(np.ndindex(table.shape)), table.flatten()
    axes = range(table.ndim)

    def residual(sets):
        columns = [np.ones(len(places))]
        for chosen in sets:
            for levels in itertools.product(*(range(table.shape[axis]) for axis in chosen)):
                columns.append(np.array([all(place[a] == b for a, b in zip(chosen, levels, strict=True))
                                         for place in places], dtype=float))
        x = np.stack(columns, 1)
        return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum())

    sets = [chosen for size in axes for chosen in itertools.combinations(axes, size + 1)]
    return {chosen: residual([s for s in sets if set(s) < set(chosen)])
            - residual([s for s in sets if set(s) <= set(chosen)]) for chosen in sets}


def test_sums_of_squares_agree_with_nested_regressions_and_add_up():
    table = np.random.default_rng(0).normal(size=(4, 3, 2))
    found, expected = decompose(table, ["a", "b", "c"]), by_least_squares(table)
    assert list(found) == ["a", "b", "c", "a × b", "a × c", "b × c", "a × b × c"]
    assert list(found.values()) == pytest.approx(list(expected.values()))
    assert sum(found.values()) == pytest.approx(((table - table.mean()) ** 2).sum())


def test_sums_of_squares_worked_by_hand():
    assert decompose(np.array([[0.0, 2.0], [4.0, 10.0]]), ["row", "column"]) == pytest.approx(
        {"row": 36, "column": 16, "row × column": 4})
    with pytest.raises(ValueError, match="table has 1 axes"):
        decompose(np.zeros(3), ["a", "b"])


def test_a_world_is_read_into_its_tables():
    world = made_world()
    table = world_table(world, "all", "gold")
    assert table.shape == (4, 2) and table[2] == pytest.approx([-0.6, -0.6 + 0.3])
    table = world_table(world, "ppo", "gold")
    assert table.shape == (3, 2) and table[0] == pytest.approx([0.3 - 0.5, 0.3 - 0.45])
    assert unpacking.place_of("prompts") == ("ppo", 1) and unpacking.place_of("data") == ("all", 0)
    with pytest.raises(ValueError, match="factor is 'weather'"):
        unpacking.place_of("weather")


def test_effects_ranges_and_shares_are_those_that_were_put_in():
    record = Unpacking("command", {}, {}, {seed: made_world(0.01, seed) for seed in range(6)})
    for part in PARTS.values():
        for factor, levels in part.items():
            mean = np.mean([EFFECTS[level] for level in levels])
            for level, estimate in record.effects(factor, "gold").items():
                assert estimate.low - 0.02 < EFFECTS[level] - mean < estimate.high + 0.02
            spread = np.ptp([EFFECTS[level] for level in levels])
            assert record.ranges(factor, "gold").value == pytest.approx(spread, abs=0.03)
    shares = {name: estimate.value for name, estimate in record.shares("all", "gold").items()}
    assert sum(shares.values()) == pytest.approx(1) and shares["data × algorithm"] < 0.01
    of_data, of_algorithm = np.var([0, 0.4, -0.6, 0.2]), np.var([0, 0.3])
    assert shares["data"] == pytest.approx(of_data / (of_data + of_algorithm), abs=0.02)
    assert record.rewards("best_of_n")["bag of phrases"].value == pytest.approx(0.0)


# ---- one KL for all
def some_policies():
    torch.manual_seed(0)
    ref, reward = torch.randn(3, 40).double().log_softmax(1), torch.randn(3, 40).double()
    return ref, reward


def test_a_policy_is_brought_to_a_kl_and_an_optimum_stays_an_optimum():
    ref, reward = some_policies()
    policy = exact.optimum(ref, reward, 0.5)[0]
    own = float(exact.response_kl(policy, ref).mean())
    for kl in (0.02, own, 2 * own):
        table, power = cells.brought_to(kl, policy, ref)
        assert float(exact.response_kl(table, ref).mean()) == pytest.approx(kl, abs=2e-4)
        assert table.exp().sum(1) == pytest.approx(np.ones(3))
        assert torch.allclose(table, exact.optimum(ref, reward, 0.5 / power)[0], atol=1e-9)
    assert cells.brought_to(own, policy, ref)[1] == pytest.approx(1.0, abs=1e-3)


def test_a_policy_that_did_not_move_is_refused():
    ref, reward = some_policies()
    with pytest.raises(ValueError, match="kl is 0.5, and no power"):
        cells.brought_to(0.5, ref, ref)
    with pytest.raises(ValueError, match="kl is 50"):
        cells.brought_to(50.0, exact.optimum(ref, reward, 0.5)[0], ref)
    hardly = exact.optimum(ref, reward, 50.0)[0]
    with pytest.raises(ValueError, match="no power of the policy up to 16"):
        cells.brought_to(float(exact.response_kl(exact.optimum(ref, reward, 0.5)[0], ref).mean()), hardly, ref)


# ---- reward models and data
def test_the_bag_of_phrases_maximises_the_penalised_likelihood_and_ignores_the_prompt(ground):
    pairs = ground.pairs("overall")
    bag = cells.BagOfPhrases(pairs, ridge=1.0)
    x = torch.from_numpy(phrase_counts([row["chosen"] for row in pairs]).astype(float)
                         - phrase_counts([row["rejected"] for row in pairs]))
    weights = torch.from_numpy(bag.weights).requires_grad_(True)
    loss = -torch.nn.functional.logsigmoid(x @ weights).sum() + weights.square().sum() / 2
    loss.backward()
    assert weights.grad.abs().max() < 1e-6
    prompts, responses = ground.typical
    scores = bag.normalised(prompts, responses)(prompts, responses)
    assert abs(float(scores.mean())) < 1e-5 and float(scores.std()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(bag([prompts[0]] * 5, responses[:5]), bag(prompts[5:10], responses[:5]))


def test_all_data_sets_label_the_same_pairs_and_get_the_same_number_of_steps(ground):
    def sides(data):
        return [{row["chosen"], row["rejected"]} for row in ground.pairs(data)]

    assert sides("overall") == sides("multi-aspect") == sides("arena")
    assert sides("few, expert") == sides("overall")[: TINY.few] and len(sides("overall")) == TINY.labels
    assert ground.pairs("overall") != ground.pairs("arena")
    assert ground.longer("few, expert") == 2 and ground.longer("arena") == 1


def test_targeted_prompts_are_three_quarters_ambiguous_and_risky(ground, monkeypatch):
    asked = {}
    for mix in MIXES:
        def start(policy, tokenizer, reward, prompts, config, critic, mix=mix):
            asked[mix] = [ground.task.world.find(stratum[0]).kind for stratum in prompts]
            raise KeyboardInterrupt

        monkeypatch.setattr(cells.PPOState, "start", start)
        with pytest.raises(KeyboardInterrupt):
            ground.train("overall", "bag of phrases", mix)
    assert sorted(asked["even"]) == sorted(cells.KINDS)
    assert sum(kind in cells.DOMAIN for kind in asked["targeted"]) / len(asked["targeted"]) == 0.75


# ---- cells
def test_a_cell_is_measured_at_the_common_kl_with_its_own_policy(ground):
    dpo, ppo = ground.cell("overall"), ground.cell("overall", "small transformer", "even")
    assert (dpo["algorithm"], dpo["reward model"], ppo["algorithm"]) == (DPO, None, PPO)
    for row in (dpo, ppo):
        assert row["at"]["kl"] == pytest.approx(TINY.kl, abs=2e-4) and row["trained_kl"] > 0 and row["seconds"] > 0
        aspects = sum(row["at"][name] for name in ("helpful", "safe", "concise", "polite"))
        assert row["at"]["gold"] == pytest.approx(aspects - ground.truth.gold_scale[0] / ground.truth.gold_scale[1])
        classes = [row["at"][f"gold_{kind}"] for kind in cells.KINDS]
        assert row["at"]["gold"] == pytest.approx(np.mean(classes))
        assert row["at"]["gold_domain"] == pytest.approx(np.mean(classes[2:]))
    assert dpo["at"]["gold"] != ppo["at"]["gold"] and 0 < ppo["share"] < 1 and "share" not in dpo
    assert ground.figures(ground.truth.ref_logps)["gold"] == pytest.approx(0, abs=1e-9)


def test_best_of_n_of_gold_itself_is_the_best(ground):
    ground._judges["overall", "gold"] = lambda prompts, responses: ground.task.world.gold_scores(prompts, responses)
    ground._judges["overall", "against"] = lambda prompts, responses: -ground.task.world.gold_scores(prompts, responses)
    best, worst = ground.judged("overall", "gold"), ground.judged("overall", "against")
    gold = ground.candidates[2]
    assert best["accuracy"] == 1 and worst["accuracy"] == 0
    assert best["best_of_n"] == pytest.approx((gold.max(1) - gold.mean(1)).mean())
    assert worst["best_of_n"] == pytest.approx((gold.min(1) - gold.mean(1)).mean()) and gold.shape == (16, TINY.n)


def test_a_world_has_every_recipe_once_and_is_not_trained_again(ground, monkeypatch):
    trained = []

    def cell(self, data, reward=None, mix=None):
        trained.append((data, DPO if reward is None else PPO, reward, mix))
        return {"trained_kl": 1.0, "power": 1.0, "at": {"gold": 0.0}}

    monkeypatch.setattr(cells.Ground, "cell", cell)
    monkeypatch.setattr(cells.Ground, "judged", lambda self, data, reward: {"accuracy": 0.5, "best_of_n": 0.0})
    monkeypatch.setattr(cells.Ground, "figures", lambda self, logps: {"gold": 0.0})
    first = cells.run_world(5, ground.folder.parent, TINY, "code")
    assert cells.run_world(5, ground.folder.parent, TINY, "code") == first and list(first["rewards"]) == list(REWARDS)
    assert sorted(map(str, trained)) == sorted(
        str((row["data"], row["algorithm"], row["reward model"], row["prompts"])) for row in made_world()["cells"])


# ---- rules
def test_rules_find_what_was_put_in():
    found = {row["name"]: row["worlds"]["3"] for row in rules.measured({3: made_world()})}
    assert found == pytest.approx({
        "C42": 1.0 - 0.3, "C42b": 0.3 - 0.1, "C42c": 0.1 - 0.05, "C42d": 0.3 - 0.5, "C44": 0.3, "C44b": 0.3,
        "C44c": 0.3, "C45": 0.4, "C45b": 0.2, "C46": 0.2, "C46b": 0.1, "C46c": 1.0 - 0.5, "C47": 0.05, "C47b": 0.0,
        "C47c": 0.05, "C49": -0.6})


def test_targeted_prompts_are_asked_about_the_reward_model_that_the_rule_names():
    found = {row["name"]: row["worlds"]["3"] for row in rules.measured({3: made_world(together=0.6)})}
    assert (found["C47"], found["C47b"], found["C47c"]) == pytest.approx((0.05 + 0.6, 0.6, 0.05 + 0.2))


def test_rules_are_claims_of_the_second_article():
    names = [rule.name for rule in rules.RULES]
    assert {name.rstrip("abcd") for name in names} == {"C42", "C44", "C45", "C46", "C47", "C49"}
    assert len(names) == len(set(names))
    assert all(rule.source == "S2" and rule.margin > 0 for rule in rules.RULES)


# ---- the published tables
def test_the_published_differences_have_the_published_means():
    paper = load_ivison()
    found = paper.algorithm_differences()
    assert {name: round(value, 1) for name, value in found.items()} == {
        "factuality": -0.1, "reasoning": 1.3, "coding": 2.9, "truthfulness": -2.5, "safety": 2.3,
        "instruction following": 0.1, "average": 0.7}
    for row in paper.data:
        assert sum(row["scores"].values()) / 6 == pytest.approx(row["average"], abs=0.15), row["name"]
    without = paper.algorithm_differences(("Chatbot Arena 2023",))
    assert without["safety"] == pytest.approx((0.6 - 0.6 - 0.7 - 0.1) / 4)
    assert paper.data_ranges()["average"] == pytest.approx(61.0 - 51.5)
    rows = tuple({"name": name, "n": n, "scores": {"safety": value}, "average": 1.0}
                 for name, n, value in (("SFT", None, 0.0), ("a", 1, 2.0), ("b", 1, 5.0)))
    assert Ivison("", "", 0.0, rows, (), (), ()).data_ranges() == {"safety": 3.0, "average": 0.0}, "SFT is no data set"
    with pytest.raises(KeyError, match="no row of Table 1"):
        paper.row("ImageNet")


# ---- the record
def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments.unpacking"):
        unpacking.load_unpacking(tmp_path / "none.json")


def test_the_record_and_the_page_agree():
    record = unpacking.load_unpacking()
    assert record.settings == cells.Size().key()
    assert (DOCS / "unpacking.md").read_text(encoding="utf-8") == lab.page(record)
    again = [{**row, "worlds": unpacking.by_seed(row["worlds"])} for row in rules.measured(record.worlds)]
    assert len(record.claims) == len(again) == len(rules.RULES)
    for claim, row in zip(record.claims, again, strict=True):
        assert claim.worlds == pytest.approx(row.pop("worlds"), abs=1e-4), claim.name
        assert all(getattr(claim, name) == value for name, value in row.items()), claim.name
    for world in record.worlds.values():
        for cell in world["cells"]:
            assert cell["at"]["kl"] == pytest.approx(record.settings["kl"], abs=1e-3)
            assert math.isfinite(cell["at"]["gold"]) and 0 < cell["power"] <= cells.LARGEST
        assert {cell["data"] for cell in world["cells"]} == set(DATA)
