"""The queue of generate_many(): the prompts, and the file that keeps their answers."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from .files_cosup import digest
from .memory_cosup import TokenNeighbors
from .settings_cosup import RetrievalConfig
from .trace_cosup import Retrieval, Row, cited_text, written_text

BEGINNING = b'{"index": '  # of each line of an output file


@dataclass
class Completion:
    """
    The answer of `generate_many` to one prompt.

    Args:
        index (`int`): number of the prompt.
        token_ids (`list[int]`): all token ids after the prompt, passages and `[Cs]` included.
        text (`str`): the generated text, without passages.
        cited_text (`str`): the text with a numbered citation after each grounded span, and the passages below.
        num_generated_tokens (`int`): number of decoded tokens.
        retrievals (`list[Retrieval]`): the trace; positions count from the first token of the prompt.
        neighbors (`list[TokenNeighbors]`): of each decoded token, with `MemoryConfig(output_neighbors=n)`; positions
            likewise.
        finish_reason (`str`): `"stop"` for an end token or a stopping criterion, `"length"` for a used budget or a
            full context; empty if it comes from the output file of an earlier release.
    """

    index: int
    token_ids: list[int]
    text: str
    cited_text: str
    num_generated_tokens: int
    retrievals: list[Retrieval]
    neighbors: list[TokenNeighbors] = field(default_factory=list)
    finish_reason: str = ""


@dataclass
class Queue:
    """
    The prompts of generate_many(), and their answers.

    Args:
        prompts (`list[list[int]]`): token ids.
        keys (`list[str]`): hashes of the prompts and what is given for each, see [`prompt_keys`].
        results (`dict[int, Completion]`): answers by the number of their prompt; at first those in `output_file`.
        batch_size (`int`): the most rows at a time.
        output_file (`str` or `Path`, *optional*): each answer is appended to it.
        settings_hash (`str`): hash of the settings that decide an answer, stored with each answer.
        bar_options (`dict`): arguments of the tqdm bar over prompts.
        on_completion (`Callable`, *optional*): gets each answer; the `dict` that it may return is shown after the bar.
    """

    prompts: list[list[int]]
    keys: list[str]
    results: dict[int, Completion]
    batch_size: int
    output_file: str | Path | None
    settings_hash: str
    bar_options: dict[str, Any]
    on_completion: Callable[[Completion], dict[str, Any] | None] | None = None

    def answer(self, model: Any, rows: list[Row], decode: Callable[[list[Row], Callable[[Row], None]], Any]) -> None:
        """
        Answer the prompts that have no answer yet, the longest first: the last rows of the batch should be short ones.

        Args:
            model ([`CoSupForCausalLM`]): its tokenizer decodes the answers.
            rows (`list[Row]`): one for each prompt.
            decode (`Callable`): [`Decoder.run`].
        """
        from tqdm.auto import tqdm

        waiting = [row for row in rows if row.number not in self.results]
        waiting.sort(key=lambda row: -len(row.prompt))
        with ExitStack() as stack:
            file = None
            if self.output_file is not None:
                file = stack.enter_context(open(self.output_file, "a", encoding="utf-8"))
            bar = stack.enter_context(tqdm(**self.bar_options))
            decode(waiting, partial(self._complete, model=model, file=file, bar=bar))

    def _complete(self, row: Row, model: Any, file: TextIO | None, bar: Any) -> None:
        """Store the answer of a finished row, write it to the file, and advance the bar."""
        start = len(row.prompt)
        completion = Completion(
            index=row.number,
            token_ids=row.ids[start:],
            text=written_text(row.ids, row.retrievals, start, model.tokenizer),
            cited_text=cited_text(row.ids, row.retrievals, start, model.tokenizer),
            num_generated_tokens=row.num_generated_tokens,
            retrievals=row.retrievals,
            neighbors=row.neighbors,
            finish_reason=row.finish_reason,
        )
        self.results[row.number] = completion
        if file is not None:
            line = asdict(completion)
            line["prompt"] = self.keys[row.number]
            line["settings"] = self.settings_hash
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
        if self.on_completion is not None:
            postfix = self.on_completion(completion)
            if postfix:
                bar.set_postfix(postfix, refresh=False)
        bar.update(1)


def prompt_keys(prompts: list[list[int]], retrieval: RetrievalConfig) -> list[str]:
    """Return a hash of each prompt and of the candidates or passages that are given for it."""
    keys = []
    for number, prompt in enumerate(prompts):
        given = []
        for entries in (retrieval.candidates, retrieval.passages):
            given.append(entries[number] if entries is not None and number < len(entries) else None)
        keys.append(digest(prompt) if all(entry is None for entry in given) else digest([prompt, *given]))
    return keys


def read_completions(path: str | Path, keys: list[str], settings_hash: str) -> dict[int, Completion]:
    """
    Return the answers in the output file of an interrupted call, after removing a last line that was cut off.

    Args:
        path (`str` or `Path`): the output file; it need not exist.
        keys (`list[str]`), settings_hash (`str`): of the prompts and settings of this call, to which all answers must
            belong.

    Returns:
        `dict[int, Completion]`: answers by the number of their prompt.

    Raises:
        `ValueError`: names a line that is not an answer to these prompts with these settings. The file stays as it is.
    """
    if not os.path.exists(path):
        return {}
    completions: dict[int, Completion] = {}
    complete_bytes = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.endswith(b"\n"):
                if not line.startswith(BEGINNING[: len(line)]):
                    raise ValueError(f"{where}: not an answer of generate_many; choose another file.")
                break
            complete_bytes += len(line)
            try:
                completion = _read_completion(line, where, keys, settings_hash)
            except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
                problem = f"not an answer of generate_many to these prompts ({error!r})"
                raise ValueError(f"{where}: {problem}; choose another file.") from error
            completions[completion.index] = completion
    os.truncate(path, complete_bytes)
    return completions


def _read_completion(line: bytes, where: str, keys: list[str], settings_hash: str) -> Completion:
    stored = json.loads(line)
    index = stored["index"]
    if stored["prompt"] != keys[index]:
        problem = f"an answer to another prompt than number {index} of this call, or with other passages or candidates"
        raise ValueError(f"{where}: {problem}; choose another output_file.")
    if stored["settings"] != settings_hash:
        problem = "an answer of another model or index, or with other settings"
        raise ValueError(f"{where}: {problem}; choose another output_file.")
    for name, default in (("neighbors", []), ("finish_reason", "")):
        stored.setdefault(name, default)  # a file of an earlier release
    values = {field.name: stored[field.name] for field in fields(Completion)}
    values["retrievals"] = []
    for trace in stored["retrievals"]:
        span = tuple(trace["grounded_span"])
        values["retrievals"].append(Retrieval(**{**trace, "grounded_span": span}))
    values["neighbors"] = [TokenNeighbors(**neighbors) for neighbors in stored["neighbors"]]
    return Completion(**values)
