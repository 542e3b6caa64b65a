"""Files, functions, classes and settings that pages name in `code` are those of the code today."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it.token import Token

from support.markdown_pages import ROOT, name_of, pages, tokens_of

PAGES = pages("docs/how_it_works.md", "docs/generation.md", "docs/passage_index.md", "docs/memory.md")
CODE = pages("modeling_cosup/*.py", "trainer/**/*.py", "recipes/**/*.py")
OTHER_FILES = pages("tests/**/*.py", "recipes/**/*.yaml")
FILE = re.compile(r"[\w/.-]+\.(?:py|yaml)")
CALL = re.compile(r"(?P<owner>(?:\w+\.)*)(?P<name>\w+)\(.*\)")
NAME = re.compile(r"(?:\w+\.)*\w+")
OF_TORCH = {"eval"}  # methods of modules


@cache
def definitions(path: Path) -> dict[str, set[str]]:
    """Return the functions and classes of a file: by name, the classes in which it is defined, `""` for none."""
    owners = defaultdict(set)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                owners[child.name].add(parent.name if isinstance(parent, ast.ClassDef) else "")
    return owners


@cache
def words_of_the_code() -> set[str]:
    """Return every word that occurs in the code."""
    return {word for path in CODE for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}


def files_named(name: str) -> list[Path]:
    """Return the files with this path or, if it has no folder, with this name."""
    if "/" in name:
        return [path for path in (ROOT / name,) if path.is_file()]
    return [path for path in (*CODE, *OTHER_FILES) if path.name == name]


def code_in_blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the `code` of each paragraph, item of a list, and row of a table of a page."""
    row: list[Token] | None = None
    for token in tokens_of(text):
        if token.type == "tr_open":
            row = []
        if token.type == "inline":
            if row is None:
                yield token.map[0] + 1, _code([token])
            else:
                row.append(token)
        if token.type == "tr_close":
            yield row[0].map[0] + 1, _code(row)
            row = None


def _code(tokens: list[Token]) -> list[str]:
    return [child.content for token in tokens for child in token.children if child.type == "code_inline"]


def wrong_names(text: str) -> list[str]:
    """
    Return what a page names and the code does not have, with its line.

    A call, such as `f()` or `C.f()`, must be defined in one of the files that its paragraph, item or row names;
    without a file, anywhere in the code.
    """
    wrong = []
    for line, spans in code_in_blocks(text):
        named = [span for span in spans if FILE.fullmatch(span)]
        wrong += [f"{line}: no file {name}" for name in named if not files_named(name)]
        places = [path for name in named for path in files_named(name) if path.suffix == ".py"] or CODE
        for span in spans:
            call = CALL.fullmatch(span)
            if call and not _is_defined(call["owner"].rstrip("."), call["name"], places):
                wrong.append(f"{line}: {span} is not defined in {', '.join(named) or 'the code'}")
            if not call and NAME.fullmatch(span) and span not in named:
                unknown = set(span.split(".")) - words_of_the_code()
                wrong += [f"{line}: {span}: the code has no {word}" for word in sorted(unknown)]
    return wrong


def _is_defined(owner: str, name: str, places: list[Path]) -> bool:
    """Return whether a file defines `name`: in the class `owner` if that is one (`index.add()` names an object)."""
    if name in OF_TORCH:
        return True
    owners = {of for path in places for of in definitions(path).get(name, ())}
    return owner in owners if owner[:1].isupper() else bool(owners)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names(page):
    assert wrong_names(page.read_text(encoding="utf-8")) == []


# ------------------------------------------------------------------ the test itself


def test_wrong_names_are_found():
    text = """
`losses.py`: `total_loss()` and `EmbeddingBatch`, `info_nce()`; `nsp_batch_size` and `nsp_size`

1. `trainer/losses.py`: `Distributions.figures()` and `EmbeddingBatch.figures()`
2. `missing.py`, `trainer/modeling_cosup.py`

| a table | `index.train_approximate("HNSW32", efSearch=64)` |
|---|---|
| `grad_cache.py` | `first_pass()`, `third_pass()` |

`third_pass()` and `first_pass(model, micro_batches)`
"""
    assert wrong_names(text) == [
        "2: info_nce() is not defined in losses.py",
        "2: nsp_size: the code has no nsp_size",
        "4: EmbeddingBatch.figures() is not defined in trainer/losses.py",
        "5: no file missing.py",
        "5: no file trainer/modeling_cosup.py",
        "9: third_pass() is not defined in grad_cache.py",
        "11: third_pass() is not defined in the code",
    ]
