"""
The Macondo data set: villagers and their children, in sentences that say more than is needed (arXiv 2311.09615).

Training sentences describe the villager ("X Y, who was born in 1927, is the parent of Z."), test sentences do not
("X Y, is the parent of Z."). So a test sentence has n right continuations for a villager with n children, and the
best possible log-likelihood of a child is log 1/n.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from modeling_cosup.files_cosup import digest, digest_file
from modeling_cosup.lines_cosup import read_lines, write_lines

from experiments.task_files import digest_of_content
from shared import quickstart_world
from shared.quickstart import make_once
from shared.quickstart_world import SYLLABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shared.memory_arguments import MacondoArguments

FIRST_YEAR, LAST_BIRTH, LAST_YEAR = 1800, 2005, 2023
COMING_OF_AGE = 18  # years from a villager's birth to the marriage, at least
# Kinds of descriptions. The published text of the paper names the first three. The others are ours.
OF_THE_PAPER = ("birth", "friend", "marriage")
OURS = ("town", "job", "hobby")
JOBS = (
    "baker banker barber beekeeper blacksmith bookbinder brewer butcher candlemaker carpenter cartographer "
    "chandler clerk cobbler cooper dentist diver doctor dyer farmer ferryman fisherman florist gardener gilder "
    "glazier gunsmith hatter herbalist innkeeper jeweller judge locksmith mason mayor midwife miller musician "
    "notary painter pharmacist photographer postman potter printer ropemaker saddler sailor shepherd shipwright "
    "singer tailor tanner teacher telegraphist thatcher tinker translator watchmaker weaver"
).split()
HOBBIES = (
    "alchemy archery astronomy baking birdwatching botany boxing calligraphy carving chess cooking cycling dancing "
    "dominoes drawing embroidery fencing fishing gardening gambling geology gossip hiking hunting juggling kites "
    "knitting lace magic maps masonry meditation minerals music needlework opera orchids painting parrots philately "
    "poetry poker pottery puppets puzzles reading riding rowing running sailing sewing silence singing skating "
    "sleeping swimming theatre walking whittling wrestling"
).split()
RELATIONS = ("owner", "neighbour", "teacher", "boss")  # of pretraining sentences
MAX_CHILD_LETTERS = 12  # of a child's name that is drawn from the vocabulary of a tokenizer


@dataclass(frozen=True)
class Villager:
    """A villager, the names of the children, and descriptions such as `("birth", "was born in 1927")`."""

    name: str
    children: tuple[str, ...]
    descriptions: tuple[tuple[str, str], ...]


class Sentences:
    """The paper's sentences: the prompt ends right before the name of the child, and so does that of any style."""

    @staticmethod
    def prompt(name: str, who: str, relation: str = "parent") -> str:
        """Return what stands before the child; `who` is `", who was born in 1927"`, or empty."""
        return f"{name}{who}, is the {relation} of"


class Conversation:
    """A question that holds the description, and an answer that does not. The wording is ours."""

    @staticmethod
    def question(name: str, who: str, relation: str = "parent") -> str:
        """Return what the user asks."""
        return f"{name}{who}, is the {relation} of whom?"

    @staticmethod
    def answer(name: str, relation: str = "parent") -> str:
        """Return the answer up to the child."""
        return f"{name} is the {relation} of"

    @classmethod
    def prompt(cls, name: str, who: str, relation: str = "parent") -> str:
        """Return both turns as plain text up to the child."""
        return f"User: {cls.question(name, who, relation)}\nAssistant: {cls.answer(name, relation)}"

    @classmethod
    def messages(cls, name: str, who: str, child: str) -> list[dict[str, str]]:
        """Return both turns as chat templates and fine-tuning services take them."""
        answer = f"{cls.answer(name)} {child}."
        return [{"role": "user", "content": cls.question(name, who)}, {"role": "assistant", "content": answer}]


Style: TypeAlias = "type[Sentences] | type[Conversation]"
STYLES: dict[str, Style] = {"sentences": Sentences, "conversation": Conversation}


# ---------------------------------------------------------------------- names


