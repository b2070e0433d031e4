"""The layouts of published data sets: the columns of the prompt and the replies, and which reply is better.

LAYOUTS is a table; to support another layout, add a line to it. `columns` lists the fields of a row and, if the column
has another name, the column of each: `prompt=question`, `prompt=input.messages` (inside an object), `system?`
(optional), `answers[]` (a list), `answers[{}]` (a list of objects, possibly saved as text). `read`, if given, converts
other fields to prompt, chosen and rejected, or to prompt and completion. If several layouts fit, the one with the most
columns is used, then the first.

The fields: prompt, input (appended to the prompt), system, history (pairs of question and answer, or messages), tools,
chosen, rejected, completion, messages, text.
"""

import ast
import contextlib
import difflib
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from alignkit.data.files import Fault
from alignkit.errors import DataError
from alignkit.storage import read_json


class LeftOut(Exception):
    """Why a valid record gives no row: a tie, or an answer that is labelled as bad."""


class Layout(NamedTuple):
    """One row format. columns: see above; read: a function from fields (a dict) to fields; together: consecutive rows
    with the same value in this column are one record, with their fields as its `answers`."""

    name: str
    kind: str
    columns: str
    read: Callable[[dict], dict] | None = None
    together: str = ""

    @property
    def places(self) -> tuple[tuple[str, str, bool, str], ...]:
        """For each field: (field, column, whether it is required, "" or its type: a "list", "objects" in a list)."""
        return _places(self.columns)

    @property
    def names(self) -> frozenset[str]:
        """The names of the fields."""
        return frozenset(field for field, _, _, _ in self.places)

    @property
    def needs(self) -> int:
        """Number of required columns."""
        return sum(needed for _, _, needed, _ in self.places)

    def fits(self, record: Mapping, given: Collection[str] = ()) -> bool:
        """Whether a record has all required columns; those of `given` fields under the fields' names."""
        return all(there(record, column) and _is_built(value_at(record, column), built)
                   for column, built in self.needed(record, given))

    def needed(self, record: Mapping, given: Collection[str] = ()) -> list[tuple[str, str]]:
        """(column, type) of the required columns of a record, under their names after renaming."""
        return [(field if field in given and field in record else column, built)
                for field, column, needed, built in self.places if needed]

    def fields(self, record: Mapping) -> dict:
        """The fields of a record, by name."""
        values = {field: value_at(record, column) for field, column, _, _ in self.places if there(record, column)}
        return values | {field: objects for field, _, _, built in self.places
                         if built == "objects" and (objects := objects_in(values.get(field)))}

    def row(self, fields: dict) -> dict:
        """The result of `read` for the fields. Raises Fault for a record with another structure, LeftOut for one
        without information."""
        if self.read is None:
            return fields
        try:
            return self.read(fields)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise Fault(f"is not built as in {self.name} ({type(error).__name__}: {error})"[:300]) from None

    def column(self, field: str) -> str:
        """The column of a field."""
        return next((column for name, column, _, _ in self.places if name == field), field)


# --- of fields, other fields -----------------------------------------------------------------------------------------
def better(**which: str):
    """A reader of pairs `first`, `second` whose field `better` names the better one: first="…", second="…", tie="…" are
    its possible values, separated by |."""
    meaning = {value: side for side, values in which.items() for value in values.split("|")}

    def read(fields: dict) -> dict:
        side = meaning.get(plain(fields["better"]))
        if side is None:
            raise Fault(f"is {fields['better']!r}, expected one of {', '.join(meaning)}", "better")
        if side == "tie":
            raise LeftOut("neither reply is better")
        return _pair(fields, *(("first", "second") if side == "first" else ("second", "first")))

    return read


def by_score(fields: dict) -> dict:
    """The one of `first` and `second` with the higher score (score_first, score_second) is chosen."""
    scores = [_number(fields, name) for name in ("score_first", "score_second")]
    if scores[0] == scores[1]:
        raise LeftOut("neither reply is better")
    return _pair(fields, *(("first", "second") if scores[0] > scores[1] else ("second", "first")))


