"""
Run one task: rank its passages and answer its questions into a folder. Processes share the questions.

A file appears under its final name only when it is complete. Until then, what an interrupted run has done is in
`parts/`.
"""

import functools
import json
import shutil
import time
from pathlib import Path

from modeling_cosup import Completion, CoSupForCausalLM, Memory, MemoryConfig, Retriever
from modeling_cosup.files_cosup import digest, read_json, write_json
from modeling_cosup.lines_cosup import read_lines, write_lines

from ..distributed import barrier, rank, world_size
from ..questions import ANSWERS_IN_PASSAGES, answer_lists, gold_ids, ranking_can_be_judged
from .answers import answer, prompt_ids, rank_passages, wrong_passages
from .correctness import exact_match, worded
from .figures import GIVEN, QUERY, SCOPES, figure, shown
from .matching import match_by_id
from .results import FORMAT
from .retrieval import Ranking
from .scoring import check_questions
from .tasks import Task, check_ids, open_index

NOT_IN_OLD_RUNS = ("prompts", "model config", "generation config")  # settings that an older run.json lacks
ANSWER_RULE = "answers in passages"  # the setting of rankings that says by which rule answers were looked for
DECIDED_BY_RULE = {ANSWER_RULE, "questions", "number of questions", "prompts"}  # it says which rankings can be judged
HASHED = {  # settings of which run.json holds a digest -> what a change of it means
    "questions": "those asked in this mode have changed: a question, its answers, provenance, candidates or meta",
    "weights": "the model has other weights",
    "prompts": "the same questions give other tokens: the tokenizer or its chat template has changed",
}
READ_WHILE_ANSWERING = (  # fields of CoSupConfig that decide queries, and how passages are read
    *("nsp_token_id", "cs_token_id", "ce_token_id"),
    *("query_from", "query_prompt", "passage_template", "max_passage_length"),
)
PREDICTIONS_FILE, RANKING_FILE, RUN_FILE = "predictions.jsonl", "ranking.jsonl", "run.json"


