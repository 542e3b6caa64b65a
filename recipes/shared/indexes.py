"""The index that a recipe is given by `--index` and `--index_uri`: a folder, a dataset repository on the Hub, or a collection in Milvus."""

INDEX_HELP = "name or path of an index; with --index_uri the name of a Milvus collection"
INDEX_URI_HELP = "of the Milvus server (http://host:19530) or local file (.db) that holds it; a token is read from the variable MILVUS_TOKEN"


def add_index_options(parser, index_help=INDEX_HELP):
    """Give an `argparse` parser, or a group of one, `--index`; and the parser `--index_uri`."""
    parser.add_argument("--index", help=index_help)
    parser.add_argument("--index_uri", help=INDEX_URI_HELP)


def check_index_options(index, index_uri):
    """
    Whether the two options can go together, before anything is loaded.

    Raises:
        `ValueError`: for a server without a collection.
    """
    if index_uri is not None and not index:
        raise ValueError(f"--index_uri {index_uri} without --index: name the collection that holds the index.")


def open_index(model, index, index_uri=None, **options):
    """
    The index of a recipe, checked against the model.

    Args:
        model ([`CoSupForCausalLM`]): that made it.
        index (`str`, *optional*), index_uri (`str`, *optional*): as above.
        **options: for `load_index`, e.g. `search="exact"`.

    Returns:
        [`Retriever`], or `None` without `index`.

    Raises:
        `ValueError`: for an index of another model, a collection that is not there, or an option that this kind of index does not have.
        `OSError`: for a folder that is not there, or a server that does not answer.
    """
    check_index_options(index, index_uri)
    return model.load_index(index, index_uri, **options) if index else None
