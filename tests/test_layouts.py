"""Layouts of published data sets: from their columns to the normal rows; what is refused, with the flag that helps."""

import json
import re
import subprocess
import sys

import pytest
from test_data import tokenizer, write  # noqa: F401 (fixtures)

from alignkit.data.layouts import columns_of
from alignkit.data.rows import _Scan, check, load_rows
from alignkit.errors import DataError
from alignkit.jobs import cli
from alignkit.task import load_task


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


Q, YES, NO = user("Hi?"), bot("Yes."), bot("No.")
TEXT, CHAT = ("Hi?", "Yes.", "No."), ([Q], "Yes.", "No.")
BE_KIND = ([system("Be kind."), Q], "Yes.", "No.")
TURNS = [Q, bot("Hello!"), user("2+2?")]
LONG = (TURNS, "4", "5")
HH = "\n\nHuman: Hi?\n\nAssistant:"

PAIRS = {  # layout -> a row with the published columns, and what it says: prompt, chosen, rejected
    "TRL standard": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, TEXT),
    "TRL standard implicit, HH-RLHF": ({"chosen": HH + " Yes.", "rejected": HH + " No."}, (HH, " Yes.", " No.")),
    "TRL conversational": ({"prompt": [Q], "chosen": [YES], "rejected": [NO]}, CHAT),
    "the system prompt is in the prompt alone, whose end the replies repeat": (
        {"prompt": [system("Be kind."), Q], "chosen": [Q, YES], "rejected": [Q, NO]}, BE_KIND),
    "TRL conversational implicit": ({"chosen": [Q, YES], "rejected": [Q, NO]}, CHAT),
    "ultrafeedback_binarized": ({"prompt": "Hi?", "prompt_id": "ab", "chosen": [Q, YES], "rejected": [Q, NO],
                                 "messages": [Q, YES], "score_chosen": 8.5, "score_rejected": 6.0}, CHAT),
    "ultrafeedback-binarized-preferences": (
        {"source": "evol", "instruction": "Hi?", "chosen_response": "Yes.", "rejected_response": "No.",
         "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0, "chosen_model": "m"}, TEXT),
    "ultrafeedback-binarized-preferences-cleaned": (
        {"source": "evol", "prompt": "Hi?", "chosen": [Q, YES], "chosen-rating": 5.0, "chosen-model": "m",
         "rejected": [Q, NO], "rejected-rating": 3.0, "rejected-model": "n"}, CHAT),
    "openbmb/UltraFeedback": (
        {"source": "evol", "instruction": "Hi?", "models": ["m", "n", "o"], "correct_answers": ["None"],
         "incorrect_answers": ["None"], "completions": [
             {"model": "m", "response": "No.", "fine-grained_score": 2.0, "overall_score": 9.0, "principle": "honesty"},
             {"model": "n", "response": "Yes.", "fine-grained_score": 4.5, "overall_score": 7.0},
             {"model": "o", "response": "Perhaps.", "fine-grained_score": 3.0, "overall_score": 6.0}]}, TEXT),
    "SHP-2": ({"post_id": "x", "domain": "askcooking", "upvote_ratio": 0.9, "history": "Hi?", "c_root_id_A": "a",
               "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 3, "score_B": 8,
               "human_ref_A": "No.", "human_ref_B": "Yes.", "labels": 0, "seconds_difference": 1.0,
               "score_ratio": 2.0}, TEXT),
    "SHP-2, the first": ({"history": "Hi?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1}, TEXT),
    "HelpSteer2-preference": (
        {"split": "train", "prompt": "Hi?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 2,
         "preference_statement": "2 is better", "preference_elaboration": "it says yes",
         "three_most_similar_preferences": [{"statement": "2"}], "all_preferences_unprocessed": [{"strength": 2}]},
        TEXT),
    "HelpSteer3": ({"domain": "general", "language": "english", "context": TURNS, "response1": "4", "response2": "5",
                    "overall_preference": -1, "individual_preference": [{"score": -1}]}, LONG),
    "Nectar": ({"prompt": HH + " ", "answers": [{"answer": "b", "model": "m", "rank": 2.0},
                                                {"answer": "a", "model": "n", "rank": 1.0},
                                                {"answer": "c", "model": "o", "rank": 3.0}],
                "turns": 1, "num_responses": 3, "source": ["x"], "good_natured": True}, (HH + " ", "a", "c")),
    "Intel/orca_dpo_pairs": ({"system": "Be kind.", "question": "Hi?", "chosen": "Yes.", "rejected": "No."}, BE_KIND),
    "Intel/orca_dpo_pairs, no system": ({"system": "", "question": "Hi?", "chosen": "Yes.", "rejected": "No."}, TEXT),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "Be kind.", "input": "Hi?", "chosen": "Yes.", "rejected": "No.", "generations": ["Yes.", "No."],
         "order": ["a", "b"], "labelling_model": "gpt", "labelling_prompt": [user("judge")], "rating": [9.0, 7.0],
         "raw_labelling_response": "9", "rationale": "why", "status": "unchanged", "original_chosen": "Yes.",
         "original_rejected": "No.", "chosen_score": 9.0, "in_gsm8k_train": False}, BE_KIND),
    "HuggingFaceH4/orca_dpo_pairs": (
        {"prompt": "Hi?", "chosen": [system("Be kind."), Q, YES], "rejected": [system("Be kind."), Q, NO]}, BE_KIND),
    "distilabel-capybara": (
        {"source": "Dove", "conversation": [{"input": "Hi?", "output": "Hello!"}, {"input": "2+2?", "output": "four"}],
         "original_response": "four", "generation_prompt": ["<s>"], "raw_generation_responses": ["4", "5"],
         "new_generations": ["4", "5"], "prompt": "Hi?", "chosen": [*TURNS, bot("4")], "rejected": [*TURNS, bot("5")],
         "rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"}, LONG),
    "stack-exchange-paired": ({"qid": 1, "question": "Hi?", "date": "2020", "metadata": ["x"], "response_j": "Yes.",
                               "response_k": "No."}, TEXT),
    "stack-exchange-preferences": (
        {"qid": 1, "question": "Hi?", "date": "2020", "metadata": ["x"], "answers": [
            {"answer_id": 1, "author": "a", "pm_score": 1, "selected": False, "text": "No."},
            {"answer_id": 2, "author": "b", "pm_score": 4, "selected": True, "text": "Yes."}]}, TEXT),
    "chatbot_arena_conversations": (
        {"question_id": "x", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j",
         "conversation_a": [Q, NO], "conversation_b": [Q, YES], "turn": 1, "anony": True, "language": "English",
         "tstamp": 1.0, "openai_moderation": {"flagged": False}, "toxic_chat_tag": {"t5": {}}}, CHAT),
    "lmsys-arena-human-preference-55k": (
        {"id": 1, "model_a": "m", "model_b": "n", "prompt": '["Hi?"]', "response_a": '["Yes."]',
         "response_b": '["No."]',
         "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, TEXT),
    "PKU-SafeRLHF": (
        {"prompt": "Hi?", "prompt_source": "x", "response_0_source": "m", "response_1_source": "n", "response_0": "No.",
         "response_1": "Yes.", "is_response_0_safe": True, "is_response_1_safe": False,
         "response_0_harm_category": {"a": False}, "response_1_harm_category": {"a": True},
         "response_0_severity_level": 0, "response_1_severity_level": 3, "better_response_id": 1,
         "safer_response_id": 0, "response_0_sha256": "ab", "response_1_sha256": "cd"}, TEXT),
    "tulu-3-preference-mixture": ({"id": "x", "source": "y", "prompt": "Hi?", "chosen": [*TURNS, bot("4")],
                                   "rejected": [*TURNS, bot("5")], "chosen_model": "m"}, LONG),
    "OpenAI": ({"input": {"messages": [Q], "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES],
                "non_preferred_output": [NO]}, CHAT),
    "LLaMA-Factory alpaca": ({"instruction": "Hi?", "input": "", "chosen": "Yes.", "rejected": "No."}, TEXT),
    "LLaMA-Factory alpaca, all": (
        {"instruction": "Is it", "input": "so?", "chosen": "Yes.", "rejected": "No.", "system": "Be kind.",
         "history": [["Hi?", "Hello!"]]},
        ([system("Be kind."), Q, bot("Hello!"), user("Is it\nso?")], "Yes.", "No.")),
    "LLaMA-Factory alpaca, list": ({"instruction": "Hi?", "input": "", "output": ["Yes.", "No."]}, TEXT),
    "LLaMA-Factory sharegpt": ({"conversations": [human("Hi?")], "chosen": gpt("Yes."), "rejected": gpt("No.")}, CHAT),
    "LLaMA-Factory sharegpt, system": (
        {"conversations": [human("Hi?")], "chosen": gpt("Yes."), "rejected": gpt("No."), "system": "Be kind."},
        BE_KIND),
    "axolotl": ({"messages": [Q], "chosen": YES, "rejected": NO}, CHAT),
    "axolotl argilla": ({"system": "Be kind.", "instruction": "Hi?", "chosen_response": "Yes.",
                         "rejected_response": "No."}, BE_KIND),
    "ms-swift": ({"messages": [Q, YES], "rejected_response": "No."}, CHAT),
    "ms-swift, query": ({"system": "Be kind.", "query": "Hi?", "response": "Yes.", "rejected_response": "No."},
                        BE_KIND),
    "rejected first": ({"rejected": "No.", "chosen": "Yes.", "prompt": "Hi?"}, TEXT),
    "ms-swift, lists": ({"messages": [*TURNS, bot("4")], "rejected_messages": [*TURNS, bot("5")]}, LONG),
    "PRM800K": (
        {"labeler": "x", "timestamp": "t", "question": {"problem": "1+1+1?", "ground_truth_answer": "3"}, "label": {
            "steps": [{"completions": [{"text": "1+1=2", "rating": 1}], "human_completion": None,
                       "chosen_completion": 0},
                      {"completions": [{"text": "2+1=4", "rating": -1}, {"text": "2+1=3", "rating": 1}],
                       "human_completion": None, "chosen_completion": 1}], "total_time": 1}},
        ("1+1+1?\n1+1=2\n", "2+1=3", "2+1=4")),
    # of the same kinds
    "WebGPT": ({"question": {"dataset": "eli5", "id": "x", "full_text": "Hi?"}, "quotes_0": {"title": ["t"]},
                "answer_0": "No.", "tokens_0": {"prefix": [1]}, "score_0": -0.5, "quotes_1": {"title": ["t"]},
                "answer_1": "Yes.", "tokens_1": {"prefix": [1]}, "score_1": 0.5}, TEXT),
    "summarize_from_feedback": ({"info": {"id": "x", "post": "Hi?", "title": "t"}, "summaries": [
        {"text": "No.", "policy": "p"}, {"text": "Yes.", "policy": "q"}], "choice": 1, "worker": "w",
        "split": "t"}, TEXT),
    "RewardBench": ({"prompt": "Hi?", "chosen": "Yes.", "chosen_model": "m", "rejected": "No.", "rejected_model": "n",
                     "subset": "s", "id": 3}, TEXT),
    "full-hh-rlhf": ({"prompt": "Hi?", "response": "Yes.", "chosen": "Yes.", "rejected": "No."}, TEXT),
    "empty system message": ({"prompt": [system(""), Q], "chosen": [YES], "rejected": [NO]}, CHAT),
    "content in parts": ({"prompt": [user([{"type": "text", "text": "Hi?"}])], "chosen": [YES], "rejected": [NO]},
                         CHAT),
    "messages as JSON": ({"prompt": "Hi?", "chosen": json.dumps([Q, YES]), "rejected": json.dumps([Q, NO])}, CHAT),
    "messages as JSON in JSON": ({"chosen": json.dumps(json.dumps([Q, YES])),
                                  "rejected": json.dumps(json.dumps([Q, NO]))}, CHAT),
    "messages as Python": ({"prompt": "Hi?", "chosen": str([Q, YES]), "rejected": str([Q, NO])}, CHAT),
    "an object as JSON": ({"chosen": json.dumps({"messages": [Q, YES]}), "rejected": json.dumps({"messages": [Q, NO]})},
                          CHAT),
    "sharegpt as JSON, other keys first": ({"chosen": json.dumps([human("Hi?"), {"weight": 1, **gpt("Yes.")}]),
                                            "rejected": json.dumps([human("Hi?"), {"weight": 0, **gpt("No.")}])}, CHAT),
    "a developer's message": ({"input": {"messages": [{"role": "developer", "content": "Be kind."}, Q]},
                               "preferred_output": [YES], "non_preferred_output": [NO]}, BE_KIND),
    "system column and system message": ({"system": "Be kind.", "chosen": [system("Be kind."), Q, YES],
                                          "rejected": [system("Be kind."), Q, NO]}, BE_KIND),
    "columns equal but for null keys": ({"prompt": [Q | {"tool_calls": None}], "chosen": [Q | {"name": None}, YES],
                                         "rejected": [Q, NO]}, CHAT),
}
DEMONSTRATIONS = {
    "KTO": ({"prompt": "Hi?", "completion": "Yes.", "label": True}, ("Hi?", "Yes.")),
    "KTO, CSV": ({"prompt": "Hi?", "completion": "Yes.", "label": "True"}, ("Hi?", "Yes.")),
    "KTO, conversational": ({"prompt": [Q], "completion": [YES], "label": True}, ([Q], "Yes.")),
    "KTO, LLaMA-Factory": ({"messages": [Q, YES], "kto_tag": True}, ([Q], "Yes.")),
    "KTO, ms-swift": ({"messages": [Q, YES], "label": 1}, ([Q], "Yes.")),
    "tulu-3-sft-mixture": ({"id": "x", "messages": [system("Be kind."), Q, YES], "source": "y"},
                           ([system("Be kind."), Q], "Yes.")),
    "no_robots": ({"prompt": "Hi?", "prompt_id": "x", "messages": [Q, YES], "category": "Chat"}, ([Q], "Yes.")),
    "messages as JSON text": ({"messages": json.dumps([Q, YES])}, ([Q], "Yes.")),
    "text that is JSON": ({"text": json.dumps({"messages": [Q, YES]})}, ([Q], "Yes.")),
    "response and label": ({"prompt": "Hi?", "response": "Yes.", "label": 1.0}, ("Hi?", "Yes.")),
    "alpaca": ({"instruction": "Is it", "input": "so?", "output": "Yes.", "text": "### Is it\nso?\n### Yes."},
               ("Is it\nso?", "Yes.")),
    "dolly": ({"instruction": "Hi?", "context": "", "response": "Yes.", "category": "qa"}, ("Hi?", "Yes.")),
    "OpenHermes": ({"conversations": [human("Hi?"), gpt("Yes.")], "source": "x"}, ([Q], "Yes.")),
}


def normal(path, **options):
    """The rows of a file as (prompt, reply, …), conversations as lists of messages."""
    scan = _Scan(path, options.get("kind"), None, None, False, options.get("split"), options.get("columns"))
    rows = [{name: text for name, text in row.items() if name != "scores"} for row, _ in scan if row]
    return [tuple(json.loads(text) if text.startswith('[{"role"') else text for text in row.values()) for row in rows]


def test_marks_that_contradict_their_pair_and_further_turns_are_told(write):  # noqa: F811
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    rows = [row | {"score_chosen": 2, "score_rejected": 9}, row | {"score_chosen": 9.0, "score_rejected": 2.0},
            row | {"chosen": "Yes.\n\nHuman: And?\n\nAssistant: No.", "score_chosen": 3, "score_rejected": 3}]
    told = str(check(write("a.jsonl", rows)))
    assert "'score_chosen' is below 'score_rejected', which contradicts the pair (the pair counts)" in told
    assert "a reply holds further turns of a transcript" in told
    assert "contradicts" not in str(check(write("b.jsonl", rows[1:])))


@pytest.mark.parametrize("row, expected", [*PAIRS.values(), *DEMONSTRATIONS.values()],
                         ids=[*PAIRS, *DEMONSTRATIONS])
def test_a_published_layout_becomes_the_normal_form(write, row, expected):  # noqa: F811
    path = write("a.jsonl", [row] * 3)
    report = check(path)
    assert report.ok and report.kind == ("pairs" if len(expected) == 3 else "demonstrations"), str(report)
    assert normal(path) == [expected] * 3


@pytest.mark.parametrize("name", ["ultrafeedback_binarized", "OpenAI", "stack-exchange-preferences", "axolotl",
                                  "SHP-2"])
def test_a_layout_is_the_same_in_parquet(tmp_path, name):
    import pyarrow
    from pyarrow import parquet

    row, expected = PAIRS[name]
    parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "a.parquet")
    assert check(tmp_path / "a.parquet").ok and normal(tmp_path / "a.parquet") == [expected] * 2


def test_a_pair_can_be_read_as_a_demonstration_or_a_prompt(write):  # noqa: F811
    path = write("a.jsonl", [PAIRS["ultrafeedback_binarized"][0]])
    assert normal(path, kind="demonstrations") == [([Q], "Yes.")]
    assert normal(write("b.jsonl", [PAIRS["Nectar"][0]]), kind="demonstrations") == [(HH + " ", "a")]
    assert normal(write("c.jsonl", [PAIRS["SHP-2"][0]]), kind="prompts") == [("Hi?",)]


def test_helpsteer_pairs_neighbours_and_leaves_ties_out(write):  # noqa: F811
    marks = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    rows = [{"prompt": prompt, "response": reply, "helpfulness": score, **marks} for prompt, reply, score in (
        ("Hi?", "No.", 1), ("Hi?", "Yes.", 4), ("tie", "a", 2), ("tie", "b", 2), ("alone", "a", 2),
        ("four", "a", 1), ("four", "b", 3), ("four", "c", 0), ("four", "d", 2))]
    path = write("a.jsonl", rows)
    assert normal(path) == [TEXT, ("four", "b", "c")]
    report = check(path)
    assert report.ok and report.left_out == 2 and "none is better: 2 times, first at line 3, 5" in str(report)


@pytest.mark.parametrize("layout, change, reason", [
    ("SHP-2", {"labels": 7}, "labels: is 7, expected one of 1, 0"),
    ("PKU-SafeRLHF", {"better_response_id": None}, "better_response_id: is null"),
    ("chatbot_arena_conversations", {"winner": "nobody"}, "winner: is 'nobody', expected one of model_a, model_b, tie"),
    ("OpenAI", {"input": {"messages": [Q], "tools": [{"type": "function"}]}}, "tools are not read"),
    ("Intel/orca_dpo_pairs", {"question": " "}, "question: is blank"),
    ("Nectar", {"answers": [{"answer": "a"}]}, "answers: answer 1 has no text"),
    ("HuggingFaceH4/orca_dpo_pairs", {"prompt": "Bye?"}, "--columns prompt="),
    ("LLaMA-Factory alpaca, all", {"history": ["Hi?"]}, r"history: expected a list of \[question, answer\]"),
    ("PRM800K", {"label": {"steps": [1]}}, "is not built as in PRM800K"),
    ("openbmb/UltraFeedback", {"completions": [{"response": "a", "fine-grained_score": "high"}]}, "expected a number"),
])
def test_a_bad_row_of_a_layout_is_named_by_its_own_columns(write, layout, change, reason):  # noqa: F811
    row = PAIRS[layout][0]
    assert re.search(reason, str(check(write("a.jsonl", [row, row, row | change]))))


def test_ties_are_left_out_and_counted(write):  # noqa: F811
    row = PAIRS["chatbot_arena_conversations"][0]
    report = check(write("a.jsonl", [row, row | {"winner": "tie"}, row | {"winner": "tie (bothbad)"}]))
    assert report.ok and str(report).endswith("3 rows, 1 good, 0 bad, 2 left out: ok")
    report = check(write("b.jsonl", [row | {"winner": "tie"}]))
    assert not report.ok and "every row was left out" in str(report)
    many = {"conversation_a": [Q, NO, Q, NO], "conversation_b": [Q, YES, Q, YES]}
    assert "part before their last reply" in str(check(write("c.jsonl", [row, row | many])))


def test_only_good_replies_are_demonstrations_and_the_task_says_so(write, tokenizer):  # noqa: F811
    rows = [{"prompt": f"{n}?", "completion": "BAD" if n % 2 else "good", "label": n % 2 == 0} for n in range(20)]
    task = load_task(write("a.jsonl", rows), tokenizer)
    assert {row["completion"] for row in task.train_rows + task.heldout_rows} == {"good"}
    assert any("its label is false" in note and "10 times" in note for note in task.notes)
    with pytest.raises(DataError, match="label: is 'maybe', expected true or false"):
        load_rows(write("b.jsonl", [*rows[:3], {"prompt": "a", "completion": "b", "label": "maybe"}]))


@pytest.mark.parametrize("row, says", [
    ({"prompt": "a", "answer_a": "b", "answer_b": "c", "pick": "a"}, "'answer_a' seems to carry answers"),
    ({"prompt": "a", "ground_truth": "c"}, "'ground_truth' seems to carry answers"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "system_prompt": "Be kind."},
     "'system_prompt' seems to carry a system prompt.*--columns system=system_prompt"),
    ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "'tools' seems to carry tools.*--columns tools="),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "context": "d"}, "'context' seems to carry part of the prompt"),
    ({"prompt": "a", "response": "b", "is_safe": False}, "'is_safe' seems to carry labels.*--columns label=is_safe"),
    ({"prompt": "a", "completion": "b", "is_correct": False}, "'is_correct' seems to carry marks.*--columns label="),
    ({"prompt": "a", "completion": "b", "winner": "x"}, "'winner' seems to carry labels"),
    ({"messages": [Q, YES], "images": ["a.png"]}, "'images' seems to carry part of the prompt"),
    ({"chosen": [Q, YES], "rejected": [Q, NO], "rejected_2": [Q, bot("Never.")]},
     "'rejected_2' seems to carry answers"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [Q, YES]}, "mixed.*--kind pairs"),
    ({"question": "a", "answer": "b"},
     "the columns are 'answer', 'question'.*--columns prompt=question,completion=answer"),
    ({"problem": "a", "reply_1": "b", "reply_2": "c"}, "--columns prompt=problem,chosen=reply_1,rejected=reply_2"),
])
def test_a_column_that_matters_and_would_go_unused_is_a_fault_with_the_flag_that_helps(write, row, says):  # noqa: F811
    path = write("a.jsonl", [row] * 3)
    with pytest.raises(DataError, match=says):
        check(path)


