"""The collection that holds a passage index in Milvus: its fields and properties, and the upload, which goes on where it was cut off."""

import hashlib
import json

from .index_files_cosup import shard_files
from .milvus_client_cosup import MAX_REQUEST_BYTES, MAX_REQUEST_ROWS, milvus_packages, split

FORMAT_VERSION = "1"
MAX_FIELD_BYTES = 65_535  # of a VARCHAR
MAX_TOKENS = 4_096  # of an ARRAY
TEXT_FIELDS = ("id", "title", "text")


def prepare_upload(connection, index, index_type, index_params, overwrite):
    """
    Create the collection for `index`, or find an upload of it that was cut off.

    Returns:
        `int`: the number of passages that are there for certain and need not be sent.

    Raises:
        `FileExistsError`: when the collection is anything else and `overwrite` is false.
    """
    source = _digest(index, index_type, index_params)
    unfinished = _is_unfinished(connection, source, overwrite)
    if not unfinished:
        _create(connection, index, source, index_type)
    _create_indexes(connection, index_type, index_params)
    if not unfinished:
        return 0
    try:
        connection.call("load_collection", "loading the collection")
    except ConnectionError:
        raise
    except OSError:  # Milvus Lite, killed while it wrote the file of an index, refuses the half of it
        while names := connection.call(
            "list_indexes", "listing the indexes"
        ):  # it drops all of them at once, a server one
            connection.call("drop_index", "dropping an index", index_name=names[0])
        _create_indexes(connection, index_type, index_params)
        connection.call("load_collection", "loading the collection")
    arrived = count_passages(connection)
    connection.call("release_collection", "releasing the collection")  # a server indexes what is not in memory faster
    return max(0, arrived - MAX_REQUEST_ROWS)  # a batch was sent only after the one before had arrived


def _is_unfinished(connection, source, overwrite):
    """Whether the collection is an unfinished upload of `source`; anything else of its name is dropped or an error."""
    if not connection.call("has_collection", "looking for the collection"):
        return False
    properties = connection.call("describe_collection", "reading the collection's properties")["properties"]
    if properties.get("cosup.source") == source and properties.get("cosup.complete") == "false":
        return True
    if not overwrite:
        raise FileExistsError(
            f"{connection} exists already and is not an unfinished upload of this index. Open it with MilvusPassageIndex(uri, collection), "
            "choose another name, or drop it with overwrite=True."
        )
    connection.call("drop_collection", "dropping the collection")
    return False


def _create(connection, index, source, index_type):
    pymilvus, _ = milvus_packages()
    data_type = pymilvus.DataType
    schema = pymilvus.MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", data_type.INT64, is_primary=True)
    for name in TEXT_FIELDS:
        schema.add_field(name, data_type.VARCHAR, max_length=MAX_FIELD_BYTES)
    schema.add_field("input_ids", data_type.ARRAY, element_type=data_type.INT32, max_capacity=MAX_TOKENS)
    schema.add_field("embedding", data_type.FLOAT_VECTOR, dim=index.config["embedding_size"])
    properties = {
        "cosup.format_version": FORMAT_VERSION,
        "cosup.fingerprint": json.dumps(index.fingerprint),
        "cosup.index_type": index_type,
        "cosup.source": source,
        "cosup.complete": "false",
        "cosup.next_row": str(
            index.num_rows
        ),  # every row below was given to a passage once, whether it is still there or not
        "cosup.adding": "",  # rows `first:stop` of an add() under way
    }
    connection.call(
        "create_collection",
        "creating the collection",
        schema=schema,
        properties=properties,
        consistency_level="Session",
    )


def _create_indexes(connection, index_type, index_params):
    there = connection.call("list_indexes", "listing the indexes")
    for name, options in (
        ("embedding", {"index_type": index_type, "metric_type": "IP", "params": index_params}),
        ("id", {"index_type": "INVERTED"}),
    ):
        if name not in there:
            index = milvus_packages()[0].MilvusClient.prepare_index_params()
            index.add_index(name, index_name=name, **options)
            connection.call(
                "create_index", "creating the index", index_params=index, sync=False
            )  # nothing is there to index yet


