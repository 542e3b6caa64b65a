"""The messages that docs/troubleshooting.md quotes are those of the code, and its advice leads to sections there are."""

import ast
import re
from functools import cache

import pytest

from support.markdown_pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.compile(r"\*\*`([^`]+)`\*\*")
VALUE = "\0"  # what stands for a value in the text of an f-string
SHORTEST = 20  # characters of a quote that the code must hold


def text_of(node: ast.AST) -> str | None:
    """Return the text of a string or an f-string, with `VALUE` for each value; `None` for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or VALUE for part in node.values)
    return None


def strings_in(source: str) -> set[str]:
    """Return the strings and f-strings of a program, but no docstring."""
    strings = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        text = text_of(node)
        if text is not None:
            strings.add(text)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            pending += ast.iter_child_nodes(node)
    return strings


@cache
def strings_of_the_code() -> set[str]:
    files = [path for package in ("modeling_cosup", "trainer", "recipes") for path in (ROOT / package).rglob("*.py")]
    return set().union(*[strings_in(path.read_text(encoding="utf-8")) for path in files])


def is_in(quote: str, strings: set[str]) -> bool:
    """
    Return whether one of the strings is a message that a quote shows; "…" in the quote stands for anything.

    Each other piece of the quote must be text of the message, not a value. Without "…" at its begin or end, the
    message begins or ends there.
    """
    pieces = [piece for piece in re.split("…", quote) if piece.strip()]
    if sum(len(piece.strip()) for piece in pieces) < SHORTEST:
        return False
    pattern = ".*".join(re.escape(piece.strip()) for piece in pieces)
    begin = "" if quote.startswith("…") else r"\A"
    end = "" if quote.endswith("…") else r"\Z"
    return any(re.search(f"{begin}{pattern}{end}", string, re.DOTALL) for string in strings)


@pytest.mark.parametrize("quote", QUOTED.findall(PAGE.read_text(encoding="utf-8")))
def test_a_quoted_message_is_in_the_code(quote):
    assert is_in(quote, strings_of_the_code())


def test_the_page_quotes_many_messages():
    assert len(QUOTED.findall(PAGE.read_text(encoding="utf-8"))) >= 40


def test_a_reworded_message_is_not_found():
    source = '''
def load(name):
    """No index of this name: this is a docstring."""
    if not name:
        raise ValueError("A name is needed: " "give one, such as wiki.")
    raise ValueError(f"{name} is no index of this model; build it again, or load {name!r}.")
'''
    strings = strings_in(source)
    assert is_in("A name is needed: give one, such as wiki.", strings)
    assert is_in("… is no index of this model; build it again, or load ….", strings)
    assert is_in("… build it again, or load …", strings)
    assert not is_in("A name is needed: give one.", strings)
    assert not is_in("name is needed: give one, such as wiki.", strings)
    assert not is_in("… is no index of this model; make it again, or load ….", strings)
    assert not is_in("wiki is no index of this model; build it again", strings)  # the name is a value
    assert not is_in("No index of this name: this is a docstring.", strings)
    assert not is_in("… again …", strings)  # too short to say which message it is