def test_a_stray_column_in_one_row_is_that_rows_fault(write):  # noqa: F811
    row = PAIRS["TRL standard"][0]
    report = check(write("a.jsonl", [row, row, row, row | {"system_prompt": "Be kind."}]))
    assert (report.bad_rows, report.problems[0].line, report.problems[0].field) == (1, 4, "system_prompt")


@pytest.mark.parametrize("columns, row", [
    ("prompt=q,chosen=good,rejected=bad", {"q": "Hi?", "good": "Yes.", "bad": "No."}),
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, {"q": "Hi?", "good": "Yes.", "bad": "No."}),
    ("system=,safe=", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": "Be kind.", "safe": True}),
    ("prompt=in.text", {"in": {"text": "Hi?"}, "chosen": "Yes.", "rejected": "No."}),
    ("chosen=rejected,rejected=chosen", {"prompt": "Hi?", "chosen": "No.", "rejected": "Yes."}),
    ("better=safer_response_id", {"prompt": "Hi?", "response_0": "Yes.", "response_1": "No.", "better_response_id": 1,
                                  "safer_response_id": 0}),
    ("first=a,second=b,better=winner", {"prompt": "Hi?", "a": "No.", "b": "Yes.", "winner": "b"}),
])
def test_columns_can_be_told(write, columns, row):  # noqa: F811
    path = write("a.jsonl", [row])
    assert normal(path, columns=columns) == [TEXT] and check(path, columns=columns).ok