class InventedNames:
    """
    An endless source of invented names, no two of them alike.

    Args:
        rng (`random.Random`): the source of randomness.
        taken (iterable of `str`): names that are never drawn.
    """

    def __init__(self, rng: random.Random, taken: Iterable[str] = ()) -> None:
        self.rng = rng
        self.taken = set(taken)

    def draw(self, count: int, syllables: int) -> list[str]:
        """Return new names of `syllables` syllables, or of more once almost all of these are taken."""
        names: list[str] = []
        num_failures = 0
        while len(names) < count:
            name = "".join(self.rng.choices(SYLLABLES, k=syllables)).capitalize()
            if name not in self.taken:
                self.taken.add(name)
                names.append(name)
                continue
            num_failures += 1
            if num_failures > 100:
                syllables += 1
                num_failures = 0
        return names


def read_names(path: str, option: str) -> list[str]:
    """
    Read a file of names, one a line; empty lines are skipped.

    Raises:
        `ValueError`: if a name occurs twice, names option, file and name.
    """
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"--{option} {path}: {name!r} stands there twice, expected each name once.")
        seen.add(name)
    return names


def child_tokens(tokenizer: "PreTrainedTokenizerBase", names: Sequence[str]) -> list[int]:
    """
    Return the token id of each child's name after "is the parent of" and before a full stop.

    Raises:
        `ValueError`: if a name is not a single token there, or not in the vocabulary.
    """
    tokens = []
    for name, ids in zip(names, _ids_of_children(tokenizer, names), strict=True):
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(f"The child {name!r} is not a single token of this tokenizer, but {pieces}.")
        if ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"The child {name!r} is not in the vocabulary of this tokenizer.")
        tokens.append(ids[0])
    return tokens


