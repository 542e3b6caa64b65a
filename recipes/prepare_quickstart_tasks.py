"""
Make evaluation tasks over a world of prepare_quickstart.py: two in-domain, four out-of-domain.

    python recipes/prepare_quickstart_tasks.py --world data/quickstart --output_dir data/quickstart-tasks

In-domain: `people` and `places`, the questions of the world's own eval.jsonl.
Out-of-domain, about further new entities:
    wordings     facts and passages as in training, questions in words that no training question has
    styles       questions as in training, passages in sentences that no training passage has
    attributes   kinds of facts that training does not have; the rest of the passage is as in training
    surnames     the question names a person only by the second half of the name, which no training question does

Written under `output_dir`:
    corpus.jsonl   the world's corpus and the new passages, one for all tasks
    <task>.jsonl   questions with `candidates`: the gold passage and the nearest others, found by the letters of names,
                   without any model
    tasks.json     the settings

The world itself is not changed.
"""

import json

from shared.cli import clear_errors, parse

from shared.quickstart import TaskArguments, prepare_tasks


def main() -> None:
    """Read the options, make the tasks and print their paths."""
    (args,) = parse([TaskArguments], __doc__)
    with clear_errors():
        print(json.dumps(prepare_tasks(args), indent=2))


if __name__ == "__main__":
    main()
