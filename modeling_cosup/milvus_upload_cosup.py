"""The collection of a passage index in Milvus: its fields and properties, and an upload that can be resumed."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from .index_files_cosup import shard_files
from .metadata_cosup import metadata_text
from .milvus_client_cosup import MAX_REQUEST_BYTES, MAX_REQUEST_ROWS, MilvusConnection, milvus_packages, split
from .retrieval_cosup import PassageIndex

FORMAT_VERSION = "1"
MAX_FIELD_BYTES = 65_535  # of a VARCHAR
MAX_TOKENS = 4_096  # of an ARRAY
TEXT_FIELDS = ("id", "title", "text")
METADATA_FIELD = "metadata"  # nullable; a collection from before passages had metadata has no such field
PASSAGE_FIELDS = (*TEXT_FIELDS, "input_ids", METADATA_FIELD)


# ---------------------------------------------------------------------- upload


def prepare_upload(
    connection: MilvusConnection, index: PassageIndex, index_type: str, index_params: dict[str, Any], overwrite: bool
) -> int:
    """
    Create the collection for `index`, or prepare to resume an interrupted upload of it.

    Returns:
        `int`: the number of passages, from the first one on, that are certainly there and need not be sent.

    Raises:
        `FileExistsError`: if the collection is anything else and `overwrite` is false.
    """
    source = _digest(index, index_type, index_params)
    resumes = _may_resume(connection, source, overwrite)
    if not resumes:
        _create(connection, index, source, index_type)
    _create_indexes(connection, index_type, index_params)
    if not resumes:
        return 0
    try:
        connection.call("load_collection", "loading the collection")
    except ConnectionError:
        raise
    except OSError:  # Milvus Lite refuses a half-written index file, which it leaves behind when it is killed
        # one call drops all indexes of Milvus Lite, but one index of a server
        while names := connection.call("list_indexes", "listing the indexes"):
            connection.call("drop_index", "dropping an index", index_name=names[0])
        _create_indexes(connection, index_type, index_params)
        connection.call("load_collection", "loading the collection")
    arrived = count_passages(connection)
    connection.call("release_collection", "releasing the collection")  # a server indexes an unloaded collection faster
    # each batch was sent after the previous one had arrived, so only the last one can be incomplete
    return max(0, arrived - MAX_REQUEST_ROWS)


def _may_resume(connection: MilvusConnection, source: str, overwrite: bool) -> bool:
    """
    Return whether the collection is an unfinished upload of `source`, which can be resumed.

    Any other collection of the same name is dropped with `overwrite`, and an error without it.
    """
    if not connection.call("has_collection", "looking for the collection"):
        return False
    properties = connection.call("describe_collection", "reading the collection's properties")["properties"]
    if properties.get("cosup.source") == source and properties.get("cosup.complete") == "false":
        return True
    if not overwrite:
        raise _taken(connection)
    connection.call("drop_collection", "dropping the collection")
    return False


def check_can_be_uploaded(connection: MilvusConnection) -> None:
    """
    Raise `FileExistsError` if the collection exists and is not an unfinished upload.

    A recipe asks before it embeds a corpus, which may take days. Whether an unfinished upload is of the same index can
    be checked only after that.
    """
    if connection.call("has_collection", "looking for the collection"):
        properties = connection.call("describe_collection", "reading the collection's properties")["properties"]
        if properties.get("cosup.complete") != "false":
            raise _taken(connection)


def _taken(connection: MilvusConnection) -> FileExistsError:
    return FileExistsError(
        f"{connection} already exists and is not an unfinished upload of this index. Open it with"
        " MilvusPassageIndex(uri, collection), choose another name, or drop it with overwrite=True."
    )


def _create(connection: MilvusConnection, index: PassageIndex, source: str, index_type: str) -> None:
    """Create the collection with its fields and properties."""
    pymilvus, _ = milvus_packages()
    data_type = pymilvus.DataType
    schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", data_type.INT64, is_primary=True)
    for name in TEXT_FIELDS:
        schema.add_field(name, data_type.VARCHAR, max_length=MAX_FIELD_BYTES)
    schema.add_field("input_ids", data_type.ARRAY, element_type=data_type.INT32, max_capacity=MAX_TOKENS)
    schema.add_field(METADATA_FIELD, data_type.JSON, nullable=True)
    schema.add_field("embedding", data_type.FLOAT_VECTOR, dim=index.config["embedding_size"])
    properties = {
        "cosup.format_version": FORMAT_VERSION,
        "cosup.fingerprint": json.dumps(index.fingerprint),
        "cosup.index_type": index_type,
        "cosup.source": source,
        "cosup.complete": "false",
        "cosup.next_row": str(index.num_rows),  # all lower rows have held a passage, which may have been deleted
        "cosup.adding": "",  # rows `first:stop` of an add() in progress
    }
    options = {"schema": schema, "properties": properties, "consistency_level": "Session"}
    connection.call("create_collection", "creating the collection", **options)


def _create_indexes(connection: MilvusConnection, index_type: str, index_params: dict[str, Any]) -> None:
    """Create the indexes of the fields `embedding` and `id`, unless they exist."""
    existing = connection.call("list_indexes", "listing the indexes")
    field_options: dict[str, dict[str, Any]] = {
        "embedding": {"index_type": index_type, "metric_type": "IP", "params": index_params},
        "id": {"index_type": "INVERTED"},
    }
    pymilvus, _ = milvus_packages()
    for name, options in field_options.items():
        if name not in existing:
            field_index = pymilvus.MilvusClient.prepare_index_params()
            field_index.add_index(name, index_name=name, **options)
            # sync=False: there are no passages yet to wait for
            connection.call("create_index", "creating the index", index_params=field_index, sync=False)


def upload(
    connection: MilvusConnection,
    index: PassageIndex,
    skip: int = 0,
    first_row: int = 0,
    batch_size: int = MAX_REQUEST_ROWS,
    show_progress_bar: bool = False,
) -> None:
    """
    Write the passages of an index, in order. Writing a passage again changes nothing.

    Args:
        connection ([`MilvusConnection`]): connection to a prepared collection.
        index ([`PassageIndex`]): its row `i` becomes row `first_row + i`.
        skip (`int`): number of passages at the beginning that are already there.
        first_row (`int`): see `index`.
        batch_size (`int`): maximum number of passages per request; fewer if they would exceed 16 MiB.
        show_progress_bar (`bool`): show a tqdm bar.
    """
    from tqdm.auto import tqdm

    rows = index.live_rows()
    batch_size = max(1, min(batch_size, MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * index.config["embedding_size"])))
    options = {"desc": "Uploading passages", "unit": "passage", "disable": not show_progress_bar}
    with tqdm(total=len(rows), initial=skip, **options) as bar:
        for start in range(skip, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            columns = zip(batch.tolist(), index.get_passages(batch), index.get_embeddings(batch), strict=True)
            data = [{"row": first_row + row, **passage, "embedding": embedding} for row, passage, embedding in columns]
            for part in split(data, _request_bytes, MAX_REQUEST_BYTES):
                connection.call("upsert", "writing passages", data=part)
            bar.update(len(batch))


def _request_bytes(passage: dict[str, Any]) -> int:
    """Return roughly how many bytes a passage takes in a request."""
    characters = sum(len(passage[name]) for name in TEXT_FIELDS)
    if METADATA_FIELD in passage:
        characters += len(metadata_text(passage[METADATA_FIELD]))
    return 4 * (len(passage["embedding"]) + len(passage["input_ids"]) + characters)


def finish_upload(connection: MilvusConnection, index: PassageIndex) -> None:
    """
    Mark an upload as complete, after checking that all passages are there.

    Raises:
        `RuntimeError`: if passages are missing.
    """
    connection.call("flush", "storing the passages")
    connection.call("load_collection", "loading the collection")  # this builds an approximate index
    num_uploaded, expected = count_passages(connection), len(index.live_rows())
    if num_uploaded != expected:
        raise RuntimeError(f"{connection}: there are {num_uploaded} passages after the upload, expected {expected}.")
    set_properties(connection, complete="true")


def check_sizes(index: PassageIndex, fields: Sequence[str] = PASSAGE_FIELDS) -> None:
    """
    Check, before any passage is sent, that all fit into the fields of a collection.

    Raises:
        `ValueError`: names the passage and the field that is too long, or that the collection does not have.
    """
    rows = index.live_rows()
    for start in range(0, len(rows), MAX_REQUEST_ROWS):
        for passage in index.get_passages(rows[start : start + MAX_REQUEST_ROWS]):
            name = f"Passage {passage['id'][:80]!r}"
            for field in TEXT_FIELDS:
                size = len(passage[field].encode())
                if size > MAX_FIELD_BYTES:
                    raise ValueError(
                        f"{name}: {field!r} has {size} bytes, Milvus holds at most {MAX_FIELD_BYTES}; cut it in two."
                    )
            if "metadata" in passage and METADATA_FIELD not in fields:
                raise ValueError(
                    f"{name} has metadata, and this collection was made without; upload the index to a new one."
                )
            num_tokens = len(passage["input_ids"])
            if num_tokens > MAX_TOKENS:
                raise ValueError(f"{name} has {num_tokens} token ids, Milvus holds at most {MAX_TOKENS}.")


def _digest(index: PassageIndex, index_type: str, index_params: dict[str, Any]) -> str:
    """
    Return the SHA-256 of what an upload depends on: fingerprint, index type and passages.

    For an index in a folder, the checksums of its files represent the passages.
    """
    rows = index.live_rows()
    settings: list[Any] = [index.fingerprint, index_type, index_params]
    if index.folder is not None:
        checksums = []
        for number in range(len(index.config["shards"])):
            checksums += [index.config["files"][name]["sha256"] for name in shard_files(number)]
        settings.append(checksums)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + rows.tobytes())
    if index.folder is None:
        for start in range(0, len(rows), MAX_REQUEST_ROWS):
            part = rows[start : start + MAX_REQUEST_ROWS]
            digest.update(json.dumps(index.get_passages(part), sort_keys=True).encode())
            digest.update(index.get_embeddings(part).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- the collection


def count_passages(connection: MilvusConnection) -> int:
    """Return the number of passages in a loaded collection, including everything that any process has written."""
    options: dict[str, Any] = {"filter": "", "output_fields": ["count(*)"], "consistency_level": "Strong"}
    (result,) = connection.call("query", "counting the passages", **options)
    return result["count(*)"]


def read_properties(connection: MilvusConnection) -> tuple[dict[str, str], int, list[str]]:
    """
    Return the properties of a collection, the size of its embeddings, and the names of a passage's fields.

    Raises:
        `ValueError`: if it is not a passage index, or has a format version that this release cannot read.
    """
    description = connection.call("describe_collection", "reading the collection's properties")
    properties = description["properties"]
    version = properties.get("cosup.format_version")
    if version is None:
        raise ValueError(f"{connection} is not a passage index: its properties have no cosup.format_version.")
    if version != FORMAT_VERSION:
        raise ValueError(f"{connection} has format_version {version}, this release reads {FORMAT_VERSION}.")
    fields = {field["name"]: field for field in description["fields"]}
    names = [name for name in PASSAGE_FIELDS if name in fields]
    return properties, fields["embedding"]["params"]["dim"], names


def passage_of(hit: dict[str, Any]) -> dict[str, Any]:
    """Return the passage in the fields that a query returned."""
    passage = {name: hit[name] for name in TEXT_FIELDS}
    passage["input_ids"] = list(hit["input_ids"])
    if hit.get(METADATA_FIELD) is not None:
        passage["metadata"] = hit[METADATA_FIELD]
    return passage


def set_properties(connection: MilvusConnection, **properties: str) -> None:
    """Change some properties of a collection."""
    properties = {f"cosup.{name}": value for name, value in properties.items()}
    connection.call("alter_collection_properties", "writing the collection's properties", properties=properties)


def check_can_be_searched(connection: MilvusConnection, properties: dict[str, str], exact: bool) -> None:
    """Raise `ValueError` if the upload is not complete, or the index type is approximate but must be `exact`."""
    if properties["cosup.complete"] != "true":
        raise ValueError(
            f"{connection}: the upload is not complete; call MilvusPassageIndex.from_index with the same index to"
            " resume it."
        )
    index_type = properties["cosup.index_type"]
    if exact and index_type != "FLAT":
        raise ValueError(f"{connection} is searched through {index_type}, and search='exact' needs FLAT.")