def test_columns_that_cannot_be_meant_are_refused(write):  # noqa: F811
    path = write("a.jsonl", [PAIRS["TRL standard"][0]])
    for columns, says in (("prompt", "expected FIELD=COLUMN"), ("prompt=a,prompt=b", "has prompt twice"),
                          ("promt=a", "no field 'promt'; did you mean prompt")):
        with pytest.raises(ValueError, match=says):
            columns_of(columns)
    with pytest.raises(DataError, match=r"no column 'question' \(--columns prompt=question\); the columns are 'ch"):
        check(path, columns="prompt=question")
    report = check(write("b.jsonl", [{"q": "a", "good": "b", "bad": "c"}, {"q": "a", "good": None, "bad": "c"}]),
                   columns="prompt=q,chosen=good,rejected=bad")
    assert report.problems[0].field == "good"


def test_a_dataset_info_beside_a_file_says_its_columns_and_tags(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "plain": {"file_name": "a.jsonl", "ranking": True,
                  "columns": {"prompt": "ask", "query": "more", "chosen": "plus", "rejected": "minus"}},
        "tagged": {"file_name": "b.jsonl", "formatting": "sharegpt", "ranking": True,
                   "columns": {"messages": "talk", "chosen": "plus", "rejected": "minus"},
                   "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"}}}))
    (tmp_path / "a.jsonl").write_text(json.dumps({"ask": "Hi?", "more": "", "plus": "Yes.", "minus": "No."}))
    (tmp_path / "b.jsonl").write_text(json.dumps({
        "talk": [{"who": "me", "what": "Hi?"}], "plus": {"who": "you", "what": "Yes."},
        "minus": {"who": "you", "what": "No."}}))
    assert normal(tmp_path / "a.jsonl") == [TEXT] and normal(tmp_path / "b.jsonl") == [CHAT]


