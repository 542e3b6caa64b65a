"""Options of the demo: from the command line, or in a Space from environment variables."""

import argparse
import os


def parse(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Return the options of the command line; their defaults come from environment variables."""
    variable = os.environ.get
    examples = [question.strip() for question in variable("COSUP_EXAMPLES", "").split("|") if question.strip()]
    upload = variable("COSUP_UPLOAD", "1") != "0"
    index_help = (
        "name or path of its index, or with --index_uri name of a Milvus collection; "
        "without it nothing is retrieved before an upload"
    )
    uri_help = (
        "Milvus server or local file (.db) that holds the index; "
        "needs the package cosup[milvus]; MILVUS_TOKEN may hold a token"
    )
    model_help = "name or path of a CoSup checkpoint; with --base_url name of a model there, by default its first"
    base_url_help = "API of a server that runs the model, such as http://127.0.0.1:8000/v1"
    instruction_help = "the task's instruction, as in training"
    upload_help = "let users upload corpora; --no-upload does not load Emb_seq"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=variable("COSUP_MODEL"), help=model_help)
    add("--base_url", default=variable("COSUP_BASE_URL"), help=base_url_help)
    add("--api_key", default=variable("OPENAI_API_KEY"), help="key of that server, if it wants one")
    add("--index", default=variable("COSUP_INDEX"), help=index_help)
    add("--index_uri", default=variable("COSUP_INDEX_URI"), help=uri_help)
    add("--memory", default=variable("COSUP_MEMORY"), help="name or path of a token memory of the model")
    faiss_help = "let FAISS read the file of an approximate index or memory; do so only if you trust its maker"
    allow_faiss = variable("COSUP_ALLOW_FAISS_FILES", "0") != "0"
    add("--allow_faiss_files", action="store_true", default=allow_faiss, help=faiss_help)
    add("--revision", default=variable("COSUP_REVISION"), help="branch, tag or commit of the checkpoint")
    add("--index_revision", default=variable("COSUP_INDEX_REVISION"), help="branch, tag or commit of the index")
    add("--instruction", default=variable("COSUP_INSTRUCTION", ""), help=instruction_help)
    add("--examples", nargs="*", default=examples, help="questions to choose from")
    add("--upload", action=argparse.BooleanOptionalAction, default=upload, help=upload_help)
    args = parser.parse_args(argv)
    if args.base_url:
        _check_base_url(args, parser)
    elif not args.model:
        parser.error("no model: give --model or --base_url, or set COSUP_MODEL or COSUP_BASE_URL.")
    if args.index_uri and not args.index:
        parser.error(
            "a server without an index: give --index, or set COSUP_INDEX, to the name of the Milvus collection."
        )
    return args


def _check_base_url(args, parser):
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base_url is {args.base_url!r}, expected a URL such as http://127.0.0.1:8000/v1.")
    for name in ("index", "index_uri", "memory", "allow_faiss_files", "revision", "index_revision"):
        if getattr(args, name):
            parser.error(f"--{name} cannot be used with --base_url: the server opens the model with all its parts.")
    args.upload = False  # a server takes no corpora