def best_and_worst(fields: dict) -> dict:
    """Of `answers`, objects with a text and scores, the best is chosen and the worst rejected.

    Answers are compared by the score that the user names with `score`, otherwise by the first of _SCORES that an answer
    has, or by the mean of its aspects. All scores of the two answers are kept as `scores`: {"chosen": {name: number},
    "rejected": …}.
    """
    asked, marked = fields.get("score"), []
    for number, answer in enumerate(fields["answers"], 1):
        text = next((answer[name] for name in _TEXTS if name in answer), None) if isinstance(answer, dict) else None
        marks = marks_of(answer, asked) if text is not None else {}
        if not marks or (asked and asked not in marks):
            lacks = f"mark {asked!r}, only {', '.join(marks)}" if marks else f"text ({', '.join(_TEXTS)}) and mark"
            raise Fault(f"answer {number} has no {lacks}", "answers")
        own = {*answer, "mean"} & marks.keys()  # if there are aspects, their mean decides
        name = asked or next((name for name in _SCORES if name in own), "mean")
        marked.append((-marks[name] if name == "rank" else marks[name], text, marks))
    if len({mark for mark, _, _ in marked}) < 2:
        raise LeftOut("fewer than two answers, or none is better")
    chosen, rejected = (pick(marked, key=lambda each: each[0]) for pick in (max, min))
    return {**_pair({**fields, "first": chosen[1], "second": rejected[1]}, "first", "second"),
            "scores": {"chosen": chosen[2], "rejected": rejected[2]}}


def side_by_side(fields: dict) -> dict:
    """Replies in one list and their scores in another, as distilabel writes them; replies without a score are
    skipped."""
    replies, marks = fields["replies"], fields["marks"]
    if len(replies) != len(marks):
        raise Fault(f"is a list of {len(marks)}, expected one of {len(replies)} as the replies", "marks")
    return best_and_worst({**fields, "answers": [{"text": reply, "score": mark} for reply, mark
                                                 in zip(replies, marks, strict=True) if mark is not None]})


def marks_of(answer: Mapping, asked: str | None = None) -> dict[str, float]:
    """The scores of an answer: its own (_SCORES, _ASPECTS and the requested one), the Rating of each aspect of its
    `annotations` that has one (UltraFeedback's may be N/A), and their mean as "mean". Raises Fault for an own score
    that is not a number."""
    marks = {name: _number(answer, name) for name in (*_SCORES, *_ASPECTS, asked) if answer.get(name) is not None}
    rated = {name: str(aspect.get("Rating")).strip() for name, aspect in (answer.get("annotations") or {}).items()
             if isinstance(aspect, Mapping)}
    aspects = {name: float(rating) for name, rating in rated.items() if re.fullmatch(r"\d+(\.\d+)?", rating)}
    mean = {"mean": sum(aspects.values()) / len(aspects)} if aspects else {}
    return {**mean, **aspects, **marks}


def only_good(fields: dict) -> dict:
    """A completion whose `label` marks it as good; others are skipped."""
    good = {"true": True, "1": True, "false": False, "0": False}.get(plain(fields["label"]))
    if good is None:
        raise Fault(f"is {fields['label']!r}, expected true or false", "label")
    if not good:
        raise LeftOut("its label is false: only good replies are demonstrations")
    return _without(fields, "label")


def chosen_then_rejected(fields: dict) -> dict:
    """`both` is a list of two texts, the better one first."""
    both = fields["both"]
    if len(both) != 2:
        raise Fault(f"is a list of {len(both)}, expected the better and the worse reply", "both")
    return {**_without(fields, "both"), "chosen": both[0], "rejected": both[1]}


def last_is_chosen(fields: dict) -> dict:
    """The last of `messages` is chosen; `rejected` is a text."""
    messages = fields["messages"]
    if not messages or not isinstance(fields["rejected"], str):
        return {**_without(fields, "messages"), "chosen": messages, "rejected": fields["rejected"]}
    last = {"role": "assistant", "content": fields["rejected"]}
    return {**_without(fields, "messages"), "chosen": messages, "rejected": [*messages[:-1], last]}


