"""
A saved model gives the same logits, generation and trace in a fresh process without this package.

The process loads it with from_pretrained(trust_remote_code=True).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_cosup import CoSupForCausalLM, MemoryConfig, PassageIndex
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import left_pad
from support.memories import knn_memory, mlp_memory
from support.models import PASSAGES, make_model, make_tokenizer
from support.travelling import names_of_travelling_files

QUESTIONS = ["who?", "who painted the Night Watch?", "[NSP] in a question", "Curie"]
NO_MILVUS = (
    'An index in Milvus needs the package cosup, which does not come with a checkpoint: pip install "cosup[milvus]".'
)

# runs where `import modeling_cosup` fails; prints one JSON line
SCRIPT = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_cosup", "trainer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_cosup
    sys.exit("the package can be imported: this process proves nothing")
except ModuleNotFoundError:
    pass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

LOADS = ((AutoModelForCausalLM, {}), (AutoModel, {}), (AutoModelForCausalLM, {"load_emb_seq": False}))

job = json.loads(sys.argv[1])
inputs = {name: torch.tensor(value) for name, value in job["inputs"].items()}


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ImportError as error:
        return str(error)


def generate(model, index, tokenizer):
    options = {"retriever": index, "max_new_tokens": 12}
    output = model.generate(**inputs, max_retrievals=3, return_dict_in_generate=True, **options)
    settings = model.retrieval_config_class(max_retrievals=3)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    many = model.generate_many(prompts, retrieval_config=settings, batch_size=3, show_progress_bar=False, **options)
    return {
        "sequences": output.sequences.tolist(),
        "trace": [[retrieval.to_dict() for retrieval in trace] for trace in output.retrievals],
        "cited": model.decode_with_citations(output, tokenizer),
        "many": [completion.token_ids for completion in many],
    }


def describe(folder, index_folder, auto, options):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = auto.from_pretrained(folder, trust_remote_code=True, **options)
    index = model.load_index(index_folder)
    module = sys.modules[type(model).__module__]
    messages = [{"role": "user", "content": "who?"}]
    result = {
        "model_type": config.model_type,
        "module": module.__name__.split(".")[0],
        "code": sorted(path.name for path in Path(module.__file__).parent.glob("*.py")),
        "vocabulary": len(tokenizer),
        "chat": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "logits": model(**inputs).logits.double().sum().item(),
        "milvus": error_of(model.load_index, "wiki", uri="http://127.0.0.1:9"),
        **generate(model, index, tokenizer),
    }
    if not options:
        memory = model.load_memory(index_folder.replace("_index", "_memory"))
        config = model.memory_config_class(weight=0.6, grounded_weight=0.2)
        memories = {"memory": memory, "memory_config": config}
        result["memory"] = model.generate(**inputs, retriever=index, max_new_tokens=12, **memories).tolist()
        built = model.build_index(job["passages"], show_progress_bar=False)
        result["embeddings"] = float((built.embeddings - index.embeddings).abs().max())
        result["ids"] = [built[row]["input_ids"] for row in range(len(built))]
        if auto is AutoModelForCausalLM:
            model.save_pretrained(job["again"] + folder.rsplit("/", 1)[1])
            model.save_gen("gen")
            result["card of gen"] = Path("gen/README.md").read_text()
            result["building a memory"] = error_of(model.build_memory, ["a text"])
            result["corpus in a file"] = error_of(model.build_index, "corpus.jsonl", show_progress_bar=False)
    return result


results = []
for folder, index_folder in job["pairs"]:
    for auto, options in LOADS:
        results.append(describe(folder, index_folder, auto, options))
print(json.dumps(results))
"""


