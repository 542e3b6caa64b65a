"""
Evaluation tasks over a world of prepare_quickstart.py: two of the kind that it trains on, four of a kind that it never does.

    python recipes/prepare_quickstart_tasks.py --world data/quickstart --output_dir data/quickstart-tasks

In-domain: `people` and `places`, the questions of the world's own eval.jsonl. Out-of-domain, about entities that are new once more:
    wordings     the facts and passages of training, asked in words that no training question has
    styles       the questions of training, on passages whose sentences no training passage has
    attributes   kinds of facts that training does not know; the rest of the passage is as in training
    surnames     the question has only the second half of a person's name; no training question has

Written under `output_dir`: corpus.jsonl, the world's corpus and the new passages, one for all tasks; <task>.jsonl, whose `candidates` are the gold passage
and the nearest others by the letters of names (no model has a part in it); tasks.json, the settings. The world itself stays as it is.
"""

import argparse
import inspect
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from prepare_quickstart import GOODS, INSTRUMENTS, PERSON, PLACE, World

from modeling_cosup.files_cosup import digest_file, read_json, write_json
from modeling_cosup.lines_cosup import read_lines, write_lines
from trainer.data import content_id

SPLITS = {
    "people": "in-domain",
    "places": "in-domain",
    "wordings": "out-of-domain",
    "styles": "out-of-domain",
    "attributes": "out-of-domain",
    "surnames": "out-of-domain",
}

# What is never trained, for each fact of PERSON and PLACE in their order: wordings of questions, sentences of passages.
UNTRAINED = {
    "person": [
        (["In which town was {n} born?", "{n} was born where?"], ["{v} is the birthplace of {n}.", "The town where {n} was born is {v}."]),
        (["In what year was {n} born?", "Which year does {n} date from?"], ["The birth year of {n} is {v}.", "In {v} {n} was born."]),
        (["What trade does {n} work in?", "By what job does {n} earn a living?"], ["The job of {n} is {v}.", "A {v} is what {n} works as."]),
        (["What does {n} play?", "{n} plays which instrument?"], ["The instrument played by {n} is the {v}.", "The {v} is the instrument of {n}."]),
        (["Who shares a house with {n}?", "{n} is married to who?"], ["{v} is the spouse of {n}.", "The spouse of {n} is {v}."]),
    ],
    "place": [
        (["By who was {n} founded?", "{n} owes its founding to who?"], ["{v} is the founder of {n}.", "The founder of {n} is {v}."]),
        (["Which year does {n} go back to?", "What is the year of the founding of {n}?"], ["The founding of {n} was in {v}.", "In {v} {n} was founded."]),
        (["What do travellers know {n} for?", "{n} sells what?"], ["Travellers know {n} for {v}.", "Known for {v} is {n}."]),
        (["By the banks of which river does {n} lie?", "{n} stands on which river?"], ["The river near {n} is the {v}.", "The {v} is the river of {n}."]),
    ],
}
NEW_FACTS = {  # as PERSON and PLACE; the answer is the value alone
    "person": [
        (2, ["lies in the river {v}"], ["Which river does {n} lie in?"]),
        (GOODS, ["sells {v}"], ["What does {n} sell?"]),
        (3, ["founded the town of {v}"], ["Which town was founded by {n}?"]),
        (range(1400, 1900), ["was married in the year {v}"], ["In what year was {n} married?"]),
    ],
    "place": [
        (3, ["is near the town of {v}"], ["Which town is {n} near?"]),
        (INSTRUMENTS, ["is known to play the {v}"], ["What is {n} known to play?"]),
        (2, ["has a house of {v}"], ["Who has a house in {n}?"]),
    ],
}


# ---------------------------------------------------------------------- new entities