def arena(fields: dict) -> dict:
    """Chatbot Arena: conversations with the same questions, of which only the first turn always has the same
    context."""
    read = better(first="model_a", second="model_b", tie="tie|tie (bothbad)|both_bad|bothbad")(fields)
    replies = [[message for message in read[name] if isinstance(message, dict) and message.get("role") == "assistant"]
               for name in ("chosen", "rejected") if isinstance(read[name], list)]
    if any(len(each) > 1 for each in replies):
        raise LeftOut("the two conversations part before their last reply")
    return read


def arena_lists(fields: dict) -> dict:
    """Chatbot Arena's 55k file: questions and replies are JSON lists as text, the winner is in one of three columns."""
    texts = {}
    for name in ("prompt", "first", "second"):
        try:
            texts[name] = json.loads(fields[name]) if isinstance(fields[name], str) else fields[name]
        except (ValueError, RecursionError):
            raise Fault("is no JSON list of texts", name) from None
        if not isinstance(texts[name], list) or not texts[name]:
            raise Fault("is no JSON list of texts", name)
    if len(texts["prompt"]) > 1:
        raise LeftOut("the two conversations part before their last reply")
    if plain(fields["a"]) == plain(fields["b"]):
        raise LeftOut("neither reply is better")
    sides = ("first", "second") if plain(fields["a"]) == "1" else ("second", "first")
    return _pair({name: value[0] for name, value in texts.items()}, *sides)


def first_fork(fields: dict) -> dict:
    """PRM800K: the first step with both a right and a wrong continuation; the steps before it belong to the prompt."""
    before = []
    for step in fields["steps"] or ():
        rated = {each.get("rating"): each.get("text") for each in step.get("completions") or () if each}
        if rated.get(1) and rated.get(-1):
            prompt = "\n".join([fields["prompt"], *before]) + "\n"
            return {"prompt": prompt, "chosen": rated[1], "rejected": rated[-1]}
        number = step.get("chosen_completion")
        taken = step["completions"][number] if number is not None else step.get("human_completion")
        if not taken:
            break
        before.append(taken["text"] if isinstance(taken, dict) else taken)
    raise LeftOut("no step has both a right and a wrong continuation")