def test_a_split_can_be_told(tmp_path, write, monkeypatch):  # noqa: F811
    import datasets

    row = PAIRS["TRL standard"][0]
    path = write("a.jsonl", [row | {"split": "train"}, row | {"split": "val", "prompt": "Bye?"}])
    assert normal(path, split="val") == [("Bye?", "Yes.", "No.")]
    with pytest.raises(DataError, match="no row has the split 'test'; there are train, val"):
        check(path, split="test")
    with pytest.raises(DataError, match="leave --split out"):
        check(write("b.jsonl", [row]), split="train")
    both = datasets.DatasetDict({name: datasets.Dataset.from_list([row]) for name in ("train_prefs", "test_prefs")})
    both.save_to_disk(tmp_path / "saved")
    assert normal(tmp_path / "saved", split="test_prefs") == [TEXT]
    with pytest.raises(DataError, match=r"splits train_prefs, test_prefs, none is called train; say which: --split"):
        check(tmp_path / "saved")
    with pytest.raises(DataError, match="no split 'dev'; its splits are train_prefs, test_prefs"):
        check(tmp_path / "saved", split="dev")


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",
                                  '[{"role": "user", "content": "a"}, {"role": "assist'])
def test_text_that_looks_like_messages_and_cannot_be_read_is_refused(write, text):  # noqa: F811
    report = check(write("a.jsonl", [{"prompt": "a", "chosen": text, "rejected": "c"}]))
    assert "chosen: looks like messages that were saved as text" in str(report)


