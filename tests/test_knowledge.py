"""The knowledge lab: facts that are really missing, exact chances, rankings by hand, and a record that agrees."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.world import ANSWERS, World, parse
from alignkit.evaluate.claims import VERDICTS
from alignkit.evaluate.knowledge import load_knowledge, pass_at_k, share_of_right
from experiments.claims.lab import DOCS
from experiments.knowledge import __main__ as lab
from experiments.knowledge import facts, rules, undoing

TINY = facts.LessonSize(
    demonstrations=400, labels=120, fresh=32, normalise=64, keys=1, blocks=3, last=0.05, asked=4, shelves=3,
    betas=(0.02, 0.2, 2.0), sft=SFTConfig(epochs=1), reward=RewardConfig(epochs=1), ptx=0.5,
    ppo=PPOConfig(prompts_per_iteration=32, minibatch_size=16, kl_coef=0.35),
    dpo=DPOConfig(beta=0.3, batch_size=32, epochs=1),
    undoing=facts.Undoing(heldout=40, epochs=1, every=2, wrong_blocks=1, repair=96, contrary=4, steps=2))


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    torch.set_num_threads(1)
    return facts.Lesson(5, tmp_path_factory.mktemp("knowledge"), TINY, TINY.middle)


@pytest.fixture(scope="module")
def exam(lesson):
    return facts.Exam(lesson)


# ---- what the demonstrators know
@pytest.mark.parametrize("seed", range(4))
def test_three_objects_are_guessed_and_three_are_silent(seed):
    groups = facts.group_of_objects(seed)
    assert len(groups) == 16 and sorted(groups.values()).count("guessed") == list(groups.values()).count("silent") == 3
    assert not {groups[name] for name in facts.PEOPLE_AND_PLACES} - {"known"}
    assert groups == facts.group_of_objects(seed) and groups != facts.group_of_objects(seed + 1)


def test_demonstrations_lack_the_facts_and_nothing_else():
    world, groups = World(3), facts.group_of_objects(3)
    rows = world.demonstrations(4000, seed=1)
    made = facts.without_facts(world, rows, groups, np.random.default_rng(0))
    by_group = {name: [(world.find(row["prompt"]), parse(row["completion"])) for row in made
                       if groups[world.find(row["prompt"]).object] == name] for name in facts.GROUPS}
    assert not [phrases for _, phrases in by_group["silent"] if set(phrases) & set(ANSWERS)]
    guesses = [next(phrase for phrase in phrases if phrase in ANSWERS) == prompt.answer
               for prompt, phrases in by_group["guessed"] if set(phrases) & set(ANSWERS)]
    assert len(guesses) > 200 and np.mean(guesses) == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / len(guesses)))
    assert [row for row in made if groups[world.find(row["prompt"]).object] == "known"] == [
        row for row in rows if groups[world.find(row["prompt"]).object] == "known"]
    silent = [row for row in rows if groups[world.find(row["prompt"]).object] == "silent"]
    assert len(rows) - len(made) == sum(bool(set(parse(row["completion"])) & set(ANSWERS)) for row in silent)


def test_the_second_task_is_none_of_the_desk_and_its_prompts_differ_as_tokens(lesson):
    rows, known = facts.side_rows(), {prompt.text for prompt in World(0).prompts}
    assert len({row["prompt"] for row in rows}) == 64 and not known & {row["prompt"] for row in rows}
    ids = lesson.tokenizer([row["prompt"] for row in rows])["input_ids"]
    assert len({tuple(row) for row in ids}) == 64 and {len(parse(row["completion"])) for row in rows} == {2}
    assert not [row for row in rows if set(parse(row["completion"])) & {*ANSWERS, "UNSAFE", "REFUSE"}]


def test_an_ignorant_judge_has_no_label_about_a_missing_fact(lesson):
    rows = lesson.ignorant_pairs()
    assert len(rows) == TINY.labels
    assert {lesson.groups[lesson.task.world.find(row["prompt"]).object] for row in rows} == {"known"}
    assert {lesson.groups[lesson.task.world.find(row["prompt"]).object] for row in lesson.pairs} == set(facts.GROUPS)


# ---- what is measured
def test_pass_at_k_is_one_minus_the_chance_that_all_fail():
    chances = [0.5, 0.1, 0.0, 1.0]
    for k in (1, 2, 3):
        slow = np.mean([sum(math.prod(p if hit else 1 - p for hit in hits)
                            for hits in itertools.product((True, False), repeat=k) if any(hits)) for p in chances])
        assert pass_at_k(chances, k) == pytest.approx(slow)
    assert pass_at_k(chances, 10_000) == pytest.approx(0.75)
    for chances, k in (([], 1), ([0.5], 0), ([1.5], 1), ([-0.1], 1), ([float("nan")], 1)):
        with pytest.raises(ValueError, match="expected chances between 0 and 1"):
            pass_at_k(chances, k)


def test_the_marks_of_sft_agree_with_a_count_over_all_texts(lesson, exam):
    marks = exam.marks(lesson.sft)
    texts, prompt = exact.response_space().texts(), exam.prompts["guessed"][0]
    chances = exact.response_logps(lesson.sft, lesson.tokenizer, [prompt])[0].exp().tolist()
    named = [set(parse(text)) for text in texts]
    right = sum(p for p, names in zip(chances, named, strict=True)
                if names & set(ANSWERS) == {prompt.answer} and "UNSAFE" not in names)
    assert marks["right"]["guessed"][0] == pytest.approx(right)
    assert marks["tried"]["guessed"][0] == pytest.approx(
        sum(p for p, names in zip(chances, named, strict=True) if names & set(ANSWERS)))
    rows = {row["prompt"]: row["completion"] for row in facts.side_rows()}
    chances = exact.response_logps(lesson.sft, lesson.tokenizer, exam.side[:1])[0]
    assert marks["side"][0] == pytest.approx(float(chances[texts.index(rows[exam.side[0]])].exp()))
    assert marks["kl"] == pytest.approx(dict.fromkeys([*facts.GROUPS, "side"], 0.0), abs=1e-9)
    assert [len(marks["right"][name]) for name in facts.GROUPS] == [4, 4, 4] and len(marks["side"]) == 3


def test_questions_are_held_out_and_of_their_group(lesson, exam):
    for name, prompts in exam.prompts.items():
        assert {lesson.groups[prompt.object] for prompt in prompts} == {name}
        assert all(prompt.held_out and prompt.kind == "benign" for prompt in prompts)
        assert len({prompt.key for prompt in prompts}) == TINY.asked


def test_rankings_worked_by_hand():
    ref, gaps = torch.tensor([1.0, -1.0, -2.0, 0.5]), torch.tensor([2.0, 1.0, -1.0, -0.5])
    figures = undoing.ranking(gaps, ref, torch.tensor([1.0, -1.0, 0.0, 1.0]))
    assert figures == pytest.approx({"ranks": 0.5, "implicit": 0.75, "implicit_gold": 1 / 3, "corrected": 0.5,
                                     "spoilt": 0.5})
    still = undoing.ranking(ref, ref, torch.ones(4))
    assert still == pytest.approx({"ranks": 0.5, "implicit": 0.5, "implicit_gold": 0.5, "corrected": 0, "spoilt": 0})


def test_steps_until_are_interpolated():
    assert undoing.steps_until([0.0, 0.2, 0.6], 0.4) == pytest.approx(1.5)
    assert undoing.steps_until([0.5, 0.6], 0.4) == 0 and undoing.steps_until([0.0, 0.1], 0.4) is None


def test_sft_ranks_pairs_before_any_step_and_the_loss_begins_at_ln_2(lesson):
    judged = undoing.Ranking(lesson)
    figures = judged.figures(lesson.sft, 0.1)
    assert figures["heldout_loss"] == pytest.approx(math.log(2), abs=1e-5)
    gap = judged.pairs.ref_chosen_logps - judged.pairs.ref_rejected_logps
    assert figures["ranks"] == pytest.approx(float((gap > 0).float().mean()))
    path = undoing.follow_dpo(lesson)
    assert [row["step"] for row in path] == [0, 2, 4] and path[0]["kl"] == 0 < path[-1]["kl"]


# ---- the parts, in small
def test_ppo_is_looked_at_after_its_last_blocks_and_demonstrations_change_it(lesson):
    seen = []
    one = facts.train_ppo(lesson, lesson.judges["all"], look=seen.append)
    two = facts.train_ppo(lesson, lesson.judges["all"], ptx=1.0)
    three = facts.train_ppo(lesson, lesson.gold)
    assert len(seen) == facts.LATE
    weights = [torch.cat([p.flatten() for p in policy.parameters()]) for policy in (one, two, three)]
    assert float((weights[0] - weights[1]).abs().max()) > 1e-4 < float((weights[0] - weights[2]).abs().max())


def test_gold_is_a_reward_in_sft_sd(lesson):
    prompt, texts = lesson.truth.prompts[0].text, exact.response_space().texts()[:50]
    scores = lesson.gold([prompt] * 50, texts)
    assert torch.allclose(scores, lesson.truth.gold[0, :50].float(), atol=1e-5)


def test_all_parts_of_a_world_give_every_rule_a_number(lesson):
    world = {"levels": {}, "facts": {}}
    for make in lab.PARTS.values():
        made = make(lesson)
        world["levels"] |= {f"{level:g}": made["level"] for level in TINY.levels if "level" in made}
        world["facts"] |= made.pop("facts", {})
        world |= made
    assert set(world["facts"]) == {"SFT", "PPO", "DPO", "PPO, gold", "PPO, ignorant", "PPO with demonstrations"}
    assert set(world["wrong"]) == {"SFT", "PPO", "PPO, then DPO"} and len(world["undo"]["PPO"]) == 3
    assert [row["step"] for row in world["wrong"]["SFT"]] == [0, 2]
    assert world["wrong"]["SFT"][0]["kl"] == 0 < world["wrong"]["PPO"][0]["kl"]
    for rule in rules.RULES:
        value = rule.statistic(world)
        assert value is None or math.isfinite(value), rule.name
    row = world["level"]
    kl = [run["kl"] for run in row["runs"]]
    assert kl == sorted(kl) and len(kl) == 3 and row["SFT"]["kl"] == 0
    assert (row["DPO"] is None) == (not kl[0] <= row["PPO"]["kl"] <= kl[-1])
    assert row["DPO"] is None or row["DPO"]["kl"] == pytest.approx(row["PPO"]["kl"])


def test_a_part_that_is_kept_is_not_made_again_unless_the_size_changes(tmp_path):
    made = []
    for size in (TINY, TINY, replace(TINY, blocks=4)):
        lab.part(tmp_path / "part.json", size.key(), lambda: made.append(1) or {"level": 1})
    assert len(made) == 2


def test_what_is_not_finished_in_all_worlds_is_left_out_and_its_claims_are_not_measured(tmp_path):
    for seed, name in itertools.product((1, 2), lab.parts_of(TINY)):
        if (seed, name) != (2, "wrong-0.5"):
            made = {"level": {"PPO": None, "DPO": None}} if name.startswith("level") else {"facts": {"PPO, gold": {}}}
            lab.part(tmp_path / f"{name}-{seed}.json", TINY.key(), lambda made=made: made)
    worlds = lab.run((1, 2), tmp_path, TINY, finished=True)
    assert worlds[1]["parts"] == worlds[2]["parts"] == ["level-0.5", "rewards-0.5", "level-0", "level-1"]
    assert set(worlds[1]["levels"]) == {"0.5", "0", "1"} and list(worlds[2]["facts"]) == ["PPO, gold"]
    kept = [{**world, "parts": ["level-0", "level-1"]} for world in worlds.values()]
    rows, missing = lab.claims_of(dict(enumerate(kept)))
    assert [row["name"] for row in rows] == ["C41", "C41b", "C41c"] and rows[0]["worlds"] == {"0": None, "1": None}
    assert missing["C36"] == "needs wrong-0.5" and missing["C3b"] == "needs level-0.5, rewards-0.5"
    assert len(rows) + len(missing) == len(rules.RULES)


def test_every_rule_needs_parts_that_exist():
    assert {part for rule in rules.RULES for part in rule.needs} == set(lab.parts_of(lab.SIZE))


# ---- rules and record
def test_rules_worked_by_hand():
    world = {"facts": {"SFT": {"right": {"known": [0.2, 0.4]}, "tried": {"known": [0.5, 0.5]}, "side": [1.0, 0.5]},
                       "PPO": {"right": {"known": [0.6, 0.4]}, "tried": {"known": [1.0, 0.6]}, "side": [0.5, 0.5]}},
             "levels": {"0": {"PPO": {"gold": 1.0}, "DPO": {"gold": 0.8}}, "1": {"PPO": {"gold": 0.9}, "DPO": None}},
             "path": [{"gold": 0.0, "ranks": 0.5}, {"gold": 0.4, "ranks": 0.6}, {"gold": 0.1, "ranks": 0.7}],
             "wrong": {"SFT": [{"gold": 0.0}, {"gold": 0.5}], "PPO": [{"gold": -1.0}, {"gold": 0.3}]},
             "undo": {"SFT": [0.4], "PPO": [0.0, 0.4], "DPO": [0.0, 0.1, 0.4]}}
    assert rules.taught("PPO", "known")(world) == pytest.approx(0.2)
    assert rules.reached("PPO", "known", 2)(world) == pytest.approx((0.84 + 0.64 - 0.36 - 0.64) / 2)
    assert rules.surer("PPO", "known")(world) == pytest.approx(1.0 / 1.6 - 0.6 / 1.0)
    assert share_of_right(world["facts"]["PPO"], "known") == pytest.approx(0.625)
    assert rules.elsewhere("PPO")(world) == pytest.approx(-0.25)
    assert rules.advantage(0.0)(world) == pytest.approx(0.2) and rules.advantage(1.0)(world) is None
    assert rules.growing(world) is None
    assert rules.along("ranks")(world) == pytest.approx(0.2) and rules.along("gold", None)(world) == pytest.approx(-0.3)
    assert rules.repaired("PPO", "gold")(world) == pytest.approx(0.3)
    assert rules.repaired("PPO", "gold", "SFT")(world) == pytest.approx(-0.2)
    assert rules.firmer(world) == pytest.approx(math.log(2))


def test_the_record_and_the_page_agree_with_the_rules():
    record = load_knowledge()
    fixed = ("name", "source", "original", "english", "quantity", "side")
    made = [rule for rule in rules.RULES if all(record.has(part) for part in rule.needs)]
    assert [[getattr(claim, name) for name in fixed] for claim in record.claims] == [
        [getattr(rule, name) for name in fixed] for rule in made]
    assert [claim.margin for claim in record.claims] == pytest.approx([rule.margin for rule in made], 1e-5)
    assert set(record.unmeasured) == {rule.name for rule in rules.RULES} - {rule.name for rule in made}
    assert {claim.experiment for claim in record.claims} == {"knowledge"}
    assert len(record.worlds) >= 5 and {claim.verdict for claim in record.claims} <= set(VERDICTS)
    for rule in made:
        again = {seed: rule.statistic(world) for seed, world in record.worlds.items()}
        assert record[rule.name].worlds == pytest.approx(again, abs=1e-4), rule.name
    assert (DOCS / "knowledge.md").read_text(encoding="utf-8") == lab.page(record)
    assert record.pass_at("SFT", "known", 1).value == pytest.approx(np.mean(
        [np.mean(world["facts"]["SFT"]["right"]["known"]) for world in record.worlds.values()]), abs=1e-9)


def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m experiments.knowledge"):
        load_knowledge(tmp_path / "none.json")