def upload(connection, index, skip=0, first_row=0, batch_size=MAX_REQUEST_ROWS, show_progress_bar=False):
    """
    Write the passages of an index, in order. Writing one again changes nothing.

    Args:
        connection ([`MilvusConnection`]): to a collection that has been prepared.
        index ([`PassageIndex`]): its row `i` becomes row `first_row + i`.
        skip (`int`): passages at the beginning that are there already.
        batch_size (`int`): passages a request, at most; fewer where they would exceed 16 MiB.
    """
    from tqdm.auto import tqdm

    rows = index.live_rows()
    batch_size = max(1, min(batch_size, MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * index.config["embedding_size"])))
    with tqdm(
        total=len(rows), initial=skip, desc="Uploading passages", unit="passage", disable=not show_progress_bar
    ) as bar:
        for start in range(skip, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            columns = zip(batch.tolist(), index.get_passages(batch), index.get_embeddings(batch), strict=True)
            data = [{"row": first_row + row, **passage, "embedding": embedding} for row, passage, embedding in columns]
            for part in split(data, _request_bytes, MAX_REQUEST_BYTES):
                connection.call("upsert", "writing passages", data=part)
            bar.update(len(batch))


def finish_upload(connection, index):
    """
    Mark an upload as complete, when all of it is there.

    Raises:
        `RuntimeError`: when passages are missing.
    """
    connection.call("flush", "storing the passages")
    connection.call("load_collection", "loading the collection")  # an approximate index is built now
    there, expected = count_passages(connection), len(index.live_rows())
    if there != expected:
        raise RuntimeError(f"{connection}: there are {there} passages after the upload, expected {expected}.")
    set_properties(connection, complete="true")


def count_passages(connection):
    """Number of passages in a loaded collection, all writes of all processes included."""
    (result,) = connection.call(
        "query", "counting the passages", filter="", output_fields=["count(*)"], consistency_level="Strong"
    )
    return result["count(*)"]


def set_properties(connection, **properties):
    """Change properties that stand with the collection; the others stay."""
    properties = {f"cosup.{name}": value for name, value in properties.items()}
    connection.call("alter_collection_properties", "writing the collection's properties", properties=properties)


def check_sizes(index):
    """
    Check that all passages fit into the fields of a collection, before any is sent.

    Raises:
        `ValueError`: names the passage and what is too long.
    """
    rows = index.live_rows()
    for start in range(0, len(rows), MAX_REQUEST_ROWS):
        for passage in index.get_passages(rows[start : start + MAX_REQUEST_ROWS]):
            sizes = {name: len(passage[name].encode()) for name in TEXT_FIELDS}
            for name, size in sizes.items():
                if size > MAX_FIELD_BYTES:
                    raise ValueError(
                        f"Passage {passage['id'][:80]!r}: {name!r} has {size} bytes, Milvus holds at most {MAX_FIELD_BYTES}; cut it in two."
                    )
            if len(passage["input_ids"]) > MAX_TOKENS:
                raise ValueError(
                    f"Passage {passage['id'][:80]!r} has {len(passage['input_ids'])} token ids, Milvus holds at most {MAX_TOKENS}."
                )


def _digest(index, index_type, index_params):
    """SHA-256 of what an upload is of: the fingerprint, the index type, and every passage: by the checksums of its folder, or all that is in memory."""
    rows = index.live_rows()
    settings = [index.fingerprint, index_type, index_params]
    if index.folder is not None:
        names = [name for number in range(len(index.config["shards"])) for name in shard_files(number)]
        settings.append([index.config["files"][name]["sha256"] for name in names])
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + rows.tobytes())
    for start in range(0, 0 if index.folder is not None else len(rows), MAX_REQUEST_ROWS):
        part = rows[start : start + MAX_REQUEST_ROWS]
        digest.update(
            json.dumps(index.get_passages(part), sort_keys=True).encode() + index.get_embeddings(part).tobytes()
        )
    return digest.hexdigest()


def _request_bytes(passage):
    """About what a passage takes in a request."""
    return 4 * (
        len(passage["embedding"]) + len(passage["input_ids"]) + sum(len(passage[name]) for name in TEXT_FIELDS)
    )