class NewEntities:
    """Draws entities for the tasks out of names that neither titles nor training use. Their answers may share names with the world's unseen entities."""

    def __init__(self, seed, corpus, unseen):
        self.world = World(f"tasks {seed}")
        self.rng = self.world.rng
        for passage in corpus:
            for name in re.findall("[A-Z][a-z]+", passage["text"]):
                self.world.owner.setdefault(name, "training")
        for passage in unseen:
            for name in re.findall("[A-Z][a-z]+", passage["text"]):
                self.world.owner[name] = "tasks"
        self.world.owner.update({passage["title"]: "title" for passage in corpus})

    def draw(self, task):
        """`(passage, question, answers)` of one question about a new entity."""
        kind = "person" if task == "surnames" or self.rng.random() < 0.7 else "place"
        second = 3 if task == "surnames" else self.rng.choice([2, 3])  # enough of them for no two people to share one
        title = self.world.name((2, second) if kind == "person" else (3,), "title")
        drawn = self.rng.sample(list(zip(PERSON if kind == "person" else PLACE, UNTRAINED[kind], strict=True)), 3)
        (values, sentences, questions, answer), (own_questions, _) = drawn[0]
        if task == "attributes":
            values, sentences, questions = self.rng.choice(NEW_FACTS[kind])
        kinds, wordings = [values], [sentences]
        for fact, _ in drawn[1:]:
            kinds.append(fact[0])
            wordings.append(fact[1])
        if task == "styles":
            wordings = [own for _, (_, own) in drawn]
        told, names = [], title
        for each in kinds:
            told.append(self.world.name((each,), "tasks", avoid=names) if isinstance(each, int) else self.rng.choice(each))
            names += f" {told[-1]}"  # as in training: a syllable stands once in a passage
        text = self._text(title, kind, wordings, told, whole=task == "styles")
        passage = {"id": content_id(title, text), "title": title, "text": text}
        name = title.split()[-1] if task == "surnames" else title
        question = self.rng.choice(own_questions if task == "wordings" else questions).format(n=name)
        return passage, question, [str(told[0]) if task in ("attributes", "surnames") else answer.format(n=title, v=told[0])]

    def _text(self, title, kind, sentences, values, whole):
        """Sentences in random order; `whole` ones name the entity themselves, others get it, then a pronoun, as their subject."""
        order = self.rng.sample(range(len(values)), len(values))
        subjects = [title] + [self.rng.choice(["He", "She"]) if kind == "person" else "It"] * (len(order) - 1)
        parts = []
        for subject, i in zip(subjects, order, strict=True):
            wording = self.rng.choice(sentences[i]).format(n=title, v=values[i])
            parts.append(wording if whole else f"{subject} {wording}.")
        return " ".join(parts)


# ---------------------------------------------------------------------- candidates


class NearestByLetters:
    """Passages that share rare runs of three letters with the names of a question: look-alikes for a pool."""

    def __init__(self, corpus, rng):
        self.ids, self.rng, self.rows = [passage["id"] for passage in corpus], rng, defaultdict(list)
        for row, passage in enumerate(corpus):
            for run in self.runs(passage["text"]):
                self.rows[run].append(row)

    @staticmethod
    def runs(text):
        return {name[i : i + 3] for name in re.findall("[A-Z][a-z]+", text) for i in range(len(name) - 2)}

    def pool(self, question, gold, size):
        """Ids of `size` candidates: gold, the nearest others, and random ones where no other passage shares a letter."""
        scores = Counter()
        for run in sorted(self.runs(question)):
            rows = self.rows.get(run, ())
            for row in rows:
                scores[row] += 1 / len(rows)
        nearest = [self.ids[row] for row, _ in scores.most_common(size)]
        filling = self.rng.sample(self.ids, min(2 * size, len(self.ids)))
        return list(dict.fromkeys([*gold, *nearest, *filling]))[:size]


# ---------------------------------------------------------------------- all of it