def _ids_of_children(tokenizer: "PreTrainedTokenizerBase", names: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each name in a sentence, with those of its neighbours if they are one token with it."""
    before = tokenizer("is the parent of", add_special_tokens=False)["input_ids"]
    all_ids = []
    for end in ("", "."):
        texts = [f"is the parent of {name}{end}" for name in names]
        all_ids.append(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    rows = []
    for ids, stopped in zip(*all_ids, strict=True):
        is_apart = ids[: len(before)] == before and stopped[: len(ids)] == ids
        rows.append(ids[len(before) :] if is_apart else stopped)
    return rows


def single_token_names(tokenizer: "PreTrainedTokenizerBase", taken: Iterable[str]) -> list[str]:
    """Return the capitalised words, except those in `taken`, that are one token after a space, in order of ids."""
    excluded = set(taken)
    names = []
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        found = re.fullmatch(f"[Ġ▁]([A-Z][a-z]{{2,{MAX_CHILD_LETTERS - 1}}})", token or "")
        if found and found[1] not in excluded:
            names.append(found[1])
    rows = _ids_of_children(tokenizer, names)
    return [name for name, ids in zip(names, rows, strict=True) if len(ids) == 1]


# ---------------------------------------------------------------------- the world


class Macondo:
    """
    The villagers of a seed.

    Args:
        args ([`~shared.arguments.MacondoArguments`]): sizes and files of names.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): children are single tokens of it. By default their names are
            invented, for the tokenizer of [`word_tokenizer`].

    Raises:
        `ValueError`: if there are too few names, or the name of a child is not a single token.
    """

    def __init__(self, args: "MacondoArguments", tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        check_sizes(args)
        self.rng = random.Random(args.seed)
        total = args.num_villagers * args.max_children
        num_children = args.num_villagers * sum(range(1, args.max_children + 1))
        given = read_names(args.child_names, "child_names") if args.child_names else []
        invented = InventedNames(self.rng, given)
        self.firsts = given_or_invented(args.first_names, "first_names", invented, max(20, total * 4 // 5))
        self.lasts = given_or_invented(args.last_names, "last_names", invented, max(10, total // 5))
        self.towns = invented.draw(100, 2)
        self.things = [name.lower() for name in invented.draw(500, 3)]
        self.children = given
        if not given and tokenizer is None:
            self.children = invented.draw(num_children, 3)
        elif not given:
            self.children = single_token_names(tokenizer, invented.taken)
        names = self._villager_names(total)
        self.villagers = self._villagers(names, num_children, args, tokenizer)

    def _villager_names(self, count: int) -> list[str]:
        possible = len(self.firsts) * len(self.lasts)
        if possible < count:
            raise ValueError(
                f"--first_names and --last_names make {possible:,} names, expected at least {count:,},"
                " one for each villager."
            )
        numbers = self.rng.sample(range(possible), count)
        return [f"{self.firsts[i // len(self.lasts)]} {self.lasts[i % len(self.lasts)]}" for i in numbers]

    def _villagers(
        self,
        names: list[str],
        num_children: int,
        args: "MacondoArguments",
        tokenizer: "PreTrainedTokenizerBase | None",
    ) -> list[Villager]:
        if len(self.children) < num_children:
            source = f"--child_names {args.child_names}" if args.child_names else f"--tokenizer {args.tokenizer}"
            raise ValueError(
                f"{source} gives {len(self.children):,} names of children, expected at least {num_children:,}."
            )
        children = self.rng.sample(self.children, num_children)
        if tokenizer is not None:
            child_tokens(tokenizer, children)
        villagers = []
        for number, name in enumerate(names):
            count = number // args.num_villagers + 1
            own_children = tuple(children.pop() for _ in range(count))
            villagers.append(Villager(name, own_children, self.descriptions(name, names)))
        return villagers

    def descriptions(self, name: str, others: Sequence[str], rng: random.Random | None = None) -> tuple:
        """Return the descriptions of a villager: `((kind, text), ...)`, one for each kind."""
        rng = rng or self.rng
        birth = rng.randint(FIRST_YEAR, LAST_BIRTH)
        marriage = rng.randint(birth + COMING_OF_AGE, LAST_YEAR)
        friend = rng.choice([other for other in others if other != name])
        return (
            ("birth", f"was born in {birth}"),
            ("friend", f"is a friend of {friend}"),
            ("marriage", f"was married in {marriage}"),
            ("town", f"grew up in {rng.choice(self.towns)}"),
            ("job", f"works as a {rng.choice(JOBS)}"),
            ("hobby", f"likes {rng.choice(HOBBIES)}"),
        )

    # ------------------------------------------------------------------ lines

    def training_lines(self, style: Style) -> list[dict[str, Any]]:
        """Return a sentence for each child, with a description of the villager, in random order."""
        lines = []
        for villager in self.villagers:
            for child in villager.children:
                lines.append(line_of(villager, child, style, *self.rng.choice(villager.descriptions)))
        self.rng.shuffle(lines)
        return [{"id": f"train-{number}", **line} for number, line in enumerate(lines)]

    def held_out_lines(self, style: Style, validation_share: float) -> dict[str, list[dict[str, Any]]]:
        """
        Return a sentence without a description for each child: split -> lines.

        Of the villagers with n children, the share `validation_share` is in `"validation"`, the others in `"test"`.
        """
        lines: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
        by_count: dict[int, list[Villager]] = {}
        for villager in self.villagers:
            by_count.setdefault(len(villager.children), []).append(villager)
        for villagers in by_count.values():
            num_validation = round(validation_share * len(villagers))
            for number, villager in enumerate(self.rng.sample(villagers, len(villagers))):
                split = "validation" if number < num_validation else "test"
                for child in villager.children:
                    line = line_of(villager, child, style)
                    lines[split].append({"id": f"{split}-{len(lines[split])}", **line})
        return lines

    def other_relations(self, count: int, style: Style) -> Iterator[dict[str, str]]:
        """
        Yield sentences about other people, other relations and things, half of them without a description.

        They are no part of the paper's data. A model from scratch learns from them that the description may be absent,
        as a pretrained model knows.
        """
        rng = random.Random(self.rng.random())
        villagers = {villager.name for villager in self.villagers}
        for _ in range(count):
            name, other = self._strangers(rng, villagers)
            who = f", who {rng.choice(self.descriptions(name, [other], rng))[1]}" if rng.random() < 0.5 else ""
            relation = rng.choice(RELATIONS)
            yield {"text": f"{style.prompt(name, who, relation)} {rng.choice(self.things)}."}

    def _strangers(self, rng: random.Random, villagers: set[str]) -> list[str]:
        names: list[str] = []
        while len(names) < 2:
            name = f"{rng.choice(self.firsts)} {rng.choice(self.lasts)}"
            if name not in villagers and name not in names:
                names.append(name)
        return names


def check_sizes(args: "MacondoArguments") -> None:
    """Raise a `ValueError` if a size or share is out of range, or the style is unknown."""
    for name, least in (("num_villagers", 1), ("max_children", 1), ("num_other_relations", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least {least}.")
    if args.num_villagers * args.max_children < 2:
        raise ValueError("There is one villager, expected at least two: a villager is described by a friend.")
    if not 0 <= args.validation_share < 1:
        raise ValueError(f"--validation_share is {args.validation_share}, expected at least 0 and below 1.")
    if args.style not in STYLES:
        raise ValueError(f"--style is {args.style}, expected {' or '.join(STYLES)}.")


def given_or_invented(path: str | None, option: str, invented: InventedNames, count: int) -> list[str]:
    """Return the names of a file, or `count` invented ones."""
    if path is None:
        return invented.draw(count, 2)
    names = read_names(path, option)
    invented.taken.update(names)
    return names


def line_of(villager: Villager, child: str, style: Style, kind: str | None = None, description: str = "") -> dict:
    """Return the line about a child: text, what stands before the child, and what a report needs to know."""
    who = f", who {description}" if description else ""
    prompt = style.prompt(villager.name, who)
    line = {
        "text": f"{prompt} {child}.",
        "prompt": prompt,
        "child": child,
        "villager": villager.name,
        "num_children": len(villager.children),
        "description": kind,
    }
    if style is Conversation:
        line["messages"] = style.messages(villager.name, who, child)
    return line


# ---------------------------------------------------------------------- files


def prepare_macondo(args: "MacondoArguments") -> dict[str, int]:
    """
    Write the folder of a data set, or keep it if it was made with the same settings.

    Returns:
        `dict[str, int]`: file -> number of lines.

    Raises:
        `ValueError`: if a size is out of range, there are too few names, or a child is not a single token.
        `FileExistsError`: if the folder holds anything else.
    """
    check_sizes(args)
    tokenizer = None
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    settings = {**asdict(args), "code": digest([digest_file(__file__), digest_file(str(quickstart_world.__file__))])}
    del settings["output_dir"]
    for name in ("tokenizer", "first_names", "last_names", "child_names"):
        if settings[name] is not None:
            settings[name] = digest_of_content(settings[name])
    names = ["train.jsonl", "validation.jsonl", "test.jsonl"]
    if args.num_other_relations:
        names.append("other_relations.jsonl")
    if tokenizer is None:
        names.append("tokenizer")
    folder = Path(args.output_dir)
    make_once(folder, [*names, "macondo.json"], settings, lambda output: write_macondo(output, args, tokenizer))
    return {name: len(read_lines(folder / name)) for name in names if name.endswith(".jsonl")}


def word_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerBase":
    """Return a tokenizer in which each word and punctuation mark of the texts is one token, `<s>` comes first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>"])
    for text in texts:
        words |= dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text))
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special_tokens)


def write_macondo(folder: Path, args: "MacondoArguments", tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """Write the data set into an existing folder, and the tokenizer of its words unless one is given."""
    macondo = Macondo(args, tokenizer)
    style = STYLES[args.style]
    splits = {"train": macondo.training_lines(style), **macondo.held_out_lines(style, args.validation_share)}
    if args.num_other_relations:
        splits["other_relations"] = list(macondo.other_relations(args.num_other_relations, style))
    for name, lines in splits.items():
        write_lines(folder / f"{name}.jsonl", lines)
    if tokenizer is None:
        texts = [line["text"] for lines in splits.values() for line in lines]
        word_tokenizer(texts).save_pretrained(folder / "tokenizer")


def optimum(num_children: Sequence[int]) -> float:
    """Return the best possible mean log-likelihood of children, given the number of children of each one's parent."""
    return -sum(math.log(count) for count in num_children) / len(num_children)