class TaskRun:
    """
    The run of one task: its questions, its index, and the folder that receives rankings and answers.

    Args:
        model ([`CoSupForCausalLM`]): answers the questions.
        task ([`Task`]): names the questions and says how they are answered.
        folder (`Path`): the folder of the task, which all processes must see.
        modes (`list[str]`): how the model answers. Modes that give it passages are left out if no question needs one.
        batch_size (`int`): number of questions per batch.
        seed (`int`): seed for drawing the passages of mode `"wrong"`.
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): as in `generate`.

    Attributes:
        questions (`list[dict]`): all questions.
        needing (`list[dict]`): the questions that need a passage.
        ranked (`list[dict]`): the questions for which passages are ranked, see
            [`~trainer.questions.ranking_can_be_judged`].
        modes (`list[str]`): the modes that are not left out.
        left_out (`list[str]`): notes on the modes that are left out.
        index, index_name: see [`~trainer.judging.tasks.open_index`]; `None` until `open_index` is called.

    Raises:
        `ValueError`: for questions that cannot be judged.
    """

    def __init__(
        self,
        model: CoSupForCausalLM,
        task: Task,
        folder: Path,
        modes: list[str],
        batch_size: int = 32,
        seed: int = 0,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.folder = folder
        self.batch_size = batch_size
        self.seed = seed
        self.memory = memory
        self.memory_config = memory_config
        self.questions = task.read_questions()
        check_questions(self.questions, task.name, task.metric)
        self.needing = [question for question in self.questions if question["provenance"]]
        self.ranked = [question for question in self.questions if ranking_can_be_judged(question)]
        self.modes = [mode for mode in modes if self.asked(mode)]
        without_questions = [mode for mode in modes if not self.asked(mode)]
        self.left_out = [f"mode {mode}: left out, no question has provenance" for mode in without_questions]
        self.index: Retriever | None = None
        self.index_name: str | None = None

    def open_index(self, index_cache: str | Path) -> None:
        """Open the index, or embed the corpus, and check that it holds every passage that the questions name."""
        self.index, self.index_name = open_index(self.task, self.model, index_cache)
        if self.index is not None:
            check_ids(self.task, self.questions, self.index)
            if "wrong" in self.modes:
                wrong_passages(self.needing, self.index, self.seed)  # raises if there are too few
        elif set(self.modes) != {"off"}:
            raise ValueError(
                f"Task {self.task.name} has neither an index nor a corpus_file; only mode 'off' needs neither."
            )

    def asked(self, mode: str) -> list[dict]:
        """Return the questions that are asked in a mode."""
        if mode == QUERY:
            return self.ranked
        return self.needing if mode in GIVEN else self.questions

    @property
    def num_passages(self) -> int | None:
        """Number of passages in the index, `None` without an index."""
        return None if self.index is None else len(self.index)

    def rank_passages(self) -> None:
        """
        Write `query/ranking.jsonl` unless there is no index, see [`~trainer.judging.answers.rank_passages`].

        A ranking that was searched for answers by another rule is made again. It takes little time.
        """
        if self.index is None or not self.ranked:
            return
        folder, done = self._begin(QUERY, RANKING_FILE)
        if not done:
            questions = self.ranked[rank() :: world_size()]
            pools = self.task.pool != "full"
            rankings = rank_passages(self.model, self.index, questions, self.batch_size, pools)
            self._merge(folder, RANKING_FILE, rankings, self.ranked)

    def answer(self, mode: str) -> None:
        """Write `predictions.jsonl` of a mode. Questions that an interrupted run has answered are not asked again."""
        folder, done = self._begin(mode, PREDICTIONS_FILE)
        if done:
            return
        questions = self.asked(mode)[rank() :: world_size()]
        candidates = None if self.task.pool == "full" else [question["candidates"] for question in questions]
        clock = Clock(questions)
        predictions = answer(
            self.model,
            questions,
            self.index,
            mode,
            self.batch_size,
            self.task.max_new_tokens,
            candidates=candidates,
            top_k=self.task.top_k,
            max_retrievals=self.task.max_retrievals,
            seed=self.seed,
            memory=self.memory,
            memory_config=self.memory_config,
            output_file=folder / "parts" / f"answers-{rank()}-of-{world_size()}.jsonl",
            on_completion=clock,
            show_progress_bar=rank() == 0,
        )
        # The answers of an interrupted run have no time.
        timed = [{**prediction, "seconds": clock.seconds.get(i)} for i, prediction in enumerate(predictions)]
        self._merge(folder, PREDICTIONS_FILE, timed, self.asked(mode))

    def predictions(self, mode: str) -> list[dict]:
        """Read the answers of a mode, see [`~trainer.judging.answers.as_prediction`]."""
        return read_lines(self.folder / mode / PREDICTIONS_FILE)

    def rankings(self) -> dict[str, list[Ranking]]:
        """Read the rankings: scope (`"corpus"`, `"pool"`) -> the ranking of each question of `ranked`."""
        path = self.folder / QUERY / RANKING_FILE
        if not self.ranked or not path.exists():  # an earlier version ranked passages for other questions too
            return {}
        rankings: dict[str, list[Ranking]] = {}
        for row, _ in match_by_id(read_lines(path), self.ranked):
            for scope in SCOPES:
                if scope in row:
                    rankings.setdefault(scope, []).append(Ranking.of(row, scope))
        return rankings

    # ------------------------------------------------------------------ files

    @functools.cached_property
    def _prompts(self) -> dict[str, list[int]]:
        """The token ids of each question, by its id: all modes ask the same prompts."""
        return {question["id"]: prompt_ids(self.model, question) for question in self.questions}

    def _settings(self, mode: str) -> dict:
        """Return everything that decides the answers or the ranking, in the form in which `run.json` is read."""
        config = self.model.config
        settings = {
            "format": FORMAT,
            "mode": mode,
            "questions": digest(self.asked(mode)),
            "number of questions": len(self.asked(mode)),
            "index": None if mode == "off" else self.index_name,
            "weights": self.model.hash_weights(None, ("gen.", "query_encoder.")),
            "dtype": str(self.model.gen.dtype),
            "prompts": digest([self._prompts[question["id"]] for question in self.asked(mode)]),
            "model config": {name: getattr(config, name) for name in READ_WHILE_ANSWERING},
        }
        for name in ("pool", "gold_in_pool", "top_k", "max_retrievals", "max_new_tokens"):
            settings[name] = getattr(self.task, name)
        if mode == "wrong":
            settings["seed"] = self.seed
        if mode == QUERY:
            settings[ANSWER_RULE] = ANSWERS_IN_PASSAGES
        else:
            settings["memory"] = memory_settings(self.memory, self.memory_config)
            generation_config = self.model.generation_config.to_diff_dict()
            generation_config.pop("transformers_version", None)
            settings["generation config"] = generation_config
        return json.loads(json.dumps(settings))

    def _begin(self, mode: str, file_name: str) -> tuple[Path, bool]:
        """
        Write `run.json` into the folder of a mode unless the folder is complete.

        Returns:
            `tuple[Path, bool]`: the folder, and whether it already holds the file.

        Raises:
            `ValueError`: if other settings produced what the folder holds.
        """
        folder = self.folder / mode
        settings = self._settings(mode)
        done = (folder / file_name).exists()
        if (folder / RUN_FILE).exists():
            previous = read_json(folder / RUN_FILE)
            compared = [key for key in settings if key in previous or key not in NOT_IN_OLD_RUNS]
            different = [key for key in compared if previous.get(key) != settings[key]]
            if "questions" in different and "prompts" in different:
                different.remove("prompts")  # other questions give other prompts anyway
            if ANSWER_RULE in different and DECIDED_BY_RULE.issuperset(different):
                done = False
            elif different:
                lines = []
                for key in different:
                    change = HASHED.get(key, f"then {previous.get(key)!r}, now {settings[key]!r}")
                    lines.append(f"  {key}: {change}")
                raise ValueError(
                    f"{folder} holds answers of other settings; choose another output_dir, or delete it.\n"
                    + "\n".join(lines)
                )
        barrier()  # all processes have looked before anything changes
        if rank() == 0 and not done:
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            (folder / file_name).unlink(missing_ok=True)  # a ranking by another rule
            write_json(folder / RUN_FILE, settings)
        barrier()
        return folder, done

    def _merge(self, folder: Path, file_name: str, rows: list[dict], questions: list[dict]) -> None:
        """Write the rows of this process. The first process then merges all rows in the order of the questions."""
        write_lines(folder / "parts" / f"{rank()}-of-{world_size()}-{file_name}", rows)
        barrier()
        if rank() == 0:
            merged = []
            for number in range(world_size()):
                merged += read_lines(folder / "parts" / f"{number}-of-{world_size()}-{file_name}")
            write_lines(folder / file_name, [row for row, _ in match_by_id(merged, questions)])
            shutil.rmtree(folder / "parts")
        barrier()


def memory_settings(memory: Memory | None, config: MemoryConfig | None) -> dict | None:
    """Return what a memory changes in answers: its fingerprint and config, as JSON values; `None` without one."""
    if memory is None:
        return None
    config = memory.memory_config if config is None else config
    return {"fingerprint": memory.fingerprint, **config.to_dict()}


class Clock:
    """
    A clock that times answers as they arrive, and reports how good they are so far. It is an `on_completion` of
    `generate_many`.

    Args:
        questions (`list[dict]`): the questions, in the order in which a completion's `index` counts them.

    Attributes:
        seconds (`dict[int, float]`): index of each question -> seconds since the previous answer, so that they add up
            to the time of this process.
    """

    def __init__(self, questions: list[dict]) -> None:
        self.questions = questions
        self.seconds: dict[int, float] = {}
        self._last_answer = time.perf_counter()
        self._num_needing = 0  # number of answers so far to questions that need a passage
        self._num_hits = 0  # how many of these answers retrieved a gold passage
        self._num_judged = 0  # how many of these questions have an answer to compare with
        self._num_right = 0  # how many of these answers are an exact match

    def __call__(self, completion: Completion) -> dict[str, str] | None:
        """Note the time, and return Ret and EM of the questions so far that need a passage, or `None` without any."""
        now = time.perf_counter()
        self.seconds[completion.index] = round(now - self._last_answer, 4)
        self._last_answer = now
        question = self.questions[completion.index]
        if question["provenance"]:
            gold = gold_ids(question)
            self._num_needing += 1
            if any(id in gold for retrieval in completion.retrievals for id in retrieval.passage_ids):
                self._num_hits += 1
            answers = [] if answer_lists(question) else worded(question["answers"])
            if answers:
                self._num_judged += 1
            if exact_match(completion.text, answers):
                self._num_right += 1
        if not self._num_needing:
            return None
        shares = {"ret": self._num_hits / self._num_needing}
        if self._num_judged:
            shares["em"] = self._num_right / self._num_judged
        return {figure(name).label: shown(share, name) for name, share in shares.items()}
