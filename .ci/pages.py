"""
Pages where the repository is not next to them: links that lead out of them become URLs of the repository.

    python .ci/pages.py release https://github.com/OWNER/NAME v0.1.0
    python .ci/pages.py site https://github.com/OWNER/NAME main

`release` changes this checkout: README.md, which PyPI shows, and pyproject.toml, which gets the URLs of the project.
It fails if the tag is not the version. `site` writes the pages of the docs site to `build/pages`, and the sources of
its API reference to `build/sources`; see mkdocs.yml.
"""

import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
CODE = re.compile(r"^ *(```|~~~).*?^ *\1[ \t]*$|(`+).+?\2", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"(?P<start>!\[[^\]]*\]\(|<img [^>]*src=\")(?P<target>[^)\s\"]+)")
LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s]+)")
PARAMETER = re.compile(r"^( +\*{0,2}\w+(?:, \*{0,2}\w+)*) \((`.*?)\): ", re.MULTILINE)  # a line of Args
TYPES = re.compile(r"^( +)(`[^`\n]+`(?:, `[^`\n]+`)*): ", re.MULTILINE)  # a line of Returns or Raises
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")  # to another object, as Hugging Face writes it
API = re.compile(r"<!-- (::: .*?) -->", re.DOTALL)  # a comment on GitHub, documentation of an object on the site


def with_urls(text: str, page: str, url: str, ref: str, is_kept: Callable[[str], bool]) -> str:
    """
    Return a page whose relative links are URLs.

    Args:
        text (`str`): Markdown. Blocks of code stay as they are.
        page (`str`): path of the page in the repository.
        url (`str`): of the repository.
        ref (`str`): tag or branch.
        is_kept (`Callable`): whether a path in the repository is linked as it is.
    """

    def replaced(match: re.Match[str]) -> str:
        link = urlsplit(match["target"])
        if link.scheme or link.netloc or not link.path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.path))
        if is_kept(path):
            return match[0]
        kind = "raw" if match.re is IMAGE else "blob"
        anchor = f"#{link.fragment}" if link.fragment else ""
        return f"{match['start']}{url}/{kind}/{ref}/{path}{anchor}"

    def with_replaced_links(prose: str) -> str:
        return LINK.sub(replaced, IMAGE.sub(replaced, prose))

    pieces = []
    end = 0
    for code in CODE.finditer(text):
        pieces += [with_replaced_links(text[end : code.start()]), code[0]]
        end = code.end()
    pieces.append(with_replaced_links(text[end:]))
    return "".join(pieces)


def release(url: str, tag: str, root: Path = ROOT) -> None:
    """Prepare README.md and pyproject.toml of a checkout for PyPI."""
    project = root / "pyproject.toml"
    settings = project.read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', settings, re.MULTILINE)
    if tag != f"v{version}":
        sys.exit(f"error: the tag is {tag}, but pyproject.toml has version {version}: expected v{version}.")
    readme = root / "README.md"
    text = with_urls(readme.read_text(encoding="utf-8"), "README.md", url, tag, lambda path: False)
    readme.write_text(text, encoding="utf-8")
    urls = {"Source": url, "Documentation": f"{url}/tree/{tag}/docs", "Issues": f"{url}/issues"}
    urls["Changelog"] = f"{url}/blob/{tag}/CHANGELOG.md"
    lines = "".join(f'{name} = "{target}"\n' for name, target in urls.items())
    project.write_text(f"{settings}\n[project.urls]\n{lines}", encoding="utf-8")


def plain_docstrings(code: str) -> str:
    """Return the code of a module whose docstrings have types without Markdown: the generator shows them as code."""
    code = PARAMETER.sub(lambda match: f"{match[1]} ({match[2].replace('`', '').replace('*', '')}): ", code)
    code = TYPES.sub(lambda match: f"{match[1]}{match[2].replace('`', '')}: ", code)
    return REFERENCE.sub(r"`\1`", code)


def site(url: str, ref: str, build: Path = BUILD) -> None:
    """Write the pages of the docs site: those of docs/, the reports of docs/results left out; and the sources."""
    pages, sources = build / "pages", build / "sources"
    for folder in (pages, sources):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("modeling_cosup", "trainer", "recipes/serving"):
        for path in sorted((ROOT / name).rglob("*.py")):
            copy = sources / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(plain_docstrings(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("results", "notebooks"))
    written = {path.relative_to(pages).as_posix() for path in pages.rglob("*")}

    def is_page(path: str) -> bool:
        return path.startswith("docs/") and path.removeprefix("docs/") in written

    for page in pages.rglob("*.md"):
        place = f"docs/{page.relative_to(pages).as_posix()}"
        text = with_urls(page.read_text(encoding="utf-8"), place, url, ref, is_page)
        page.write_text(API.sub(r"\1", text), encoding="utf-8")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["missing"]
    commands = {"release": release, "site": site}
    if command not in commands or len(arguments) != 2:
        sys.exit(__doc__)
    commands[command](*arguments)
