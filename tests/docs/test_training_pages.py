"""docs/training.md and docs/hub.md say what the code says: names in the log, defaults, and the files of a push."""

import re
from fnmatch import fnmatch

import yaml

from modeling_cosup.configuration_cosup import SIMILARITY_DEFAULTS
from modeling_cosup.hub_cosup import ADAPTER_FILES, CHECKPOINT_FILES, EMB_SEQ_TOKENIZER_FOLDER
from modeling_cosup.index_files_cosup import INDEX_FORMAT
from support.markdown_pages import ROOT
from trainer.judging.figures import figure
from trainer.training_args import CHOICES

TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
HUB = (ROOT / "docs/hub.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def section(page, heading):
    """Return the text below a heading, up to the next one of its level."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text):
    """Return the rows of the first table, as lists of cells, without the head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[2:]]


def test_names_in_the_log_are_figures():
    names = [name for row in table(section(TRAINING, "What does the log say?")) for name in CODE.findall(row[0])]
    assert len(names) > 5
    for name in names:
        figure("query_recall@5" if name == "@5" else name.removeprefix("eval_"))  # raises for an unknown one


def test_every_supervision_is_explained():
    rows = table(section(TRAINING, "Train the paper's baselines, or only a part"))
    assert sorted(name for row in rows for name in CODE.findall(row[0])) == sorted(CHOICES["supervision"])


def test_defaults_of_the_similarities():
    rows = table(section(TRAINING, "Which λ, similarity and temperature?"))
    paper = yaml.safe_load((ROOT / "recipes/configs/paper_llama2_7b.yaml").read_text(encoding="utf-8"))
    for row, similarity in zip(rows, ("cosine", "dot"), strict=True):
        name, temperature, weight = row[1].split(", ")
        defaults = SIMILARITY_DEFAULTS[similarity]
        assert name.startswith(similarity)
        assert [float(temperature), float(weight)] == [defaults["temperature"], defaults["nsp_loss_weight"]]
    assert {name: paper[name] for name in defaults} == defaults


def test_the_files_of_a_push():
    named = {}
    for kind, cell in table(section(HUB, "What is sent to the Hub?")):
        named.setdefault(kind.split(":")[0], set()).update(CODE.findall(cell))
    of_emb_seq = {name for name in CHECKPOINT_FILES if name.startswith(f"{EMB_SEQ_TOKENIZER_FOLDER}/")}
    listed = named["model"] - {f"{EMB_SEQ_TOKENIZER_FOLDER}/"}
    assert listed == set(CHECKPOINT_FILES) - of_emb_seq
    assert all(any(fnmatch(name, pattern) for pattern in ADAPTER_FILES) for name in named["adapters"])
    assert named["index"] == {INDEX_FORMAT.config_file, *INDEX_FORMAT.patterns, "README.md"}
