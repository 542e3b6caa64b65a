"""Loading never unpickles or executes, no name leads out of a folder, and the code that travels can be audited."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import facts_of
from support.models import PASSAGES, make_model, make_tokenizer
from support.travelling import STAYS, travelling_files

ROOT = Path(__file__).parents[2]
TRAVELS = travelling_files()
SHIPPED = [
    path for folder in ("modeling_cosup", "trainer", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Modules that unpickle, start programs, load native code or open connections by themselves
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN = UNPICKLE | {"ctypes", "socket", "urllib", "requests", "http", "httpx", "runpy", "code"}
FORBIDDEN_WHERE_IT_TRAVELS = FORBIDDEN | {
    "subprocess",
    "multiprocessing",
    "sys",
    "site",
    "builtins",
    "trainer",
    "recipes",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "np.fromfile"}


def calls(tree):
    """Yield `(line, dotted name, call)` of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def imported(tree):
    """Yield the names of the top-level packages that a module imports, anywhere in its file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_code_of_ours_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text())
    next_to_model = path in TRAVELS or path.name in STAYS  # the rest of the model's package must pass the same checks
    if next_to_model:
        forbidden = FORBIDDEN_WHERE_IT_TRAVELS
    elif "benchmarks" in path.parts:  # they ask the C library about memory, and find a free port
        forbidden = UNPICKLE
    elif path.parent.name == "serving":  # a server listens, and asks the servers of vLLM
        forbidden = FORBIDDEN - {"socket", "httpx"}
    else:
        forbidden = FORBIDDEN
    assert not set(imported(tree)) & forbidden
    for line, name, call in calls(tree):
        place = f"{path.name}:{line}"
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in FORBIDDEN_CALLS, f"{place} calls {name}"
        if name == "torch.load":
            assert arguments.get("weights_only") == "True", place
        if name in ("np.load", "numpy.load"):
            assert arguments.get("allow_pickle", "False") == "False", place
        assert "allow_pickle" not in arguments or arguments["allow_pickle"] == "False", place
        # A module whose name is computed: the one that the checkpoint's class came from, or, in a package's __init__,
        # which does not travel, one from its own table.
        if name.endswith("import_module") and not isinstance(call.args[0], ast.Constant):
            assert path.name in ("demo.py", "__init__.py"), place
        if next_to_model:
            runs_foreign_code = arguments.get("trust_remote_code", "False") != "False"
            assert not runs_foreign_code, f"{place} would run the code of another repository"


def test_what_travels_is_small_enough_to_be_read():
    """
    A careful user reads the code before trusting it: a file in one sitting, all of it in a day.

    What only authors need stays in the package. The caps leave about 5 % of room: raise them only with a reason, after
    asking what could stay there. The total was 7,000 until lines became shorter and got type annotations, 8,900
    until every kind of tokenizer, encoder and prompt was either read right or refused, 9,500 until there were token
    memories, 12,300 until rows of different requests shared one loop and passages had metadata, 13,000 until a
    push replaced only what it is about, 13,500 until folders, encoders and device copies of an index were checked
    while other processes change them, and 13,750 until equal scores had one order and a push kept a card's licence.
    """
    lengths = {path.name: len(path.read_text().splitlines()) for path in TRAVELS}
    assert max(lengths.values()) <= 450, lengths
    assert sum(lengths.values()) <= 13800, lengths


def is_pickle(path):
    """Return whether a file starts like a pickle, or like a zip archive, in which torch stores one."""
    head = path.read_bytes()[:4]
    return head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04"


def test_nothing_that_is_saved_is_a_pickle(tmp_path):
    model = make_model(emb_seq_tokenizer=make_tokenizer(texts=["another corpus"]))
    model.save_pretrained(tmp_path / "model")
    model.save_gen(tmp_path / "gen")
    model.save_emb_seq(tmp_path / "emb_seq")
    index = model.build_index(PASSAGES, save_directory=tmp_path / "index", show_progress_bar=False)
    index.delete(["p1"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if is_pickle(path)]

    (tmp_path / "pickle").write_bytes(pickle.dumps([1]))
    torch.save({}, tmp_path / "archive")
    assert is_pickle(tmp_path / "pickle")
    assert is_pickle(tmp_path / "archive")


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_booby_trapped_files_next_to_a_checkpoint_or_an_index_do_nothing(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    index = model.build_index(PASSAGES, save_directory=tmp_path / "index", show_progress_bar=False)
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(str(exploded)))
    for folder in ("model", "index"):
        for name in ("pytorch_model.bin", "training_args.bin", "index.pkl", "optimizer.pt"):
            (tmp_path / folder / name).write_bytes(bomb)
    code = f"import os\nos.mkdir({str(exploded)!r})\n"
    (tmp_path / "index" / "index.py").write_text(code)  # the loading script of a dataset
    (tmp_path / "model" / "sitecustomize.py").write_text(code)

    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "model")
    assert len(loaded.load_index(tmp_path / "index", verify=True)) == len(index)
    (tmp_path / "model" / "model.safetensors").unlink()  # only pickled weights are left: refused, not read
    with pytest.raises(Exception, match="(?i)weights.only|unpickl|safetensors"):
        CoSupForCausalLM.from_pretrained(tmp_path / "model")
    assert not exploded.exists()

    exploded.mkdir()
    with pytest.raises(FileExistsError):  # the bomb does explode when it is unpickled
        pickle.loads(bomb)


def test_code_runs_only_with_trust_remote_code(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    exploded = tmp_path / "exploded"
    (tmp_path / "model" / "configuration_cosup.py").write_text(f"import os\nos.mkdir({str(exploded)!r})\n")
    code = "import sys\nfrom transformers import AutoModelForCausalLM\n"
    code += "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "model")],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr
    assert not exploded.exists()


def test_pytorch_bin_is_read_only_if_that_is_asked_for(tmp_path):
    """Its weights are good, and torch would read them."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model.save_gen(tmp_path / "gen")
    for folder in (tmp_path / "model", tmp_path / "gen"):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    asked = {"use_safetensors": None}
    with pytest.raises(OSError, match=r"model\.safetensors"):
        CoSupForCausalLM.from_pretrained(tmp_path / "model")
    CoSupForCausalLM.from_pretrained(tmp_path / "model", **asked)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        CoSupForCausalLM.from_gen_and_emb_seq(tmp_path / "gen")
    CoSupForCausalLM.from_gen_and_emb_seq(tmp_path / "gen", model_kwargs=asked)


