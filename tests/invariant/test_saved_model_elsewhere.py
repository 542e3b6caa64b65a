"""save_pretrained -> a fresh process without this package -> from_pretrained(trust_remote_code=True): same logits, same generation, same trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import left_pad
from support.models import PASSAGES, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "[NSP] in a question", "Curie"]

# runs where `import modeling_cosup` fails; prints one JSON line
SCRIPT = """
import json, sys

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

job = json.loads(sys.argv[1])
results = []
for folder, index_folder in job["pairs"]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = {name: torch.tensor(value) for name, value in job["inputs"].items()}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "who?"}], add_generation_prompt=True, return_dict=False)
    for auto, options in ((AutoModelForCausalLM, {}), (AutoModel, {}), (AutoModelForCausalLM, {"load_emb_seq": False})):
        model = auto.from_pretrained(folder, trust_remote_code=True, **options)
        index = model.load_index(index_folder)
        output = model.generate(**inputs, retriever=index, max_new_tokens=12, max_retrievals=3, return_dict_in_generate=True)
        settings = model.retrieval_config_class(max_retrievals=3)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
        many = model.generate_many(prompts, retriever=index, retrieval_config=settings, max_new_tokens=12, batch_size=3, show_progress_bar=False)
        result = {
            "many": [done.token_ids for done in many],
            "model_type": config.model_type,
            "module": type(model).__module__.split(".")[0],
            "vocabulary": len(tokenizer),
            "chat": chat,
            "logits": model(**inputs).logits.double().sum().item(),
            "sequences": output.sequences.tolist(),
            "trace": [[retrieval.to_dict() for retrieval in trace] for trace in output.retrievals],
            "cited": model.decode_with_citations(output, tokenizer),
        }
        try:
            model.load_index("wiki", uri="http://127.0.0.1:9")
        except ImportError as error:
            result["milvus"] = str(error)
        if not options:
            own = model.build_index(job["passages"], show_progress_bar=False)
            result["embeddings"] = float((own.embeddings - index.embeddings).abs().max())
            result["ids"] = [own[row]["input_ids"] for row in range(len(own))]
            if auto is AutoModelForCausalLM:
                model.save_pretrained(job["again"] + folder.rsplit("/", 1)[1])
                model.save_gen("gen")
                with open("gen/README.md") as file:
                    result["card of gen"] = file.read()
                try:
                    model.build_index("corpus.jsonl", show_progress_bar=False)
                except ImportError as error:
                    result["corpus in a file"] = str(error)
        results.append(result)
print(json.dumps(results))
"""


def run_elsewhere(tmp_path, pairs, inputs):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    (tmp_path / "cwd").mkdir(exist_ok=True)
    job = {"pairs": pairs, "inputs": inputs, "again": f"{tmp_path}/again_", "passages": PASSAGES}
    command = [sys.executable, "-I", "-c", SCRIPT, json.dumps(job)]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    result = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, timeout=300, **streams)
    assert result.returncode == 0, result.stderr
    assert "[transformers]" not in result.stderr, result.stderr  # no warnings
    return json.loads(result.stdout)  # nothing else is printed: nobody is asked again whether this code may run


@pytest.fixture(scope="module")
def models():
    own = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", pad="<nothing>", texts=["another corpus"])
    return {
        "plain": make_model(),
        "two_tokenizers": make_model(
            "gpt2",
            "bert",
            emb_seq_kwargs={"hidden_size": 16},
            emb_seq_pooling="cls",
            similarity="dot",
            emb_seq_tokenizer=own,
        ),
    }


def as_json(retrieval):
    """A retrieval as JSON gives it back, without its score."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in retrieval.to_dict().items()
        if name != "scores"
    }


