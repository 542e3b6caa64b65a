"""Links of all pages: files and anchors exist, also those that the code names. URLs outside are not visited."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.markdown_pages import ROOT, anchors_in, anchors_of, links_of, name_of, pages, slugs

PAGES = pages(
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "recipes/**/*.md",
    ".github/**/*.md",
)
CARD_TEMPLATE = ROOT / "hub_card.md"
CODE = pages(
    "*.toml",
    ".ci/*",
    ".github/**/*.yml",
    "modeling_cosup/*.py",
    "trainer/**/*.py",
    "recipes/**/*.py",
    "recipes/**/*.yaml",
)
IN_CODE = re.compile(r"(?<![\w/.*-])(?P<path>(?:[\w-]+/)*[\w-]+\.md)(?:#(?P<anchor>[\w-]+))?")


def fault_of(target: str, page: Path) -> str | None:
    """Return what is wrong with a link of a page; `None` if it is right."""
    url = urlsplit(target)
    if url.scheme == "mailto":
        return None if re.fullmatch(r"[^@\s]+@[\w-]+(\.[\w-]+)+", url.path) else "no address"
    if url.scheme or url.netloc:
        is_web = url.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)*(:\d+)?", url.netloc)
        return None if is_web else "no URL of the web"
    if url.path.startswith("/"):
        return "not relative"
    path = (page.parent / unquote(url.path)).resolve() if url.path else page
    if not path.is_relative_to(ROOT):
        return "leads out of the repository"
    if not path.exists():
        return "no such file"
    if not url.fragment:
        return None
    if path.suffix != ".md":
        return "an anchor of a file that is no page"
    return None if unquote(url.fragment) in anchors_in(path) else f"no such heading in {name_of(path)}"


def faults(text: str, page: Path) -> list[str]:
    """Return the wrong links of a page, each with its place."""
    found = []
    for link in links_of(text):
        fault = fault_of(link.target, page)
        if fault:
            found.append(f"{name_of(page)}:{link.line}: {link.target}: {fault}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    assert faults(page.read_text(encoding="utf-8"), page) == []


def test_urls_of_the_card():
    """The card's template fills in links; each of the others is a URL of the web."""
    targets = [link.target for link in links_of(CARD_TEMPLATE.read_text(encoding="utf-8"))]
    urls = [target for target in targets if "{" not in unquote(target) and target != "loss_curves.png"]
    assert [target for target in urls if not urlsplit(target).scheme or fault_of(target, CARD_TEMPLATE)] == []


def test_pages_that_the_code_names():
    """A docstring, comment or message that names a page of docs/, or an anchor of any page, names an existing one."""
    wrong = []
    checked = 0
    for path in CODE:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in IN_CODE.finditer(line):
                if match["path"].startswith("docs/") or match["anchor"]:
                    checked += 1
                    fault = fault_of(match[0], ROOT / "README.md")
                    if fault:
                        wrong.append(f"{name_of(path)}:{number}: {match[0]}: {fault}")
    assert wrong == []
    assert checked  # recipes/serve.py names docs/serving.md


# ------------------------------------------------------------------ the test itself


def test_anchors_are_githubs():
    titles = ["See it work: five minutes", "`nsp_loss_weight` (λ)", "a  b", "Ret-P, Cor⁻ & Gr", "Why?", "Why?", "why!"]
    expected = ["see-it-work-five-minutes", "nsp_loss_weight-λ", "a--b", "ret-p-cor--gr", "why", "why-1", "why-2"]
    assert slugs([title.replace("`", "") for title in titles]) == expected
    text = '## A [link](b.md) of `code_x`\n\n<a name="old"></a>\n\n## *Two*\n\n```\n## no heading\n```\n\nTwo\n---\n'
    assert anchors_of(text) == {"a-link-of-code_x", "old", "two", "two-1"}


def test_wrong_links_are_found():
    text = """
[no file](missing.md) and [no heading](docs/memory.md#missing) and ![no picture](no.png), [here](#missing)

| a table | <a href="missing.html">HTML</a> |
|---|---|
| [a cell](../outside.md) | [web](https:/example.org) |

`[code](is_no_link.md)`

```
[code](is_no_link.md)
```

[reference][1], [right](LICENSE), [right](https://example.org/a#b), [right](pyproject.toml)

[1]: /absolute.md
"""
    assert [fault.removeprefix("README.md:") for fault in faults(text, ROOT / "README.md")] == [
        "2: missing.md: no such file",
        "2: docs/memory.md#missing: no such heading in docs/memory.md",
        "2: no.png: no such file",
        "2: #missing: no such heading in README.md",
        "4: missing.html: no such file",
        "6: ../outside.md: leads out of the repository",
        "6: https:/example.org: no URL of the web",
        "14: /absolute.md: not relative",
    ]