@pytest.mark.parametrize("text", ['{"from": "Rome", "to": "Oslo"}', '[1, 2, 3]', '{"role": "admin"}',
                                  "[role: content]"])
def test_other_json_stays_text(write, text):  # noqa: F811
    assert normal(write("a.jsonl", [{"prompt": "a", "completion": text}])) == [("a", text)]


def test_rows_that_differ_in_their_system_prompt_are_not_repeats(write):  # noqa: F811
    rows = [{"system": f"You are agent {n}.", "prompt": "1+1?", "chosen": "2", "rejected": "no"} for n in range(3)]
    assert "repeats" not in str(check(write("a.jsonl", rows)))


R1 = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ %s }}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("written, chosen, says", [
    ("m.content.split('</think>')[-1]", "<think>step by step</think>4", "leaves out part of the reply: '<think>"),
    ("m.content[:9]", "a long answer that is cut", "leaves out part of the reply"),
    ("m.content if m.role != 'system' else ''", "fine", "leaves out the system message"),
    ("m.content", "fine", None),
    ("m.content | trim", "    indented()", "changes the spaces at the ends of replies: 2 times"),
    ("m.content.split() | join(' ')", "two  spaces", "changes the spaces inside replies: 2 times"),
    ("m.content.split('<tool>')[0]", "call <tool>f</tool>", "leaves out part of the reply"),
])
def test_what_was_in_the_reply_is_still_there_after_the_template(write, tokenizer, monkeypatch,  # noqa: F811
                                                                 written, chosen, says):
    monkeypatch.setattr(tokenizer, "chat_template", R1.replace("%s", written))
    row = {"prompt": [system("Be nice"), Q], "chosen": [bot(chosen)], "rejected": [bot("short")]}
    path = write("a.jsonl", [row, row])
    report = check(path, tokenizer=tokenizer)
    lost = bool(says and "leaves" in says)
    assert report.ok != lost and (says is None or says in str(report)), str(report)
    if not lost:
        assert all(row["chosen"].strip() for row in load_rows(path, tokenizer=tokenizer))


