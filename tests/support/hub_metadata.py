"""The metadata of a card (the YAML at the head of README.md), read and checked against hub_metadata_schema.json."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

SCHEMA = json.loads((Path(__file__).parent / "hub_metadata_schema.json").read_bytes())
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def card_metadata(content: str) -> dict[str, Any] | None:
    """
    Return the metadata of a card, `None` if it has none.

    Raises:
        `yaml.YAMLError`: for invalid YAML.
        `ValueError`: for YAML that is not a mapping.
    """
    block = FRONT_MATTER.match(content)
    metadata = yaml.safe_load(block[1]) if block else None
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"expected a mapping, got a {type(metadata).__name__}")
    return metadata


def check_card(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """
    Check a card as the validation endpoint does.

    This is stricter than the Hub in one respect: an unknown task is an error here, a warning there. Only models and
    datasets have a schema; for other types of repositories the YAML is merely parsed.

    Returns:
        `(errors, warnings)`: two lists of sentences.
    """
    import jsonschema  # an optional package that only this endpoint needs

    try:
        metadata = card_metadata(content)
    except (yaml.YAMLError, ValueError) as error:
        return [f"README.md begins with invalid YAML: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if repo_type not in SCHEMA["$defs"]:
        return [], []
    validator = jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{repo_type}"})
    errors = sorted(validator.iter_errors(metadata), key=lambda error: error.json_path)
    return [f'"{error.json_path.removeprefix("$.")}": {error.message}' for error in errors], []
