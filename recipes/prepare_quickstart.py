"""
Make the fictional world of the offline quickstart: people and places that no language model has read about.

    python recipes/prepare_quickstart.py --output_dir data/quickstart --seed 0

Every entity has one passage of three facts, and a question about it can only be answered by retrieving that passage.
About one question in nine (counting, "Which day comes after Monday?", greetings) needs no passage, so that the model
also learns when not to retrieve.

Written under `output_dir`:
    train.jsonl, validation.jsonl   training instances
    eval.jsonl                      questions about unseen entities: neither they nor the names in their answers occur
                                    in train.jsonl or validation.jsonl
    corpus.jsonl                    the passages of all entities, trained and unseen
    gen/, emb_seq/                  two tiny Llama checkpoints with their tokenizer, ready to be co-supervised
    pairs.jsonl, start.jsonl        with --pairs true, for distillation: the questions of train.jsonl with answers in
                                    place of gold passages, and instances of another world with gold passages
    world.json                      the settings

Gen runs a copy drill on random tokens, in place of the pretraining that a real Gen has. Without the drill, Gen still
learns to retrieve, but not to copy an answer out of a passage.
"""

import json

from shared.cli import clear_errors, parse

from shared.quickstart import WorldArguments, prepare_world


def main() -> None:
    """Read the options, make the world and print its paths."""
    (args,) = parse([WorldArguments], __doc__)
    with clear_errors():
        print(json.dumps(prepare_world(args), indent=2))


if __name__ == "__main__":
    main()
