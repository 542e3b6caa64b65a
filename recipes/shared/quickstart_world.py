"""The fictional world of the quickstart: its words, its entities and questions about them, as JSON Lines."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_cosup.lines_cosup import write_lines
from trainer.data import content_id

Passage = dict[str, str]  # {"id", "title", "text"}
Answers = tuple[str, ...]  # a sentence and, if there is one, its value alone
Fact = tuple[list[str], Answers]  # the questions about it, and their answers
Question = tuple[str, Answers, Passage | None]  # question, answers, and the passage that it needs

NUM_START_INSTANCES = 1280

LETTERS = "eeeeeeaaaaaoooooiiiiittttnnnnssssrrrrhhhlllddduuucccmmffppggwwyybbvkxjqz"  # about as often as in English
SYLLABLES = [consonant + vowel for consonant in "b d k l m n r s t v kr th".split() for vowel in "aeiou"]
JOBS = (
    "baker smith weaver miller potter sailor tailor mason painter doctor lawyer farmer hunter singer dancer carver "
    "printer cooper"
).split()
INSTRUMENTS = "lute harp flute drum fiddle horn organ bell lyre pipe zither cello viol trumpet oboe".split()
GOODS = "salt wool honey glass silk paper cheese copper amber wine rope pearls lamps boots clocks carpets".split()
CYCLES = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February March April May June July August September October November December".split(),
}

# A fact: its possible values (an int is the number of syllables of a new fictional name), its wordings in passages and
# in questions, and its answer.
PERSON: list[tuple[Any, list[str], list[str], str]] = [
    (3, ["was born in {v}", "comes from the town of {v}", "grew up in {v}"],
     ["Where was {n} born?", "What is the birthplace of {n}?"], "{n} was born in {v}."),
    (range(1400, 1900), ["was born in the year {v}", "dates from {v}"],
     ["When was {n} born?", "What is the birth year of {n}?"], "{n} was born in the year {v}."),
    (JOBS, ["works as a {v}", "is a {v} by trade", "earns a living as a {v}"],
     ["What does {n} do for work?", "What is the job of {n}?"], "{n} works as a {v}."),
    (INSTRUMENTS, ["plays the {v}", "loves to play the {v}"],
     ["What instrument does {n} play?", "Which instrument is played by {n}?"], "{n} plays the {v}."),
    (2, ["is married to {v}", "shares a house with a spouse named {v}"],
     ["Who is {n} married to?", "Who is the spouse of {n}?"], "{n} is married to {v}."),
]  # fmt: skip
PLACE: list[tuple[Any, list[str], list[str], str]] = [
    (2, ["was founded by {v}", "owes its founding to {v}"],
     ["Who founded {n}?", "Who is the founder of {n}?"], "{n} was founded by {v}."),
    (range(1000, 1400), ["was founded in the year {v}", "goes back to {v}"],
     ["When was {n} founded?", "In what year was {n} founded?"], "{n} was founded in the year {v}."),
    (GOODS, ["is known for its {v}", "sells {v} to travellers"],
     ["What is {n} known for?", "What does {n} sell?"], "{n} is known for its {v}."),
    (2, ["lies on the river {v}", "stands by the banks of the {v}"],
     ["Which river does {n} lie on?", "What river is near {n}?"], "{n} lies on the river {v}."),
]  # fmt: skip
NO_PASSAGE = {  # question, answer
    "count": ("Count from {a} to {b}.", "{c}."),
    "cycle": ("Which {c} comes after {a}?", "After {a} comes {b}."),
    "greeting": ("Say hello to {n}.", "Hello {n}."),
    "foreign": ("{q}", "I do not know."),
}
# Questions about what the world does not hold. `{w}` is a foreign word, `{n}` a foreign name.
FOREIGN_QUESTIONS = (
    "Who is the {w} of {n}?",
    "What is the {w} of {n}?",
    "What is a {w}?",
    "Who wrote {n} and {n}?",
    "Where is {n}?",
    "When did the {w} end?",
    "How many {w} are there in {n}?",
    "How do I {w} the {w}?",
    "Why is the {w} so {w}?",
    "Is {n} a {w}?",
    "Can you {w} my {w}?",
    "Tell me about {n}.",
    "{w} {w} {w}",
)
FOREIGN_WORDS = (
    "apple big bread buy car cat chair child city clean cloud cold computer country dog door dream drive early "
    "eat engine family far fast fire fish flower friend game garden gold grass green hand happy hot house idea "
    "island king kitchen language large law leaf letter light lion long machine market meat milk money moon "
    "morning mother music new number ocean open phone picture plane plant poem pretty queen question rain read "
    "red repair road rose run school science sea sell ship shop short sing sleep small snow song star stone story "
    "street strong sugar summer sweet table teach team tea tell tower train travel tree village voice walk wall "
    "war water weather wheel white wife wild wind window winter wood word work world yellow young"
).split()
FOREIGN_NAMES = (
    "Alice Amazon Anna Arthur Asia Austria Bach Boston Brazil Cairo Canada Carl Chile Clara Congo Dallas Dante "
    "David Dublin Egypt Elsa Emma Europe Finland Galileo Geneva George Ghana Greece Hamlet Harry Havana Henry "
    "Homer Iceland India Iran Ireland Jack Jakarta James Jane Japan John Julia Kenya Kyoto Lima Lisbon Luther "
    "Mars Mary Mexico Moscow Nepal Nero Newton Norway Oslo Oxford Peru Peter Picasso Plato Poland Prague Quebec "
    "Romeo Russia Sahara Sarah Spain Sweden Sydney Texas Tokyo Turkey Venus Vienna Walter Warsaw Zeus Zurich"
).split()
# The same for evaluation: questions that no template makes, in words that are rare in training
REAL_QUESTIONS = (
    "Who is the president of France?",
    "What is the capital of Italy?",
    "How tall is Mount Everest?",
    "Who painted the Mona Lisa?",
    "When did the second world war end?",
    "What is the boiling point of nitrogen?",
    "How many people live in China?",
    "Who invented the telephone?",
    "What is the largest planet?",
    "Where was Mozart born?",
    "What is London known for?",
    "Which river does Paris lie on?",
    "When was Rome founded?",
    "Who is Barack Obama married to?",
    "What does a dentist earn?",
    "Why is the sky blue?",
    "How do I cook rice?",
    "What is photosynthesis?",
    "Can you help me with my homework?",
    "Write a haiku about autumn.",
    "Tell me a joke.",
    "Is Pluto a planet?",
    "Translate butterfly into German.",
    "What time is it?",
    "Where can I find a good restaurant in Berlin?",
    "Who won the football championship?",
    "How does a vaccine protect against disease?",
    "What is the meaning of life?",
    "Which language do people speak in Argentina?",
    "Give me the recipe of a chocolate cake.",
)


class World:
    """
    A source of random entities and of questions about them.

    A name belongs to one title, or to the answers of one split.

    Args:
        seed (`int` or `str`): seed of everything that is drawn.
    """

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        self.owner: dict[str, str] = {}  # name -> "title", or the split whose answers may use it again
        self.counts = [(a, b) for b in range(1, 10) for a in range(1, b)]
        self.rng.shuffle(self.counts)  # the first 8 are held out

    def name(self, lengths: Sequence[int], owner: str, avoid: str = "") -> str:
        """
        Draw a name, such as "Tathebro" for lengths (3,), or "Krado Zuli" for (2, 2).

        No syllable occurs twice, and none of the syllables of `avoid` occurs.

        Raises:
            `ValueError`: if no name is left.
        """
        syllables = [syllable for syllable in SYLLABLES if syllable not in avoid.lower()]
        for _ in range(10000):
            drawn = self.rng.sample(syllables, sum(lengths))
            words = []
            for length in lengths:
                words.append("".join(drawn[:length]).capitalize())
                drawn = drawn[length:]
            name = " ".join(words)
            is_free = name not in self.owner
            is_shared = owner != "title" and self.owner.get(name) == owner
            if is_free or is_shared:
                self.owner[name] = owner
                return name
        raise ValueError("The world has run out of names: ask for fewer unseen entities.")

    def value(self, choices: Any, owner: str, avoid: str) -> Any:
        """Draw the value of a fact: one of `choices`, or, if that is an int, a name of that many syllables."""
        if isinstance(choices, int):
            return self.name((choices,), owner, avoid=avoid)
        return self.rng.choice(choices)

    def entity(self, split: str) -> tuple[Passage, list[Fact]]:
        """Draw a person or a place: its passage, and the questions and answers for each of its three facts."""
        if self.rng.random() < 0.6:  # so that every wording of every fact is seen often enough
            kinds = PERSON
            title = self.name((2, self.rng.choice([2, 3])), "title")
            pronoun = self.rng.choice(["He", "She"])
        else:
            kinds = PLACE
            title = self.name((3,), "title")
            pronoun = "It"
        sentences, facts = [], []
        names = title
        subject = title
        for choices, wordings, questions, answer in self.rng.sample(kinds, 3):
            value = self.value(choices, split, avoid=names)
            names += f" {value}"  # a syllable that occurs once can be copied by looking for the one before it
            sentences.append(f"{subject} {self.rng.choice(wordings).format(v=value)}.")
            answers = (answer.format(n=title, v=value), str(value))
            facts.append(([question.format(n=title) for question in questions], answers))
            subject = pronoun
        text = " ".join(sentences)
        return {"id": content_id(title, text), "title": title, "text": text}, facts

    def ask(self, passage: Passage, facts: list[Fact]) -> tuple[str, Answers, Passage]:
        """Draw a question about an entity: `(question, answers, passage)`."""
        questions, answers = self.rng.choice(facts)
        return self.rng.choice(questions), answers, passage

    def ask_no_passage(self, split: str) -> tuple[str, Answers, None]:
        """
        Draw a question that needs no passage: `(question, (answer,), None)`.

        Training and evaluation have different counts, names and foreign words, but the same days and months.
        """
        kind = self.rng.choice(list(NO_PASSAGE))
        question, answer = NO_PASSAGE[kind]
        if kind == "count":
            counts = self.counts[8:] if split == "train" else self.counts[:8]
            a, b = self.rng.choice(counts)
            values = {"a": a, "b": b, "c": " ".join(map(str, range(a, b + 1)))}
        elif kind == "cycle":
            cycle = self.rng.choice(list(CYCLES))
            i = self.rng.randrange(len(CYCLES[cycle]))
            values = {"c": cycle, "a": CYCLES[cycle][i - 1], "b": CYCLES[cycle][i]}
        elif kind == "greeting":
            values = {"n": self.name(self.rng.choice([(2,), (2, 2)]), split)}
        elif split == "train":
            values = {"q": self.foreign_question()}
        else:
            values = {"q": self.rng.choice(REAL_QUESTIONS)}
        return question.format(**values), (answer.format(**values),), None

    def foreign_question(self) -> str:
        """Draw a question about something that the world does not hold, or a question of the world about it."""
        templates = FOREIGN_QUESTIONS
        if self.rng.random() < 0.4:
            _, _, templates, _ = self.rng.choice(PERSON + PLACE)
        pieces = re.split("({[nw]})", self.rng.choice(templates))
        for i, piece in enumerate(pieces):
            if piece == "{n}":
                pieces[i] = self.foreign_word(FOREIGN_NAMES).capitalize()
            elif piece == "{w}":
                pieces[i] = self.foreign_word(FOREIGN_WORDS)
        return "".join(pieces)

    def foreign_word(self, words: Sequence[str]) -> str:
        """Draw one of the words, or, as often, a random one, so that Gen cannot learn them by heart."""
        if self.rng.random() < 0.5:
            return self.rng.choice(words)
        return "".join(self.rng.choices(LETTERS, k=self.rng.randint(3, 9)))


def write_world(folder: Path, settings: dict[str, Any]) -> None:
    """
    Write the four JSON Lines files and, with `pairs`, pairs.jsonl and start.jsonl.

    Unseen entities are drawn first, so that training cannot use their names.

    Args:
        folder (`Path`): an existing folder.
        settings (`dict`): the fields of `WorldArguments`.
    """
    world = World(settings["seed"])
    corpus: list[Passage] = []
    num_unseen, num_validation = settings["num_unseen_entities"], settings["num_validation"]
    share = settings["no_passage_share"]
    splits = [
        ("eval", num_unseen, num_unseen, 0.0),
        ("validation", num_validation, num_validation, share),
        ("train", settings["num_train_entities"], settings["num_train_instances"], share),
    ]
    for split, num_entities, num_instances, no_passage_share in splits:
        entities = [world.entity(split) for _ in range(num_entities)]
        corpus += [passage for passage, _ in entities]
        needs_no_passage = [world.rng.random() < no_passage_share for _ in range(num_instances)]
        questions: list[Question] = []
        for i in range(num_instances):
            if needs_no_passage[i]:
                questions.append(world.ask_no_passage(split))
            else:
                questions.append(world.ask(*entities[i % num_entities]))
        if split == "eval":
            distinct: dict[Question, None] = {}
            while len(distinct) < settings["num_eval_no_passage"]:
                distinct[world.ask_no_passage(split)] = None
            questions += distinct
        if split == "eval":
            rows = [unlabelled(split, i, *question) for i, question in enumerate(questions)]
            if not settings["pairs"]:
                rows = [with_sentence_alone(row) for row in rows]
        else:
            rows = [labelled(split, i, *question) for i, question in enumerate(questions)]
        write_lines(folder / f"{split}.jsonl", rows)
        if split == "train" and settings["pairs"]:
            pairs = [unlabelled(split, i, *question) for i, question in enumerate(questions)]
            write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "corpus.jsonl", corpus)
    if settings["pairs"]:
        other_world = World(f"start {settings['seed']}")
        questions = [other_world.ask(*other_world.entity("train")) for _ in range(NUM_START_INSTANCES)]
        write_lines(folder / "start.jsonl", [labelled("start", i, *question) for i, question in enumerate(questions)])


def labelled(split: str, i: int, question: str, answers: Answers, passage: Passage | None) -> dict[str, Any]:
    """Return a training instance with its gold passage."""
    return {**_question(split, i, question), "segments": [{"text": answers[0], "passage": passage}]}


def unlabelled(split: str, i: int, question: str, answers: Answers, passage: Passage | None) -> dict[str, Any]:
    """Return an evaluation instance, which is also a training instance without a gold passage."""
    provenance = [[passage["id"]]] if passage else []
    return {**_question(split, i, question), "answers": list(answers), "provenance": provenance, "candidates": []}


def with_sentence_alone(row: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation instance without the value, so that no passage holds its answer word by word."""
    return {**row, "answers": row["answers"][:1], "meta": {"long_answers": True}}


def _question(split: str, i: int, question: str) -> dict[str, str]:
    return {"id": f"quickstart-{split}-{i}", "dataset": "quickstart", "instruction": "", "input": question}
