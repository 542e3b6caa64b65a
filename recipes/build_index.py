"""
Embed a corpus with a CoSup checkpoint and save the index.

    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index
    accelerate launch recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index \\
        --index_factory HNSW32
    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index \\
        --index wiki --index_uri http://host:19530
    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index \\
        --encoder_url http://host:8000/v1

Every process embeds its share. After a crash the same command resumes at the first incomplete shard. An index that is
already in `output_dir` stays until the new one is complete. With `--encoder_url`, a vLLM server embeds in place of the
processes: it serves what `save_emb_seq` wrote (`vllm serve emb_seq --runner pooling --convert embed`). The environment
variable VLLM_API_KEY may hold its key. With `--index_uri` the index is also uploaded to Milvus, and an interrupted
upload is resumed. Pass the same two options to the other recipes to search that collection. The environment variable
MILVUS_TOKEN may hold `user:password` or an API key. With `--index_factory` or `--index_uri`, an index of the same
corpus and model that `output_dir` already holds is not embedded again.
"""

import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shared.cli import check_options, clear_errors, json_object, parse, refuse_given, table

from shared.arguments import IndexArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([IndexArguments], __doc__)

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from modeling_cosup import CoSupForCausalLM, MilvusPassageIndex, PassageIndex
from modeling_cosup.index_approximate_cosup import empty_approximate
from modeling_cosup.index_files_cosup import METADATA_COLUMN
from modeling_cosup.milvus_client_cosup import MilvusConnection, milvus_packages
from modeling_cosup.milvus_upload_cosup import check_can_be_uploaded
from modeling_cosup.passages_cosup import checked_passages, read_corpus
from trainer.judging.figures import figure, shown

from serving.server_encoder import ServerEncoder
from shared.indexes import check_index_options, file_or_dataset, search_options
from shared.processes import end_processes, processes, set_cpu_threads


def main() -> None:
    """Check the settings, embed the corpus and save the index."""
    (args,) = parse([IndexArguments], __doc__)
    with clear_errors():
        state = processes()
        set_cpu_threads(args.num_threads)
        model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        check(args, model.config.embedding_size)
        was_built = is_built_before(args, model, state)
        if not was_built:
            build(args, model, state)
        elif state.is_main_process:
            print(f"{args.output_dir} holds this corpus already, so nothing is embedded. To embed anew, remove it.")
        state.wait_for_everyone()
        if state.is_main_process:
            finish(args, must_merge=state.num_processes > 1 and not was_built)
    end_processes()


def build(args: IndexArguments, model: CoSupForCausalLM, state: PartialState) -> None:
    """Embed the share of this process."""
    encoder = None
    if args.encoder_url is None:
        model.to(state.device)
    else:
        encoder = ServerEncoder(model, args.encoder_url, os.environ.get("VLLM_API_KEY"), args.batch_size)
    model.build_index(
        file_or_dataset(args.corpus_file, args.streaming),
        save_directory=args.output_dir,
        batch_size=args.batch_size,
        max_tokens_per_batch=args.max_tokens_per_batch,
        shard_size=args.shard_size,
        dtype=args.embedding_dtype,
        num_processes=state.num_processes,
        process_index=state.process_index,
        encoder=encoder,
    )


def check(args: IndexArguments, embedding_size: int) -> None:
    """
    Check the settings before anything is embedded.

    Raises:
        `ValueError`: names the setting.
    """
    for name in ("batch_size", "max_tokens_per_batch", "shard_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
    if args.index_factory:
        empty_approximate(args.index_factory, embedding_size, args.train_size, **search_options(args))
    else:
        options = ("train_size", "nprobe", "ef_search", "seed")
        refuse_given(args, options, "is for an approximate index: give --index_factory")
    if args.encoder_url is not None:
        refuse_given(args, ["max_tokens_per_batch"], "limits a forward of this process, not of --encoder_url")
    check_index_options(args.index, args.index_uri)
    if args.index and args.index_uri is None:
        raise ValueError(
            f"--index {args.index} without --index_uri: name the Milvus server to upload to; the folder is output_dir."
        )
    options = ["milvus_index_type"]
    if milvus_index_params(args):
        options.append("milvus_index_params")
    if args.index_uri is None:
        refuse_given(args, options, "is for an upload to Milvus: give --index_uri")
    else:
        milvus_packages()


def milvus_index_params(args: IndexArguments) -> dict[str, Any]:
    """Return the parameters of the collection's index; a config may leave them empty."""
    return {} if args.milvus_index_params is None else json_object(args.milvus_index_params, "milvus_index_params")


def is_built_before(args: IndexArguments, model: CoSupForCausalLM, state: PartialState) -> bool:
    """
    Return whether an earlier run embedded this corpus, and only what follows is left to do: training or an upload.

    One process does it for all. Before an upload it also asks Milvus for the collection.
    """
    if args.index_factory is None and args.index_uri is None:
        return False
    was_built = [False]
    if state.is_main_process:
        if args.index_uri is not None:
            check_collection(args.index_uri, args.index)
        was_built = [is_built(args, model)]
    return bool(broadcast_object_list(was_built)[0])


def check_collection(uri: str, collection: str) -> None:
    """Connect to Milvus; `FileExistsError` if the collection exists, and is not an unfinished upload."""
    connection = MilvusConnection(uri, collection)
    if connection.is_file and not Path(uri).exists():
        return
    try:
        check_can_be_uploaded(connection)
    finally:
        connection.close()


def is_built(args: IndexArguments, model: CoSupForCausalLM) -> bool:
    """
    Return whether `output_dir` holds a complete index of this corpus and model, with these settings.

    An upload resumes only from the same embeddings, and embedding again would make others.
    """
    if not Path(args.output_dir).is_dir():
        return False
    try:
        index = PassageIndex.from_pretrained(args.output_dir, search="exact")
        index.check_model(model)
    except (OSError, ValueError):
        return False
    num_full, num_left = divmod(index.num_rows, args.shard_size)
    sizes = [args.shard_size] * num_full + ([num_left] if num_left else [])
    has_settings = index.config["dtype"] == args.embedding_dtype and index.config["shards"] == sizes
    if not has_settings or (index.config["approximate"] and not args.index_factory):
        return False
    corpus = checked_passages(read_corpus(file_or_dataset(args.corpus_file, args.streaming)))
    held = index.read(("id", "title", "text", METADATA_COLUMN))
    return all(first == second for first, second in zip_longest((passage for _, passage in corpus), held))


def finish(args: IndexArguments, must_merge: bool) -> None:
    """In one process, merge the shards, train an approximate index, upload the index, and print what was made."""
    if must_merge:
        PassageIndex.merge(args.output_dir)
    index = PassageIndex.from_pretrained(args.output_dir, search="exact", verify=False)
    print(f"{len(index):,} passages in {args.output_dir}", flush=True)
    if args.index_factory:
        recalls = index.train_approximate(args.index_factory, args.train_size, args.seed, **search_options(args))
        print(f"{args.index_factory} against exact search, queries sampled from the passages:")
        print(table([(figure(name).label, f"{shown(value, name)} %") for name, value in recalls.items()]))
    if args.index_uri is not None:
        options = {"index_type": args.milvus_index_type, "index_params": milvus_index_params(args)}
        uploaded = MilvusPassageIndex.from_index(index, args.index_uri, args.index, **options)
        print(f"{len(uploaded):,} passages in collection {args.index} of {args.index_uri}", flush=True)
        uploaded.close()


if __name__ == "__main__":
    main()
