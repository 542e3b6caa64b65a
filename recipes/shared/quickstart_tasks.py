"""Evaluation tasks over the quickstart world: new entities, questions about them, and look-alikes as candidates."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modeling_cosup.lines_cosup import read_lines, write_lines
from trainer.data import content_id

from shared.quickstart_world import GOODS, INSTRUMENTS, PERSON, PLACE, Passage, World

SPLITS = {
    "people": "in-domain",
    "places": "in-domain",
    "wordings": "out-of-domain",
    "styles": "out-of-domain",
    "attributes": "out-of-domain",
    "surnames": "out-of-domain",
}

# Wordings that are never trained: for each fact of PERSON and PLACE, in their order, questions and passage sentences.
UNTRAINED = {
    "person": [
        (
            ["In which town was {n} born?", "{n} was born where?"],
            ["{v} is the birthplace of {n}.", "The town where {n} was born is {v}."],
        ),
        (
            ["In what year was {n} born?", "Which year does {n} date from?"],
            ["The birth year of {n} is {v}.", "In {v} {n} was born."],
        ),
        (
            ["What trade does {n} work in?", "By what job does {n} earn a living?"],
            ["The job of {n} is {v}.", "A {v} is what {n} works as."],
        ),
        (
            ["What does {n} play?", "{n} plays which instrument?"],
            ["The instrument played by {n} is the {v}.", "The {v} is the instrument of {n}."],
        ),
        (
            ["Who shares a house with {n}?", "{n} is married to who?"],
            ["{v} is the spouse of {n}.", "The spouse of {n} is {v}."],
        ),
    ],
    "place": [
        (
            ["By who was {n} founded?", "{n} owes its founding to who?"],
            ["{v} is the founder of {n}.", "The founder of {n} is {v}."],
        ),
        (
            ["Which year does {n} go back to?", "What is the year of the founding of {n}?"],
            ["The founding of {n} was in {v}.", "In {v} {n} was founded."],
        ),
        (
            ["What do travellers know {n} for?", "{n} sells what?"],
            ["Travellers know {n} for {v}.", "Known for {v} is {n}."],
        ),
        (
            ["By the banks of which river does {n} lie?", "{n} stands on which river?"],
            ["The river near {n} is the {v}.", "The {v} is the river of {n}."],
        ),
    ],
}
# Kinds of facts that training does not have: as in PERSON and PLACE, but the answer is only the value.
NEW_FACTS: dict[str, list[tuple[Any, list[str], list[str]]]] = {
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
    """
    A source of entities for the tasks, with names that neither the titles of the world nor its training passages use.

    Their answers may share names with the answers about the world's unseen entities.

    Args:
        seed (`int`): seed of everything that is drawn.
        corpus (`list[dict]`): the passages of the world.
        unseen (`list[dict]`): the passages of the unseen entities of the world.
    """

    def __init__(self, seed: int, corpus: list[Passage], unseen: list[Passage]) -> None:
        self.world = World(f"tasks {seed}")
        self.rng = self.world.rng
        for passage in corpus:
            for name in re.findall("[A-Z][a-z]+", passage["text"]):
                self.world.owner.setdefault(name, "training")
        for passage in unseen:
            for name in re.findall("[A-Z][a-z]+", passage["text"]):
                self.world.owner[name] = "tasks"
        self.world.owner.update({passage["title"]: "title" for passage in corpus})

    def draw(self, task: str) -> tuple[Passage, str, list[str]]:
        """Draw a new entity and one question about it: `(passage, question, answers)`."""
        kind = "person" if task == "surnames" or self.rng.random() < 0.7 else "place"
        # with three syllables there are enough surnames for all people of the task "surnames" to have different ones
        second_length = 3 if task == "surnames" else self.rng.choice([2, 3])
        lengths = (2, second_length) if kind == "person" else (3,)
        title = self.world.name(lengths, "title")
        trained_facts = PERSON if kind == "person" else PLACE
        facts = self.rng.sample(list(zip(trained_facts, UNTRAINED[kind], strict=True)), 3)
        (choices, sentences, questions, answer), (untrained_questions, _) = facts[0]
        if task == "attributes":
            choices, sentences, questions = self.rng.choice(NEW_FACTS[kind])
        value_choices, wordings = [choices], [sentences]
        for (other_choices, other_sentences, _, _), _ in facts[1:]:
            value_choices.append(other_choices)
            wordings.append(other_sentences)
        if task == "styles":
            wordings = [untrained_sentences for _, (_, untrained_sentences) in facts]

        values = []
        names = title
        for choices in value_choices:
            values.append(self.world.value(choices, "tasks", avoid=names))
            names += f" {values[-1]}"  # as in training, no syllable occurs twice in a passage
        text = self._text(title, kind, wordings, values, whole_sentences=task == "styles")
        passage = {"id": content_id(title, text), "title": title, "text": text}

        name = title.split()[-1] if task == "surnames" else title
        if task == "wordings":
            questions = untrained_questions
        question = self.rng.choice(questions).format(n=name)
        if task in ("attributes", "surnames"):
            return passage, question, [str(values[0])]
        return passage, question, [answer.format(n=title, v=values[0])]

    def _text(self, title: str, kind: str, wordings: list[list[str]], values: list[Any], whole_sentences: bool) -> str:
        """
        Return the sentences of a passage in random order.

        Args:
            title (`str`): the title of the entity.
            kind (`str`): "person" or "place".
            wordings (`list[list[str]]`): the wordings of each fact.
            values (`list`): the value of each fact.
            whole_sentences (`bool`): whether wordings name the entity. If not, they get its name as their subject, and
                a pronoun after the first sentence.
        """
        order = self.rng.sample(range(len(values)), len(values))
        pronoun = self.rng.choice(["He", "She"]) if kind == "person" else "It"
        subject = title
        sentences = []
        for i in order:
            wording = self.rng.choice(wordings[i]).format(n=title, v=values[i])
            sentences.append(wording if whole_sentences else f"{subject} {wording}.")
            subject = pronoun
        return " ".join(sentences)


# ---------------------------------------------------------------------- candidates


class NearestByLetters:
    """
    A search for look-alikes: passages that share rare runs of three letters with the names of a question.

    Args:
        corpus (`list[dict]`): the passages that are searched.
        rng (`random.Random`): draws further candidates if too few passages share letters.
    """

    def __init__(self, corpus: list[Passage], rng: random.Random) -> None:
        self.ids = [passage["id"] for passage in corpus]
        self.rng = rng
        self.rows: dict[str, list[int]] = defaultdict(list)  # run -> rows of the corpus
        for row, passage in enumerate(corpus):
            for run in self.runs(passage["text"]):
                self.rows[run].append(row)

    @staticmethod
    def runs(text: str) -> set[str]:
        """Return all runs of three letters in the names of a text."""
        runs = set()
        for name in re.findall("[A-Z][a-z]+", text):
            runs.update(name[i : i + 3] for i in range(len(name) - 2))
        return runs

    def pool(self, question: str, gold: Iterable[str], size: int) -> list[str]:
        """Return the ids of `size` candidates: gold, the nearest others, then random ones if too few share letters."""
        scores: Counter = Counter()
        for run in sorted(self.runs(question)):
            rows = self.rows.get(run, ())
            for row in rows:
                scores[row] += 1 / len(rows)
        nearest = [self.ids[row] for row, _ in scores.most_common(size)]
        filling = self.rng.sample(self.ids, min(2 * size, len(self.ids)))
        return list(dict.fromkeys([*gold, *nearest, *filling]))[:size]


# ---------------------------------------------------------------------- files


def write_tasks(world: Path, folder: Path, seed: int, num_questions: int, num_no_passage: int, pool_size: int) -> None:
    """
    Write corpus.jsonl and the file of each task.

    Args:
        world (`Path`): folder of the world, which is only read.
        folder (`Path`): an existing folder.
        seed (`int`): seed of the new entities.
        num_questions (`int`): maximum number of questions per task that need a passage.
        num_no_passage (`int`): further questions of `people` and of `places` that need none.
        pool_size (`int`): candidates per question.
    """
    corpus = read_lines(world / "corpus.jsonl")
    world_passages = {passage["id"]: passage for passage in corpus}
    unseen_passages: list[Passage] = []
    people, places, without_passage = [], [], []
    for question in read_lines(world / "eval.jsonl"):
        if not question["provenance"]:
            without_passage.append(question)
            continue
        passage = world_passages[gold_id(question)]
        unseen_passages.append(passage)
        if " " in passage["title"]:  # a place has one word
            people.append(question)
        else:
            places.append(question)
    tasks: dict[str, list[dict[str, Any]]] = {
        "people": people[:num_questions] + without_passage[:num_no_passage],
        "places": places[:num_questions] + without_passage[num_no_passage : 2 * num_no_passage],
    }

    entities = NewEntities(seed, corpus, unseen_passages)
    for task in SPLITS:
        if task in tasks:
            continue
        tasks[task] = []
        for _ in range(num_questions):
            passage, text, answers = entities.draw(task)
            corpus.append(passage)
            tasks[task].append({"input": text, "answers": answers, "provenance": [[passage["id"]]]})
    tasks["surnames"] = with_unique_surnames(tasks["surnames"], corpus)

    nearest = NearestByLetters(corpus, random.Random(f"pools {seed}"))
    write_lines(folder / "corpus.jsonl", corpus)
    for task, questions in tasks.items():
        rows = []
        for i, question in enumerate(questions):
            gold = [id for evidence in question["provenance"] for id in evidence]
            row = {
                "id": f"{task}-{i}",
                "dataset": task,
                "instruction": "",
                "input": question["input"],
                "answers": question["answers"],
                "provenance": question["provenance"],
                "candidates": nearest.pool(question["input"], gold, pool_size),
            }
            rows.append(row)
        write_lines(folder / f"{task}.jsonl", rows)


def with_unique_surnames(questions: list[dict[str, Any]], corpus: list[Passage]) -> list[dict[str, Any]]:
    """
    Return the questions whose surname only one passage holds.

    If several passages held it, several answers could be right.
    """
    num_passages: Counter = Counter()  # word -> number of passages that hold it
    for passage in corpus:
        num_passages.update(set(re.findall(r"\w+", passage["text"])))
    titles = {passage["id"]: passage["title"] for passage in corpus}
    unique = []
    for question in questions:
        surname = titles[gold_id(question)].split()[1]
        if num_passages[surname] == 1:
            unique.append(question)
    return unique


def gold_id(question: dict[str, Any]) -> str:
    """Return the id of the only passage that a question needs."""
    return question["provenance"][0][0]
