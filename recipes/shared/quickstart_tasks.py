"""Evaluation tasks over the quickstart's world: new entities, questions about them, look-alikes for their pools."""

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

# What is never trained: for each fact of PERSON and PLACE, in their order, wordings of questions and sentences of
# passages.
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
NEW_FACTS: dict[str, list[tuple[Any, list[str], list[str]]]] = {  # as PERSON and PLACE; the answer is the value alone
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
    Draws entities for the tasks out of names that neither titles nor training use.

    Their answers may share names with the world's unseen entities.

    Args:
        seed (`int`): of what is drawn.
        corpus (`list[dict]`): the passages of the world.
        unseen (`list[dict]`): the passages of its unseen entities.
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
        """`(passage, question, answers)` of one question about a new entity."""
        kind = "person" if task == "surnames" or self.rng.random() < 0.7 else "place"
        second = 3 if task == "surnames" else self.rng.choice([2, 3])  # enough of them for no two people to share one
        title = self.world.name((2, second) if kind == "person" else (3,), "title")
        drawn = self.rng.sample(list(zip(PERSON if kind == "person" else PLACE, UNTRAINED[kind], strict=True)), 3)
        (values, sentences, questions, answer), (untrained_questions, _) = drawn[0]
        if task == "attributes":
            values, sentences, questions = self.rng.choice(NEW_FACTS[kind])
        kinds, wordings = [values], [sentences]
        for fact, _ in drawn[1:]:
            kinds.append(fact[0])
            wordings.append(fact[1])
        if task == "styles":
            wordings = [untrained_sentences for _, (_, untrained_sentences) in drawn]
        facts, names = [], title
        for choices in kinds:
            if isinstance(choices, int):
                facts.append(self.world.name((choices,), "tasks", avoid=names))
            else:
                facts.append(self.rng.choice(choices))
            names += f" {facts[-1]}"  # as in training: a syllable comes once in a passage
        text = self._text(title, kind, wordings, facts, whole=task == "styles")
        passage = {"id": content_id(title, text), "title": title, "text": text}
        name = title.split()[-1] if task == "surnames" else title
        question = self.rng.choice(untrained_questions if task == "wordings" else questions).format(n=name)
        if task in ("attributes", "surnames"):
            return passage, question, [str(facts[0])]
        return passage, question, [answer.format(n=title, v=facts[0])]

    def _text(self, title: str, kind: str, sentences: list[list[str]], values: list[Any], whole: bool) -> str:
        """Sentences in random order. `whole` ones name the entity; others get it, then a pronoun, as their subject."""
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

    def __init__(self, corpus: list[Passage], rng: random.Random) -> None:
        self.ids = [passage["id"] for passage in corpus]
        self.rng = rng
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, passage in enumerate(corpus):
            for run in self.runs(passage["text"]):
                self.rows[run].append(row)

    @staticmethod
    def runs(text: str) -> set[str]:
        """All runs of three letters in the names of a text."""
        return {name[i : i + 3] for name in re.findall("[A-Z][a-z]+", text) for i in range(len(name) - 2)}

    def pool(self, question: str, gold: Iterable[str], size: int) -> list[str]:
        """Ids of `size` candidates: gold, the nearest others, then random ones where no other shares three letters."""
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
        world (`Path`): a folder of the world; it is only read.
        folder (`Path`): it exists.
        seed, num_questions, num_no_passage, pool_size (`int`): as in `TaskArguments`.
    """
    corpus = read_lines(world / "corpus.jsonl")
    passages = {passage["id"]: passage for passage in corpus}
    asked = read_lines(world / "eval.jsonl")
    needing, free = [x for x in asked if x["provenance"]], [x for x in asked if not x["provenance"]]
    people = [x for x in needing if " " in passages[x["provenance"][0][0]]["title"]]  # a place has one word
    places = [x for x in needing if x not in people]
    tasks: dict[str, list[dict[str, Any]]] = {
        "people": people[:num_questions] + free[:num_no_passage],
        "places": places[:num_questions] + free[num_no_passage : 2 * num_no_passage],
    }
    entities = NewEntities(seed, corpus, [passages[x["provenance"][0][0]] for x in needing])
    drawn = {task: [entities.draw(task) for _ in range(num_questions)] for task in SPLITS if task not in tasks}
    corpus += [passage for rows in drawn.values() for passage, *_ in rows]
    for task, rows in drawn.items():
        tasks[task] = []
        for passage, question, answers in rows:
            tasks[task].append({"input": question, "answers": answers, "provenance": [[passage["id"]]]})
    names = Counter(word for passage in corpus for word in set(re.findall(r"\w+", passage["text"])))
    titles = {passage["id"]: passage["title"] for passage in corpus}
    surnames = tasks["surnames"]  # a name that comes twice would make another passage right too
    tasks["surnames"] = [row for row in surnames if names[titles[row["provenance"][0][0]].split()[1]] == 1]
    nearest = NearestByLetters(corpus, random.Random(f"pools {seed}"))
    write_lines(folder / "corpus.jsonl", corpus)
    for task, questions in tasks.items():
        for i, row in enumerate(questions):
            gold = [id for evidence in row["provenance"] for id in evidence]
            pool = nearest.pool(row["input"], gold, pool_size)
            facts = {name: row[name] for name in ("input", "answers", "provenance")}
            questions[i] = {"id": f"{task}-{i}", "dataset": task, "instruction": "", **facts, "candidates": pool}
        write_lines(folder / f"{task}.jsonl", questions)
