"""
The notebooks: they run from top to bottom with small values, and the outputs that are kept in them are those of a run.

`support/notebooks.py` says how to write new outputs into them.
"""

import re

import pytest

from support.forks import ENVIRONMENT
from support.markdown_pages import ROOT
from support.models import make_emb_seq, make_gen, make_tokenizer

notebooks = pytest.importorskip("support.notebooks", reason="needs nbclient and ipykernel (extra test)")

ANSWER, TRAIN = "corpus_to_cited_answer", "train_on_your_questions"
QUICKSTART = (
    "--config_file recipes/accelerate_configs/single.yaml recipes/train.py --config recipes/configs/quickstart.yaml"
)
MACHINE = re.compile(r"(?<![\w.])/(tmp|home|root|work|opt|usr)/|[A-Z]:\\\\|\d+%\|")  # its paths, and progress bars


def run(name, folder, monkeypatch, **values):
    """Run a notebook in a folder of stand-ins, and return it."""
    for variable in ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, ENVIRONMENT[variable])
    monkeypatch.setenv("HF_HOME", str(folder / "hf_home"))  # the code of the checkpoints is copied there
    notebook = notebooks.read(notebooks.FOLDER / f"{name}.ipynb")
    notebooks.set_parameters(notebook, values)
    notebooks.execute(notebook, folder)
    return notebook


def test_from_a_corpus_to_a_cited_answer(folder, monkeypatch):
    notebook = run(ANSWER, folder, monkeypatch, OUTPUT="cosup-notebook")
    text = notebooks.printed(notebook)
    assert "20 passages, embeddings of 32 dimensions" in text
    assert re.search(r"A  +Rembrandt painted \[1\]\n\[1\] \w+ \w+: ", text)
    assert "grounded text ' Rembrandt painted'" in text
    assert re.search(r"forbid_nsp.* \[\]\n", text)
    assert re.search(r"candidates.*\('p1[69]', ", text)
    assert re.search(r"passages.*\(None, None\)", text)
    assert (folder / "cosup-notebook" / "index" / "index_config.json").exists()


def test_train_on_your_questions(folder, monkeypatch):
    gen, tokenizer = make_gen(max_position_embeddings=512), make_tokenizer()
    for name, model in (("gen", gen), ("emb_seq", make_emb_seq(max_position_embeddings=512))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    sizes = {"NUM_SHIPS": 8, "NUM_HELD_OUT": 5, "STEPS": 2, "BATCH_SIZE": 8}
    text = notebooks.printed(run(TRAIN, folder, monkeypatch, GEN="gen", EMB_SEQ="emb_seq", **sizes))
    assert "26 instances to train on, 5 held out, 13 passages" in text
    assert len(re.findall(r"^ +[12] +[\d.]+ +[\d.]+ +[\d.]+% of \d+$", text, re.M)) == 2  # two steps
    assert re.search(r"eval_query_recall@1 +[\d.]+ -> +[\d.]+", text)
    assert re.search(r"own retrieval: \d of 5 answers .*, over 13 passages", text)
    assert (folder / "cosup-ships" / "model.safetensors").exists()


@pytest.mark.parametrize("name", [ANSWER, TRAIN])
def test_kept_outputs_are_those_of_one_whole_run(name):
    notebook = notebooks.read(notebooks.FOLDER / f"{name}.ipynb")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "pip install" in cells[0].source
    for cell in cells:
        assert not MACHINE.search(notebooks.text_of(cell))
    outputs = [cell.outputs for cell in cells]
    notebooks.clean(notebook)
    assert [cell.outputs for cell in cells] == outputs  # neither errors nor warnings


def test_kept_outputs_show_what_the_text_says():
    text = notebooks.printed(notebooks.read(notebooks.FOLDER / f"{ANSWER}.ipynb"))
    assert "A  Toka Rivune works as a baker. [1]\n[1] Toka Rivune: Toka Rivune works as a baker." in text
    assert len(re.findall("I do not know", text)) >= 4  # without a passage, and with a limit of scores
    text = notebooks.printed(notebooks.read(notebooks.FOLDER / f"{TRAIN}.ipynb"))
    own, off = re.findall(r"(\d+) of 100 answers are exactly right", text)
    assert int(own) > 80 > 5 > int(off)


def test_the_model_is_trained_by_the_command_of_the_readme():
    notebook = notebooks.read(notebooks.FOLDER / f"{ANSWER}.ipynb")
    assert any(QUICKSTART in cell.source for cell in notebook.cells)
    assert QUICKSTART in (ROOT / ".ci" / "run").read_text()


def test_an_unknown_parameter_is_refused():
    notebook = notebooks.read(notebooks.FOLDER / f"{TRAIN}.ipynb")
    with pytest.raises(ValueError, match="sets STEP 0 times"):
        notebooks.set_parameters(notebook, {"STEP": 2})