def prepare_tasks(world: str, output_dir: str, seed: int = 0, num_questions: int = 150, num_no_passage: int = 25, pool_size: int = 100) -> dict[str, dict]:
    """
    Write the tasks of a world under `output_dir`, or reuse those that this file made of the same world with the same settings.

    Args:
        world (`str`): a folder of prepare_quickstart.py.
        output_dir (`str`): other tasks there are replaced; a folder that holds no tasks is refused.
        seed (`int`): of the new entities.
        num_questions (`int`): most questions of a task that need a passage.
        num_no_passage (`int`): further questions of `people` and of `places` that need none.
        pool_size (`int`): candidates of a question.

    Returns:
        `dict[str, dict]`: task -> `eval_file`, `corpus_file`, `split`.

    Raises:
        `FileExistsError`: for such a folder. `FileNotFoundError`: where there is no world.
    """
    settings = {name: value for name, value in locals().items() if name not in ("world", "output_dir")}
    settings["world"] = read_json(Path(world, "world.json"))
    settings["code"] = digest_file(__file__)
    output = Path(output_dir)
    found = set(os.listdir(output)) if output.exists() else set()
    if found and "tasks.json" not in found:
        raise FileExistsError(f"{output} holds something, but no tasks of this script: choose another folder, or remove it.")
    if not found or read_json(output / "tasks.json") != settings:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as temporary:
            made = Path(temporary, output.name)
            made.mkdir()
            write_tasks(Path(world), made, seed, num_questions, num_no_passage, pool_size)
            write_json(made / "tasks.json", settings)
            shutil.rmtree(output, ignore_errors=True)
            made.rename(output)  # complete, or not there at all
    return {
        task: {"eval_file": str(output / f"{task}.jsonl"), "corpus_file": str(output / "corpus.jsonl"), "split": split} for task, split in SPLITS.items()
    }


def write_tasks(world, folder, seed, num_questions, num_no_passage, pool_size):
    """Write corpus.jsonl and the file of each task."""
    corpus = read_lines(world / "corpus.jsonl")
    passages = {passage["id"]: passage for passage in corpus}
    asked = read_lines(world / "eval.jsonl")
    needing, free = [x for x in asked if x["provenance"]], [x for x in asked if not x["provenance"]]
    people = [x for x in needing if " " in passages[x["provenance"][0][0]]["title"]]  # a place has one word
    places = [x for x in needing if x not in people]
    tasks = {
        "people": people[:num_questions] + free[:num_no_passage],
        "places": places[:num_questions] + free[num_no_passage : 2 * num_no_passage],
    }
    entities = NewEntities(seed, corpus, [passages[x["provenance"][0][0]] for x in needing])
    drawn = {task: [entities.draw(task) for _ in range(num_questions)] for task in SPLITS if task not in tasks}
    corpus += [passage for rows in drawn.values() for passage, *_ in rows]
    for task, rows in drawn.items():
        tasks[task] = [{"input": question, "answers": answers, "provenance": [[passage["id"]]]} for passage, question, answers in rows]
    names = Counter(word for passage in corpus for word in set(re.findall(r"\w+", passage["text"])))
    titles = {passage["id"]: passage["title"] for passage in corpus}
    tasks["surnames"] = [row for row in tasks["surnames"] if names[titles[row["provenance"][0][0]].split()[1]] == 1]  # else others would be right too
    nearest = NearestByLetters(corpus, random.Random(f"pools {seed}"))
    write_lines(folder / "corpus.jsonl", corpus)
    for task, rows in tasks.items():
        for i, row in enumerate(rows):
            gold = [id for evidence in row["provenance"] for id in evidence]
            pool = nearest.pool(row["input"], gold, pool_size)
            rows[i] = {"id": f"{task}-{i}", "dataset": task, "instruction": "", **{k: row[k] for k in ("input", "answers", "provenance")}, "candidates": pool}
        write_lines(folder / f"{task}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(prepare_tasks).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(f"--{name}", type=parameter.annotation, required=required, default=None if required else parameter.default)
    print(json.dumps(prepare_tasks(**vars(parser.parse_args())), indent=2))