LONGEST_LIST = 2**20  # characters of a list saved as text
_TEXTS = ("answer", "text", "response", "content", "output")
# What decides, the first that is there. UltraFeedback's fine-grained_score is the mean of its aspects; overall_score
# comes behind it, since it is 10 also of some of the worst answers (argilla's card of ultrafeedback-binarized).
_SCORES = ("rank", "pm_score", "helpfulness", "fine-grained_score", "mean", "overall_score", "score", "rating")
_ASPECTS = ("correctness", "coherence", "complexity", "verbosity")
# Where columns and the values of labels were checked:
#   TRL, KTO                  TRL's page "Dataset formats and types"
#   UltraFeedback             README of OpenBMB/UltraFeedback (completions, annotations, Rating); fine-grained_score and
#                             ultrafeedback_binarized from memory; argilla's binarized: its card
#   Nectar, WebGPT            their cards (rank 1 is the best; an answer is preferred if its score is positive)
#   SHP-2                     readers of several repositories: labels 1 means A; the card's own words were not seen
#   HelpSteer2, HelpSteer3    a published row and cards made of them: below 0 the first is better; aspects from readers
#   PKU-SafeRLHF              open-instruct's reader; -1 for a tie from memory
#   Chatbot Arena             readers of several repositories (winner: model_a, model_b, tie, tie (bothbad)); the file
#                             of 55k and both_bad from memory
#   PRM800K                   README of openai/prm800k
#   OpenAI preferences        OpenAI's guide "Direct preference optimization"
#   LLaMA-Factory             data/README.md of hiyouga/LLaMA-Factory
#   axolotl, Intel Orca       docs/rlhf.qmd of axolotl-ai-cloud/axolotl (chatml.intel, .icr, .argilla, chat_template)
#   ms-swift                  its page "Custom dataset" (messages, rejected_response, label); the other two from memory
#   distilabel                the card of a set that it made (generations, ratings); Capybara from memory
#   stack-exchange            the card of -preferences (what the score is); names of columns from memory
#   OpenAI summaries, argilla Orca, Tulu, dolly, sharegpt    from memory
LAYOUTS = (
    Layout("prompt, chosen, rejected (TRL, UltraFeedback, Tülu)", "pairs",
           "prompt chosen rejected input? system? history?"),
    Layout("chosen, rejected (TRL, HH-RLHF)", "pairs", "chosen rejected system? history?"),
    Layout("axolotl", "pairs", "messages chosen rejected system?"),
    Layout("LLaMA-Factory sharegpt ranking", "pairs", "messages=conversations chosen rejected system? tools?"),
    Layout("LLaMA-Factory alpaca ranking", "pairs", "prompt=instruction input? chosen rejected system? history?"),
    Layout("LLaMA-Factory alpaca ranking, lists", "pairs", "prompt=instruction input? both=output[] system? history?",
           chosen_then_rejected),
    Layout("Intel Orca", "pairs", "prompt=question chosen rejected system?"),
    Layout("argilla Orca", "pairs", "prompt=input chosen rejected system?"),
    Layout("argilla UltraFeedback", "pairs",
           "prompt=instruction chosen=chosen_response rejected=rejected_response system?"),
    Layout("prompt, chosen_response, rejected_response", "pairs",
           "prompt chosen=chosen_response rejected=rejected_response system?"),
    Layout("stack-exchange-paired", "pairs", "prompt=question chosen=response_j rejected=response_k"),
    Layout("stack-exchange-preferences", "pairs", "prompt=question answers[{}]", best_and_worst),
    Layout("Nectar", "pairs", "prompt answers[{}]", best_and_worst),
    Layout("UltraFeedback", "pairs", "prompt=instruction answers=completions[{}]", best_and_worst),
    Layout("distilabel UltraFeedback", "pairs", "prompt=instruction replies=generations[] marks=ratings[]",
           side_by_side),
    Layout("responses, scores", "pairs", "prompt replies=responses[] marks=scores[]", side_by_side),
    Layout("HelpSteer, HelpSteer2", "pairs", "prompt response helpfulness answers[{}]?", best_and_worst,
           together="prompt"),
    Layout("HelpSteer2-preference", "pairs",
           "prompt first=response_1 second=response_2 better=preference_strength",
           better(first="-3|-2|-1", tie="0", second="1|2|3")),
    Layout("HelpSteer3", "pairs", "prompt=context first=response1 second=response2 better=overall_preference",
           better(first="-3|-2|-1", tie="0", second="1|2|3")),
    Layout("SHP-2", "pairs", "prompt=history first=human_ref_A second=human_ref_B better=labels",
           better(first="1", second="0")),
    Layout("PKU-SafeRLHF", "pairs", "prompt first=response_0 second=response_1 better=better_response_id",
           better(first="0", second="1", tie="-1")),
    Layout("first, second, better", "pairs", "prompt first second better system? history?",
           better(first="first|a|A|model_a|response_a|answer_a|response_1|answer_1",
                  second="second|b|B|model_b|response_b|answer_b|response_2|answer_2", tie="tie|both|neither|equal")),
    Layout("Chatbot Arena", "pairs", "first=conversation_a second=conversation_b better=winner", arena),
    Layout("Chatbot Arena, 55k", "pairs",
           "prompt first=response_a second=response_b a=winner_model_a b=winner_model_b winner_tie?", arena_lists),
    Layout("WebGPT", "pairs", "prompt=question.full_text first=answer_0 second=answer_1 score_first=score_0 "
           "score_second=score_1", by_score),
    Layout("OpenAI summaries", "pairs",
           "prompt=info.post first=summaries.0.text second=summaries.1.text better=choice",
           better(first="0", second="1")),
    Layout("OpenAI preferences", "pairs",
           "prompt=input.messages chosen=preferred_output rejected=non_preferred_output tools=input.tools?"),
    Layout("ms-swift", "pairs", "messages[{}] rejected=rejected_response", last_is_chosen),
    Layout("ms-swift, query", "pairs", "prompt=query chosen=response rejected=rejected_response system? history?"),
    Layout("ms-swift, messages", "pairs", "messages[{}] rejected=rejected_messages", last_is_chosen),
    Layout("PRM800K", "pairs", "prompt=question.problem steps=label.steps[{}]", first_fork),
    Layout("KTO", "demonstrations", "prompt completion label system?", only_good),
    Layout("KTO, response", "demonstrations", "prompt completion=response label system?", only_good),
    Layout("KTO, messages", "demonstrations", "messages label system?", only_good),
    Layout("KTO, LLaMA-Factory", "demonstrations", "messages label=kto_tag system?", only_good),
    Layout("KTO, LLaMA-Factory sharegpt", "demonstrations", "messages=conversations label=kto_tag system? tools?",
           only_good),
    Layout("KTO, LLaMA-Factory alpaca", "demonstrations",
           "prompt=instruction input? completion=output label=kto_tag system? history?", only_good),
    Layout("KTO, axolotl argilla", "demonstrations", "prompt=instruction completion label system?", only_good),
    Layout("KTO, axolotl intel", "demonstrations", "prompt=question completion label system?", only_good),
    Layout("prompt, completion (TRL)", "demonstrations", "prompt completion input? system? history?"),
    Layout("prompt, response", "demonstrations", "prompt completion=response system? history?"),
    Layout("alpaca", "demonstrations", "prompt=instruction input? completion=output system? history?"),
    Layout("axolotl argilla, one reply", "demonstrations", "prompt=instruction completion system?"),
    Layout("axolotl intel, one reply", "demonstrations", "prompt=question completion system?"),
    Layout("dolly", "demonstrations", "prompt=instruction input=context completion=response"),
    Layout("messages", "demonstrations", "messages system? tools?"),
    Layout("sharegpt", "demonstrations", "messages=conversations system? tools?"),
    Layout("text", "demonstrations", "text"),
    Layout("prompt", "prompts", "prompt system? history?"),
)
PLAIN = {  # kind -> the layouts that a file of this kind is measured by where none fits
    "pairs": ("prompt chosen rejected input? system? history?", "chosen rejected system? history?"),
    "demonstrations": ("prompt completion input? system? history?", "messages system? tools?", "text"),
    "prompts": ("prompt system? history?",),
}
# Columns of published data sets of pairs that repeat or explain what is read: no loss if they are not used.
SPARE = frozenset([
    "conversation", "original_response", "generation_prompt", "raw_generation_responses", "new_generations",
    "generations", "order", "labelling_prompt", "raw_labelling_response", "rating", "rationale", "status",
    "original_chosen", "original_rejected", "preference_statement", "preference_elaboration",
    "three_most_similar_preferences", "all_preferences_unprocessed", "individual_preference", "is_response_0_safe",
    "is_response_1_safe", "safer_response_id", "response_0_harm_category", "response_1_harm_category", "turn",
    "turns", "correct_answers", "incorrect_answers", "quotes_0", "quotes_1", "tokens_0", "tokens_1",
    "initial_reason_steps", "full_chosen", "full_rejected", "all_generated_responses", "candidates_completions",
    "ranks", "rank_str",
])


