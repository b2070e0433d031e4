"""What people bring works or is refused for the right reason: which test holds each public report that was tried, and
further layouts of the same kinds, made for these tests in the manner of published sets."""

import json
import re
from pathlib import Path

import pytest
from faults.test_index import functions_of
from test_data import tokenizer, write  # noqa: F401 (fixtures)
from test_ends import CHATML, bytes_tokenizer, policy_of
from test_layouts import BE_KIND, CHAT, LONG, NO, TEXT, TURNS, YES, Q, bot, gpt, human, normal, system, user

from alignkit import RewardConfig, SFTConfig
from alignkit.data.layouts import LAYOUTS, marks_of
from alignkit.data.rows import check, load_rows
from alignkit.errors import DataError, RunError
from alignkit.forward.rollout import encode_rows
from alignkit.jobs import notebooks
from alignkit.jobs.parameters import notebook_parameters
from alignkit.models.heads import reward_model_from
from alignkit.reward import RewardScorer, train_reward_model
from alignkit.runs.records import run_facts, start_run
from alignkit.sft import train_sft
from alignkit.task import load_task

TESTS = Path(__file__).parent
ANY, ENDS, LAY = "test_any_model.py::test_", "test_ends.py::test_", "test_layouts.py::test_"
OWN, HERE, DATA = "test_own_template.py::test_", "test_real_inputs.py::test_", "test_data.py::test_"
THROUGH, PUBLISHED = f"{ANY}an_architecture_goes_through_everything", f"{LAY}a_published_layout_becomes_the_normal_form"
UNUSED = f"{LAY}a_column_that_matters_and_would_go_unused_is_a_fault_with_the_flag_that_helps"
HELD = {  # report -> the tests that hold it
    1: [THROUGH],  # OPT among them
    2: [f"{ENDS}the_sampler_stops_at_the_end_of_a_turn"],
    3: [f"{ENDS}sft_reward_model_dpo_and_ppo_see_the_same_ids_for_a_reply",
        f"{ENDS}ppo_with_a_reward_model_begins_and_every_reply_is_scored_on_the_ids_that_were_written"],
    4: [PUBLISHED, f"{LAY}check_takes_kind_split_and_columns", f"{LAY}course_and_run_hand_them_to_the_notebooks"],
    5: [PUBLISHED],
    6: [PUBLISHED, f"{LAY}text_that_looks_like_messages_and_cannot_be_read_is_refused"],
    7: [f"{LAY}only_good_replies_are_demonstrations_and_the_task_says_so"],
    8: [f"{LAY}what_was_in_the_reply_is_still_there_after_the_template"],
    9: [f"{ANY}a_tokenizer_with_tokens_that_the_model_has_no_rows_for_is_refused_and_not_saved"],
    10: [THROUGH, f"{ANY}a_mixture_that_was_not_loaded_here_is_sampled_too"],
    11: [f"{ANY}a_model_that_cannot_be_read_is_refused_in_one_sentence_when_it_is_loaded_and_when_it_is_first_used"],
    13: [PUBLISHED],
    15: [PUBLISHED],
    16: [PUBLISHED, f"{LAY}rows_that_differ_in_their_system_prompt_are_not_repeats"],
    17: [PUBLISHED, UNUSED],
    18: [PUBLISHED],
    19: [f"{OWN}it_reads_of_a_policy_s_conversation_the_ids_that_it_reads_of_its_own",
         f"{OWN}ppo_trains_a_policy_against_a_saved_reward_model_of_another_family"],
    20: [f"{ANY}the_tokenizer_of_a_loaded_model_carries_its_context_so_that_a_task_is_cut_to_it"],
    21: [THROUGH, f"{ANY}families_that_do_not_fit_are_named_in_one_sentence"],
    22: [f"{ANY}a_reward_model_with_several_labels_says_how_many_and_what_to_do",
         f"{ANY}families_that_do_not_fit_are_named_in_one_sentence"],
    26: [f"{HERE}a_further_file_is_refused_for_the_right_reason"],
    27: [PUBLISHED],
    28: [f"{DATA}a_pair_is_tokenised_jointly_where_the_border_is_one"],
    29: [THROUGH],
    30: [THROUGH],
    31: [f"{ANY}scores_of_every_sensible_type_are_taken",
         f"{ANY}scores_of_any_other_are_one_error_that_names_the_reward"],
    32: [f"{ANY}an_adapter_alone_is_merged_into_its_base_and_beside_a_model_it_is_refused"],
}