def test_a_thought_that_the_prompt_opens_is_not_lost(write, tokenizer, monkeypatch):  # noqa: F811
    template = R1.replace("%s", "m.content").replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = {"prompt": [Q], "chosen": [bot("<think>\na</think>4")], "rejected": [bot("<think>\nb</think>5")]}
    path = write("a.jsonl", [row])
    assert load_rows(path, tokenizer=tokenizer)[0]["chosen"] == "a</think>4"


# --- the command -----------------------------------------------------------------------------------------------------
def test_check_takes_kind_split_and_columns(write, capsys):  # noqa: F811
    row = {"q": "Hi?", "chosen": "Yes.", "rejected": "No.", "split": "a"}
    path = str(write("a.jsonl", [row, row | {"split": "b"}]))
    assert cli.main(["check", path]) == 1
    assert cli.main(["check", path, "--columns", "prompt=q", "--kind", "pairs", "--split", "b"]) == 0
    assert "1 row, 1 good" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["check", path, "--columns", "promt=q"])
    assert "did you mean prompt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["course"], ["run", "01_sft"]])
def test_course_and_run_hand_them_to_the_notebooks(write, tmp_path, monkeypatch, command):  # noqa: F811
    from alignkit.jobs import notebooks

    path, jobs = write("a.jsonl", [PAIRS["Nectar"][0]]), []
    monkeypatch.setattr(notebooks, "_spare", lambda job: None)
    monkeypatch.setattr(notebooks, "_check_facts", lambda job: None)
    monkeypatch.setattr(notebooks, "check_before", lambda jobs: None)
    monkeypatch.setattr(notebooks, "_run", lambda job, **_: jobs.append(job))
    monkeypatch.setattr("alignkit.jobs.report.build_report", lambda out: out)
    monkeypatch.setattr("alignkit.jobs.report.overview", lambda out: "")
    data = ["--data", str(path)] if command == ["course"] else ["-p", f"data={path}"]
    reading = ["--kind", "demonstrations", "--split", "train", "--columns", "prompt=question"]
    monkeypatch.setattr(cli, "_shown", str)  # of a notebook that is not made here
    assert cli.main([*command, *data, *reading, "--out", str(tmp_path / "out")]) == 0
    assert jobs
    for job in jobs:
        known = {"kind", "split", "columns"} & set(job.parameters)
        assert known == {"kind", "split", "columns"}, job.name
        assert [job.values[name] for name in ("kind", "split", "columns")] == reading[1::2]


