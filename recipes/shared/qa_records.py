"""
What a row of a question–answer set says: a question with its answers, its passages and wrong passages.

Sets differ in the names of their columns and in the form of what they hold. A column that no option names is the first
of a list of usual names that a row has, in capitals or not. Answers are a string, a list, or an object with `text`
(SQuAD) or `value` and `aliases` (TriviaQA); passages are a string, an object with `text` and perhaps `title` (DPR's
`*_ctxs`), or a list. The cells of a table hold these lists and objects in JSON or, as pandas writes them, in Python.
"""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling_cosup.names_cosup import nearest_name
from modeling_cosup.passages_cosup import check_id
from trainer.data import content_id

from shared.data_files import distinct

# Usual names of columns, the best first: of DPR, SQuAD, sentence-transformers, Tevatron, FlagEmbedding, FiD.
QUESTIONS = ("question", "query", "anchor", "input", "prompt")
ANSWERS = ("answers", "answer", "short_answers", "response", "output", "target")
PASSAGES = ("positive_ctxs", "positive_passages", "positives", "positive", "pos", "passage", "context", "document")
TITLES = ("title", "passage_title", "document_title")
IDS = ("id", "_id", "question_id", "query_id", "qid")
CANDIDATES = ("ctxs",)
NEGATIVES = ("hard_negative_ctxs", "negative_ctxs", "negative_passages", "negatives", "neg")
NEGATIVE = re.compile(r"negative(_?\d+)?")  # one wrong passage a column, as of sentence-transformers
NUMPY_CALLS = ("array", "str_", "int32", "int64", "float64")  # in what pandas writes: array(['a'], dtype=object)
TEXTS = ("text", "contents", "content", "passage", "paragraph_text")  # of a passage that is an object


class Refused(Exception):
    """A row gives no instance; the message says why, in words that do not depend on the row."""