def test_every_report_of_the_list_has_a_test_that_is_there(shared):
    listed = (shared / "reference" / "real_inputs.md").read_text(encoding="utf-8")
    assert set(map(int, re.findall(r"^\| (\d+) \|", listed, re.M))) == set(HELD)


@pytest.mark.parametrize("number", HELD)
def test_the_tests_that_hold_a_report_are_there(number):
    for place in HELD[number]:
        file, _, name = place.partition("::")
        assert name in functions_of(TESTS / file), place


FILES = {  # file of shared/data/real_layouts -> what its first row says, as far as it goes
    "argilla_orca.jsonl": 3, "axolotl.jsonl": 3, "empty_system.jsonl": 3, "kto_text.jsonl": 2,
    "msgs_as_jsonstr.jsonl": 3, "nectar.jsonl": 3, "openai_pref.jsonl": 3, "pku.jsonl": 3,
    "prompt_first_user.jsonl": 3, "sharegpt_rank.jsonl": 3, "system_col.jsonl": 3, "system_in_chosen.jsonl": 3,
    "ultrafeedback.jsonl": 3, "ultrafeedback.parquet": 3}


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_the_files_of_the_list_are_read_without_a_bad_row(shared, name):
    path = shared / "data" / "real_layouts" / name
    report, rows = check(path), normal(path)
    assert report.ok and len(rows) == report.rows - report.left_out >= 3
    assert all(len(row) == FILES[name] for row in rows)
    texts = json.dumps(rows)
    assert '\\"role\\"' not in texts and "BAD" not in texts  # no messages as text, no reply that is labelled as bad


