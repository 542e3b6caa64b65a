"""Options of the demo: from the command line, or in a Space from environment variables."""

import argparse
import os

FLAGS = {"0": False, "false": False, "1": True, "true": True}


def variable(name: str) -> str | None:
    """Return an environment variable; an empty one counts as not set."""
    return os.environ.get(name) or None


def flag(name: str, default: bool, parser: argparse.ArgumentParser) -> bool:
    """Return an environment variable that is 0 or 1; anything else ends the program, because it might mean either."""
    value = variable(name)
    if value is None:
        return default
    if value.lower() not in FLAGS:
        parser.error(f"the variable {name} is {value!r}, expected 0 or 1.")
    return FLAGS[value.lower()]


def parse(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Return the options of the command line; their defaults come from environment variables."""
    examples = [question.strip() for question in (variable("COSUP_EXAMPLES") or "").split("|") if question.strip()]
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
    allow_faiss = flag("COSUP_ALLOW_FAISS_FILES", False, parser)
    add("--allow_faiss_files", action="store_true", default=allow_faiss, help=faiss_help)
    add("--revision", default=variable("COSUP_REVISION"), help="branch, tag or commit of the checkpoint")
    add("--index_revision", default=variable("COSUP_INDEX_REVISION"), help="branch, tag or commit of the index")
    add("--instruction", default=variable("COSUP_INSTRUCTION") or "", help=instruction_help)
    add("--examples", nargs="*", default=examples, help="questions to choose from")
    upload = flag("COSUP_UPLOAD", True, parser)
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
    has_folder = args.index and not args.index_uri
    if args.index_revision and not has_folder:
        parser.error(
            "--index_revision (or COSUP_INDEX_REVISION) is for an index on the Hub: give --index, without --index_uri."
        )
    if args.allow_faiss_files and not has_folder and not args.memory:
        parser.error(
            "--allow_faiss_files (or COSUP_ALLOW_FAISS_FILES) is for an index in a folder and for a memory: give"
            " --index, without --index_uri, or --memory."
        )
    return args


def _check_base_url(args, parser):
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base_url is {args.base_url!r}, expected a URL such as http://127.0.0.1:8000/v1.")
    for name in ("index", "index_uri", "memory", "allow_faiss_files", "revision", "index_revision"):
        if getattr(args, name):
            parser.error(f"--{name} cannot be used with --base_url: the server opens the model with all its parts.")
    args.upload = False  # a server takes no corpora