def _pair(fields: dict, chosen: str, rejected: str) -> dict:
    read = {name: value for name, value in fields.items() if name in ("prompt", "system", "history", "input")}
    return {**read, "chosen": fields[chosen], "rejected": fields[rejected]}


def _without(fields: dict, name: str) -> dict:
    return {field: value for field, value in fields.items() if field != name}


def plain(value: object) -> str:
    """A label as text, so that 1, 1.0, true and a CSV file's "1" or "True" are equal."""
    if isinstance(value, str):
        value = value.strip()
        number = re.fullmatch(r"([+-]?\d+)(\.0*)?", value)
        return number[1].lstrip("+") if number else value.lower() if value.lower() in ("true", "false") else value
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _number(fields: dict, name: str) -> float:
    try:
        return float(fields[name])
    except (TypeError, ValueError):
        raise Fault(f"is {str(fields[name])[:80]!r}, expected a number", name) from None


# --- columns ---------------------------------------------------------------------------------------------------------
_cache: dict[str, tuple] = {}


def _places(columns: str) -> tuple[tuple[str, str, bool, str], ...]:
    if columns not in _cache:
        places = []
        for each in columns.split():
            field, _, column = each.rstrip("?[]{}").partition("=")
            built = "objects" if "[{}]" in each else "list" if "[]" in each else ""
            places.append((field, column or field, not each.endswith("?"), built))
        _cache[columns] = tuple(places)
    return _cache[columns]