# --- further layouts -------------------------------------------------------------------------------------------------
TOOL = {"role": "tool", "content": "4"}
ANSWERS = [{"answer": "No.", "rank": 2}, {"answer": "Yes.", "rank": 1}]
FURTHER = {  # name -> (row, flags of the command line, what it says)
    "ranked answers, saved as JSON text": ({"prompt": "Hi?", "answers": json.dumps(ANSWERS)}, "", TEXT),
    "ranked answers, saved by pandas": ({"question": "Hi?", "answers": str(
        [{"pm_score": 1, "text": "No."}, {"pm_score": 3, "text": "Yes."}])}, "", TEXT),
    "distilabel, generations and ratings": ({"instruction": "Hi?", "generations": ["No.", "So.", "Yes."],
                                             "ratings": [1, None, 5], "model_names": ["a", "b", "c"]}, "", TEXT),
    "a layout of the table whose prompt has another name": (
        {"task": "Hi?", "completions": [{"response": "No.", "score": 1}, {"response": "Yes.", "score": 2}]},
        "prompt=task", TEXT),
    "responses and scores": ({"prompt": "Hi?", "responses": ["Yes.", "No."], "scores": [0.9, 0.2]}, "", TEXT),
    "the worse one first, nested": ({"q": "Hi?", "pair": {"bad": "No.", "good": "Yes."}},
                                    "prompt=q,chosen=pair.good,rejected=pair.bad", TEXT),
    "all of it nested": ({"data": {"x": [Q], "w": [YES], "l": [NO]}}, "prompt=data.x,chosen=data.w,rejected=data.l",
                         CHAT),
    "a verdict that names the column": ({"ask": "Hi?", "response_a": "No.", "response_b": "Yes.",
                                         "winner": "response_b"},
                                        "prompt=ask,first=response_a,second=response_b,better=winner", TEXT),
    "y_w and y_l": ({"x": "Hi?", "y_w": "Yes.", "y_l": "No."}, "prompt=x,chosen=y_w,rejected=y_l", TEXT),
    "the prompt stands before both replies": ({"prompt": "Hi? ", "chosen": "Hi? Yes.", "rejected": "Hi? No."}, "",
                                              ("Hi? ", "Yes.", "No.")),
    "the dialogue is both prompt and reply": (
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.",
         "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, "", ("\n\nHuman: Hi?\n\nAssistant:", " Yes.", " No.")),
    "roles in capitals": ({"chosen": [{"role": "User", "content": "Hi?"}, {"role": "ASSISTANT", "content": "Yes."}],
                           "rejected": [Q, NO]}, "", CHAT),
    "a system prompt as messages": ({"system": [system("Be kind.")], "prompt": "Hi?", "chosen": "Yes.",
                                     "rejected": "No."}, "", BE_KIND),
    "a persona": ({"persona": "Be kind.", "prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, "system=persona",
                  BE_KIND),
    "history of pairs beside messages": ({"history": [["Hi?", "Hello!"]], "prompt": [user("2+2?")],
                                          "chosen": [bot("4")], "rejected": [bot("5")]}, "", LONG),
    "sharegpt ranking of several turns, as text": (
        {"conversations": json.dumps([human("Hi?"), gpt("Hello!"), human("2+2?")]), "chosen": json.dumps(gpt("4")),
         "rejected": json.dumps(gpt("5"))}, "", LONG),
    "a tool's answer in the prompt": ({"prompt": [*TURNS, TOOL], "chosen": [YES], "rejected": [NO]}, "",
                                      ([*TURNS, TOOL], "Yes.", "No.")),
    "step by step": ({"question": {"problem": "1+1?"}, "label": {"steps": [
        {"completions": [{"text": "So:", "rating": 0}], "chosen_completion": None, "human_completion": "Well:"},
        {"completions": [{"text": "3", "rating": -1}, {"text": "2", "rating": 1}], "chosen_completion": 1}]}}, "",
        ("1+1?\nWell:\n", "2", "3")),
}
DEMONSTRATIONS = {
    "KTO of LLaMA-Factory, alpaca": ({"instruction": "Is it", "input": "so?", "output": "Yes.", "kto_tag": True}, "",
                                     ("Is it\nso?", "Yes.")),
    "KTO of LLaMA-Factory, sharegpt": ({"conversations": [human("Hi?"), gpt("Yes.")], "kto_tag": "true"}, "",
                                       ([Q], "Yes.")),
    "KTO of axolotl": ({"system": "Be kind.", "question": "Hi?", "completion": "Yes.", "label": True}, "",
                       ([system("Be kind."), Q], "Yes.")),
    "thumbs": ({"prompt": "Hi?", "completion": "Yes.", "thumbs_up": 1}, "label=thumbs_up", ("Hi?", "Yes.")),
    "replies that are JSON": ({"instruction": "List.", "input": "", "output": '["a", "b"]'}, "",
                              ("List.", '["a", "b"]')),
    "replies that are JSON objects": ({"instruction": "List.", "output": '[{"a": 1}]'}, "", ("List.", '[{"a": 1}]')),
    "completion with its prompt": ({"prompt": "Q: Hi?\nA:", "completion": "Q: Hi?\nA: Yes."}, "",
                                   ("Q: Hi?\nA:", " Yes.")),
    "a dialog": ({"dialog": [Q, YES]}, "messages=dialog", ([Q], "Yes.")),
}


@pytest.mark.parametrize("row, columns, expected", [*FURTHER.values(), *DEMONSTRATIONS.values()],
                         ids=[*FURTHER, *DEMONSTRATIONS])
def test_a_further_layout_becomes_the_normal_form(write, row, columns, expected):  # noqa: F811
    path = write("a.jsonl", [row] * 3)
    report = check(path, columns=columns)
    assert report.ok and report.kind == ("pairs" if len(expected) == 3 else "demonstrations"), str(report)
    assert normal(path, columns=columns) == [expected] * 3


@pytest.mark.parametrize("row, says", [
    ({"prompt": [Q], "chosen": [YES], "rejected": [NO], "images": ["a.png"]}, "'images' seems to carry part of the pr"),
    ({"prompt": [user([{"type": "image_url"}, {"type": "text", "text": "Hi?"}])], "chosen": [YES], "rejected": [NO]},
     "content of message 1: is a list with 'image_url', expected text alone"),
    ({"conversations": [human("Hi?"), {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"}],
      "chosen": gpt("Yes."), "rejected": gpt("No.")}, "role of message 2: is 'function_call': calls of tools are not"),
    ({"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                   {"role": "tool", "content": "4"}, YES]}, "content of message 2: is null"),
    ({"prompt": [Q], "chosen": [bot("")], "rejected": [NO]}, "chosen: content of message 1: is empty"),
    ({"messages": [Q, YES, user("thanks")]}, "messages: ends with a user's message"),
    ({"messages": [Q, NO | {"weight": 0}]}, "its reply is marked as not to be trained on"),
    ({"messages": [Q, NO | {"train": False}]}, "its reply is marked as not to be trained on"),
    ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes. "}, "rejected: is identical to chosen but for spaces"),
    ({"prompt": [Q], "chosen": [bot("Yes.\n")], "rejected": [YES]}, "rejected: is identical to chosen but for spaces"),
    ({"prompt": "Hi?", "chosen": "Hi? ", "rejected": "Hi? No."}, "chosen is a blank reply"),
    ({"prompt": "Hi?", "response_a": "Yes.", "response_b": "No.", "preference": 5},
     "'preference' seems to carry labels"),
    ({"question": "Hi?", "answer_a": "Yes.", "answer_b": "No.", "label": "A"},
     "--columns prompt=question,first=answer_a,second=answer_b,better=label"),
    ({"prompt": "Hi?", "pos": "Yes.", "neg": "No."}, "'neg' seems to carry answers"),
    ({"prompt": "Hi?", "win": "Yes.", "lose": "No."}, "'lose' seems to carry answers"),
    ({"prompt": "Hi?", "model_response": "It is so."}, "'model_response' seems to carry answers"),
    ({"prompt": "Hi?", "x": "Sure, I can help you."}, "'x' seems to carry answers"),
    ({"prompt": "Hi?", "completions": ["a", "b"], "labels": [True, False]}, "'completions' seems to carry answers"),
    ({"instruction": "Hi?", "generations": ["a", "b"], "ratings": [1]}, "ratings: is a list of 1, expected one of 2"),
    ({"prompt": "Hi?", "completion": "Yes.", "label": "bad"}, "label: is 'bad', expected true or false"),
    ({"dialog": [Q, YES]}, "--columns messages=dialog"),
    ({"prompt": "Hi?", "chosen": {"text": "Yes."}, "rejected": {"text": "No."}}, "chosen: is an object, expected text"),
])
def test_a_further_file_is_refused_for_the_right_reason(write, row, says):  # noqa: F811
    path = write("a.jsonl", [row] * 3)
    try:
        said = str(check(path))
    except DataError as error:
        said = str(error)
    assert says in said


def test_replies_that_echo_a_short_prompt_in_some_rows_alone_stay_as_they_are(write):  # noqa: F811
    rows = [{"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."}]
    rows += [{"prompt": f"What is {n}?", "chosen": "A number.", "rejected": "No."} for n in range(9)]
    assert normal(write("a.jsonl", rows))[0] == ("Hi", "Hi there!", "Hi.")


def test_prompts_with_a_topic_are_prompts_when_that_is_said(write):  # noqa: F811
    path = write("a.jsonl", [{"prompt": "Hi?", "theme": "how one greets a stranger"}] * 2)
    with pytest.raises(DataError, match="'theme' seems to carry answers"):
        check(path)
    assert normal(path, kind="prompts") == [("Hi?",)] * 2 == normal(path, columns="theme=")


@pytest.mark.parametrize("name", ["sharegpt ranking of several turns, as text", "a system prompt as messages",
                                  "roles in capitals", "history of pairs beside messages"])
def test_all_stages_see_the_same_ids_of_a_further_layout(write, name, monkeypatch):  # noqa: F811
    kept = []
    for place in ("alignkit.sft.run_trainer", "alignkit.reward.run_trainer"):
        monkeypatch.setattr(place, lambda trainer, model, args, rows, *rest: kept.extend(rows) or [])
    chat = bytes_tokenizer(CHATML)
    policy = policy_of(chat)
    rows = load_rows(write("a.jsonl", [FURTHER[name][0]]), tokenizer=chat, columns=FURTHER[name][1])
    train_sft(policy, chat, [{"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"]}], SFTConfig())
    train_reward_model(policy, chat, rows, RewardConfig())
    dpo = encode_rows(chat, rows, "chosen", 64)
    scored = RewardScorer(reward_model_from(policy), chat).ids([rows[0]["prompt"]], [str(rows[0]["chosen"])])[0]
    assert kept[0]["input_ids"] == kept[1]["chosen_ids"] == scored == dpo.prompt_ids[0].tolist() + \
        dpo.response_ids[0].tolist()


# --- aspects ---------------------------------------------------------------------------------------------------------
def rated(text, **aspects):
    return {"model": "m", "response": text, "annotations": {
        name: {"Rating": str(rating), "Rationale": "why"} for name, rating in aspects.items()}}


RAW = {"source": "evol", "instruction": "Hi?", "models": ["m"], "correct_answers": ["None"],
       "incorrect_answers": ["None"], "completions": [
           rated("A", helpfulness=5, honesty=1, truthfulness=2, instruction_following=2),
           rated("B", helpfulness=1, honesty=5, truthfulness="N/A", instruction_following=3),
           rated("C", helpfulness=2, honesty=2, truthfulness=2, instruction_following=2)]}


@pytest.mark.parametrize("columns, expected", [
    (None, ("Hi?", "B", "C")),  # means: 10/4, 9/3, 8/4
    ("score=helpfulness", ("Hi?", "A", "B")), ("score=honesty", ("Hi?", "B", "A")), ("score=mean", ("Hi?", "B", "C")),
])
def test_raw_ultrafeedback_becomes_pairs_by_the_mean_of_its_aspects_or_by_one_of_them(write, columns,  # noqa: F811
                                                                                      expected):
    path = write("a.jsonl", [RAW])
    assert normal(path, columns=columns) == [expected]
    row = load_rows(path, columns=columns)[0]
    by_text = {each["response"]: marks_of(each) for each in RAW["completions"]}
    assert row["scores"] == {side: by_text[row[side]] for side in ("chosen", "rejected")}
    assert by_text["B"] == {"mean": 3.0, "helpfulness": 1.0, "honesty": 5.0, "instruction_following": 3.0}


def test_the_mean_goes_before_an_overall_score_that_is_known_to_be_wrong_and_both_can_be_asked_for(write):  # noqa: F811
    row = RAW | {"completions": [each | {"overall_score": score, "fine-grained_score": mean} for each, score, mean in
                                 zip(RAW["completions"], (10.0, 7.0, 6.0), (2.5, 3.0, 2.0), strict=True)]}
    path = write("a.jsonl", [row])
    assert normal(path) == [("Hi?", "B", "C")] and normal(path, columns="score=overall_score") == [("Hi?", "A", "C")]


def test_ties_in_an_aspect_are_left_out_and_counted_and_one_that_is_not_there_is_named(write):  # noqa: F811
    tie = RAW | {"completions": [rated("A", honesty=2, helpfulness=1), rated("B", honesty=2, helpfulness=2)]}
    path = write("a.jsonl", [RAW, tie])
    assert check(path, columns="score=honesty").left_out == 1 and check(path).left_out == 0
    assert "completions: answer 2 has no mark 'truthfulness', only mean, helpfulness, honesty" in str(
        check(path, columns="score=truthfulness"))
    with pytest.raises(DataError, match="score=honesty says which mark of several answers counts, and this data has"):
        check(write("b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]), columns="score=honesty")


def test_helpsteer_can_be_read_by_another_aspect_and_a_task_keeps_the_scores(write, tokenizer):  # noqa: F811
    rows = [{"prompt": f"ask {n}", "response": reply, "helpfulness": helpful, "correctness": 4 - helpful}
            for n in range(4) for reply, helpful in (("Yes.", 4), ("No.", 1))]
    path = write("a.jsonl", rows)
    assert {row[1:] for row in normal(path)} == {("Yes.", "No.")}
    assert {row[1:] for row in normal(path, columns="score=correctness")} == {("No.", "Yes.")}
    task = load_task(path, tokenizer, columns="score=correctness")
    pair = task.preference_pairs(None, tokenizer, 1)[0]
    assert pair["scores"]["chosen"] == {"helpfulness": 1.0, "correctness": 3.0} and pair["chosen"] == "No."


def test_every_layout_of_the_table_can_be_told_apart_from_the_others():
    keys = [(layout.kind, frozenset(column for _, column, needed, _ in layout.places if needed),
             frozenset(built for _, _, _, built in layout.places)) for layout in LAYOUTS]
    assert len(keys) == len(set(keys))


# --- how a run reads its data ----------------------------------------------------------------------------------------
READING = {"kind": "pairs", "split": None, "columns": "prompt=q"}


def test_a_run_remembers_how_its_data_is_read_and_a_later_job_reads_it_so(tmp_path, monkeypatch):
    data = tmp_path / "a.jsonl"
    data.write_text('{"q": "a", "chosen": "b", "rejected": "c"}\n')
    run = start_run(tmp_path / "run", "tiny", str(data), 7, READING)
    assert run_facts(run) == {"model": "tiny", "data": str(data), "seed": 7, "kind": "pairs", "columns": "prompt=q"}
    jobs = []
    monkeypatch.setattr(notebooks, "_spare", lambda job: None)
    monkeypatch.setattr(notebooks, "_check_facts", lambda job: None)
    monkeypatch.setattr(notebooks, "check_before", lambda jobs: None)
    monkeypatch.setattr(notebooks, "_check_stages", lambda job: None)
    monkeypatch.setattr(notebooks, "_run", lambda job, **_: jobs.append(job))
    notebooks.run_notebook("03b_ppo", run)
    notebooks.run_notebook("03b_ppo", run, {"columns": "prompt=r"})
    notebooks.run_notebook("07_over_optimisation", run)  # reads no file
    assert [jobs[0].values[name] for name in ("data", "kind", "columns")] == [str(data), "pairs", "prompt=q"]
    assert "split" not in jobs[0].given and jobs[1].values["columns"] == "prompt=r"
    assert not {"kind", "columns"} & jobs[2].values.keys()


def test_columns_may_be_corrected_until_a_stage_has_finished_and_not_after(tmp_path):
    start = [tmp_path / "run", "tiny", "a.jsonl", 0]
    run = start_run(*start)
    assert start_run(*start, READING) == start_run(*start, READING | {"columns": "prompt=r"}) == run
    assert run_facts(run)["columns"] == "prompt=r"
    (run / "sft").mkdir()
    (run / "sft" / "results.json").write_text("{}")
    start_run(*start)  # a notebook that reads no data
    start_run(*start, READING | {"columns": "prompt=r"})
    with pytest.raises(RunError, match="belongs to another run: columns was 'prompt=r', now None"):
        start_run(*start, READING | {"columns": None})


def test_a_notebook_that_reads_a_file_takes_kind_split_and_columns_and_the_others_know_the_desk_alone():
    for name, path in notebooks.find_notebooks().items():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        if {"kind", "split", "columns"} <= notebook_parameters(path).keys():
            assert "kind=kind" in code and '"columns": columns}' in code, name
        else:
            desk_only = 'if data != "desk":\n    raise' in code or 'live = data == "desk"' in code
            assert "load_task(" not in code or desk_only, name
