"""Reading and validating data: each bad input has a test that reads the message; each format gives its rows."""

import collections
import csv
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignkit.data import encoding, fields, files, rows
from alignkit.data.encoding import ChatText, encode_pair, encode_pairs, encode_text
from alignkit.data.files import LINE_LIMIT
from alignkit.data.rows import check, load_rows
from alignkit.desk.tiny import desk_tokenizer
from alignkit.errors import DataError
from alignkit.forward.rollout import encode_prompts
from alignkit.reward import RewardScorer
from alignkit.task import DeskTask, desk_task, file_task, is_heldout, load_task

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
HH = SHARED / "data" / "hh_rlhf_harmless.jsonl.gz"
STORIES = SHARED / "models" / "stories260K"

PAIR = {"prompt": "Why is the sky blue?", "chosen": " Because of scattering.", "rejected": " It is not."}
GOOD = json.dumps(PAIR).encode()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, `<s>` in front, one chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *alphabet, "ab"]
    raw = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["</s>", "<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHATML
    return made


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path: bytes as they are, rows as JSON lines."""

    def write(name, content):
        path = tmp_path / name
        lines = content if isinstance(content, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in content)
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        return path

    return write


def pair(**changes):
    return json.dumps({**PAIR, **changes}).encode()


# --- every kind of bad row -------------------------------------------------------------------------------------------

BAD_LINES = {
    "missing field": (json.dumps({"prompt": "a", "chosen": "b"}).encode(), "rejected: is missing"),
    "null": (pair(chosen=None), "chosen: is null, expected text"),
    "null prompt": (pair(prompt=None), "prompt: is null, expected text"),
    "int": (pair(chosen=3), "chosen: is a number, expected text"),
    "truth value": (pair(chosen=True), "chosen: is a truth value, expected text"),
    "object": (pair(rejected={"a": 1}), "rejected: is an object, expected text"),
    "list of text": (pair(rejected=["a"]), "rejected: is a list, expected text, or a list of {role, content} messages"),
    "empty": (pair(prompt=""), "prompt: is empty"),
    "blank": (pair(chosen=" \n\t"), "chosen: is blank (only spaces)"),
    "identical": (pair(rejected=PAIR["chosen"]), "rejected: is identical to chosen"),
    "identical but for spaces": (
        pair(rejected=PAIR["chosen"] + " "),
        "rejected: is identical to chosen but for spaces",
    ),
    "invalid UTF-8": (GOOD.replace(b"sky", b"sk\xff"), "invalid UTF-8 at byte 26 of the line"),
    "lone surrogate": (
        GOOD.replace(b"sky", b"\\ud83d"),
        r"prompt: contains half of a surrogate pair, '\ud83d' at character 12",
    ),
    "NUL": (GOOD.replace(b"sky", b"\\u0000"), "prompt: contains a NUL character"),
    "NUL bytes": (b"\0\0\0", "not valid JSON: Expecting value at column 1 (the line contains NUL bytes)"),
    "not JSON": (b"prompt,chosen,rejected", "not valid JSON: Expecting value at column 1"),
    "duplicate key": (
        b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        "the key 'chosen' is there twice",
    ),
    "NaN": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "score": NaN}', "NaN is not JSON"),
    "infinity": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "score": -Infinity}', "-Infinity is not JSON"),
    "array": (b'["a", "b"]', "is a list, expected an object with prompt, chosen, rejected"),
    "number": (b"17", "is a number, expected an object"),
    "huge number": (b"1" * 5000, "not valid JSON: Exceeds the limit"),
    "deep": (b"[" * 100_000, "not valid JSON: nested too deeply"),
    "two values": (GOOD + b" {}", "more text after the JSON value"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_reason(write, line, reason):
    path = write("pairs.jsonl", GOOD + b"\n\n" + line + b"\n" + pair(prompt="Why?") + b"\n")
    report = check(path)
    assert not report.ok
    assert (report.kind, report.rows, report.bad_rows) == ("pairs", 3, 1)
    assert str(report.problems[0]).startswith(f"{path}:3: {reason}")
    assert str(report.problems[0]) in str(report)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: {reason}")):
        load_rows(path)
    rows = load_rows(path, skip_bad=True)
    assert [row["prompt"] for row in rows] == [PAIR["prompt"], "Why?"]
    assert rows.skipped == 1


def test_the_error_lists_ten_problems_the_total_and_what_to_do(write):
    path = write("pairs.jsonl", [PAIR] + [{**PAIR, "chosen": None, "rejected": 3}] * 12)
    with pytest.raises(DataError) as error:
        load_rows(path)
    message = str(error.value)
    assert "12 of 13 rows cannot be used" in message
    assert message.count(f"{path}:") == 11 and "... and 14 more" in message
    assert f"`alignkit check {path}`" in message and "skip_bad=True" in message


def test_all_rows_bad_is_an_error_even_when_bad_rows_may_be_skipped(write):
    with pytest.raises(DataError, match="No good row is left"):
        load_rows(write("pairs.jsonl", [{**PAIR, "chosen": None}]), skip_bad=True)


@pytest.mark.parametrize("cut", [1, 20, len(GOOD) - 1])
def test_a_torn_last_line_has_its_own_message(write, cut):
    report = check(write("pairs.jsonl", GOOD + b"\n" + GOOD[:cut]))
    assert [problem.line for problem in report.problems] == [2]
    assert "the file ends in the middle of this line (a torn write?): not valid JSON" in str(report)


def test_a_line_torn_inside_a_character_says_so(write):
    line = json.dumps(PAIR | {"rejected": "é"}, ensure_ascii=False).encode()
    report = check(write("pairs.jsonl", GOOD + b"\n" + line[: line.index("é".encode()) + 1]))
    assert "torn write?): invalid UTF-8" in str(report)


def test_no_newline_at_the_end_is_fine(write):
    assert check(write("pairs.jsonl", GOOD)).ok


def test_bom_crlf_and_blank_lines_are_accepted(write):
    rows = load_rows(write("pairs.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + pair(prompt="Why?") + b"\r\n"))
    assert list(rows) == [PAIR, PAIR | {"prompt": "Why?"}]


def test_utf16_gets_a_hint(write):
    assert "looks like UTF-16" in str(check(write("pairs.jsonl", GOOD.decode().encode("utf-16"))))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b""),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"prompt\n"),
        ("a.jsonl.gz", b""),
    ],
)
def test_an_empty_file_is_refused(write, name, content):
    path = write(name, content)
    assert not check(path).ok
    assert f"{path}:1: " in str(check(path)) and "the file is empty" in str(check(path))
    with pytest.raises(DataError, match="the file is empty"):
        load_rows(path, skip_bad=True)


def test_lines_over_the_limit_are_skipped_without_reading_them_whole(write):
    path = write(
        "pairs.jsonl.gz", GOOD + b"\n" + b'{"prompt": "' + b"x" * (3 * LINE_LIMIT) + b'"}\n' + GOOD + b"\n"
    )
    tracemalloc.start()
    report = check(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [str(problem) for problem in report.problems] == [f"{path}:2: the line is longer than 16 MiB"]
    assert report.rows == 3 and peak < 2.5 * LINE_LIMIT


def test_a_check_does_not_keep_the_rows(write):
    row = json.dumps(PAIR | {"rejected": " no" * 3000})
    path = write(
        "pairs.jsonl.gz", "".join(row.replace("Why", f"Why {i}") + "\n" for i in range(2000)).encode()
    )  # 18 MB
    tracemalloc.start()
    assert check(path).rows == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def test_a_damaged_gzip_file_is_named_with_its_line(write):
    path = write("pairs.jsonl.gz", b"".join(pair(prompt=f"{i} {hash(str(i))}?") + b"\n" for i in range(2000)))
    path.write_bytes(path.read_bytes()[:-2000])
    report = check(path)
    assert report.bad_rows == 1 and "the gzip stream is damaged or cut off here" in str(report.problems[0])
    assert report.problems[0].line == report.rows > 100


# --- warnings --------------------------------------------------------------------------------------------------------


def test_warnings_count_and_give_the_first_places(write, tokenizer):
    path = write(
        "pairs.jsonl", [PAIR, PAIR | {"prompt": "See </s>", "score": 1}, PAIR, PAIR, PAIR | {"chosen": " It is"}]
    )
    report = check(path, tokenizer=tokenizer)
    assert report.ok
    assert set(report.warnings) == {
        "the row repeats an earlier one: 2 times, first at line 3, 4",
        "the text contains '</s>', a special token of the tokenizer (it stays text): 1 time, first at line 2",
        "the column 'score' is not used: 1 time, first at line 2",
        "chosen is the beginning of rejected: 1 time, first at line 5",
    }
    assert load_rows(path, tokenizer=tokenizer).warnings == report.warnings
    assert f"{path}: warning: the row repeats" in str(report)


def test_warnings_do_not_grow_with_the_file(write):
    report = check(write("pairs.jsonl", [PAIR | {f"column {i}": 1, "prompt": f"{i}?"} for i in range(300)]))
    assert report.ok and len(report.warnings) == 51 and "not listed: 250 times" in report.warnings[-1]


def test_a_prompt_longer_than_the_context_is_refused_when_the_context_is_given(write, tokenizer):
    path = write("pairs.jsonl", [PAIR, PAIR | {"prompt": "x" * 40}])
    report = check(path, tokenizer=tokenizer, max_length=30)
    assert str(report.problems[0]) == f"{path}:2: prompt: the prompt has 41 tokens, the context is 30"
    with pytest.raises(ValueError, match="max_length is 30, which is counted in tokens; give the tokenizer"):
        check(path, max_length=30)


# --- kinds of files --------------------------------------------------------------------------------------------------


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, PAIR)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


ROWS = [
    {"prompt": f"Line one\nof {i}, «ünïcode» 🙂?", "chosen": f' "yes", {i}', "rejected": "\nno"} for i in range(150)
]
ENCODED = {
    "jsonl": "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": as_csv(ROWS),
    "parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, zipped):
    content = ENCODED[name.split(".")[1].replace("ndjson", "jsonl")]
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert list(load_rows(path)) == ROWS
    assert check(path).ok and check(path).rows == 150


def test_gzip_is_told_by_its_bytes_not_by_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(ENCODED["jsonl"]))
    (tmp_path / "b.jsonl.gz").write_bytes(ENCODED["jsonl"])
    assert list(load_rows(tmp_path / "a.jsonl")) == list(load_rows(tmp_path / "b.jsonl.gz")) == ROWS


def test_json_lines_in_a_file_called_json(write):
    assert list(load_rows(write("a.json", [PAIR]))) == [PAIR]


@pytest.mark.parametrize(
    "items, row, reason",
    [
        ([GOOD, pair(chosen=None), GOOD], 2, "chosen: is null"),
        ([GOOD, b'{"prompt": "a", "prompt": "b"}'], 2, "the key 'prompt' is there twice"),
        ([GOOD, b"17", GOOD], 2, "is a number, expected an object"),
        ([GOOD, GOOD.replace(b"sky", b"\xff")], 2, "invalid UTF-8"),
        (
            [GOOD, b"{oops}", GOOD],
            2,
            "not valid JSON: Expecting property name enclosed in double quotes; reading stops here",
        ),
    ],
)
def test_a_bad_item_of_an_array_is_named_by_its_row(write, items, row, reason):
    path = write("a.json", b"[" + b",\n".join(items) + b"]")
    assert str(check(path).problems[0]).startswith(f"{path}:{row}: row {row}: {reason}")


def test_a_torn_array_is_named_and_its_whole_items_are_read(write):
    report = check(write("a.json", ENCODED["json"][:-200]))
    assert report.rows - report.bad_rows > 100 and "reading stops here" in str(report)
    report = check(write("b.json", b"[" + GOOD))
    assert "the file ends inside the array (a torn write?)" in str(report)


def test_a_long_array_is_read_in_pieces(write):
    rows = [PAIR | {"prompt": f"{i} " + "x" * 20_000} for i in range(400)]  # 8 MB
    path = write("a.json", json.dumps(rows).encode())
    tracemalloc.start()
    assert check(path).rows == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert list(load_rows(path)) == rows


def test_csv_problems_have_real_line_numbers(write):
    path = write(
        "a.csv",
        b"\xef\xbb\xbfprompt,chosen,rejected\r\n"
        b'"two\nlines",a,b\r\n'  # lines 2 and 3
        b"short,a\r\n"  # 4
        b"long,a,b,c\r\n"  # 5
        b"bytes,\xff,b\r\n"  # 6
        b"\r\n"
        b"empty,,b\r\n"  # 8
        b'torn,a,"b\r\n',
    )  # 9
    assert [str(problem) for problem in check(path).problems] == [
        f"{path}:4: rejected: is missing",
        f"{path}:5: 4 cells, the header has 3",
        f"{path}:6: invalid UTF-8",
        f"{path}:8: chosen: is empty",
        f"{path}:9: not valid CSV: unexpected end of data",
    ]


def test_csv_with_the_same_column_twice_is_refused(write):
    with pytest.raises(DataError, match=r"two columns have the same name: 'prompt', 'prompt'"):
        check(write("a.csv", b"prompt,prompt\na,b\n"))


def test_parquet_problems_are_named_by_row(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet([PAIR, PAIR | {"chosen": None}]))
    assert "a.parquet:2: row 2: chosen: is null" in str(check(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(as_parquet([PAIR])[:-9])
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        check(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("absent.jsonl", "there is no such file"),
        ("./absent", "there is no such file"),
        ("a b", "there is no such file"),
        (Path("absent"), "there is no such file"),
        ("", "is a folder"),
    ],
)
def test_a_source_that_is_not_there(source, reason):
    with pytest.raises(DataError, match=reason):
        load_rows(source)


def test_a_folder_and_an_unknown_kind_of_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; expected a file, or a folder written by datasets\.save_to_disk"):
        load_rows(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"unknown kind of file '\.pkl'; expected \.jsonl"):
        load_rows(tmp_path / "a.pkl")


def test_a_saved_data_set_and_a_hub_id(tmp_path, monkeypatch):
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    assert list(load_rows(tmp_path / "saved")) == ROWS
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or {"train": saved}
    )
    assert list(load_rows("someone/some-pairs")) == ROWS
    assert asked == [(("someone/some-pairs",), {})]  # nothing that could allow remote code
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"a": saved, "b": saved})
    with pytest.raises(DataError, match="it has the splits a, b, none is called train"):
        load_rows("someone/some-pairs")


def test_the_hub_cannot_be_reached(monkeypatch):
    import datasets

    def refuse(name):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match="someone/pairs: there is no such file or folder here, and alignkit cannot load .*ConnectionErr"
                         "or: Couldn't reach.*Offline.*local file"
    ):
        load_rows("someone/pairs")


# --- formats ---------------------------------------------------------------------------------------------------------

USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No."))
)
HEAD = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row, kind, expected",
    [
        (PAIR, "pairs", PAIR),
        ({"prompt": "a"}, "prompts", {"prompt": "a"}),
        ({"prompt": "a", "completion": "b"}, "demonstrations", {"prompt": "a", "completion": "b"}),
        ({"text": "Once upon a time"}, "demonstrations", {"prompt": "", "completion": "Once upon a time"}),
        (
            {"text": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"},
            "demonstrations",
            {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"},
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: It is b", "rejected": "\n\nHuman: a\n\nAssistant: It is c"},
            "pairs",
            {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " It is b", "rejected": " It is c"},
        ),
        (
            {"chosen": "Q: two plus two\nA: four", "rejected": "Q: two plus two\nA: five"},
            "pairs",
            {"prompt": "Q: two plus two\nA:", "chosen": " four", "rejected": " five"},
        ),
        ({"chosen": "Q: a", "rejected": "Q: a b"}, "pairs", {"prompt": "Q:", "chosen": " a", "rejected": " a b"}),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
            "pairs",
            {"prompt": HEAD, "chosen": "Yes.", "rejected": "No."},
        ),
        (
            {"chosen": [USER, YES], "rejected": [USER, NO]},
            "pairs",
            {"prompt": HEAD, "chosen": "Yes.", "rejected": "No."},
        ),
        (
            {"prompt": "Hi?", "chosen": [USER, YES], "rejected": [USER, NO]},
            "pairs",
            {"prompt": HEAD, "chosen": "Yes.", "rejected": "No."},
        ),
        ({"messages": [USER, YES]}, "demonstrations", {"prompt": HEAD, "completion": "Yes."}),
        ({"prompt": [USER], "completion": [YES]}, "demonstrations", {"prompt": HEAD, "completion": "Yes."}),
        ({"prompt": [USER]}, "prompts", {"prompt": HEAD}),
    ],
)
def test_formats(write, tokenizer, row, kind, expected):
    path = write("a.jsonl", [row])
    rows = load_rows(path, tokenizer=tokenizer)
    assert rows.kind == check(path).kind == kind and list(rows) == [expected]
    chat = any(isinstance(value, list) for value in row.values())
    assert all(isinstance(text, ChatText) == chat for text in rows[0].values())


def test_the_kind_can_be_given_and_mixed_columns_must_have_one(write):
    path = write("a.jsonl", [PAIR | {"messages": [USER, YES]}])
    with pytest.raises(DataError, match=r"'chosen', 'messages', 'prompt', 'rejected', which is mixed.*kind='pairs'"):
        check(path)
    assert list(load_rows(path, kind="pairs")) == [PAIR]
    with pytest.raises(ValueError, match="kind is 'pair', expected one of pairs, demonstrations, prompts"):
        check(path, kind="pair")
    with pytest.raises(DataError, match=r"the columns are 'answer', 'question'; expected prompt, chosen, rejected"):
        check(write("b.jsonl", [{"question": "a", "answer": "b"}]))
    with pytest.raises(DataError, match="chosen: is missing"):
        load_rows(write("c.jsonl", [{"prompt": "a"}]), kind="pairs")


def test_rows_of_another_kind_are_named(write):
    report = check(write("a.jsonl", [{"chosen": "Q: a b", "rejected": "Q: a c"}] * 3 + [PAIR, {"prompt": "a"}]))
    assert [(problem.line, problem.field, problem.reason) for problem in report.problems] == [
        (4, "prompt", "this row has a prompt, others have none"),
        (5, "prompt", "this row has a prompt, others have none"),
    ]


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("Yes", "No"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"),
        ("\n\nAssistant: a", "\n\nHuman: a"),
    ],
)
def test_dialogues_that_share_no_prompt_are_refused(write, chosen, rejected):
    report = check(write("a.jsonl", [{"chosen": chosen, "rejected": rejected}]))
    assert "chosen and rejected do not begin with the same prompt; give the prompt in a column" in str(report)


def test_a_blank_reply_in_a_dialogue_is_kept_with_a_warning(write):
    rows = load_rows(
        write("a.jsonl", [{"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}])
    )
    assert rows[0]["chosen"] == "" and "chosen is a blank reply" in rows.warnings[0]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": [USER, YES], "rejected": "No."}, "rejected: is text, expected a list of messages"),
        (
            {"chosen": [USER, {"role": "assistant"}], "rejected": [USER, NO]},
            "chosen: message 2 is an object, expected an object",
        ),
        (
            {"chosen": [USER, YES | {"content": None}], "rejected": [USER, NO]},
            "content of message 2: is null, expected text",
        ),
        (
            {"chosen": [USER, YES | {"content": [{"type": "image"}]}], "rejected": [USER, NO]},
            "content of message 2: is a list",
        ),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "rejected: is identical to chosen"),
        ({"chosen": [YES], "rejected": [NO]}, "is empty or ends with an assistant message"),
        (
            {"chosen": [USER, YES, USER], "rejected": [USER, NO]},
            "chosen: expected one assistant message after the prompt, came assistant, user",
        ),
        (
            {"chosen": [USER, YES | {"content": "a<|im_end|>"}], "rejected": [USER, NO]},
            "message 2 contains '<|im_end|>', which the chat template would make a real token",
        ),
    ],
)
def test_bad_conversations(write, tokenizer, row, reason):
    assert reason in str(check(write("a.jsonl", [row]), tokenizer=tokenizer))


def test_a_conversation_needs_a_tokenizer_with_a_template(write, tokenizer):
    path = write("a.jsonl", [{"chosen": [USER, YES], "rejected": [USER, NO]}])
    assert check(path).ok
    with pytest.raises(DataError, match=r"the rows are conversations; give tokenizer="):
        load_rows(path)
    with pytest.raises(
        DataError, match=r"the tokenizer has no chat template; set tokenizer\.chat_template, use a chat model"
    ):
        load_rows(path, tokenizer=desk_tokenizer())


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{% if add_generation_prompt %}A{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
            "in another way when",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses it: TemplateError: roles must alternate",
        ),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses it: SecurityError"),
    ],
)
def test_templates_that_cannot_be_used(write, template, reason):
    tokenizer = desk_tokenizer()
    tokenizer.chat_template = template
    assert reason in str(
        check(write("a.jsonl", [{"chosen": [USER, YES], "rejected": [USER, NO]}]), tokenizer=tokenizer)
    )


# --- text and tokens -------------------------------------------------------------------------------------------------

TEXTS = ["Hello world", "a</s>b", "<s>", "</s>", "<|im_end|>", " lead and trail ", "", "ünï 🙂\n\n", "<s><s></s>"]


def tokenizers():
    yield "desk", desk_tokenizer()
    if STORIES.exists():
        yield "stories260K", AutoTokenizer.from_pretrained(STORIES)


@pytest.mark.parametrize("tok", [pytest.param(made, id=name) for name, made in tokenizers()])
@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_a_text_stay_text_and_bos_comes_once(tok, text):
    ids = encode_text(tok, text)
    specials = {tok.bos_token_id, tok.eos_token_id}
    assert ids[0] == tok.bos_token_id and not specials & set(ids[1:])
    assert ids[1:] == encode_text(tok, text, add_special_tokens=False)
    if tok.convert_ids_to_tokens(5) != "<unk>" and tok.name_or_path:  # byte fallback: nothing is lost
        assert tok.decode(ids, skip_special_tokens=True) == text


def test_a_rendered_conversation_keeps_its_special_tokens_and_gets_no_bos(tokenizer):
    ids = encode_text(tokenizer, ChatText(HEAD))
    assert ids == tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2 and tokenizer.bos_token_id not in ids
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in encode_text(tokenizer, HEAD)
    batch, mask = encode_prompts(tokenizer, [ChatText(HEAD), "a", HEAD])  # the sampler sees the same tokens
    rows = [row[keep].tolist() for row, keep in zip(batch, mask, strict=True)]
    assert rows == [ids, encode_text(tokenizer, "a"), encode_text(tokenizer, HEAD)]


def test_a_tokenizer_that_ends_every_text_with_eos(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 4)]
    )
    assert other("a")["input_ids"][-1] == other.eos_token_id
    assert encode_text(other, "a b") == encode_text(tokenizer, "a b")
    assert encode_pair(other, "a", " b") == encode_pair(tokenizer, "a", " b")


def test_a_pair_is_tokenised_jointly_where_the_border_is_one(tokenizer):
    bos, a, b, ab = 1, *tokenizer.convert_tokens_to_ids(["a", "b", "ab"])
    assert encode_pairs(tokenizer, ["b", "a", "a"], ["ab", "ab", "b"]) == (
        [([bos, b], [ab]), ([bos, a], [ab]), ([bos, a], [b])],
        1,
    )
    assert encode_pair(tokenizer, "", "ab") == ([bos], [ab])


def test_the_prompts_ids_do_not_depend_on_the_response_nor_on_being_plain(tokenizer):
    prompt, response = ChatText(HEAD), ChatText("Yes.")
    assert (
        encode_pair(tokenizer, prompt, response)[0]
        == encode_pair(tokenizer, prompt, "Y")[0]
        == encode_text(tokenizer, prompt)
    )
    both, apart = encode_pairs(tokenizer, [prompt, HEAD], [response, response])
    assert apart == 1 and both[0][0] != both[1][0] and both[0][1] == both[1][1]
    hostile = encode_pair(tokenizer, prompt, "<|im_end|>")  # what a policy wrote is text
    assert tokenizer.eos_token_id not in hostile[1]


@pytest.mark.shared
@pytest.mark.parametrize(
    "prompt, response", [("Answer: ", "yes"), ("Answer:", " yes"), ("Answer:", "yes"), ("a ", " b"), ("x", "")]
)
def test_prompt_and_response_read_as_the_joint_text(prompt, response):
    tok = AutoTokenizer.from_pretrained(STORIES)
    head, tail = encode_pair(tok, prompt, response)
    assert tok.decode(head + tail, skip_special_tokens=True) == prompt + response
    assert head == tok(prompt)["input_ids"] and tok.bos_token_id not in tail


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_hh_rlhf_is_read_as_1500_pairs_and_nothing_is_lost():
    report = check(HH)
    assert (report.kind, report.rows, report.bad_rows) == ("pairs", 1500, 0)
    assert report.warnings == (
        "chosen is a blank reply (kept: it stands for saying nothing): 4 times, first at line 87, 517, 926, 1104",
        "a reply holds further turns of a transcript, which are read as part of it: 1 time, first at line 1255",
    )
    rows = load_rows(HH)
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        for row, original in zip(rows, map(json.loads, lines), strict=True):
            assert row["prompt"].endswith("\n\nAssistant:")
            assert row["prompt"] + row["chosen"] == original["chosen"]
            assert row["prompt"] + row["rejected"] == original["rejected"]


@pytest.mark.shared
def test_hh_rlhf_as_a_task_fits_the_context_and_keeps_its_parts_apart(write):
    tok = AutoTokenizer.from_pretrained(STORIES)
    with gzip.open(HH) as lines:
        path = write("hh.jsonl.gz", b"".join(line for line, _ in zip(lines, range(400), strict=False)))
    task = load_task(path, tok, seed=0, max_new_tokens=16, max_length=256)
    assert 20 < len(task.heldout_prompts) < 70 and task.heldout_keys == list(range(len(task.heldout_prompts)))
    assert not {" ".join(text.split()) for text in task.train_prompts} & {
        " ".join(text.split()) for text in task.heldout_prompts
    }
    train, held = task.preference_pairs(None, None), task.preference_pairs(None, None, split="heldout")
    assert {row["prompt"] for row in train} == set(task.train_prompts)
    assert {row["prompt"] for row in held} == set(task.heldout_prompts)
    for row in held:
        for name in ("chosen", "rejected"):
            head, tail = encode_pair(tok, row["prompt"], row[name])
            assert len(head) <= 239 and len(head) + len(tail) + 1 <= 256
        assert row["prompt"].endswith("\n\nAssistant:")
    assert any("longer than 239 tokens and lost its beginning" in note for note in task.notes)
    assert all(row["completion"].strip() for row in task.demonstrations())
    assert len(task.demonstrations(7)) == 7 and task.demonstrations(7, seed=1) != task.demonstrations(
        7
    ) == task.demonstrations(7)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_equal_prompts_are_never_on_both_sides(write, tokenizer):
    spellings = (str, str.upper, lambda text: text.replace(" ", "  \n"), lambda text: f" {text} ")
    rows = [
        {**PAIR, "prompt": spell(f"how do I {i % 60}?"), "chosen": f"{i}"} for i in range(180) for spell in spellings
    ]
    for seed in range(5):
        task = file_task(write("a.jsonl", rows), tokenizer, seed, heldout_share=0.3)
        parts = [
            {" ".join(row["prompt"].lower().split()) for row in part} for part in (task.train_rows, task.heldout_rows)
        ]
        assert not parts[0] & parts[1] and len(parts[0]) + len(parts[1]) == 60 and 5 < len(parts[1]) < 35
        assert len(task.train_prompts) == len(parts[0]) and len(task.heldout_prompts) == len(parts[1])
        assert all(is_heldout(prompt, seed, 0.3) for prompt in task.heldout_prompts)
        assert not any(is_heldout(prompt, seed, 0.3) for prompt in task.train_prompts)


def test_the_same_prompt_goes_to_the_same_side_in_every_file(write, tokenizer):
    rows = [{**PAIR, "prompt": f"how {i}?"} for i in range(100)]
    first = file_task(write("a.jsonl", rows[:70]), tokenizer, 3, heldout_share=0.3)
    second = file_task(write("b.jsonl", rows[:29:-1]), tokenizer, 3, heldout_share=0.3)
    assert not set(first.train_prompts) & set(second.heldout_prompts)
    assert not set(second.train_prompts) & set(first.heldout_prompts)
    other = file_task(write("a.jsonl", rows[:70]), tokenizer, 4, heldout_share=0.3)
    assert set(other.heldout_prompts) != set(first.heldout_prompts)


def test_prompts_that_are_equal_after_shortening_stay_together(write, tokenizer):
    rows = [{**PAIR, "prompt": f"{i:02d}" * 20 + f" the same end {i % 3}" + "." * 30} for i in range(60)]
    task = file_task(write("a.jsonl", rows), tokenizer, heldout_share=0.5, max_length=60, max_new_tokens=20)
    assert len(task.train_prompts) + len(task.heldout_prompts) == 3
    assert all(prompt.endswith("." * 30) and len(encode_text(tokenizer, prompt)) == 39 for prompt in task.train_prompts)
    assert "60 of 60 rows: the prompt was longer than 39 tokens and lost its beginning" in task.notes


def test_a_prompt_leaves_room_for_a_whole_response_and_its_end(write, tokenizer):
    rows = [{**PAIR, "prompt": f"{i}" * 60} for i in range(9)]
    task = file_task(write("a.jsonl", rows), tokenizer, max_length=60, max_new_tokens=20)
    scored = RewardScorer(torch.nn.Identity(), tokenizer).ids(task.train_prompts, ["x" * 20] * len(task.train_prompts))
    assert {len(ids) for ids in scored} == {60}  # a reward model with a context of 60 tokens can score it


def test_responses_are_cut_to_the_context_and_pairs_that_become_equal_are_left_out(write, tokenizer):
    rows = [PAIR | {"prompt": f"{i}?", "chosen": "x" * 50 + "a", "rejected": "x" * 50 + "b"} for i in range(4)]
    rows += [PAIR | {"prompt": f"{i}?", "chosen": "y" * 50} for i in range(4)]
    task = file_task(write("a.jsonl", rows), tokenizer, max_length=32, max_new_tokens=8)
    both = task.train_rows + task.heldout_rows
    assert len(both) == 4 and all(row["chosen"] == "y" * 28 for row in both)  # 32 - <s>, digit, ?, EOS
    assert "4 of 8 rows: left out, chosen and rejected are equal in what is left of them" in task.notes


def test_tasks_of_other_kinds_of_rows(write, tokenizer):
    prompts = file_task(write("a.jsonl", [{"prompt": f"{i}?"} for i in range(20)]), tokenizer)
    assert len(prompts.train_prompts) + len(prompts.heldout_prompts) == 20
    with pytest.raises(DataError, match="has prompts only; SFT needs demonstrations"):
        prompts.demonstrations(3)
    with pytest.raises(DataError, match="has prompts; the reward model and DPO need pairs"):
        prompts.preference_pairs(None, None)
    demos = file_task(write("b.jsonl", [{"prompt": f"{i}?", "completion": "b"} for i in range(20)]), tokenizer)
    assert demos.demonstrations(2)[0]["completion"] == "b"
    pairs = file_task(write("c.jsonl", [PAIR, PAIR | {"prompt": "a"}]), tokenizer)
    assert len(pairs.train_prompts) == len(pairs.heldout_prompts) == 1
    with pytest.raises(ValueError, match="annotator is 'expert' and noise None, expected 'default' and None"):
        pairs.preference_pairs(None, None, annotator="expert")
    with pytest.raises(ValueError, match="split is 'test', expected one of train, heldout"):
        pairs.preference_pairs(None, None, split="test")
    with pytest.raises(DataError, match="1 different prompts; expected at least 2"):
        file_task(write("d.jsonl", [PAIR, PAIR]), tokenizer)
    with pytest.raises(DataError, match=r"0 different prompts.*rows of plain text have none"):
        file_task(write("e.jsonl", [{"text": "Once"}]), tokenizer)
    with pytest.raises(ValueError, match=r"max_new_tokens is 600, expected 1 to 510"):
        file_task(write("f.jsonl", [PAIR]), tokenizer, max_new_tokens=600)


def test_bad_rows_stop_a_task_unless_it_may_skip_them(write, tokenizer):
    path = write("a.jsonl", [PAIR, PAIR | {"prompt": "a"}, PAIR | {"chosen": None}])
    with pytest.raises(DataError, match="1 of 3 rows cannot be used"):
        load_task(path, tokenizer)
    assert "1 bad rows left out" in load_task(path, tokenizer, skip_bad=True).notes


def test_a_task_of_conversations_keeps_them_chats(write, tokenizer):
    rows = [
        {"chosen": [USER | {"content": f"{i}" * 60}, YES], "rejected": [USER | {"content": f"{i}" * 60}, NO]}
        for i in range(9)
    ]
    task = file_task(write("a.jsonl", rows), tokenizer, max_length=80, max_new_tokens=16)
    assert all(isinstance(prompt, ChatText) for prompt in task.train_prompts + task.heldout_prompts)
    assert all(isinstance(text, ChatText) for row in task.train_rows for text in row.values())
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in task.train_prompts)


def test_the_desk_world_is_a_task():
    task = load_task("desk", desk_tokenizer(), seed=0)
    assert (
        isinstance(task, DeskTask)
        and task.max_new_tokens == 4
        and load_task("desk", desk_tokenizer(), 1).world.seed == 1
    )
    assert task.train_prompts == [prompt.text for prompt in task.world.train_prompts]
    assert task.heldout_prompts == [prompt.text for prompt in task.world.heldout_prompts]
    assert task.heldout_keys == [task.world.find(text).key for text in task.heldout_prompts]
    assert task.heldout_kinds == [task.world.find(text).kind for text in task.heldout_prompts]
    assert len(task.train_kinds) == len(task.train_prompts) and len(set(task.train_kinds)) == 4
    assert not set(task.train_prompts) & set(task.heldout_prompts)
    demonstrations = task.demonstrations(50, seed=3)
    assert len(demonstrations) == 50 and {row["prompt"] for row in demonstrations} <= set(task.train_prompts)
    assert (
        demonstrations
        == desk_task(0).demonstrations(50, seed=3)
        != desk_task(0, messiness=0.1).demonstrations(50, seed=3)
    )


@pytest.mark.shared
def test_the_desk_world_needs_its_own_tokenizer():
    with pytest.raises(ValueError, match="model='tiny'"):
        load_task("desk", AutoTokenizer.from_pretrained(STORIES))


def test_desk_pairs_come_from_the_policy_and_the_annotator():
    from alignkit.models.loading import load_policy

    policy, tokenizer = load_policy("tiny", seed=0, device="cpu")
    task = desk_task(0)
    pairs = task.preference_pairs(policy, tokenizer, 40, seed=5)
    assert len(pairs) == 40 and all(row["chosen"] != row["rejected"] for row in pairs)
    assert {row["prompt"] for row in pairs} <= set(task.train_prompts)
    assert pairs == task.preference_pairs(policy, tokenizer, 40, seed=5)
    other = task.preference_pairs(policy, tokenizer, 400, seed=6)
    assert pairs != other[:40]
    kinds = collections.Counter(task.world.find(row["prompt"]).kind for row in other)
    assert len(kinds) == 4 and min(kinds.values()) > 80  # every class about as often
    held = task.preference_pairs(policy, tokenizer, 40, seed=5, split="heldout", annotator="expert", noise=0.0)
    assert {row["prompt"] for row in held} <= set(task.heldout_prompts)
    with pytest.raises(ValueError, match="annotator is 'nobody'"):
        task.preference_pairs(policy, tokenizer, 4, annotator="nobody")


def test_every_public_name_is_documented():
    public = [
        value
        for module in (encoding, fields, files, rows)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    assert len(public) > 8 and all(value.__doc__ for value in public)