@pytest.mark.parametrize("id", ["..", "../x", "a/../b", "..\\x", "x\\..", "/..", "nul\x00"])
def test_an_id_that_leads_out_of_a_folder_is_refused(id, tmp_path):
    passages = [{"id": id, "text": "word"}]
    with pytest.raises(ValueError, match="Passage 0|row 0|id is"):
        PassageIndex.build(passages, make_model(), save_directory=tmp_path / "index", show_progress_bar=False)
    assert not (tmp_path / "index").exists()


def test_ids_that_only_look_like_paths_are_names(tmp_path):
    ids = ["/m/02mjmr", "enwiki/12#3", "a..b", "...", "C:\\x", "آی‌دی", "with space", "%2e%2e/x"]
    passages = [{"id": id, "text": "word"} for id in ids]
    model = make_model()
    before = sorted(tmp_path.parent.iterdir())
    model.build_index(passages, save_directory=tmp_path / "index", show_progress_bar=False)
    index = PassageIndex.from_pretrained(tmp_path / "index")
    assert [passage["id"] for passage in index] == ids
    assert index.rows_of(ids).tolist() == list(range(len(ids)))
    assert sorted(tmp_path.parent.iterdir()) == before


def test_a_module_path_of_an_emb_seq_folder_cannot_lead_out():
    from modeling_cosup.retriever_files_cosup import safe_path

    for path in ("../x", "/etc", "a/../../b"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            safe_path("me/retriever", path)


def test_facts_next_to_a_checkpoint_are_data(tmp_path):
    """A card is made by our template only: what a stranger wrote into the facts is shown, not run."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    facts = {"question": "{{ 7 * 7 }}", "name": "{% for x in ().__class__.__bases__ %}{% endfor %}", "license": "mit"}
    (tmp_path / "model" / "training_facts.json").write_text(json.dumps(facts))
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "model")
    card = model_card(loaded, "me/model", facts_of(loaded))
    assert "{{ 7 * 7 }}" in card
    assert "49" not in card.split("## Settings")[0]
    assert "__bases__" in card