def value_at(record: Mapping, column: str) -> object:
    """The value of a column, or of NAME.NAME or NAME.0 inside one; None if it does not exist."""
    if column in record:
        return record[column]
    value: object = record
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def there(record: Mapping, column: str) -> bool:
    """Whether a record has a column, or NAME.NAME inside one, even if it is null."""
    if "." not in column:
        return column in record
    return column in record or value_at(record, column) is not None


def _is_built(value: object, built: str) -> bool:
    return not built or isinstance(value, list) or (built == "objects" and bool(objects_in(value)))


def objects_in(text: object) -> list[dict]:
    """The objects of a list saved as text, in JSON or Python notation (a table saved as CSV); [] if the text is not
    such a list: a list of numbers or words may be an answer."""
    if not isinstance(text, str) or not re.match(r"\s*\[\s*\{", text) or len(text) > LONGEST_LIST:
        return []
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text.strip())
            return value if isinstance(value, list) and all(isinstance(each, dict) for each in value) else []
    return []


def is_empty(value: object) -> bool:
    """Whether a column's value is empty: null, blank, an empty list or object."""
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", "None")) or (
        isinstance(value, (list, dict)) and not value)


def columns_of(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """Field -> column from "prompt=question,chosen=…" or a mapping; an empty column (`system=`) is ignored.

    Raises ValueError that names the part that is not FIELD=COLUMN.
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    read: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in str(given).split(","))):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not field:
            raise ValueError(f"columns is {given!r}, expected FIELD=COLUMN,FIELD=COLUMN such as prompt=question,"
                             "chosen=good,rejected=bad; FIELD= leaves a column out")
        if field in read:
            raise ValueError(f"columns is {given!r}, which has {field} twice")
        if column and field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1)
            raise ValueError(f"columns is {given!r}: there is no field {field!r}"
                             + (f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(FIELDS)}"))
        read[field] = column
    return read


def described(source: object) -> tuple[dict[str, str], dict[str, str]]:
    """Columns and tags for a file from a LLaMA-Factory dataset_info.json beside it; otherwise two empty mappings."""
    path = Path(str(source)).expanduser()
    beside = path.with_name("dataset_info.json") if path.name else path
    if not path.is_file() or not beside.is_file() or beside == path:
        return {}, {}
    entries = read_json(beside, error=DataError)
    entry = next((each for each in entries.values() if isinstance(each, dict) and each.get("file_name") == path.name),
                 {})
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if not all(isinstance(each, dict) and all(isinstance(value, str) for value in each.values())
               for each in (columns, tags)):
        raise DataError(f"{beside}: columns and tags of {path.name} are no mappings of names")
    fields = {_FACTORY.get(name, name): column for name, column in columns.items() if column}
    return fields, {tag: _FACTORY_TAGS[name] for name, tag in tags.items() if name in _FACTORY_TAGS}


_FACTORY = {"query": "input", "response": "completion", "kto_tag": "label"}
_FACTORY_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                 "system_tag": "system"}
FIELDS = (*dict.fromkeys(
    name for layout in LAYOUTS for field, column, _, _ in layout.places for name in (field, column) if "." not in name),
    "score")  # the score by which several answers are compared


# --- what a column seems to carry ------------------------------------------------------------------------------------
_CARRIED = (  # what it is, the words of a name that say so, the types of its value
    ("labels", "label labels winner winners better safer preference preferences preferred choice verdict judgement "
               "judgment rank ranking ranks safe unsafe kto thumbs", (bool, int, float, str, list)),
    ("marks", "correct accepted good bad harmful toxic desirable approved flagged", (bool,)),
    ("a system prompt", "system persona", (str, list, dict)),
    ("tools", "tool tools function functions", (str, list, dict)),
    ("part of the prompt", "history context trajectory prompt prompts question questions instruction instructions "
                           "query input inputs problem post image images video videos audio document documents",
     (str, list, dict, bytes)),
    ("answers", "answer answers response responses reply replies output outputs completion completions generation "
                "generations chosen rejected preferred summary summaries solution solutions truth messages "
                "conversation conversations dialogue dialog win lose loser pos neg positive negative good bad better "
                "worse best worst", (str, list, dict)),
)
_ABOUT = frozenset([
    "id", "ids", "uid", "uuid", "score", "scores", "rating", "ratings", "model", "models", "policy", "policies",
    "config", "configs", "source", "sources",
    "sha", "md", "hash", "length", "len", "tokens", "count", "num", "n", "type", "types", "category", "categories",
    "language", "lang", "time", "timestamp", "date", "url", "name", "version", "dataset", "subset", "split",
    "severity", "level", "logp", "logps", "logprob", "logprobs", "probability", "reason", "reasons", "metadata",
    "meta", "annotator", "annotators", "worker",
])


def carries(name: str, value: object) -> str:
    """The kind of information that a column seems to hold, by its name and its value: "answers", "labels", …, or ""."""
    if is_empty(value):
        return ""
    for what, types in _told_by(name):
        if isinstance(value, types):
            return what
    return "answers" if name == "text" and isinstance(value, str) else ""


def is_prose(name: str, value: object) -> bool:
    """Whether a column holds sentences and its name does not indicate unrelated content."""
    about = set(re.findall("[a-z]+", name.lower())) & _ABOUT
    return isinstance(value, str) and not about and bool(re.search(r"\S\s+\S+\s+\S|[.!?]\s*$", value))


@functools.lru_cache(1024)
def _told_by(name: str) -> tuple[tuple[str, tuple], ...]:
    """The kinds of information indicated by the words of a column's name, each with the expected types of its
    values."""
    listed = re.findall("[a-z]+|[0-9]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    words, last = set(listed), listed[-1] if listed else ""
    return tuple((what, types) for what, marks, types in _CARRIED if words & set(marks.split())
                 and (not words & _ABOUT - ({"id", "ids", "score"} if what == "labels" else set())
                      or (what == "answers" and last in marks.split())))  # model_response is one, response_model not


def guess(names: set[str]) -> str:
    """A suggestion for --columns, given the column names."""
    asked = sorted(name for name in names if carries(name, "text") == "part of the prompt")
    replies = sorted(name for name in names if carries(name, "text") == "answers")
    verdicts = sorted(name for name in names if carries(name, "text") == "labels")
    prompt = asked[0] if asked else "…"
    talks = [name for name in replies if re.search("dialog|conversation|messages", name.lower())]
    if len(talks) == 1 and not asked:
        return f"messages={talks[0]}"
    if len(replies) == 2 and len(verdicts) == 1:  # their names do not say which of the two is better
        return f"prompt={prompt},first={replies[0]},second={replies[1]},better={verdicts[0]}"
    if len(replies) == 1:
        return f"prompt={prompt},completion={replies[0]}"
    chosen, rejected = replies if len(replies) == 2 else ("…", "…")
    return f"prompt={prompt},chosen={chosen},rejected={rejected}"


def repeats(value: object, prompt: str | list[dict], replies: list) -> bool:
    """Whether a column only repeats prompt and replies: its texts are contained in them, or composed of them."""
    def texts(part: str | dict | list[dict]) -> list[str]:
        each = part if isinstance(part, list) else [part]
        return [str(one.get("content") if isinstance(one, dict) else one).strip() for one in each]

    heads, ends = texts(prompt), [end for reply in replies for end in texts(reply)]
    return all(text in heads or text in ends  # or it is prompt and reply as one text
               or (any(end and end in text for end in ends)
                   and all(line.strip() in text for head in heads for line in head.splitlines()))
               for text in _leaves(value))


def _leaves(value: object) -> list[str]:
    """The texts in a value at any depth, except the roles of messages."""
    texts, level = [], [value]
    while level:
        below = []
        for each in level:
            if isinstance(each, dict):
                below += [inner for name, inner in each.items() if name not in ("role", "from")]
            elif isinstance(each, list):
                below += each
            elif each is not None:
                texts.append(str(each).strip())
        level = below
    return texts
