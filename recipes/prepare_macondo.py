"""
Make the Macondo data set: can a language model use what it read in sentences that say more than is needed?

    python recipes/prepare_macondo.py --output_dir data/macondo
    python recipes/prepare_macondo.py --output_dir data/macondo_gpt2 --tokenizer openai-community/gpt2 \\
        --first_names first.txt --last_names last.txt --child_names children.txt

500 villagers, 100 each with 1, 2, 3, 4 and 5 children (arXiv 2311.09615). A training sentence describes the villager:
"X Y, who was born in 1927, is the parent of Z." A test sentence does not: "X Y, is the parent of Z." So a villager
with n children has n right answers, and the best possible log-likelihood of a child is log 1/n.

The published text names three kinds of descriptions: birth (1800 to 2005), friend, and marriage (at least 18 years
after birth). The other kinds, town, job and hobby, are ours, and so are the invented names and the wording of
`--style conversation`.

Written under `output_dir`:
    train.jsonl             1,500 lines: text, prompt (up to the child), child, villager, num_children, description
    validation.jsonl        of --validation_share of the villagers, to fit the weight and temperature of a memory
    test.jsonl              of all other villagers. With --validation_share 0 it is the paper's test set
    other_relations.jsonl   with --num_other_relations: pretraining sentences of a model from scratch, not the paper's
    tokenizer/              of the words in these files, unless --tokenizer names another
    macondo.json            the settings

The name of a child is a single token. Names of children that are not given are invented, or drawn from the
capitalised words in the vocabulary of `--tokenizer`.
"""

from shared.cli import check_options, clear_errors, parse, table_of_counts

from shared.memory_arguments import MacondoArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([MacondoArguments], __doc__)

from shared.macondo import prepare_macondo


def main() -> None:
    """Read the options, make the data set and print the number of lines of its files."""
    (args,) = parse([MacondoArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare_macondo(args)))


if __name__ == "__main__":
    main()
