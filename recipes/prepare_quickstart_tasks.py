"""
Evaluation tasks over a world of prepare_quickstart.py: two of a kind that it trains on, four of a kind that it does not.

    python recipes/prepare_quickstart_tasks.py --world data/quickstart --output_dir data/quickstart-tasks

In-domain: `people` and `places`, the questions of the world's own eval.jsonl.
Out-of-domain, about entities that are new once more:
    wordings     the facts and passages of training, asked in words that no training question has
    styles       the questions of training, on passages whose sentences no training passage has
    attributes   kinds of facts that training does not know; the rest of the passage is as in training
    surnames     the question has only the second half of a person's name; no training question has

Written under `output_dir`:
    corpus.jsonl   the world's corpus and the new passages, one for all tasks
    <task>.jsonl   questions, whose `candidates` are the gold passage and the nearest others by the letters of names:
                   no model has a part in it
    tasks.json     the settings

The world itself stays as it is.
"""

import json

from shared.cli import clear_errors, parse

from shared.quickstart import TaskArguments, prepare_tasks


def main():
    """Read the options, make it, print its paths."""
    (args,) = parse([TaskArguments], __doc__)
    with clear_errors():
        print(json.dumps(prepare_tasks(args), indent=2))


if __name__ == "__main__":
    main()
