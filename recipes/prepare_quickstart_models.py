"""
Make further encoders for a world of prepare_quickstart.py, with its tokenizer.

    python recipes/prepare_quickstart_models.py --world data/quickstart --output_dir data/quickstart-models

Written under `output_dir`:
    emb_seq_small/   like the world's Emb_seq, but with one layer of half the width; untrained
    emb_seq_bert/    another architecture, which reads in both directions; untrained
    retriever/       the same architecture, trained as a general retriever: of two pieces cut out of one passage, each
                     must find the other. Its passages come from another world, so it knows what names and sentences
                     look like, but nobody in this world. Its pooling is `mean`.
    models.json      the settings
"""

import json

from shared.cli import clear_errors, parse

from shared.quickstart import EncoderArguments, prepare_encoders


def main() -> None:
    """Read the options, make the encoders and print their paths."""
    (args,) = parse([EncoderArguments], __doc__)
    with clear_errors():
        print(json.dumps(prepare_encoders(args), indent=2))


if __name__ == "__main__":
    main()
