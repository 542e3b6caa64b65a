"""The queue of generate_many(): which prompts are waiting, and the file that keeps the answers."""

import contextlib
import json
import os
from dataclasses import dataclass, fields

from .files_cosup import digest
from .trace_cosup import Retrieval, cited_text, written_text


@dataclass
class Completion:
    """
    What `generate_many` returns for one prompt.

    Args:
        index (`int`): of the prompt.
        token_ids (`list[int]`): what follows the prompt, passages and `[Cs]` included.
        text (`str`): what the model wrote itself.
        cited_text (`str`): with a numbered citation after each grounded span, and the passages below.
        num_generated_tokens (`int`): tokens that were decoded.
        retrievals (`list[Retrieval]`): the trace; positions count from the first token of the prompt.
    """

    index: int
    token_ids: list
    text: str
    cited_text: str
    num_generated_tokens: int
    retrievals: list


class Queue:
    """The prompts of generate_many() that are not answered yet, and where their answers go."""

    def __init__(self, prompts, results, batch_size, output_file, key, bar, on_completion=None):
        self.prompts, self.results, self.batch_size, self.output_file, self.key, self.bar = (
            prompts,
            results,
            batch_size,
            output_file,
            key,
            bar,
        )
        self.on_completion = on_completion

    def run(self, model, decoder, rows):
        """Longest prompts first: the last rows of the batch should be short ones."""
        from tqdm.auto import tqdm

        waiting = sorted((row for row in rows if row.number not in self.results), key=lambda row: -len(row.prompt))
        file = (
            open(self.output_file, "a", encoding="utf-8") if self.output_file is not None else contextlib.nullcontext()
        )
        with file, tqdm(**self.bar) as bar:

            def keep(row):
                start = len(row.prompt)
                text, cited = (
                    function(row.ids, row.retrievals, start, model.tokenizer)
                    for function in (written_text, cited_text)
                )
                self.results[row.number] = done = Completion(
                    row.number, row.ids[start:], text, cited, row.num_generated_tokens, row.retrievals
                )
                if self.output_file is not None:
                    trace = [retrieval.to_dict() for retrieval in done.retrievals]
                    line = {**vars(done), "retrievals": trace, "prompt": digest(row.prompt), "settings": self.key}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                if self.on_completion is not None and (said := self.on_completion(done)):
                    bar.set_postfix(said, refresh=False)
                bar.update(1)

            decoder.run(waiting, keep)


def read_completions(path, prompts, key):
    """Answers that stand in the output file of an earlier, interrupted call: `{index: Completion}`. A last line that was cut off is removed."""
    if not os.path.exists(path):
        return {}
    results, whole = {}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                found = json.loads(line)
                index, names = found["index"], {field.name for field in fields(Completion)}
                if found["prompt"] != digest(prompts[index]):
                    raise ValueError(
                        f"{path}, line {number}: an answer to another prompt than number {index} of this call; choose another output_file."
                    )
                if found["settings"] != key:
                    raise ValueError(
                        f"{path}, line {number}: an answer of another model or index, or with other settings; choose another output_file."
                    )
                retrievals = [
                    Retrieval(**{**trace, "grounded_span": tuple(trace["grounded_span"])})
                    for trace in found["retrievals"]
                ]
                results[index] = Completion(**{**{name: found[name] for name in names}, "retrievals": retrievals})
            except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not an answer of generate_many to these prompts ({error!r}); choose another file."
                ) from error
    os.truncate(path, whole)
    return results