@dataclass
class Columns:
    """
    The columns of a row; `None` if there is none.

    Args:
        question, answer, passage, title, id, candidates (`str`, *optional*): names of columns.
        negatives (`list[str]`): columns with wrong passages, those with harder ones first.
    """

    question: str | None = None
    answer: str | None = None
    passage: str | None = None
    title: str | None = None
    id: str | None = None
    candidates: str | None = None
    negatives: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return which column is what, for the user to check."""
        parts = []
        for role, name in vars(self).items():
            if name:
                parts.append(f"{role}: {', '.join(name) if isinstance(name, list) else name}")
        return "; ".join(parts)


@dataclass
class Record:
    """
    A question.

    Args:
        question (`str`): its text.
        id (`str`): from the row; empty if it has none.
        answers (`list[str]`): distinct; empty if the row has no column of answers.
        passages, negatives, candidates (`list[dict]`): right passages, wrong ones, and those that a retriever found,
            `{"id", "title", "text"}` with content ids.
    """

    question: str
    id: str
    answers: list[str]
    passages: list[dict[str, str]]
    negatives: list[dict[str, str]]
    candidates: list[dict[str, str]]

    def merge(self, other: "Record") -> None:
        """Add the passages of another row of the same question."""
        self.passages = distinct_passages([*self.passages, *other.passages], [])
        self.negatives = distinct_passages([*self.negatives, *other.negatives], [])
        self.candidates = distinct_passages([*self.candidates, *other.candidates], [])


def check_given(names: Collection[str], given: Mapping[str, str | None], where: str) -> None:
    """Raise a `ValueError` if a column that an option names is not among those of the first row."""
    for role, name in given.items():
        if name is not None and name not in names:
            nearest = nearest_name(name, tuple(names))
            hint = f" (did you mean {nearest!r}?)" if nearest else ""
            listed = ", ".join(names)
            raise ValueError(f"{where}: --{role}_column {name} is none of the columns, {listed}{hint}.")


def find_columns(names: Collection[str], given: Mapping[str, str | None], where: str) -> Columns:
    """
    Return which columns a row has.

    Args:
        names (collection of `str`): names of the row's columns.
        given (`dict`): role (`question`, `answer`, `passage`, `title`, `id`, `negative`) -> name from an option.
        where (`str`): place of the row.

    Raises:
        `ValueError`: if no column holds questions, or none holds answers or passages. Names the option.
    """
    # A column that an option names is not also used for another role, but an id or a title may be one.
    taken = [name for role, name in given.items() if role not in ("id", "title")]
    usual_forms = {name.lower().replace(" ", "_"): name for name in names if name not in taken}

    def choose(role: str, usual: Iterable[str]) -> str | None:
        if given.get(role) is not None:
            return given[role] if given[role] in names else None
        return next((usual_forms[name] for name in usual if name in usual_forms), None)

    negatives = [usual_forms[name] for name in NEGATIVES if name in usual_forms]
    numbered = sorted(filter(NEGATIVE.fullmatch, usual_forms), key=lambda name: (len(name), name))  # 2 before 10
    negatives += [usual_forms[name] for name in numbered]
    if given.get("negative") is not None:
        negatives = [str(given["negative"])]
    columns = Columns(
        question=choose("question", QUESTIONS),
        answer=choose("answer", ANSWERS),
        passage=choose("passage", PASSAGES),
        title=choose("title", TITLES),
        id=choose("id", IDS),
        candidates=choose("candidates", CANDIDATES),
        negatives=negatives,
    )
    listed = ", ".join(names)
    if columns.question is None:
        raise ValueError(
            f"{where}: none of the columns, {listed}, is named as one of questions usually is"
            f" ({', '.join(QUESTIONS)}): name it as --question_column. A CSV or TSV file without a header needs"
            " --column_names."
        )
    if columns.answer is None and columns.passage is None:
        raise ValueError(
            f"{where}: none of the columns, {listed}, is named as one of answers ({', '.join(ANSWERS)}) or passages"
            f" ({', '.join(PASSAGES)}) usually is: name one as --answer_column or --passage_column."
        )
    return columns


def read_record(row: Mapping[str, Any], columns: Columns | None) -> Record:
    """
    Return what a row says.

    Raises:
        [`Refused`]: if it has no question, no answer in its column of answers, neither an answer nor a passage, or a
            value of another form.
    """
    if columns is None:
        raise Refused("no column of questions, or none of answers or passages")
    row = {name: None if is_nan(value) else value for name, value in row.items()}
    value = row.get(columns.question or "")
    if not isinstance(value, str) or not value.strip():
        raise Refused("no question")
    title = row.get(columns.title or "") or ""
    if not isinstance(title, str):
        raise Refused("the title is no text")
    raw_answers = read_cell(row.get(columns.answer or ""))
    if isinstance(raw_answers, str) and is_object(raw_answers):
        raise Refused("the answer looks like an object, {...}, that is neither JSON nor Python")
    if is_squad(raw_answers):
        title = title.replace("_", " ")
    answers = distinct(stripped(text) for text in read_answers(raw_answers) if text.strip())
    if columns.answer is not None and not answers:
        raise Refused("no answer")
    passages = distinct_passages(read_passages(read_passage_cell(row.get(columns.passage or "")), title), [])
    if not answers and not passages:
        raise Refused("no passage")
    wrong = []
    for name in columns.negatives:
        wrong += read_passages(read_passage_cell(row.get(name)), "")
    candidates = read_passages(read_passage_cell(row.get(columns.candidates or "")), "")
    id = row.get(columns.id or "")
    return Record(
        question=stripped(value),
        id="" if id is None or id == "" else read_id(id),
        answers=answers,
        passages=passages,
        negatives=distinct_passages(wrong, passages),
        candidates=distinct_passages(candidates, []),
    )


def read_id(id: Any) -> str:
    """Return an id as text."""
    try:
        return check_id(id, "")
    except ValueError:
        raise Refused("an id that is no text, or has NUL or '..' in it") from None


def stripped(text: str) -> str:
    """Return a text without white space around it; refuse half a surrogate pair: valid JSON, but no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("text that holds half a character (a lone surrogate)") from None
    return text.strip()


