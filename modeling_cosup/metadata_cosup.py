"""Where a passage comes from: a JSON object that travels with it, from the corpus to the trace and the citation."""

import json
from collections.abc import Mapping
from typing import Any

from .files_cosup import parse_json

MAX_METADATA_BYTES = 16_384  # of its JSON text; Milvus holds 65,536
MAX_METADATA_DEPTH = 64  # lists and objects within each other; far fewer than json and pickle can take


def check_metadata(value: object, where: str) -> dict[str, Any] | None:
    """
    Return the metadata of a passage, a copy of JSON values; `None` if there is none.

    A key with `None` counts as missing, since Arrow fills in `None`.

    Raises:
        `ValueError`: unless it is an object of finite numbers, encodable texts, lists and objects, of at most
            `MAX_METADATA_BYTES` and `MAX_METADATA_DEPTH`; names the place.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: metadata is of type {type(value).__name__}, expected a JSON object.")
    wrong_keys = [key for key in value if not isinstance(key, str)]
    if wrong_keys:
        raise ValueError(f"{where}: metadata has the key {wrong_keys[0]!r}, expected a string.")
    present = {key: entry for key, entry in value.items() if entry is not None}
    text = metadata_text(present, where)
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{where}: metadata takes {size:,} bytes as JSON, expected at most {MAX_METADATA_BYTES:,}.")
    return json.loads(text) or None


def metadata_text(metadata: Mapping[str, Any], where: str = "metadata") -> str:
    """Return metadata as JSON text; `ValueError` names a key whose value is not JSON."""
    for key, entry in metadata.items():
        reason = _flaw(entry)
        try:
            if not reason:
                json.dumps({key: entry}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            reason = "holds half a surrogate pair, which is not a character"
        except TypeError:
            reason = f"is of type {type(entry).__name__}, or holds a value that is not JSON"
        except ValueError:
            reason = "holds a number that is not finite"
        if reason:
            raise ValueError(f"{where}: metadata[{key!r}] {reason}.")
    return json.dumps(metadata, ensure_ascii=False)


def _flaw(entry: Any, depth: int = 0) -> str:
    """Return what is wrong with the depth and the integers of a JSON value; empty if nothing is."""
    if isinstance(entry, Mapping | list | tuple):
        if depth == MAX_METADATA_DEPTH:
            return f"is nested too deeply, expected at most {MAX_METADATA_DEPTH} levels"
        values = entry.values() if isinstance(entry, Mapping) else entry
        return next(filter(None, (_flaw(value, depth + 1) for value in values)), "")
    fits = not isinstance(entry, int) or -(2**63) <= entry < 2**63
    return "" if fits else "holds an integer of more than 64 bits"


def read_metadata(text: str, where: str) -> dict[str, Any]:
    """Return the metadata in JSON text; `ValueError` names the place of a text that is no JSON object."""
    metadata = parse_json(text.encode(), where)
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata is of type {type(metadata).__name__}, expected a JSON object.")
    return metadata


def traced_passage(passage: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"id", "title", "text"}` of a passage, and its `"metadata"` if it has some."""
    fields = {name: passage[name] for name in ("id", "title", "text")}
    if passage.get("metadata"):
        fields["metadata"] = passage["metadata"]
    return fields


def source_text(passage: Mapping[str, Any]) -> str:
    """Return the source of a passage for human readers, such as `guide.pdf, page 3`; empty if it is not known."""
    metadata = passage.get("metadata") or {}
    source = metadata.get("source") or metadata.get("url")
    if not isinstance(source, str):
        return ""
    page = metadata.get("page")
    return f"{source}, page {page}" if isinstance(page, int) else source