def test_a_process_without_this_package_gives_the_same(models, tmp_path):
    pairs, expected = [], {}
    prompts = [
        [*encode_prompt(models["plain"].tokenizer, question), models["plain"].config.nsp_token_id]
        for question in QUESTIONS
    ]
    inputs = left_pad(prompts, models["plain"].tokenizer.pad_token_id)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        index = model.build_index(PASSAGES, show_progress_bar=False)
        index.save_pretrained(tmp_path / f"{name}_index")
        pairs.append([f"{tmp_path}/{name}", f"{tmp_path}/{name}_index"])
        output = model.generate(
            **inputs, retriever=index, max_new_tokens=12, max_retrievals=3, return_dict_in_generate=True
        )
        expected[name] = model(**inputs).logits.double().sum().item(), output, index
    found = run_elsewhere(tmp_path, pairs, {key: value.tolist() for key, value in inputs.items()})
    assert len(found) == 6
    for i, result in enumerate(found):
        name = list(models)[i // 3]
        model, (logits, output, index) = models[name], expected[name]
        assert result["model_type"] == "cosup" and result["module"] == "transformers_modules"
        assert (
            result["logits"] == pytest.approx(logits, rel=1e-4, abs=1e-2)
            and result["sequences"] == output.sequences.tolist()
        )
        for found_trace, trace in zip(result["trace"], output.retrievals, strict=True):
            scores = [
                retrieval.pop("scores") for retrieval in found_trace
            ]  # another number of threads may round the last digit otherwise
            assert scores == pytest.approx(np.array([retrieval.scores for retrieval in trace]), abs=1e-5)
            assert found_trace == [as_json(retrieval) for retrieval in trace]
        assert result["cited"] == model.decode_with_citations(output, model.tokenizer) and "[1]" in result["cited"][0]
        assert (
            result["milvus"]
            == 'An index in Milvus needs the package cosup, which does not come with a checkpoint: pip install "cosup[milvus]".'
        )
        assert result["vocabulary"] == len(model.tokenizer) and result["chat"] == encode_prompt(
            model.tokenizer, "who?"
        )
        pad, width = model.tokenizer.pad_token_id, output.prompt_length
        for ids, sequence in zip(result["many"], result["sequences"], strict=True):
            assert ids + [pad] * (len(sequence) - width - len(ids)) == sequence[width:]
        if "card of gen" in result:  # what only authors need is not here, which is said or does not matter
            assert "pip install cosup" in result["corpus in a file"]
            assert (
                "library_name: transformers" in result["card of gen"]
                and "# gen\n\nGen of a CoSup model" in result["card of gen"]
            )
        if "ids" in result:
            assert result["embeddings"] < 1e-5 and result["ids"] == [
                index[row]["input_ids"] for row in range(len(index))
            ]

    for name, model in models.items():  # what the other process saved is as good as what it loaded
        again = tmp_path / f"again_{name}"
        assert sorted(os.listdir(again)) == sorted(os.listdir(tmp_path / name))
        loaded = CoSupForCausalLM.from_pretrained(again)
        assert loaded.fingerprint() == model.fingerprint()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
        loaded.load_index(f"{tmp_path}/{name}_index")
    again = run_elsewhere(
        tmp_path, [[f"{tmp_path}/again_plain", pairs[0][1]]], {key: value.tolist() for key, value in inputs.items()}
    )
    for result, first in zip(again, found[:3], strict=True):
        assert (result["sequences"], result["cited"], result["chat"]) == (
            first["sequences"],
            first["cited"],
            first["chat"],
        )
    assert (
        PassageIndex.from_pretrained(pairs[0][1]).fingerprint != PassageIndex.from_pretrained(pairs[1][1]).fingerprint
    )


# runs where the package is installed; the classes of the model still come with the checkpoint
MILVUS_SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, index_folder, uri, inputs = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = {name: torch.tensor(value) for name, value in inputs.items()}
indexes = model.load_index(index_folder), model.load_index("elsewhere", uri=uri)
result = {"modules": [type(each).__module__ for each in (model, *indexes)]}
outputs = [model.generate(**inputs, retriever=index, max_new_tokens=12, max_retrievals=3, return_dict_in_generate=True) for index in indexes]
result["sequences"] = [output.sequences.tolist() for output in outputs]
result["ids"] = [[[retrieval.passage_ids for retrieval in trace] for trace in output.retrievals] for output in outputs]
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
    prompts = [[*encode_prompt(model.tokenizer, question), model.config.nsp_token_id] for question in QUESTIONS]
    inputs = {name: value.tolist() for name, value in left_pad(prompts, model.tokenizer.pad_token_id).items()}
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HOME": str(tmp_path / "hf_home"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    job = json.dumps([str(tmp_path / "model"), str(tmp_path / "index"), milvus_server.uri, inputs])
    command = [sys.executable, "-c", MILVUS_SCRIPT, job]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    model_module, files_module, milvus_module = result["modules"]
    assert model_module.startswith("transformers_modules") and files_module.startswith("transformers_modules")
    assert milvus_module == "modeling_cosup.milvus_cosup"
    assert (
        result["sequences"][0] == result["sequences"][1]
        and result["ids"][0] == result["ids"][1]
        and any(result["ids"][0])
    )
    assert result["added"] == "radium"
