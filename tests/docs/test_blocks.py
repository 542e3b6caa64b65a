"""
The code of the pages: Python is run, JSON and YAML are read.

The Python blocks of a page run one after another in one namespace, in a folder of tiny stand-ins, with a server in
place of the Hub (`support/stand_ins.py` says what is there). A block after `<!-- not run: reason -->` is not run: it
is a skipped test, and the reason stands in the summary of `pytest -rs`.
"""

import json

import pytest
import yaml

from support.forks import run_forked
from support.markdown_pages import ROOT, blocks_of, name_of, pages

PAGES = pages("README.md", "docs/*.md")
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_A_PAGE = "from support.page_runner import run_page; run_page()"
LANGUAGES = {"", "bash", "json", "mermaid", "python", "text", "yaml"}  # of a block; "" and text are output
PROGRAMS = {"bash", "json", "python", "yaml"}


def with_python(page):
    return any(block.language == "python" and block.not_run is None for block in blocks_of(page))


def read_json(text):
    """Return the JSON values of a text, one after another."""
    values = []
    decoder = json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def run_page(page, folder, variables):
    return run_forked("-c", RUN_A_PAGE, page, cwd=folder, env=variables, timeout=120)


@pytest.mark.parametrize("page", [page for page in PAGES if with_python(page)], ids=name_of)
def test_python(page, folder, hub_variables):
    ended = run_page(page, folder, hub_variables)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "json"], ids=lambda block: block.place
)
def test_json(block):
    if block.not_run is None:
        assert read_json(block.code)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.place
)
def test_yaml(block):
    if block.not_run is None:
        assert yaml.safe_load(block.code)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.not_run is not None], ids=lambda block: block.place
)
def test_a_block_that_is_not_run_says_why(block):
    assert len(block.not_run.split()) > 1, "<!-- not run: the reason is missing -->"
    assert block.language in PROGRAMS, "nothing would be run anyway"
    pytest.skip(f"{block.place} is not run: {block.not_run}")


def test_languages():
    """A language that is not known would be a block that nothing checks."""
    assert [block.place for block in BLOCKS if block.language not in LANGUAGES] == []


# ------------------------------------------------------------------ the test itself


def test_the_failing_line_is_shown(tmp_path, hub_variables):
    page = tmp_path / "page.md"
    text = """
```python
word = "kept"
```

<!-- not run: needs a GPU -->

```python
raise SystemExit("was run")
```

- in a list

  ```python
  print(word)
  print(missing_name)
  ```
"""
    page.write_text(text)
    ended = run_page(page, tmp_path, hub_variables)
    assert ended.returncode == 1
    assert ended.stdout == "kept\n"
    assert f'{page}", line 16' in ended.stderr
    assert "print(missing_name)" in ended.stderr
    assert [block.not_run for block in blocks_of(page)] == [None, "needs a GPU", None]


def test_values_of_a_json_block():
    assert read_json('{"a": 1}\n{"b":\n [2]}\n') == [{"a": 1}, {"b": [2]}]
    with pytest.raises(json.JSONDecodeError):
        read_json('{"a": …}')
    assert ROOT / "README.md" in PAGES
