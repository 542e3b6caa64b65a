"""
One task while it is evaluated: ranks passages and answers questions into its folder. Processes share the questions.

A file that has its name is whole. What an interrupted run leaves lives in `parts/` until the mode is complete.
"""

import json
import shutil
import time
from pathlib import Path

from modeling_cosup import Completion, CoSupForCausalLM, Retriever
from modeling_cosup.files_cosup import digest, read_json, write_json
from modeling_cosup.lines_cosup import read_lines, write_lines

from ..distributed import barrier, rank, world_size
from .answers import answer, rank_passages, wrong_passages
from .correctness import exact_match
from .figures import GIVEN, QUERY, figure, shown
from .matching import gold_ids, match_by_id
from .results import FORMAT
from .scoring import check_questions
from .tasks import Task, check_ids, open_index

PREDICTIONS_FILE, RANKING_FILE, RUN_FILE = "predictions.jsonl", "ranking.jsonl", "run.json"


class TaskRun:
    """
    The questions of a task, asked in every mode.

    Args:
        model ([`CoSupForCausalLM`]).
        task ([`Task`]).
        folder (`Path`): for the task alone, seen by all processes.
        modes (`list[str]`): in which the model answers; those that give passages are left out where no question needs
            one.
        batch_size (`int`): questions at once.
        seed (`int`): of the passages of mode `"wrong"`.

    Attributes:
        questions (`list[dict]`): all of them.
        needing (`list[dict]`): those that need a passage.
        left_out (`list[str]`): notes on what was left out, with counts.
        index, index_name: see [`open_index`].

    Raises:
        `ValueError`: for questions that cannot be judged.
    """

    def __init__(
        self, model: CoSupForCausalLM, task: Task, folder: Path, modes: list[str], batch_size: int = 32, seed: int = 0
    ):
        self.model, self.task, self.folder, self.batch_size, self.seed = model, task, folder, batch_size, seed
        self.questions = task.read_questions()
        check_questions(self.questions, task.name, task.metric)
        self.needing = [question for question in self.questions if question["provenance"]]
        self.modes = [mode for mode in modes if self.asked(mode)]
        self.left_out = [
            f"mode {mode}: left out, no question has provenance" for mode in modes if not self.asked(mode)
        ]
        self.index: Retriever | None = None
        self.index_name: str | None = None

    def open_index(self, index_cache: str | Path) -> None:
        """Open the index, or embed the corpus; check that it holds every passage that the questions name."""
        self.index, self.index_name = open_index(self.task, self.model, index_cache)
        if self.index is not None:
            check_ids(self.task, self.questions, self.index)
            if "wrong" in self.modes:
                wrong_passages(self.needing, self.index, self.seed)  # raises where there are none
        elif set(self.modes) != {"off"}:
            raise ValueError(
                f"Task {self.task.name} has neither an index nor a corpus_file; only mode 'off' needs none of them."
            )

    def asked(self, mode: str) -> list[dict]:
        """The questions of a mode."""
        return self.needing if mode in (*GIVEN, QUERY) else self.questions

    @property
    def num_passages(self) -> int | None:
        """Passages of the index, `None` without one."""
        return None if self.index is None else len(self.index)

    def rank_passages(self) -> None:
        """Write `query/ranking.jsonl`, see [`~trainer.judging.answers.rank_passages`]; nothing without an index."""
        if self.index is None or not self.needing:
            return
        folder, done = self._begin(QUERY, RANKING_FILE)
        if not done:
            questions = self.needing[rank() :: world_size()]
            pools = self.task.pool != "full"
            rankings = rank_passages(self.model, self.index, questions, self.batch_size, pools)
            self._merge(folder, RANKING_FILE, rankings, self.needing)

    def answer(self, mode: str) -> None:
        """Write `predictions.jsonl` of a mode; what an interrupted run has answered is not answered again."""
        folder, done = self._begin(mode, PREDICTIONS_FILE)
        if done:
            return
        questions = self.asked(mode)[rank() :: world_size()]
        clock = Clock(questions)
        predictions = answer(
            self.model,
            questions,
            self.index,
            mode,
            self.batch_size,
            self.task.max_new_tokens,
            candidates=None if self.task.pool == "full" else [question["candidates"] for question in questions],
            top_k=self.task.top_k,
            max_retrievals=self.task.max_retrievals,
            seed=self.seed,
            output_file=folder / "parts" / f"answers-{rank()}-of-{world_size()}.jsonl",
            on_completion=clock,
            show_progress_bar=rank() == 0,
        )
        timed = [{**prediction, "seconds": clock.seconds.get(i)} for i, prediction in enumerate(predictions)]
        self._merge(folder, PREDICTIONS_FILE, timed, self.asked(mode))

    def predictions(self, mode: str) -> list[dict]:
        """The answers of a mode, see [`~trainer.judging.answers.as_prediction`]."""
        return read_lines(self.folder / mode / PREDICTIONS_FILE)

    def rankings(self) -> dict[str, list[list[str]]]:
        """By scope (the corpus, the pool) the passage ids of each question of `needing`, best first."""
        path = self.folder / QUERY / RANKING_FILE
        if not path.exists():
            return {}
        rows = [row for row, _ in match_by_id(read_lines(path), self.needing)]
        return {scope: [row[scope] for row in rows] for scope in rows[0] if scope != "id"}

    # ------------------------------------------------------------------ files

    def _settings(self, mode: str) -> dict:
        """All that decides what the model writes."""
        settings = {
            "format": FORMAT,
            "mode": mode,
            "questions": digest(self.asked(mode)),
            "number of questions": len(self.asked(mode)),
            "index": None if mode == "off" else self.index_name,
            "weights": self.model.hash_weights(None, ("gen.", "query_encoder.")),
            "dtype": str(self.model.gen.dtype),
        }
        for name in ("pool", "gold_in_pool", "top_k", "max_retrievals", "max_new_tokens"):
            settings[name] = getattr(self.task, name)
        if mode == "wrong":
            settings["seed"] = self.seed
        return json.loads(json.dumps(settings))

    def _begin(self, mode: str, file: str) -> tuple[Path, bool]:
        """The folder of a mode, and whether `file` is there already. Raises when other settings made what it holds."""
        folder, settings = self.folder / mode, self._settings(mode)
        if (folder / RUN_FILE).exists():
            before = read_json(folder / RUN_FILE)
            if different := [name for name in settings if before.get(name) != settings[name]]:
                lines = [f"  {name}: then {before.get(name)!r}, now {settings[name]!r}" for name in different]
                raise ValueError(
                    f"{folder} holds answers of other settings; choose another output_dir, or delete it.\n"
                    + "\n".join(lines)
                )
        done = (folder / file).exists()
        barrier()  # all have looked before anything changes
        if rank() == 0 and not done:
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_FILE, settings)
        barrier()
        return folder, done

    def _merge(self, folder: Path, name: str, rows: list[dict], questions: list[dict]) -> None:
        """Every process writes its rows; the first puts them together in the order of the questions."""
        write_lines(folder / "parts" / f"{rank()}-of-{world_size()}-{name}", rows)
        barrier()
        if rank() == 0:
            merged = []
            for number in range(world_size()):
                merged += read_lines(folder / "parts" / f"{number}-of-{world_size()}-{name}")
            write_lines(folder / name, [row for row, _ in match_by_id(merged, questions)])
            shutil.rmtree(folder / "parts")
        barrier()


class Clock:
    """
    Times answers as they come, and says how good they are so far: `on_completion` of generate_many().

    Args:
        questions (`list[dict]`): that are answered; a completion's `index` counts them.

    Attributes:
        seconds (`dict[int, float]`): since the answer before: they add up to the time of this process.
    """

    def __init__(self, questions: list[dict]):
        self.questions = questions
        self.seconds: dict[int, float] = {}
        self.last = time.perf_counter()
        self.asked = self.found = self.right = 0

    def __call__(self, completion: Completion) -> dict[str, str] | None:
        now, question = time.perf_counter(), self.questions[completion.index]
        self.seconds[completion.index] = round(now - self.last, 4)
        self.last = now
        if question["provenance"]:
            retrieved = [id for retrieval in completion.retrievals for id in retrieval.passage_ids]
            self.asked += 1
            self.found += not gold_ids(question).isdisjoint(retrieved)
            self.right += exact_match(completion.text, question["answers"])
        if not self.asked:
            return None
        shares = {"ret": self.found / self.asked, "em": self.right / self.asked}
        return {figure(name).label: shown(share, name) for name, share in shares.items()}
