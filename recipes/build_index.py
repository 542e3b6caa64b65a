"""
Embed a corpus with a CoSup checkpoint and save the index.

    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index
"""

from dataclasses import dataclass, field

from cli import check_trainer_package, clear_errors, parse

check_trainer_package()

import torch  # noqa: E402

from modeling_cosup import CoSupForCausalLM, PassageIndex  # noqa: E402
from trainer import load_corpus  # noqa: E402


@dataclass
class IndexArguments:
    """Which model embeds which corpus."""

    model: str = field(metadata={"help": "Name or path of a CoSup checkpoint."})
    corpus_file: str = field(metadata={"help": "Passages {id, title, text}: JSON Lines (.gz) or a dataset name."})
    output_dir: str = field(metadata={"help": "Folder of the index."})
    batch_size: int = field(default=64, metadata={"help": "Passages per forward."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights."})


def main():
    """Check the corpus, embed it, save the index."""
    (args,) = parse([IndexArguments], __doc__)
    with clear_errors():
        PassageIndex.check_save_directory(args.output_dir)
        corpus = load_corpus(args.corpus_file)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
        index = model.build_index(corpus, batch_size=args.batch_size)
        index.save_pretrained(args.output_dir)
    print(f"{len(index):,} passages in {args.output_dir}")


if __name__ == "__main__":
    main()