def is_squad(answers: Any) -> bool:
    """Return whether answers have SQuAD's form; its titles have underscores in place of spaces."""
    return isinstance(answers, Mapping) and "answer_start" in answers


def read_answers(value: Any) -> list[str]:
    """Return the answers in a value; an empty list for `None` and NaN."""
    if value is None or is_nan(value):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int | float):
        return [str(value)]
    if isinstance(value, Mapping):
        if "text" in value:
            return read_answers(value["text"])
        return read_answers(value.get("value")) + read_answers(value.get("aliases"))
    if isinstance(value, list | tuple):
        return [text for item in value for text in read_answers(item)]
    raise Refused("the answer is neither text nor a list of texts")


def is_nan(value: Any) -> bool:
    """Return whether a value is NaN, which pandas writes where there is none."""
    return isinstance(value, float) and math.isnan(value)


# ---------------------------------------------------------------------- cells of tables


def is_list(text: str) -> bool:
    """Return whether a text has the brackets of a list."""
    return text.lstrip().startswith("[") and text.rstrip().endswith("]")


def is_object(text: str) -> bool:
    """Return whether a text looks like an object: a brace and a quoted name."""
    return re.match(r"\s*\{\s*['\"]", text) is not None and text.rstrip().endswith("}")


def read_cell(value: Any) -> Any:
    """Return the list or object that a text holds, in JSON or Python; any other value unchanged."""
    if not isinstance(value, str) or not (is_list(value) or is_object(value)):
        return value
    for parse in (json.loads, python_value):
        try:
            content = parse(value.strip())
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        if isinstance(content, list | dict):
            return content
    return value


def read_passage_cell(value: Any) -> Any:
    """Return the passages that a text holds, see [`read_cell`]; any other value unchanged."""
    content = read_cell(value)
    items = content if isinstance(content, list) else [content]
    for item in items:
        is_passage = isinstance(item, Mapping) and any(item.get(name) for name in TEXTS)
        if not isinstance(item, str) and not is_passage:
            return value
    return content


def python_value(text: str) -> Any:
    """
    Return the value of a Python literal. Arrays of numpy are lists, as `repr` writes them and as `str` does, which
    leaves out the commas: `['a' 'b']`.
    """
    words: list[str] = []
    after_string = False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NL:
            continue
        is_string = token.type == tokenize.STRING
        if is_string and after_string:  # Python itself would make one string of two
            words.append(",")
        words.append(token.string)
        after_string = is_string
    tree = ast.parse(" ".join(words).strip(), mode="eval")
    return ast.literal_eval(NumpyValues().visit(tree))


class NumpyValues(ast.NodeTransformer):
    """Replace numpy's `array([...], dtype=...)` and `str_('...')` by what they hold, and `nan` by None."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in NUMPY_CALLS and node.args:
            return self.visit(node.args[0])
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(None) if node.id == "nan" else node


def read_passages(value: Any, title: str) -> list[dict[str, str]]:
    """Return the passages in a value, `{"id", "title", "text"}`; `title` is for passages without one of their own."""
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [passage for item in value for passage in read_passages(item, title)]
    if isinstance(value, Mapping):
        text = next((value[name] for name in TEXTS if value.get(name)), None)
        title = value.get("title") or title
    else:
        text = value
    if not isinstance(text, str) or not isinstance(title, str):
        raise Refused("a passage is neither text nor an object with title and text")
    if not text.strip():
        return []
    title, text = stripped(title), stripped(text)
    return [{"id": content_id(title, text), "title": title, "text": text}]


def distinct_passages(passages: Iterable[dict[str, str]], others: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return each passage once, without those that are among `others`."""
    known = {passage["id"] for passage in others}
    kept = []
    for passage in passages:
        if passage["id"] not in known:
            known.add(passage["id"])
            kept.append(passage)
    return kept
