"""The relay from the command line on a chat model and UltraFeedback's own layout, both tiny and made here: rewards are
scored on the ids that were trained on, and a later job reads the data as the run did."""

import json
import random

import pytest
from test_course import NOTEBOOKS, SMALL, STAGES, alignkit
from test_ends import CHATML, bytes_tokenizer, policy_of

from alignkit import RewardScorer, load_policy, load_task
from alignkit.data.ends import end_after
from alignkit.evaluate.evaluation import Evaluation, EvaluationSet
from alignkit.forward.rollout import encode_rows


def rated(text: str, helpful: int, honest: int) -> dict:
    return {"model": "m", "principle": "helpfulness", "custom_system_prompt": "Be kind.", "response": text,
            "annotations": {"helpfulness": {"Rating": str(helpful), "Rationale": "so"},
                            "honesty": {"Rating": str(honest), "Rationale": "so"}}}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """(run, data, facts of how it is read) of the course on a ChatML model, trained on one aspect of the answers."""
    place, draw = tmp_path_factory.mktemp("chat"), random.Random(0)
    tokenizer = bytes_tokenizer(CHATML)
    policy = policy_of(tokenizer)
    policy.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    policy.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rows = []
    for number in range(60):
        answers = [rated("yes it is", 5, 1), rated("no never", 1, 5), rated("so so", 2, 2)]
        draw.shuffle(answers)
        rows.append({"source": "evol", "task": [{"role": "system", "content": "Be brief."},
                                                {"role": "user", "content": f"ask {number}"}], "models": ["m"],
                     "correct_answers": ["None"], "incorrect_answers": ["None"], "completions": answers})
    (place / "ultrafeedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [part for name, value in (SMALL | {"max_new_tokens": 6}).items() for part in ("-p", f"{name}={value}")]
    alignkit("course", "--model", place / "model", "--data", place / "ultrafeedback.jsonl", "--out", place / "run",
             "--columns", "prompt=task,score=honesty", *small)
    return place / "run", place / "ultrafeedback.jsonl"


@pytest.mark.slow
def test_a_chat_model_goes_through_the_course_on_one_aspect_of_ultrafeedback(course):
    run, _ = course
    summary = json.loads((run / "summary.json").read_text())
    assert set(STAGES) <= set(summary["stages"]) and set(NOTEBOOKS) <= set(summary["seconds"])
    assert summary["stages"]["reward"]["accuracy_labels"] > 0.9  # "no never" and never anything else is the honest one


@pytest.mark.slow
def test_rewards_are_scored_on_the_ids_that_were_trained_on(course):
    run, data = course
    _, tokenizer = load_policy(run / "ppo", device="cpu")
    scorer = RewardScorer.load(run / "reward", device="cpu")
    task = load_task(data, tokenizer, columns="prompt=task,score=honesty", max_new_tokens=6, max_length=192)
    rows = task.preference_pairs(None, tokenizer)
    assert {row["chosen"] for row in rows} == {"no never"} and rows[0]["scores"]["chosen"]["honesty"] == 5.0
    dpo = encode_rows(tokenizer, rows, "chosen", 64)
    trained = scorer.ids([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for number, ids in enumerate(trained):
        said = dpo.response_ids[number][dpo.response_mask[number]].tolist()
        assert ids == dpo.prompt_ids[number][dpo.prompt_mask[number]].tolist() + said and ids[-1] == end
    assert end_after(tokenizer, rows[0]["prompt"]) == end
    # what notebook 03b recorded as rewards of its evaluation is what the reward model says of these prompts and replies
    evaluation = Evaluation.load(run / "ppo" / "evaluation.json")
    asked = [prompt for prompt in evaluation.set.prompts for _ in range(evaluation.set.samples)]
    again = scorer(asked, evaluation.columns["response"])
    assert again.tolist() == pytest.approx(list(evaluation.columns["proxy"]), abs=1e-4)
    kept = EvaluationSet.load(run / "evaluation_set.json")
    assert kept.prompts[0].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.slow
def test_a_later_job_and_compare_read_the_data_as_the_run_did(course, tmp_path):
    run, data = course
    assert json.loads((run / "run.json").read_text())["columns"] == "prompt=task,score=honesty"
    small = [part for name in ("max_length", "iterations", "prompts_per_iteration", "minibatch_size")
             for part in ("-p", f"{name}={SMALL[name]}")]
    alignkit("run", "03b_ppo", "--out", run, "-p", "kl_coef=0.5", "-p", "max_new_tokens=6", *small)
    alignkit("compare", run / "sft", run / "ppo", "--data", data, "--out", tmp_path / "comparison")
