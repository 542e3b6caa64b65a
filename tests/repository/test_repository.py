"""The files that GitHub and PyPI read: forms, workflows, and what a release changes; and the list of the API."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

import modeling_cosup
import trainer
from support.forks import run_forked

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
URL = "https://github.com/OWNER/NAME"


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def release():
    """The module `.ci/release.py`."""
    spec = importlib.util.spec_from_file_location("release_of_ci", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ .github


def test_issue_forms():
    assert [path.name for path in FORMS] == ["bug.yml", "config.yml", "feature.yml"]
    for path in FORMS:
        form = load(path)
        if path.name == "config.yml":
            assert form == {"blank_issues_enabled": True}
            continue
        assert set(form) == {"name", "description", "labels", "body"}
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        ids = [field["id"] for field in fields]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in fields)
    bug = {field.get("id"): field for field in load(FORMS[0])["body"]}
    for name in ("versions", "reproduction"):
        assert bug[name]["validations"]["required"]


def test_pull_request_template_has_five_lines():
    text = (ROOT / ".github" / "pull_request_template.md").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 5


def test_dependabot():
    ecosystems = {update["package-ecosystem"] for update in load(ROOT / ".github" / "dependabot.yml")["updates"]}
    assert ecosystems == {"github-actions", "pip"}


def test_workflows_name_files_that_exist():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "publish.yml"]
    named = []
    for path in WORKFLOWS:
        named += re.findall(r"(?<![\w/.])\.ci/[\w.]+", path.read_text(encoding="utf-8"))
    assert set(named) == {".ci/lint", ".ci/run", ".ci/release.py", ".ci/smoke_test.py"}
    assert all((ROOT / name).is_file() for name in named)


def test_only_the_publishing_job_may_write():
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            assert ("permissions" in job) == (name == "publish")
    job = load(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]["publish"]
    assert job["permissions"] == {"id-token": "write"}
    assert job["environment"] == "pypi" and job["needs"] == "build"


def test_the_smoke_test_of_a_release(tmp_path):
    shutil.copy(ROOT / ".ci" / "smoke_test.py", tmp_path)
    ended = run_forked(tmp_path / "smoke_test.py", ".", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "[1]" in ended.stdout
    refused = run_forked(tmp_path / "smoke_test.py", cwd=tmp_path)
    assert refused.returncode == 1
    assert "is not an installed package" in refused.stderr


# ------------------------------------------------------------------ .ci/release.py


def test_relative_links_become_urls(release):
    text = """# Page

A [page](docs/other.md#part), a [file](./trainer/losses.py), ![a picture](recipes/demo.png), [here](#page),
[the web](https://example.org/a.md), [![a badge](b.png)](LICENSE) and `[code](c.py)`.

```python
row[(0)](no_link)
```
"""
    found = release.with_urls(text, URL, "v1")
    expected = text.replace("(docs/other.md#part)", f"({URL}/blob/v1/docs/other.md#part)")
    expected = expected.replace("(./trainer/losses.py)", f"({URL}/blob/v1/trainer/losses.py)")
    expected = expected.replace("(recipes/demo.png)", f"({URL}/raw/v1/recipes/demo.png)")
    expected = expected.replace(
        "[![a badge](b.png)](LICENSE)", f"[![a badge]({URL}/raw/v1/b.png)]({URL}/blob/v1/LICENSE)"
    )
    assert found == expected


def test_a_release_has_urls(release, tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    before = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', before, re.MULTILINE)[1]
    with pytest.raises(SystemExit, match=f"the tag is v9, but pyproject.toml has version {version}"):
        release.release(URL, "v9", tmp_path)
    release.release(URL, f"v{version}", tmp_path)
    settings = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert settings.startswith(before)
    assert f'Source = "{URL}"' in settings
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"]({URL}/blob/v{version}/CITATION.cff)" in readme
    relative = [target for target in re.findall(r"\]\(([^)]+)\)", readme) if not re.match("https?://|#", target)]
    assert relative == []


def test_the_list_of_the_api_names_what_exists():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \[`(\w+)`\]\(\.\./([\w./]+)\)", page, re.MULTILINE)
    assert len(entries) > 20
    for name, path in entries:
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", code, re.MULTILINE), name
    assert {*modeling_cosup.__all__, *trainer.__all__} <= {name for name, _ in entries}


def test_the_packages_list_their_public_names():
    for package in (modeling_cosup, trainer):
        assert set(package.__all__) <= set(dir(package))