def test_a_system_prompt_after_many_rows_without_is_seen_in_time(write):  # noqa: F811
    row = {"system": "", "prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    path = write("a.jsonl", [row] * 100 + [row | {"system": "Be kind."}])
    assert normal(path)[0] == CHAT and normal(path)[-1] == BE_KIND
    assert normal(write("b.jsonl", [row] * 100)) == [TEXT] * 100
    report = check(write("c.jsonl", [row] * 1000 + [row | {"system": "Be kind."}]))
    assert report.bad_rows == 1 and "--columns system=" in str(report)


def test_the_desk_world_has_no_columns(tokenizer, tmp_path, capsys):  # noqa: F811
    assert cli.main(["course", "--out", str(tmp_path), "--columns", "prompt=a"]) == 1
    assert "--columns says how to read a file" in capsys.readouterr().err
    with pytest.raises(DataError, match="columns is 'prompt=a', and data is 'desk'"):
        load_task("desk", tokenizer, columns="prompt=a")


# --- the files beside the project ------------------------------------------------------------------------------------
FILES = {
    "argilla_orca.jsonl": ("What is 0+1?", "1", "no idea"),
    "axolotl.jsonl": ([user("hi 0")], "hello", "go"),
    "empty_system.jsonl": ([user("hi 0")], "hello", "go"),
    "kto_text.jsonl": ("hi 0", "hello"),
    "msgs_as_jsonstr.jsonl": ([user("hi 0")], "hello", "go"),
    "nectar.jsonl": ("\n\nHuman: hi 0\n\nAssistant: ", "a", "b"),
    "openai_pref.jsonl": ([user("hi 0")], "hello", "go"),
    "pku.jsonl": ("p0", "a", "b"),
    "prompt_first_user.jsonl": ([user("Hi 0"), bot("Hello!"), user("2+2?")], "4", "5"),
    "sharegpt_rank.jsonl": ([user("hi 0")], "hello", "go"),
    "system_col.jsonl": ([system("You are agent 0."), user("What is 1+1?")], "2", "no idea"),
    "system_in_chosen.jsonl": ([system("You are kind."), user("q 0")], "yes", "no"),
    "ultrafeedback.jsonl": ([user("How do I boil 0 eggs?")], "Put 0 eggs in water.", "I do not know."),
    "ultrafeedback.parquet": ([user("How do I boil 0 eggs?")], "Put 0 eggs in water.", "I do not know."),
}


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_the_files_of_real_layouts(shared, tokenizer, name):  # noqa: F811
    path = shared / "data" / "real_layouts" / name
    assert normal(path)[0] == FILES[name] and check(path, tokenizer=tokenizer).ok
    rows = load_rows(path, tokenizer=tokenizer)
    assert rows[0]["chosen" if rows.kind == "pairs" else "completion"] == FILES[name][1]


def test_layouts_need_nothing_heavy():
    code = "import sys, alignkit.data.layouts\nsys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_alpacas_own_text_repeats_instruction_and_input(tmp_path):
    text = "Below is an instruction.\n\n### Instruction:\nSay hi.\n\n### Input:\nto Bob\n\n### Response:\nHi, Bob."
    row = {"instruction": "Say hi.", "input": "to Bob", "output": "Hi, Bob.", "text": text}
    (tmp_path / "alpaca.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_rows(tmp_path / "alpaca.jsonl")
    assert list(rows) == [{"prompt": "Say hi.\nto Bob", "completion": "Hi, Bob."}]
    (tmp_path / "other.jsonl").write_text(json.dumps(row | {"text": text.replace("to Bob", "to Eve")}) + "\n")
    with pytest.raises(DataError, match="mixed"):
        load_rows(tmp_path / "other.jsonl")


def test_the_column_that_may_hold_the_missing_prompt_is_named_with_its_flag(tmp_path):
    row = {"trajectory": [human("Hi?")], "chosen": "Yes.", "rejected": "No.", "id": "1"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="is it 'trajectory'. --columns prompt=trajectory") as told:
        load_rows(tmp_path / "pairs.jsonl")
    assert "same prompt" in str(told.value)
    assert load_rows(tmp_path / "pairs.jsonl", columns="prompt=trajectory", messages=True)[0]["prompt"] == [Q]


def test_candidates_beside_the_pair_and_names_of_policies_are_no_loss(tmp_path):
    row = {"prompt": "Hi?", "chosen": [Q, YES], "rejected": [Q, NO], "all_generated_responses": ["Yes.", "No.", "Hm."],
           "all_rm_scores": [1.0, 0.0, 0.5], "chosen_policy": "m", "rejected_policy": "n", "ranks": [1, 2],
           "candidates_completions": ["Yes.", "No."], "candidate_policies": ["m", "n"], "gen_input_configs": {"t": 1}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert load_rows(tmp_path / "pairs.jsonl", messages=True)[0] == {"prompt": [Q], "chosen": YES, "rejected": NO}
