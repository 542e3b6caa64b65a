"""
Store the tokens of texts as a kNN memory of a CoSup checkpoint, or of another causal language model.

    python recipes/build_memory.py --model out --text_file text.jsonl --output_dir out/memory
    accelerate launch recipes/build_memory.py --model out --text_file text.jsonl --output_dir out/memory
    python recipes/build_memory.py --model out --text_file text.jsonl --output_dir out/memory \\
        --index_factory IVF1024,PQ64 --nprobe 32

Every process stores its share. After a crash the same command resumes at the first incomplete shard. A memory that is
already in `output_dir` stays until the new one is complete. With `--index_factory`, a memory of the same texts, model
and settings that `output_dir` already holds is not stored again. `recipes/train_memory.py` fits its weight,
temperature and k on held-out text.
"""

from pathlib import Path

from shared.cli import check_options, clear_errors, parse, refuse_given, table

from shared.memory_arguments import BuildMemoryArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([BuildMemoryArguments], __doc__)

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_cosup import KNNMemory
from modeling_cosup.datastore_build_cosup import KeyBuilder, split_texts
from modeling_cosup.files_cosup import digest_all
from modeling_cosup.index_approximate_cosup import L2, empty_approximate
from modeling_cosup.shard_build_cosup import build_digest

from shared.indexes import file_or_dataset, search_options
from shared.processes import end_processes, processes, set_cpu_threads
from shared.token_memories import load_gen


def main() -> None:
    """Check the settings, store the tokens and save the memory."""
    (args,) = parse([BuildMemoryArguments], __doc__)
    with clear_errors():
        state = processes()
        set_cpu_threads(args.num_threads)
        model, tokenizer = load_gen(args.model, args.dtype)
        model = model.to(state.device)
        check(args, model.config.get_text_config().hidden_size)
        was_built = is_built_before(args, model, tokenizer, state)
        if not was_built:
            build(args, model, tokenizer, state)
        elif state.is_main_process:
            print(f"{args.output_dir} holds these texts already, so nothing is stored. To store anew, remove it.")
        state.wait_for_everyone()
        if state.is_main_process:
            finish(args, must_merge=state.num_processes > 1 and not was_built)
    end_processes()


def build(
    args: BuildMemoryArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: PartialState
) -> None:
    """Store the share of this process."""
    KNNMemory.build(
        model,
        file_or_dataset(args.text_file, args.streaming),
        args.output_dir,
        tokenizer=tokenizer,
        dtype=args.key_dtype,
        max_length=args.max_length,
        stride=args.stride,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        num_processes=state.num_processes,
        process_index=state.process_index,
    )


def check(args: BuildMemoryArguments, key_size: int) -> None:
    """
    Check the settings before anything is stored.

    Raises:
        `ValueError`: names the setting.
    """
    if args.index_factory:
        empty_approximate(args.index_factory, key_size, args.train_size, L2, **search_options(args))
    else:
        options = ("train_size", "nprobe", "ef_search", "seed")
        refuse_given(args, options, "is for an approximate index: give --index_factory")


def is_built_before(
    args: BuildMemoryArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: PartialState
) -> bool:
    """Return whether an earlier run stored the tokens, and only training is left to do; one process finds out."""
    if args.index_factory is None:
        return False
    was_built = [False]
    if state.is_main_process:
        was_built = [is_built(args, model, tokenizer)]
    return bool(broadcast_object_list(was_built)[0])


def is_built(args: BuildMemoryArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `output_dir` holds a complete memory of these texts and this model, with these settings."""
    if not Path(args.output_dir).is_dir():
        return False
    try:
        memory = KNNMemory.from_pretrained(args.output_dir, search="exact")
    except (OSError, ValueError):
        return False
    builder = KeyBuilder(model, tokenizer, args.key_dtype, args.batch_size, args.max_length, args.stride)
    shards = split_texts(file_or_dataset(args.text_file, args.streaming), args.shard_size)
    made_from = build_digest(builder.settings(args.shard_size), map(digest_all, shards))
    return memory.config.get("build") == made_from  # earlier releases recorded none


def finish(args: BuildMemoryArguments, must_merge: bool) -> None:
    """In one process, merge the shards, train an approximate index, and print what was made."""
    if must_merge:
        KNNMemory.merge(args.output_dir)
    memory = KNNMemory.from_pretrained(args.output_dir, verify=False)
    size = sum(file["size"] for file in memory.config["files"].values())
    documents = len(memory.document_starts)
    print(f"{len(memory):,} tokens of {documents:,} texts, {size / 1e6:,.1f} MB, in {args.output_dir}", flush=True)
    if args.index_factory:
        figures = memory.train_approximate(args.index_factory, args.train_size, args.seed, **search_options(args))
        print(f"{args.index_factory} against exact search, states sampled from the memory:")
        print(table([(name, f"{value:.4g}") for name, value in figures.items()]))


if __name__ == "__main__":
    main()
