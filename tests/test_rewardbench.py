"""RewardBench's schema: files made for the tests, stub scorers, and sections worked by hand."""

import csv
import json
import pathlib

import numpy as np
import pytest

from alignkit import exact
from alignkit.data.rows import check
from alignkit.desk.world import World, parse
from alignkit.errors import DataError
from alignkit.evaluate.reward_table import COLUMNS, accuracy, best_of_n_gold, reward_model_table
from alignkit.evaluate.rewardbench import (
    DESK_BENCH,
    SECTIONS,
    RewardBench,
    desk_bench,
    read_rewardbench,
    rewardbench,
    write_rewardbench,
)
from alignkit.formulas.intervals import Estimate, wilson
from experiments import reward_models

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORLD = World(0)


def length(prompts, responses):
    """A scorer that likes length."""
    return [float(len(response)) for response in responses]


def rows_of(**subsets):
    """Rows of each subset from marks: 1 a pair that `length` ranks rightly, 0 wrongly, = a tie."""
    pairs = {"1": ("aaa", "b"), "0": ("a", "bbb"), "=": ("aa", "bb")}
    return [{"prompt": "p", "chosen": pairs[mark][0], "rejected": pairs[mark][1], "subset": name.replace("_", "-")}
            for name, marks in subsets.items() for mark in marks]