def run_elsewhere(tmp_path, pairs, inputs):
    """Run SCRIPT on pairs of a model's and an index's folder; return its results, three for each pair, in order."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    (tmp_path / "cwd").mkdir(exist_ok=True)
    inputs = {name: value.tolist() for name, value in inputs.items()}
    job = {"pairs": pairs, "inputs": inputs, "again": f"{tmp_path}/again_", "passages": PASSAGES}
    command = [sys.executable, "-I", "-c", SCRIPT, json.dumps(job)]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr, done.stderr  # no warnings
    return json.loads(done.stdout)  # nothing else is printed: nobody has to confirm again that this code may run


@pytest.fixture(scope="module")
def models():
    emb_seq_tokenizer = make_tokenizer(
        vocab_size=300, bos="<cls>", eos="<sep>", pad="<nothing>", texts=["another corpus"]
    )
    two_tokenizers = make_model(
        "gpt2",
        "bert",
        emb_seq_kwargs={"hidden_size": 16},
        emb_seq_pooling="cls",
        similarity="dot",
        emb_seq_tokenizer=emb_seq_tokenizer,
    )
    tied = make_model(tie_emb_seq=True, emb_head_size=16)
    return {"plain": make_model(), "two_tokenizers": two_tokenizers, "tied": tied}


def memory_of(model):
    """Return a token memory: a datastore for a GPT-2, an MLP for others."""
    if model.gen.config.model_type == "gpt2":
        return knn_memory(model)
    return mlp_memory(model)


def prompts_of(model):
    """Return the questions as prompts that end in [NSP], padded on the left."""
    nsp = model.config.nsp_token_id
    prompts = [[*encode_prompt(model.tokenizer, question), nsp] for question in QUESTIONS]
    return left_pad(prompts, model.tokenizer.pad_token_id)


def without_scores(retrieval):
    """Return a retrieval as it comes back from JSON, without its scores."""
    values = json.loads(json.dumps(retrieval.to_dict()))
    del values["scores"]
    return values


def check_result(result, model, index, output, logits):
    """Assert that another process got the same results as this one."""
    assert result["model_type"] == "cosup"
    assert result["module"] == "transformers_modules"
    assert set(result["code"]) == {"__init__.py", *names_of_travelling_files()}
    assert result["vocabulary"] == len(model.tokenizer)
    assert result["chat"] == encode_prompt(model.tokenizer, "who?")
    assert result["milvus"] == NO_MILVUS
    assert result["logits"] == pytest.approx(logits, rel=1e-4, abs=1e-2)

    assert result["sequences"] == output.sequences.tolist()
    for remote_trace, trace in zip(result["trace"], output.retrievals, strict=True):
        # another number of threads may round the last digit of a score differently
        scores = [retrieval.pop("scores") for retrieval in remote_trace]
        assert scores == pytest.approx(np.array([retrieval.scores for retrieval in trace]), abs=1e-5)
        assert remote_trace == [without_scores(retrieval) for retrieval in trace]
    assert result["cited"] == model.decode_with_citations(output, model.tokenizer)
    assert "[1]" in result["cited"][0]
    pad, width = model.tokenizer.pad_token_id, output.prompt_length
    for ids, sequence in zip(result["many"], result["sequences"], strict=True):
        padding = [pad] * (len(sequence) - width - len(ids))
        assert ids + padding == sequence[width:]

    if "card of gen" in result:  # without the package an error names it, and a plain card is written
        assert "pip install cosup" in result["corpus in a file"]
        assert "To build a memory, install the package: pip install cosup." in result["building a memory"]
        assert "library_name: transformers" in result["card of gen"]
        assert "# gen\n\nGen of a CoSup model" in result["card of gen"]
    if "ids" in result:
        memories = {"memory": memory_of(model), "memory_config": MemoryConfig(weight=0.6, grounded_weight=0.2)}
        inputs = prompts_of(model)
        assert result["memory"] == model.generate(**inputs, retriever=index, max_new_tokens=12, **memories).tolist()
        assert result["memory"] != result["sequences"]
        assert result["embeddings"] < 1e-5
        assert result["ids"] == [index[row]["input_ids"] for row in range(len(index))]


def test_a_process_without_this_package_gives_the_same(models, tmp_path):
    inputs = prompts_of(models["plain"])
    pairs, expected = [], []
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        index = model.build_index(PASSAGES, show_progress_bar=False)
        index.save_pretrained(tmp_path / f"{name}_index")
        memory_of(model).save_pretrained(tmp_path / f"{name}_memory")
        pairs.append([f"{tmp_path}/{name}", f"{tmp_path}/{name}_index"])
        options = {"max_new_tokens": 12, "max_retrievals": 3, "return_dict_in_generate": True}
        output = model.generate(**inputs, retriever=index, **options)
        logits = model(**inputs).logits.double().sum().item()
        expected += [(model, index, output, logits)] * 3

    results = run_elsewhere(tmp_path, pairs, inputs)
    assert len(results) == 9
    for result, values in zip(results, expected, strict=True):
        check_result(result, *values)

    for name, model in models.items():  # what the other process saved is as good as what it loaded
        again = tmp_path / f"again_{name}"
        assert sorted(os.listdir(again)) == sorted(os.listdir(tmp_path / name))
        loaded = CoSupForCausalLM.from_pretrained(again)
        assert loaded.fingerprint() == model.fingerprint()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
        loaded.load_index(f"{tmp_path}/{name}_index")
    again = run_elsewhere(tmp_path, [[f"{tmp_path}/again_plain", pairs[0][1]]], inputs)
    for result, first in zip(again, results[:3], strict=True):
        for key in ("code", "sequences", "cited", "chat"):
            assert result[key] == first[key]
    fingerprints = [PassageIndex.from_pretrained(index_folder).fingerprint for _, index_folder in pairs]
    assert len({fingerprint["emb_seq"] for fingerprint in fingerprints}) == 3


# runs where the package is installed; the classes of the model still come with the checkpoint
MILVUS_SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, index_folder, uri, inputs = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = {name: torch.tensor(value) for name, value in inputs.items()}
indexes = model.load_index(index_folder), model.load_index("elsewhere", uri=uri)
result = {"modules": [type(value).__module__ for value in (model, *indexes)], "sequences": [], "ids": []}
options = {"max_new_tokens": 12, "max_retrievals": 3, "return_dict_in_generate": True}
for index in indexes:
    output = model.generate(**inputs, retriever=index, **options)
    result["sequences"].append(output.sequences.tolist())
    result["ids"].append([[retrieval.passage_ids for retrieval in trace] for trace in output.retrievals])
indexes[1].add([{"id": "new", "title": "", "text": "radium"}], model, show_progress_bar=False)
result["added"] = indexes[1][indexes[1].row_of("new")]["text"]
print(json.dumps(result))
"""


def test_a_model_that_came_with_a_checkpoint_searches_milvus_through_the_installed_package(
    models, tmp_path, milvus_server
):
    from modeling_cosup import MilvusPassageIndex

    model = models["plain"]
    model.save_pretrained(tmp_path / "model")
    index = model.build_index(PASSAGES, show_progress_bar=False)
    index.save_pretrained(tmp_path / "index")
    MilvusPassageIndex.from_index(index, milvus_server.uri, "elsewhere", show_progress_bar=False)
    inputs = {name: value.tolist() for name, value in prompts_of(model).items()}
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HOME": str(tmp_path / "hf_home"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    job = json.dumps([str(tmp_path / "model"), str(tmp_path / "index"), milvus_server.uri, inputs])
    command = [sys.executable, "-c", MILVUS_SCRIPT, job]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    model_module, files_module, milvus_module = result["modules"]
    assert model_module.startswith("transformers_modules")
    assert files_module.startswith("transformers_modules")
    assert milvus_module == "modeling_cosup.milvus_cosup"
    assert result["sequences"][0] == result["sequences"][1]
    assert result["ids"][0] == result["ids"][1]
    assert any(result["ids"][0])
    assert result["added"] == "radium"
