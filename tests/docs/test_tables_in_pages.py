"""Tables of pages say what the code says: settings, outputs, fingerprints, labels, and arithmetic."""

import itertools
import json
import re
from dataclasses import fields

import pytest

from modeling_cosup import Completion, CoSupGenerateOutput, Retrieval, RetrievalConfig
from modeling_cosup.memory_cosup import MemoryConfig
from support.markdown_pages import ROOT, tokens_of
from support.models import make_model
from trainer.data import check_instance
from trainer.tokenizing import tokenize_instance

GENERATION = ROOT / "docs" / "generation.md"
PASSAGE_INDEX = ROOT / "docs" / "passage_index.md"
HOW_IT_WORKS = ROOT / "docs" / "how_it_works.md"
MEMORY = ROOT / "docs" / "memory.md"


def table(page, first_cell):
    """Return the rows of the table whose first cell is `first_cell`, as lists of Markdown, without the head."""
    rows = []
    for token in tokens_of(page.read_text(encoding="utf-8")):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            if rows[0][0] == first_cell:
                return rows[1:]
            rows = []
        elif token.type == "inline" and rows:
            rows[-1].append(token.content)
    raise AssertionError(f"{page} has no table that begins with {first_cell}")


def names(cell):
    """Return the `names` in a cell."""
    return re.findall(r"`([^`]+)`", cell)


# ------------------------------------------------------------------ settings and outputs


def test_fields_of_retrieval_config():
    listed = [(name.strip("`"), default.strip("`")) for name, default, _ in table(GENERATION, "`RetrievalConfig`")]
    assert listed == [(field.name, repr(field.default)) for field in fields(RetrievalConfig)]


def test_fields_of_memory_config():
    listed = [tuple(re.sub(r"[`()]", "", cell).split()) for cell, _ in table(MEMORY, "`MemoryConfig`")]
    assert sorted(listed) == sorted((field.name, repr(field.default)) for field in fields(MemoryConfig))


@pytest.mark.parametrize("output", [CoSupGenerateOutput, Retrieval], ids=lambda output: output.__name__)
def test_fields_of_outputs(output):
    listed = [name for cell, _ in table(GENERATION, f"`{output.__name__}`") for name in names(cell)]
    assert listed == [field.name for field in fields(output)]


def test_fields_of_a_completion():
    (item,) = re.findall(
        r"^- Each answer is a `Completion`(.*?)\n\n", GENERATION.read_text(), re.DOTALL | re.MULTILINE
    )
    fields_of_item = [name for name in names(item) if name not in ('"stop"', '"length"')]  # values of finish_reason
    assert fields_of_item == [field.name for field in fields(Completion)]


# ------------------------------------------------------------------ the index


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_what_a_refusal_names(model):
    listed = [name for cell, _ in table(PASSAGE_INDEX, "it names") for name in names(cell)]
    assert sorted(listed) == sorted(model.fingerprint())


def test_sizes_of_embeddings():
    for _, width, float32, half in table(PASSAGE_INDEX, "embeddings of 10M passages"):
        gigabytes = 10e6 * int(width.replace(",", "")) / 1e9
        assert [float32, half] == [f"{4 * gigabytes:.1f} GB", f"{2 * gigabytes:.1f} GB"]


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_passage(model, tmp_path, dtype, num_bytes):
    """The parts from which the page computes sizes: of 512 passages against 1,024, since files have a head."""
    sizes = []
    for count in (512, 1024):
        passages = [{"id": f"{i:06d}", "title": "ab", "text": "cd ef"} for i in range(count)]
        folder = tmp_path / str(count)
        index = model.build_index(passages, save_directory=folder, dtype=dtype, show_progress_bar=False)
        sizes.append({name.split("-")[0]: facts["size"] for name, facts in index.config["files"].items()})
    text = 6 + 2 + 5 + 4 * len(index[0]["input_ids"]) + 40
    width = model.config.embedding_size
    expected = {"embeddings": num_bytes * width, "passages": text, "ids": 16}
    for kind, size in expected.items():
        assert (sizes[1][kind] - sizes[0][kind]) / 512 == pytest.approx(size, abs=0.1), kind


# ------------------------------------------------------------------ an instance's trip


def test_labels_of_an_instance(model):
    text = HOW_IT_WORKS.read_text(encoding="utf-8")
    instance = json.loads(re.search(r'^line = """(.*?)"""', text, re.DOTALL | re.MULTILINE)[1])
    row = tokenize_instance(check_instance(instance, "page"), model.tokenizer, model.emb_seq_tokenizer, model.config)
    config = model.config
    controls = {config.nsp_token_id: "[NSP]", config.cs_token_id: "[Cs]", config.ce_token_id: "[CE]"}
    pieces = []
    for id, label in zip(row["input_ids"][:-1], row["labels"][:-1], strict=True):
        assert label in (-100, id)
        pieces.append((controls.get(id, "text"), label != -100))
    pieces = [piece for piece, _ in itertools.groupby(pieces)]
    pieces.append(("</s>", row["labels"][-1] != -100))

    listed = []
    for tokens, label, _ in table(HOW_IT_WORKS, "tokens"):
        (span,) = names(tokens)
        listed.append((span if span in (*controls.values(), "</s>") else "text", label == "itself"))
    assert listed == pieces
