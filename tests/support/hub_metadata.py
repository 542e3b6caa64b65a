"""The metadata of a card (the YAML at the head of README.md), read and checked against hub_metadata_schema.json."""

import json
import re
from pathlib import Path

import yaml

SCHEMA = json.loads((Path(__file__).parent / "hub_metadata_schema.json").read_bytes())
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def card_metadata(content):
    """The mapping that a card's YAML holds, `None` without one; `yaml.YAMLError` or `ValueError` for what is none."""
    block = FRONT_MATTER.match(content)
    metadata = yaml.safe_load(block[1]) if block else None
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"expected a mapping, got a {type(metadata).__name__}")
    return metadata


def check_card(content, repo_type):
    """
    What the validation endpoint says of a model's or dataset's card.

    Stricter than the Hub in one respect: a task that it does not know is an error here, a warning there. Other types of repositories have no
    schema: only their YAML is read.

    Returns:
        `(errors, warnings)`: two lists of sentences.
    """
    import jsonschema  # an optional package: only this endpoint needs it

    try:
        metadata = card_metadata(content)
    except (yaml.YAMLError, ValueError) as error:
        return [f"README.md begins with invalid YAML: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if repo_type not in SCHEMA["$defs"]:
        return [], []
    validator = jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{repo_type}"})
    found = sorted(validator.iter_errors(metadata), key=lambda error: error.json_path)
    return [f'"{error.json_path.removeprefix("$.")}": {error.message}' for error in found], []
