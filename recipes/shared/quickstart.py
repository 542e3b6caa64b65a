"""
Folders of the quickstart: its world, encoders and tasks. Each folder is either complete or not there at all.

A folder holds its settings and a hash of the code that made it, and is made again only if one of them has changed.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from modeling_cosup.files_cosup import digest, digest_file, read_json, write_json

from shared import quickstart_tasks, quickstart_world

WORLD_NAMES = ("train.jsonl", "validation.jsonl", "eval.jsonl", "corpus.jsonl", "gen", "emb_seq", "world.json")
PAIRS_NAMES = ("pairs.jsonl", "start.jsonl")


@dataclass
class WorldArguments:
    """Folder and size of a world."""

    output_dir: str = field(
        metadata={"help": "folder; another world in it is replaced, a folder that holds anything else is refused"}
    )
    seed: int = field(default=0, metadata={"help": "of names, facts, questions and weights"})
    num_train_entities: int = field(
        default=20000,
        metadata={
            "help": "entities of train.jsonl; with only a few hundred, Gen memorises names rather than looks them up"
        },
    )
    num_unseen_entities: int = field(default=500, metadata={"help": "entities of eval.jsonl, one question each"})
    num_train_instances: int = field(default=28800, metadata={"help": "instances of train.jsonl: 450 steps of 64"})
    num_validation: int = field(
        default=256, metadata={"help": "number of instances, and of entities, in validation.jsonl"}
    )
    num_eval_no_passage: int = field(
        default=100, metadata={"help": "further questions of eval.jsonl that need no passage"}
    )
    no_passage_share: float = field(
        default=0.15, metadata={"help": "share of questions in train.jsonl and validation.jsonl that need no passage"}
    )
    drill_max_steps: int = field(
        default=1200,
        metadata={
            "help": "maximum steps of the copy drill, which warns if it takes all of them; 0 leaves Gen untrained"
        },
    )
    pairs: bool = field(
        default=False,
        metadata={
            "help": "also write pairs.jsonl, the questions of train.jsonl with answers in place of gold passages, and "
            "start.jsonl, instances of another world with gold passages; the value alone is an answer then as well"
        },
    )


@dataclass
class EncoderArguments:
    """World and folder of further encoders."""

    world: str = field(metadata={"help": "a folder of prepare_quickstart.py"})
    output_dir: str = field(
        metadata={
            "help": "folder; other encoders of this script in it are replaced, "
            "a folder that holds anything else is refused"
        }
    )
    seed: int = field(default=0, metadata={"help": "of all weights, and of the world that the retriever trains on"})
    retriever_steps: int = field(
        default=400, metadata={"help": "training steps of the retriever, with 64 passages each"}
    )


@dataclass
class TaskArguments:
    """World, folder and sizes of evaluation tasks."""

    world: str = field(metadata={"help": "a folder of prepare_quickstart.py"})
    output_dir: str = field(
        metadata={
            "help": "folder; other tasks of this script in it are replaced, "
            "a folder that holds anything else is refused"
        }
    )
    seed: int = field(default=0, metadata={"help": "of the new entities"})
    num_questions: int = field(
        default=150, metadata={"help": "maximum number of questions per task that need a passage"}
    )
    num_no_passage: int = field(
        default=25, metadata={"help": "further questions of `people` and of `places` that need none"}
    )
    pool_size: int = field(default=100, metadata={"help": "candidates per question"})


def prepare_world(args: WorldArguments) -> dict[str, str]:
    """
    Write a world, or reuse the one that is there.

    Returns:
        `dict[str, str]`: the path of each output, under "train", "validation", "eval", "corpus", "gen", "emb_seq" and
            "world", and with `pairs` also "pairs" and "start".

    Raises:
        `FileExistsError`: if the folder holds anything but a world.
    """
    from shared import quickstart_models  # it needs torch, which the options do not

    settings = settings_of(args, quickstart_world, quickstart_models)

    def write(folder: Path) -> None:
        quickstart_world.write_world(folder, settings)
        quickstart_models.write_models(folder, args.seed, args.drill_max_steps)

    output = Path(args.output_dir)
    make_once(output, WORLD_NAMES, settings, write, optional_names=PAIRS_NAMES)
    names = WORLD_NAMES + PAIRS_NAMES if args.pairs else WORLD_NAMES
    return {name.partition(".")[0]: str(output / name) for name in names}


def prepare_encoders(args: EncoderArguments) -> dict[str, str]:
    """
    Write the encoders, or reuse the ones that are there.

    Returns:
        `dict[str, str]`: the path of each encoder, under its name in `quickstart_models.ENCODERS`.

    Raises:
        `FileExistsError`: if the folder holds anything but such encoders.
        `FileNotFoundError`: if there is no world.
    """
    from shared import quickstart_models

    output = Path(args.output_dir)
    names = quickstart_models.ENCODERS

    def write(folder: Path) -> None:
        quickstart_models.write_encoders(Path(args.world), folder, args.seed, args.retriever_steps)

    settings = settings_of(args, quickstart_world, quickstart_models)
    make_once(output, (*names, "models.json"), settings, write)
    return {name: str(output / name) for name in names}


def prepare_tasks(args: TaskArguments) -> dict[str, dict[str, str]]:
    """
    Write the tasks, or reuse the ones that are there.

    Returns:
        `dict[str, dict]`: task -> `eval_file`, `corpus_file`, `split`.

    Raises:
        `FileExistsError`: if the folder holds anything but such tasks.
        `FileNotFoundError`: if there is no world.
    """
    output = Path(args.output_dir)
    splits = quickstart_tasks.SPLITS

    def write(folder: Path) -> None:
        quickstart_tasks.write_tasks(
            Path(args.world),
            folder,
            args.seed,
            num_questions=args.num_questions,
            num_no_passage=args.num_no_passage,
            pool_size=args.pool_size,
        )

    names = [*(f"{task}.jsonl" for task in splits), "corpus.jsonl", "tasks.json"]
    settings = settings_of(args, quickstart_world, quickstart_tasks)
    make_once(output, names, settings, write)
    corpus = str(output / "corpus.jsonl")
    return {
        task: {"eval_file": str(output / f"{task}.jsonl"), "corpus_file": corpus, "split": split}
        for task, split in splits.items()
    }


def settings_of(args: WorldArguments | EncoderArguments | TaskArguments, *modules: ModuleType) -> dict[str, Any]:
    """
    Return everything that determines the content of a folder.

    Args:
        args (dataclass): the options. A world counts by its settings, not by its path.
        modules: the modules that make the content.
    """
    settings = asdict(args)
    del settings["output_dir"]
    if "world" in settings:
        settings["world"] = read_json(Path(settings["world"], "world.json"))
    settings["code"] = digest([digest_file(str(module.__file__)) for module in modules])
    return settings


def make_once(
    output: Path,
    names: Sequence[str],
    settings: dict[str, Any],
    write: Callable[[Path], None],
    optional_names: Sequence[str] = (),
) -> None:
    """
    Make a folder, unless it is there and was made with the same settings.

    Args:
        output (`Path`): the folder.
        names (sequence of `str`): everything in the folder. The last name is the file of the settings.
        settings (`dict`): values that JSON can hold.
        write (callable): takes a folder, and writes everything but the settings into it.
        optional_names (sequence of `str`): what the folder also holds with some settings.

    Raises:
        `FileExistsError`: if the folder holds anything else.
    """
    present = set(os.listdir(output)) if output.exists() else set()
    if present and present - set(optional_names) != set(names):
        raise FileExistsError(
            f"{output} does not hold exactly {', '.join(names)}: choose another folder, or remove it."
        )
    if present and read_json(output / names[-1]) == settings:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        write(folder)
        write_json(folder / names[-1], settings)
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)  # so it is complete, or not there at all
