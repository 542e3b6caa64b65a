"""
Judge a model on tasks: it answers every question in every mode, the answers are scored, and a folder holds what was found.

    OUT/metrics.json                    all figures, with n and intervals, and what they were measured with
    OUT/<task>/query/ranking.jsonl      the passages nearest to each query embedding, over the corpus and over the pool
    OUT/<task>/<mode>/predictions.jsonl one question a line, with its trace
    OUT/<task>/<mode>/scores.jsonl      the scores of each question, what `recipes/compare.py` reads
    OUT/<task>/<mode>/metrics.json      their means
    OUT/<task>/<mode>/run.json          what decides the predictions: another run may go on with them only if it is the same

A file that has its name is whole. What an interrupted run leaves lives in `parts/` until the mode is complete.
"""

import json
import platform
import shutil
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import transformers

from modeling_cosup.files_cosup import digest, read_json, write_json
from modeling_cosup.lines_cosup import read_lines, write_lines

from ..distributed import barrier, gather_objects, host_group, rank, world_size
from .answers import MODES, answer, embed_queries, wrong_passages
from .correctness import exact_match
from .grounding import HYPOTHESIS, check_hypothesis
from .matching import gold_ids, match_by_id, provenance_unknown
from .nli import SharedJudge
from .scoring import averages, check_questions, cor_names, figures, has_rouge, score, score_ranking
from .tasks import check_ids, open_index

RANKED = 100  # passages of a ranking over the whole corpus
KS = (1, 5, 20, 100)
QUERY = "query"  # the mode that generates nothing
NEEDS_GOLD = ("gold", "wrong")


def evaluate_tasks(
    model, tasks, output_dir, modes=("retrieval", "gold", "off"), entail=None, index_cache=None, batch_size=32, seed=0, facts=None, gr_hypothesis=HYPOTHESIS
):
    """
    Judge a model; all processes of a group call this together and share the questions. What `output_dir` holds already, of the same settings, is kept.

    Args:
        model ([`CoSupForCausalLM`]): with Emb_seq in memory where a corpus must be embedded.
        tasks (`list[Task]`): what it is judged on.
        output_dir (`str` or `Path`): the results folder, seen by all processes.
        modes (sequence of `str`): of [`~trainer.judging.answers.retrieval_settings`]. The query embeddings are ranked in any case; `"query"` generates nothing
            beside that: alone, it judges retrieval fast.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. Where every process gives one they share the pairs, else
            the first process' is asked. It may be given later: the same call then scores the answers that are there.
        index_cache (`str` or `Path`, *optional*): where embedded corpora are kept, for all runs that name it; defaults to `output_dir/indexes`.
        batch_size (`int`): rows at once.
        seed (`int`): of the passages of mode `"wrong"`.
        facts (`dict`, *optional*): more to record in `settings`: command, names, ...
        gr_hypothesis (`str`): how the judge reads a sentence for Gr; see [`~trainer.grounding.grounding`].

    Returns:
        `dict`: what `metrics.json` holds, on every process.

    Raises:
        `ValueError`: with counts, for whatever is wrong with questions, passages or ids, before anything is generated; for a folder that holds answers of
            other settings.
    """
    output_dir, start = Path(output_dir), time.perf_counter()
    if wrong := [mode for mode in modes if mode not in (*MODES, QUERY)]:
        raise ValueError(f"mode is {wrong[0]!r}, expected one of {', '.join((*MODES, QUERY))}.")
    if not modes:
        raise ValueError("There is no mode: nothing would be judged.")
    check_hypothesis(gr_hypothesis)
    modes = [mode for mode in modes if mode != QUERY]
    judges = [_Judge(model, task, output_dir / task.name, modes, batch_size, seed) for task in tasks]
    for judge in judges:
        judge.open_index(index_cache or output_dir / "indexes")
    tasks_found, scores, entail = {}, {}, _shared(entail)
    for judge in judges:
        judge.rank_passages()
        for mode in judge.modes:
            judge.answer(mode)
        if rank() == 0:
            try:
                tasks_found[judge.task.name], scores[judge.task.name] = judge.score(entail, gr_hypothesis)
            finally:
                if isinstance(entail, SharedJudge):
                    entail.stop()
        elif isinstance(entail, SharedJudge):
            entail.serve()
    if rank() == 0:
        settings = {**(facts or {}), "modes": list(modes), "nli": entail is not None, "gr_hypothesis": gr_hypothesis, "seed": seed}
        settings |= {**environment(model), "batch_size": batch_size}
        splits = {judge.task.name: judge.task.split for judge in judges}
        results = {"settings": settings, "tasks": tasks_found, "averages": averages(splits, scores), "seconds": round(time.perf_counter() - start, 1)}
        write_json(output_dir / "metrics.json", results)
    barrier()
    return read_json(output_dir / "metrics.json")