def test_the_table_of_the_docs_is_the_recorded_one():
    record = json.loads((ROOT / "experiments" / "results" / "reward_models.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")
    tables = {int(seed): {name: {column: Estimate(**value) for column, value in row.items()}
                          for name, row in table.items()} for seed, table in record["tables"].items()}
    assert reward_models.summarise(tables) == record["models"] and len(tables) >= 3
    for row in record["models"]:
        cells = [f"{row[c]['mean']:.3f} ({min(row[c]['values']):.3f} to {max(row[c]['values']):.3f})" for c in COLUMNS]
        assert f"| {row['name']} | {' | '.join(cells)} |" in page
    for column, told in {"best_of_n_gold": "best-of-16 in {} of {}", "accuracy": "accuracy in {}"}.items():
        agreeing, pairs = reward_models.same_order(tables, column, "downstream")
        assert told.format(agreeing, pairs) in page


# ---- the published table
def test_the_sections_are_rewardbenchs():
    sizes = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(map(len, SECTIONS.values())) == 23
    assert sum(sizes.values()) - 984 + 447 == 2985  # the released pairs: math-prm has 447, and weighs as much as code
    assert SECTIONS["Reasoning"]["math-prm"] == 6 * SECTIONS["Reasoning"]["hep-python"]


# ---- values by hand
def test_sections_are_means_with_the_published_weights_and_overall_is_the_mean_of_sections():
    rows = rows_of(alpacaeval_easy="1110", mt_bench_easy="10", math_prm="1111", hep_cpp="0001")
    result = rewardbench(length, rows)
    chat, reasoning = (0.75 * 100 + 0.5 * 28) / 128, (1 * 984 + 0.25 * 164) / 1148
    assert {name: value.value for name, value in result.subsets.items()} == {
        "alpacaeval-easy": 0.75, "mt-bench-easy": 0.5, "math-prm": 1, "hep-cpp": 0.25}
    assert {name: value.value for name, value in result.sections.items()} == pytest.approx(
        {"Chat": chat, "Reasoning": reasoning})
    assert result.overall.value == pytest.approx((chat + reasoning) / 2)
    assert result.metrics["rewardbench"] == result.overall
    assert result.metrics["rewardbench/Chat"].value == pytest.approx(chat)
    assert result.metrics["rewardbench/Reasoning/math-prm"].value == 1


def test_intervals_are_wilsons_and_a_section_counts_as_many_pairs_as_vary_as_much():
    result = rewardbench(length, rows_of(alpacaeval_easy="1110", mt_bench_easy="10"))
    easy = result.subsets["alpacaeval-easy"]
    assert (easy.low, easy.high) == pytest.approx(wilson(3, 4))
    pairs = 128**2 / (100**2 / 4 + 28**2 / 2)
    value = (75 + 14) / 128
    assert (result.sections["Chat"].low, result.sections["Chat"].high) == pytest.approx(wilson(value * pairs, pairs))
    equal = RewardBench({"a": (3, 4), "b": (1, 4)}, 0)  # equal weights and sizes: eight pairs in all
    assert (equal.overall.low, equal.overall.high) == pytest.approx(wilson(4, 8))
    perfect = RewardBench({name: (5, 5) for names in SECTIONS.values() for name in names}, 0)
    assert perfect.overall.value == 1 and perfect.overall.high == 1 > perfect.overall.low


def test_ties_count_as_wrong_and_are_counted():
    result = rewardbench(length, rows_of(donotanswer="11=="))
    assert result.subsets["donotanswer"].value == 0.5 and result.ties == 2
    assert "2 pairs have equal scores and count as wrong" in str(result)
    swapped = rewardbench(lambda prompts, responses: [-score for score in length(prompts, responses)],
                          rows_of(donotanswer="11=="))
    assert swapped.subsets["donotanswer"].value == 0


def test_missing_subsets_are_named_and_what_is_left_is_called_partial():
    result = rewardbench(length, rows_of(alpacaeval_easy="1", **{
        name.replace("-", "_"): "1" for name in SECTIONS["Safety"]}))
    assert "Safety" not in result.missing and "Safety (partial)" not in str(result)
    assert result.missing["Chat"] == ("alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med")
    assert len(result.missing["Reasoning"]) == 7
    assert any(note.startswith("Chat is partial, without alpacaeval-length") for note in result.notes)
    assert any(note.startswith("Reasoning is missing, without math-prm") for note in result.notes)
    assert "Chat (partial)" in str(result) and "overall (partial)" in str(result)
    full = rewardbench(length, rows_of(**{n.replace("-", "_"): "1" for names in SECTIONS.values() for n in names}))
    assert full.missing == {} and full.notes == [] and "partial" not in str(full)


def test_unknown_subsets_are_sections_of_their_own_name():
    result = rewardbench(length, rows_of(mine="1110", yours="0"))
    assert {name: value.value for name, value in result.sections.items()} == {"mine": 0.75, "yours": 0}
    assert result.overall.value == pytest.approx(0.375) and result.missing == {}
    assert set(result.metrics) == {"rewardbench", "rewardbench/mine", "rewardbench/yours"}
    namesake = rewardbench(length, rows_of(Chat="0", alpacaeval_easy="1"))
    assert {name: value.value for name, value in namesake.sections.items()} == {"Chat": 1, "Chat (subset)": 0}
    hostile = rewardbench(length, [{**row, "subset": "\x1b[2J\n"} for row in rows_of(x="1")])
    assert "\x1b" not in str(hostile) and len(str(hostile).splitlines()) == 2


# ---- files
def test_rewardbenchs_columns_are_read_and_the_rest_is_left_out(tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "math-prm", "chosen_model": "human",
           "rejected_model": "gpt", "id": 7, "text_chosen": "…"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rewardbench(tmp_path / "b.jsonl") == [{name: row[name] for name in list(row)[:-1]}]
    with open(tmp_path / "b.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["subset", "prompt", "chosen", "rejected"], ["x", "p\nq", "c", "r"]])
    assert read_rewardbench(tmp_path / "b.csv") == [{"prompt": "p\nq", "chosen": "c", "rejected": "r", "subset": "x"}]


def test_rows_that_are_no_pairs_are_named(tmp_path):
    lines = [{"prompt": "p", "chosen": "c", "rejected": ["r", "s"], "subset": "x"}, {"prompt": "p", "chosen": ""},
             {"prompt": "p", "chosen": "c", "rejected": "r"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError) as error:
        read_rewardbench(tmp_path / "b.jsonl")
    said = str(error.value)
    assert "b.jsonl:1: rejected: is a list, expected text" in said and "b.jsonl:2: chosen: is empty" in said
    assert "b.jsonl:3: subset: is missing" in said and "prompt, chosen, rejected, subset" in said


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        rewardbench(length, [])
    for scores in ([1.0, 2.0], [float("nan")]):
        with pytest.raises(ValueError, match=r"expected \(1,\) finite"):
            rewardbench(lambda prompts, responses, scores=scores: scores, rows_of(x="1"))


# ---- the desk world's bench
def test_gold_prefers_every_chosen_reply_and_each_subset_tests_what_its_name_says():
    rows = desk_bench(WORLD, 60)
    assert [list(DESK_BENCH).index(row["subset"]) for row in rows] == [i for i in range(5) for _ in range(60)]
    held_out = {prompt.text: prompt for prompt in WORLD.heldout_prompts}
    prompts = [row["prompt"] for row in rows]
    better, worse = (WORLD.gold_scores(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    assert (better > worse + 0.02).all()
    for row in rows:
        chosen, rejected = parse(row["chosen"]), parse(row["rejected"])
        assert held_out[row["prompt"]].kind == DESK_BENCH[row["subset"]][0]
        if row["subset"] == "Length":
            assert len(rejected) > len(chosen) and set(chosen) <= set(rejected)
        if row["subset"] == "Adversarial-polite":
            assert rejected.count("POLITE") > chosen.count("POLITE")
        if row["subset"] in ("Look-alike", "Risky"):
            assert ("REFUSE" in chosen) == (row["subset"] == "Risky")


def test_the_bench_finds_what_a_reward_is_biased_towards():
    rows = desk_bench(WORLD, 40)
    gold = rewardbench(WORLD.gold_scores, rows)
    assert gold.overall.value == 1 and gold.ties == 0
    polite = rewardbench(lambda prompts, responses: WORLD.gold_scores(prompts, responses) + 5 * np.array(
        [parse(response).count("POLITE") for response in responses]), rows)
    assert polite.sections["Adversarial-polite"].value == 0 and polite.sections["Easy"].value == 1
    assert rewardbench(length, rows).sections["Length"].value == 0
    refusing = rewardbench(lambda prompts, responses: ["REFUSE" in parse(text) for text in responses], rows)
    assert refusing.sections["Risky"].value == 1 and refusing.sections["Look-alike"].value == 0


def test_the_same_seed_makes_the_same_bench():
    assert desk_bench(WORLD, 9, seed=1) == desk_bench(WORLD, 9, seed=1) != desk_bench(WORLD, 9, seed=2)


def test_what_is_written_is_read_back_and_scores_the_same(tmp_path):
    written = write_rewardbench(length, WORLD, tmp_path / "desk.jsonl", 12, seed=3)
    rows = read_rewardbench(tmp_path / "desk.jsonl")
    assert rows == desk_bench(WORLD, 12, seed=3) and rewardbench(length, rows) == written
    lines = [json.loads(line) for line in (tmp_path / "desk.jsonl").read_text().splitlines()]
    assert {"prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset", "id", "scores_chosen",
            "scores_rejected", "results"} == set(lines[0])
    assert all(line["scores_chosen"] == len(line["chosen"]) for line in lines)
    assert sum(line["results"] for line in lines) == sum(right for right, _ in written.won.values())
    assert check(tmp_path / "desk.jsonl", "pairs").ok  # and it is a file of preference pairs too


# ---- reward models side by side
@pytest.fixture(scope="module")
def tiny():
    from alignkit.models.loading import load_policy

    return load_policy("tiny", seed=0, device="cpu")


QUESTIONS = [prompt.text for prompt in WORLD.heldout_prompts[:40:10]]  # of different keys
PAIRS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in desk_bench(WORLD, 4)]


def shortest(prompts, responses):
    return [-float(len(response)) for response in responses]


def test_best_of_n_by_gold_itself_is_the_mean_of_the_largest_of_n(tiny):
    logps, gold = exact.response_logps(*tiny, QUESTIONS), exact.gold_table(WORLD, QUESTIONS, exact.response_space())
    rng, best = np.random.default_rng(0), []
    for chances, values in zip(logps.exp().numpy(), gold.numpy(), strict=True):
        drawn = rng.choice(values, (20_000, 4), p=chances / chances.sum())
        best.append(drawn.max(1).mean())
    mean = float((logps.exp() * gold).sum(1).mean())
    spread = float(((logps.exp() * gold.square()).sum(1).mean() - mean**2).sqrt())
    found = best_of_n_gold({"gold": WORLD.gold_scores, "short": shortest}, *tiny, QUESTIONS, WORLD, n=4)
    assert found["gold"].value == pytest.approx((np.mean(best) - mean) / spread, abs=0.03)  # 80,000 draws
    assert found["gold"].value > found["short"].value


def test_best_of_one_is_the_policy_itself(tiny):
    found = best_of_n_gold({"any": shortest}, *tiny, QUESTIONS[:1], WORLD, n=1)
    assert found["any"].value == pytest.approx(0, abs=1e-9)


def test_best_of_n_from_samples_agrees_with_the_exact_one(tiny):
    scorers = {"short": shortest, "gold": WORLD.gold_scores}
    truth = best_of_n_gold(scorers, *tiny, QUESTIONS, WORLD, n=4)
    sampled = best_of_n_gold(scorers, *tiny, QUESTIONS * 32, WORLD.gold_scores, n=4, max_new_tokens=4)
    for name, value in truth.items():
        assert sampled[name].value == pytest.approx(value.value, abs=0.12)  # 128 prompts × 16 samples


def test_paraphrases_are_one_cluster(tiny):
    one_key = [prompt.text for prompt in WORLD.heldout_prompts[:2]]
    assert len({WORLD.find(text).key for text in one_key}) == 1
    assert best_of_n_gold({"s": shortest}, *tiny, one_key, WORLD, n=2)["s"].low is None  # one cluster tells no spread


def test_the_table_has_a_row_a_model_and_a_slot_for_what_came_of_it(tiny):
    bench = desk_bench(WORLD, 8)
    table = reward_model_table({"gold": WORLD.gold_scores, "long": length}, PAIRS, bench, *tiny, QUESTIONS, WORLD, n=4,
                               downstream={"gold": 0.7})
    assert set(table["gold"]) == set(COLUMNS) and table["gold"]["downstream"] == Estimate(0.7, None, None)
    assert "downstream" not in table["long"]
    assert table["gold"]["accuracy"].value == 1 == table["gold"]["rewardbench"].value
    right = sum(len(row["chosen"]) > len(row["rejected"]) for row in PAIRS)
    ties = sum(len(row["chosen"]) == len(row["rejected"]) for row in PAIRS)
    assert table["long"]["accuracy"].value == pytest.approx((right + ties / 2) / len(PAIRS))
    assert table["long"]["rewardbench"] == rewardbench(length, bench).overall
    alone = best_of_n_gold({"long": length}, *tiny, QUESTIONS, WORLD, n=4)
    assert table["long"]["best_of_n_gold"] == alone["long"]
    assert accuracy(lambda prompts, responses: [0.0] * len(prompts), PAIRS).value == 0.5


def test_a_table_that_cannot_be_made_says_why(tiny):
    given = (PAIRS, desk_bench(WORLD, 1), *tiny, QUESTIONS[:1], WORLD)
    with pytest.raises(ValueError, match="scorers is empty"):
        reward_model_table({}, *given)
    with pytest.raises(ValueError, match="pairs is empty"):
        reward_model_table({"long": length}, [], *given[1:])
    with pytest.raises(ValueError, match="downstream names 'other', expected one of long"):
        reward_model_table({"long": length}, *given, downstream={"other": 1})
    with pytest.raises(ValueError, match="n is 0"):
        reward_model_table({"long": length}, *given, n=0)
    with pytest.raises(ValueError, match="gold is the same for all"):
        best_of_n_gold({"long": length}, *tiny, QUESTIONS, lambda prompts, responses: [1.0] * len(prompts), n=2,
                       max_new_tokens=2)


# ---- the experiment
def test_the_experiment_runs_small_and_its_summary_is_of_its_tables():
    size = reward_models.Size(demonstrations=256, steps=2, heldout=32, each=4, keys=1, iterations=0, epochs=1)
    tables = {0: reward_models.run_seed(0, size)}
    rows = reward_models.summarise(tables)
    assert [row["name"] for row in rows] == list(reward_models.MODELS) and "downstream" not in rows[0]
    assert rows[2]["accuracy"]["values"] == [tables[0]["1,000 pairs"]["accuracy"].value]


def test_how_often_two_columns_order_models_alike_is_counted_by_hand():
    def row(a, b):
        return {"accuracy": Estimate(a, None, None), "rewardbench": Estimate(b, None, None)}

    tables = {0: {"x": row(0.1, 0.1), "y": row(0.2, 0.3), "z": row(0.3, 0.2)},  # z and y apart
              1: {"x": row(0.1, 0.1), "y": row(0.2, 0)}}  # x and y apart
    assert reward_models.same_order(tables, "accuracy", "rewardbench") == (2, 4)
