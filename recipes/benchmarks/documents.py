"""
Time and memory of recipes/prepare_documents.py over generated folders of several sizes.

    python recipes/benchmarks/documents.py --model out --megabytes 20 200 --output_file documents.json

Each folder holds, by size, a quarter of one large text file, a quarter of small text and Markdown files, and half of
web pages, most of which is script and navigation. Their words are random. The recipe runs twice over each folder, in a
process of its own: the second time one small file has changed. CPU seconds and the peak of resident memory are those
of the process, imports included.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from shared.cli import clear_errors, parse

import numpy as np

from modeling_cosup.files_cosup import write_json

from measuring import cpu_name, print_table

RECIPE = Path(__file__).parents[1] / "prepare_documents.py"
MB = 1_000_000
SCRIPT = "<script>var data = [" + "1234567, " * 8000 + "];</script>"
NAVIGATION = "<nav><ul>" + '<li><a href="/section">Section</a></li>' * 60 + "</ul></nav>"


@dataclass(kw_only=True)
class BenchmarkArguments:
    """The model, and the folders."""

    model: str = field(
        metadata={"local_or_hub": True, "help": "CoSup checkpoint whose Emb_seq will read the passages"}
    )
    megabytes: list[int] = field(default_factory=lambda: [20, 200], metadata={"help": "sizes of the folders"})
    passage_length: int | None = field(default=None, metadata={"help": "most tokens of a passage"})
    seed: int = field(default=0, metadata={"help": "seed of the texts"})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the numbers"})


def main() -> None:
    """Make each folder, prepare it twice, and print a table."""
    (args,) = parse([BenchmarkArguments], __doc__)
    rows = []
    print(cpu_name())
    with clear_errors():
        for megabytes in args.megabytes:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(args, megabytes, Path(folder))
        if args.output_file:
            write_json(args.output_file, rows)
    print_table(list(rows[0]), [list(map(str, row.values())) for row in rows])


def measure(args: BenchmarkArguments, megabytes: int, folder: Path) -> list[dict[str, object]]:
    """Return the numbers of both runs over a folder of this size."""
    documents = folder / "documents"
    num_files = write_documents(documents, megabytes * MB, args.seed)
    rows = []
    for name in ("all new", "one changed"):
        seconds, peak = run(args, documents, folder / "corpus.jsonl")
        report = json.loads((folder / "corpus.report.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "MB": megabytes,
                "files": num_files,
                "run": name,
                "unchanged": report["unchanged"],
                "passages": report["passages"],
                "CPU s": round(seconds, 1),
                "peak MB": round(peak / MB),
            }
        )
        (documents / "text" / "0.txt").write_text("Another text. It is short.", encoding="utf-8")
    return rows


def run(args: BenchmarkArguments, documents: Path, corpus: Path) -> tuple[float, int]:
    """Return the CPU seconds and the peak of resident memory, in bytes, of one run of the recipe."""
    command = [sys.executable, str(RECIPE), str(documents), "--output_file", str(corpus), "--model", args.model]
    if args.passage_length is not None:
        command += ["--passage_length", str(args.passage_length)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, after.ru_maxrss * 1024  # the largest child so far, in kB on Linux


def write_documents(folder: Path, num_bytes: int, seed: int) -> int:
    """Write the documents; return their number."""
    rng = np.random.default_rng(seed)
    for name in ("text", "markdown", "pages"):
        (folder / name).mkdir(parents=True)
    with open(folder / "large.txt", "w", encoding="utf-8") as file:
        for paragraph in paragraphs(rng, num_bytes // 4):
            file.write(paragraph + "\n\n")
    num_files = 1
    small = 20_000  # bytes of a small file
    for number in range(num_bytes // 8 // small + 1):
        texts = list(paragraphs(rng, small))
        (folder / "text" / f"{number}.txt").write_text("\n\n".join(texts), encoding="utf-8")
        sections = [f"## Part {part}\n\n{text}" for part, text in enumerate(texts)]
        notes = "\n\n".join([f"# Notes {number}", *sections])
        (folder / "markdown" / f"{number}.md").write_text(notes, encoding="utf-8")
        num_files += 2
    page_bytes = len(SCRIPT) + len(NAVIGATION) + small // 2
    for number in range(num_bytes // 2 // page_bytes + 1):
        body = "".join(f"<h2>Part {part}</h2><p>{text}</p>" for part, text in enumerate(paragraphs(rng, small // 2)))
        head = f"<head><title>Page {number}</title>{SCRIPT}</head>"
        page = f"<html>{head}<body>{NAVIGATION}<main>{body}</main></body></html>"
        (folder / "pages" / f"{number}.html").write_text(page, encoding="utf-8")
        num_files += 1
    return num_files


def paragraphs(rng: np.random.Generator, num_bytes: int) -> Iterator[str]:
    """Yield paragraphs of random sentences until they have this many bytes."""
    sentences = random_sentences()
    written = 0
    while written < num_bytes:
        chosen = rng.integers(0, len(sentences), rng.integers(3, 9))
        paragraph = " ".join(sentences[number] for number in chosen)
        written += len(paragraph) + 2
        yield paragraph


@cache
def random_sentences(num_sentences: int = 5000) -> list[str]:
    """Return sentences of 6 to 19 words of one to three syllables."""
    rng = random.Random(0)
    syllables = ("ba", "co", "den", "fir", "gu", "hal", "ki", "lo", "mer", "nu", "pas", "ri", "so", "ta", "ven", "wi")
    sentences = []
    for _ in range(num_sentences):
        words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(rng.randint(6, 19))]
        sentences.append(" ".join(words).capitalize() + ".")
    return sentences


if __name__ == "__main__":
    main()