def _shared(entail):
    """A judge that all processes answer, where each has one; else that of the first process."""
    if world_size() == 1 or not all(gather_objects(entail is not None)):
        return entail
    return SharedJudge(entail, host_group(timedelta(days=7)))


def environment(model):
    """Where figures come from: model, index fingerprint, versions and hardware."""
    cuda = model.device.type == "cuda"
    return {
        "model": model.config._name_or_path,
        "fingerprint": model.fingerprint(),
        "dtype": str(model.gen.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "processes": world_size(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class _Judge:
    """One task of [`evaluate_tasks`]."""

    def __init__(self, model, task, folder, modes, batch_size, seed):
        self.model, self.task, self.folder, self.batch_size, self.seed = model, task, folder, batch_size, seed
        self.questions = task.read_questions()
        check_questions(self.questions, task.name, task.metric)
        self.needing = [x for x in self.questions if x["provenance"]]
        self.modes = [mode for mode in modes if mode not in NEEDS_GOLD or self.needing]
        self.left_out = [f"mode {mode}: left out, no question has provenance" for mode in modes if mode not in self.modes]
        self.index = self.index_name = None

    def open_index(self, index_cache):
        self.index, self.index_name = open_index(self.task, self.model, index_cache)
        if self.index is not None:
            check_ids(self.task, self.questions, self.index)
            if "wrong" in self.modes:
                wrong_passages(self.needing, self.index, self.seed)  # whether there are any
        elif set(self.modes) != {"off"}:
            raise ValueError(f"Task {self.task.name} has neither an index nor a corpus_file; only mode 'off' needs none of them.")

    def asked(self, mode):
        """The questions of a mode."""
        return self.needing if mode in NEEDS_GOLD else self.questions

    def _settings(self, mode):
        """All that decides what the model writes."""
        names = ("pool", "gold_in_pool", "top_k", "max_retrievals", "max_new_tokens")
        return {
            "mode": mode,
            "questions": digest(self.asked(mode)),
            "number of questions": len(self.asked(mode)),
            "index": None if mode == "off" else self.index_name,
            "weights": self.model.hash_weights(None, ("gen.", "query_encoder.")),
            "dtype": str(self.model.gen.dtype),
            **{name: getattr(self.task, name) for name in names},
            **({"seed": self.seed} if mode == "wrong" else {}),
        }

    def _begin(self, mode, file):
        """The folder of a mode, and whether `file` is there already. Raises when it holds what other settings made."""
        folder = self.folder / mode
        settings = json.loads(json.dumps(self._settings(mode)))
        if (folder / "run.json").exists():
            before = read_json(folder / "run.json")
            if different := [name for name in settings if before.get(name) != settings[name]]:
                lines = [f"  {name}: then {before.get(name)!r}, now {settings[name]!r}" for name in different]
                raise ValueError(f"{folder} holds answers of other settings; choose another output_dir, or delete it.\n" + "\n".join(lines))
        done = (folder / file).exists()
        barrier()  # all have looked before anything changes
        if rank() == 0 and not done:
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", settings)
        barrier()
        return folder, done

    # ------------------------------------------------------------------ running the model

    def rank_passages(self):
        """Write `query/ranking.jsonl`: for each question that needs a passage, the nearest of the corpus and, where there is a pool, of the pool."""
        if self.index is None or not self.needing:
            return
        folder, done = self._begin("query", "ranking.jsonl")
        if not done:
            own = self.needing[rank() :: world_size()]
            queries = embed_queries(self.model, own, self.batch_size) if own else torch.empty(0, self.model.config.embedding_size)
            found = {"corpus": self.index.search(queries, k=RANKED)[1]}
            if self.task.pool != "full":
                pools = [self.index.rows_of(x["candidates"]) for x in own]
                found["pool"] = self.index.search(queries, k=max(map(len, pools), default=1), candidates=pools)[1]
            rows = [{"id": x["id"], **{name: self._ids(rows[i]) for name, rows in found.items()}} for i, x in enumerate(own)]
            self._merge(folder, "ranking.jsonl", rows, self.needing)

    def _ids(self, rows):
        return [passage["id"] for passage in self.index.get_passages(rows[rows >= 0])]

    def answer(self, mode):
        """Write `predictions.jsonl` of a mode; what an interrupted run has answered is not answered again."""
        folder, done = self._begin(mode, "predictions.jsonl")
        if done:
            return
        own = self.asked(mode)[rank() :: world_size()]
        clock = _Clock(own)
        pools = None if self.task.pool == "full" else [x["candidates"] for x in own]
        answers = answer(
            self.model, own, self.index, mode, self.batch_size, self.task.max_new_tokens, pools, self.task.top_k, self.task.max_retrievals, self.seed,
            folder / "parts" / f"answers-{rank()}-of-{world_size()}.jsonl", clock, show_progress_bar=rank() == 0,
        )  # fmt: skip
        rows = [self._prediction(*each, mode) for each in zip(own, answers, [clock.seconds.get(i) for i in range(len(own))], strict=True)]
        self._merge(folder, "predictions.jsonl", rows, self.asked(mode))

    def _prediction(self, question, answer, seconds, mode):
        return {
            "id": question["id"],
            "dataset": question["dataset"],
            "input": question["input"],
            "answers": question["answers"],
            "provenance": question["provenance"],
            "output": answer.text,
            "output_with_citations": answer.output_with_citations,
            "retrievals": answer.retrievals,
            "mode": mode,
            "seconds": seconds,
            "num_generated_tokens": answer.num_generated_tokens,
        }

    def _merge(self, folder, name, rows, questions):
        """Every process writes its rows; the first puts them together in the order of the questions, and what led to them goes."""
        write_lines(folder / "parts" / f"{rank()}-of-{world_size()}-{name}", rows)
        barrier()
        if rank() == 0:
            parts = [read_lines(folder / "parts" / f"{number}-of-{world_size()}-{name}") for number in range(world_size())]
            write_lines(folder / name, [row for row, _ in match_by_id([row for part in parts for row in part], questions)])
            shutil.rmtree(folder / "parts")
        barrier()

    # ------------------------------------------------------------------ scoring

    def score(self, entail, gr_hypothesis):
        """Figures of the task, and the scores of each mode's questions; `scores.jsonl` and `metrics.json` of each mode are written."""
        rankings = self._rankings()
        found, scores = {}, {}
        if rankings:
            sizes = {"corpus": len(self.index), "pool": self.task.pool}
            ks = {name: tuple(k for k in KS if k <= sizes[name]) for name in rankings}
            scores = {f"query ({name})": score_ranking(own, self.needing, ks[name]) for name, own in rankings.items()}
            self._write_scores("query", self.needing, {f"{name} {metric}": v for name in rankings for metric, v in scores[f"query ({name})"].items()})
        for mode in self.modes:
            predictions = read_lines(self.folder / mode / "predictions.jsonl")
            scores[mode] = score(predictions, self.asked(mode), mode, self.task.metric, entail, gr_hypothesis)
            self._write_scores(mode, self.asked(mode), scores[mode])
            budget = sum(p["num_generated_tokens"] >= self.task.max_new_tokens for p in predictions)
            empty = sum(not p["output"].strip() for p in predictions)
            seconds = [p["seconds"] for p in predictions if p["seconds"] is not None]
            self.left_out += [f"mode {mode}: {budget} of {len(predictions)} answers end at max_new_tokens ({self.task.max_new_tokens})"] * bool(budget)
            self.left_out += [f"mode {mode}: {empty} of {len(predictions)} answers are empty"] * bool(empty)
            found[mode] = {"metrics": figures(scores[mode]), "n": len(predictions), "seconds": round(sum(seconds), 1), "timed": len(seconds)}
            write_json(self.folder / mode / "metrics.json", found[mode])
        facts = {**{name: value for name, value in asdict(self.task).items() if name != "name"}, "n": len(self.questions), "index": self.index_name}
        facts |= {"passages": None if self.index is None else len(self.index), "cor": cor_names(self.questions, self.task.metric, entail is not None)}
        facts |= {"modes": found, "query": {name: figures(scores[f"query ({name})"]) for name in rankings}, "left_out": self._left_out(entail)}
        return facts, scores

    def _rankings(self):
        """`{"corpus": {id: passage ids}, "pool": ...}`, as far as there are any."""
        path = self.folder / "query" / "ranking.jsonl"
        if not path.exists():
            return {}
        rows = [row for row, _ in match_by_id(read_lines(path), self.needing)]
        return {name: {row["id"]: row[name] for row in rows} for name in ("corpus", "pool") if rows and name in rows[0]}

    def _write_scores(self, mode, questions, scores):
        write_lines(self.folder / mode / "scores.jsonl", [{"id": x["id"], **{k: v[i] for k, v in scores.items()}} for i, x in enumerate(questions)])

    def _left_out(self, entail):
        """What does not count somewhere, with counts, in words."""
        total, unknown = len(self.questions), sum(provenance_unknown(x) and not x["provenance"] for x in self.questions)
        free, notes = total - len(self.needing) - unknown, []
        if free:
            notes.append(f"{free} of {total} questions need no passage: they count in '[NSP], not needed' and 'Cor, not needed' alone")
        if unknown:
            notes.append(f"{unknown} of {total} questions do not say which passages they need: they do not count in Ret and what follows from it")
        if self.task.pool != "full" and (without := sum(gold_ids(x).isdisjoint(x["candidates"]) for x in self.needing)):
            notes.append(f"{without} of {len(self.needing)} pools hold no gold passage")
        if self.task.pool != "full" and (easy := sum(set(x["candidates"]) <= gold_ids(x) for x in self.needing)):
            notes.append(f"{easy} of {len(self.needing)} pools hold gold passages alone: whatever is retrieved there is right")
        if entail is None:
            notes.append("no NLI model was given: no Gr, citation recall and precision, claim recall" + ("; FEVER is judged by its label" * self._has_fever()))
        if not has_rouge():
            notes.append("ROUGE-L is left out: pip install rouge")
        return notes + self.left_out

    def _has_fever(self):
        return "fever_label" in cor_names(self.questions, self.task.metric, nli=False)


class _Clock:
    """
    Times answers as they come, and says how good they are so far.

    Args:
        questions (`list[dict]`): that are answered; a completion's `index` counts them.

    Attributes:
        seconds (`dict[int, float]`): since the answer before: they add up to the time of this process.
    """

    def __init__(self, questions):
        self.questions, self.seconds, self.last = questions, {}, time.perf_counter()
        self.asked = self.found = self.right = 0

    def __call__(self, done):
        now, question = time.perf_counter(), self.questions[done.index]
        self.seconds[done.index], self.last = round(now - self.last, 4), now
        if question["provenance"]:
            self.asked += 1
            self.found += not gold_ids(question).isdisjoint(id for retrieval in done.retrievals for id in retrieval.passage_ids)
            self.right += exact_match(done.text, question["answers"])
        return {"Ret": f"{100 * self.found / self.asked:.1f}", "EM": f"{100 * self.right / self.asked:.1f}"} if self.asked else None


def command_line():
    """The command that runs, to be recorded."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
