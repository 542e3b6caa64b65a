"""
Prepare a checkout for PyPI, where the repository is not next to the README: its relative links become URLs.

    python .ci/release.py https://github.com/OWNER/NAME v0.1.0

This changes README.md, and pyproject.toml, which gets the URLs of the project. It fails if the tag is not the version.
"""

import posixpath
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^ *(```|~~~).*?^ *\1[ \t]*$|(`+).+?\2", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"(?P<start>!\[[^\]]*\]\(|<img [^>]*src=\")(?P<target>[^)\s\"]+)")
LINK = re.compile(r"(?P<start>\]\()(?P<target>[^)\s]+)")


def with_urls(text: str, url: str, tag: str) -> str:
    """Return the Markdown of a README whose relative links are URLs of a repository; code blocks stay as they are."""

    def replaced(match: re.Match[str]) -> str:
        link = urlsplit(match["target"])
        if link.scheme or link.netloc or not link.path:
            return match[0]
        path = posixpath.normpath(link.path)
        kind = "raw" if match.re is IMAGE else "blob"
        anchor = f"#{link.fragment}" if link.fragment else ""
        return f"{match['start']}{url}/{kind}/{tag}/{path}{anchor}"

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
    """Change README.md and pyproject.toml of a checkout."""
    project = root / "pyproject.toml"
    settings = project.read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', settings, re.MULTILINE)
    if tag != f"v{version}":
        sys.exit(f"error: the tag is {tag}, but pyproject.toml has version {version}: expected v{version}.")
    readme = root / "README.md"
    text = with_urls(readme.read_text(encoding="utf-8"), url, tag)
    readme.write_text(text, encoding="utf-8")
    urls = {"Source": url, "Documentation": f"{url}/tree/{tag}/docs", "Issues": f"{url}/issues"}
    urls["Changelog"] = f"{url}/blob/{tag}/CHANGELOG.md"
    lines = "".join(f'{name} = "{target}"\n' for name, target in urls.items())
    project.write_text(f"{settings}\n[project.urls]\n{lines}", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    release(*sys.argv[1:])
