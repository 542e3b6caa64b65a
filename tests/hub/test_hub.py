"""What is pushed comes back: a real server, the genuine client, and fresh processes without this package."""

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from modeling_cosup import CoSupForCausalLM, MemoryConfig
from modeling_cosup.facts_cosup import FACTS_FILE
from modeling_cosup.files_cosup import write_json
from modeling_cosup.hub_cosup import is_repo_id
from support.hub_server import TOKEN, hub_server
from support.models import PASSAGES, make_model, make_tokenizer

pytest.importorskip("jsonschema", reason="jsonschema, which the test Hub checks cards with, is not installed")

WIDE = {"hidden_size": 128, "intermediate_size": 128}  # 4-bit weights come in blocks of 64
PUSH = """
import json, sys
from modeling_cosup import CoSupForCausalLM, MLPMemory
folder, passages = sys.argv[1], json.loads(sys.argv[2])
commits = {}
for name in ("plain", "two_tokenizers"):
    model = CoSupForCausalLM.from_pretrained(f"{folder}/{name}")
    index = model.build_index(passages, save_directory=f"{folder}/{name}_index", show_progress_bar=False)
    commit = index.push_to_hub(f"{name}-index", model=f"tester/{name}", license="cc-by-sa-4.0")
    commits[f"{name}_index"] = commit.oid
    commit = model.push_to_hub(
        name, index=f"tester/{name}-index", license="mit", max_shard_size="200KB", tags=["tiny"]
    )
    commits[name] = commit.oid
    if name == "plain":
        memory = MLPMemory.from_gen(model, intermediate_size=8)
        memory.push_to_hub("plain-memory", model="tester/plain", license="mit")
        commits["memory"] = memory.fingerprint
        memory = model.build_memory([passage["text"] for passage in passages], show_progress_bar=False)
        memory.push_to_hub("plain-datastore", model="tester/plain", license="mit")
        commits["datastore"] = memory.fingerprint
index = model.build_index(passages[:5], show_progress_bar=False)
commits["of_five"] = index.push_to_hub("tester/two_tokenizers-index").oid
print(json.dumps(commits))
"""
# All that a checkpoint on the Hub must be able to do, in one process because each takes seconds to start
LOAD = """
import json, sys, types
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline
job, results = json.loads(sys.argv[1]), {}

def answer(model, index):
    inputs = {name: torch.tensor(value) for name, value in job["inputs"].items()}
    out = model.generate(**inputs, retriever=index, max_new_tokens=8, max_retrievals=2, return_dict_in_generate=True)
    trace = []
    for row in out.retrievals:
        trace.append([{**r.to_dict(), "grounded_span": list(r.grounded_span)} for r in row])
    embeddings = model.build_index(job["passages"], show_progress_bar=False).embeddings
    return {
        "sequences": out.sequences.tolist(),
        "trace": trace,
        "cited": model.decode_with_citations(out, model.tokenizer),
        "dtype": str(model.dtype),
        "module": type(model).__module__.split(".")[0],
        "attention": [part.config._attn_implementation for part in (model.gen, model.emb_seq)],
        "embeddings": float((embeddings - index.embeddings).abs().max()),
    }

def load(auto=AutoModelForCausalLM, **kwargs):
    model = auto.from_pretrained("tester/plain", trust_remote_code=True, **kwargs)
    return answer(model, model.load_index("tester/plain-index"))

results["plain"] = load()
if job["all"]:
    results["AutoModel"] = load(AutoModel)
    results["code_revision"] = load(revision=job["commit"], code_revision=job["commit"])
    results["eager"] = load(attn_implementation="eager")
    results["auto"] = load(device_map="auto")
    results["disk"] = load(device_map={"gen": "cpu", "emb_seq": "disk"}, offload_folder="offloaded")
    results["bfloat16"] = load(dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained("tester/two_tokenizers", trust_remote_code=True)
    index = model.load_index("tester/two_tokenizers-index", revision=job["index_commit"])
    results["two_tokenizers"] = answer(model, index)
    results["of_five"] = len(model.load_index("tester/two_tokenizers-index"))
    try:
        model.load_index("tester/plain-index")
    except ValueError as error:
        results["refused"] = str(error)
    pipe = pipeline("text-generation", model="tester/plain", trust_remote_code=True)
    results["memory"] = pipe.model.load_memory("tester/plain-memory", allow_faiss_files=True).fingerprint
    index = pipe.model.load_index("tester/plain-index")
    chat, config = [{"role": "user", "content": "who?"}], pipe.model.retrieval_config_class(force_nsp_first=True)
    results["pipeline"] = pipe(chat, retriever=index, retrieval_config=config, max_new_tokens=8)
    results["prompt"] = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    for bits in job["bits"]:
        results[f"{bits} bits"] = load(quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
print(json.dumps(results))
"""
WITHOUT_PACKAGES = """
import json, sys
for name in ("faiss", "pyarrow", "pymilvus", "datasets", "peft", "accelerate", "matplotlib", "sentence_transformers"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tester/plain", trust_remote_code=True)
ids = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4).tolist()
memory = model.load_memory("tester/plain-datastore")
config = model.memory_config_class(weight=0.9, k=8, temperature=20.0)
spoken = model.generate(torch.tensor([[5, 6]]), memory=memory, memory_config=config, max_new_tokens=8).tolist()
checked = model.load_memory("tester/plain-datastore", verify=True, search="exact")
fingerprints = [memory.fingerprint, checked.fingerprint]
try:
    model.load_index("tester/plain-index")
except ImportError as error:
    print(json.dumps([ids, str(error), spoken, fingerprints]))
"""
PUSH_BARE = """
import sys
from modeling_cosup import CoSupForCausalLM
CoSupForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("bare")
print(1)
"""


@pytest.fixture(scope="module")
def models():
    other = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", pad="<nothing>", texts=["another corpus"])
    return {
        "plain": make_model(gen_kwargs=WIDE, emb_seq_kwargs=WIDE),
        "two_tokenizers": make_model(
            "gpt2",
            "bert",
            emb_seq_kwargs={"hidden_size": 16},
            emb_seq_pooling="cls",
            similarity="dot",
            emb_seq_tokenizer=other,
        ),
    }


@pytest.fixture(scope="module")
def published(models, tmp_path_factory):
    """A Hub that holds two models and their indexes, and the ids of the commits that pushed them."""
    folder = tmp_path_factory.mktemp("hub")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        write_json(folder / name / FACTS_FILE, {"weights": model.hash_all_weights(), "question": "who painted it?"})
    with hub_server(folder / "server") as hub:
        yield hub, hub.run(PUSH, folder, json.dumps(PASSAGES))


@pytest.fixture(scope="module")
def inputs(models):
    """A prompt that ends in `[NSP]`, so that it retrieves first, and one after which the model decides."""
    nsp, pad = models["plain"].config.nsp_token_id, models["plain"].tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[5, 6, 7, nsp], [pad, pad, 9, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }


def job(inputs, **settings):
    """Return the argument of `LOAD`."""
    input_lists = {name: value.tolist() for name, value in inputs.items()}
    return json.dumps({"inputs": input_lists, "passages": PASSAGES, "all": False, **settings})


def assert_same(result, model, inputs):
    """Assert that a model that was loaded elsewhere answers, retrieves and embeds as `model` does here."""
    index = model.build_index(PASSAGES, show_progress_bar=False)
    output = model.generate(
        **inputs, retriever=index, max_new_tokens=8, max_retrievals=2, return_dict_in_generate=True
    )
    assert result["sequences"] == output.sequences.tolist()
    assert result["cited"] == model.decode_with_citations(output, model.tokenizer)
    for remote_row, local_row in zip(result["trace"], output.retrievals, strict=True):
        for remote, local in zip(remote_row, local_row, strict=True):
            assert remote.pop("scores") == pytest.approx(np.array(local.scores), abs=1e-4)
            expected = local.to_dict()
            del expected["scores"]
            expected["grounded_span"] = list(local.grounded_span)  # JSON has no tuples
            assert remote == expected
    assert result["embeddings"] < 1e-4
    assert result["module"] == "transformers_modules"
    assert sum(map(len, output.retrievals)) > 0


def listing(hub, repo, repo_type="model"):
    """Return the names of the files of a repository, and its README."""
    code = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
repo, kind = sys.argv[1:]
readme = Path(hf_hub_download(repo, "README.md", repo_type=kind)).read_text()
print(json.dumps([HfApi().list_repo_files(repo, repo_type=kind), readme]))
"""
    return hub.run(code, repo, repo_type)


def test_what_was_pushed_loads_and_answers_the_same_without_this_package(published, models, inputs, tmp_path):
    hub, commits = published
    bits = [8, 4] if find_spec("bitsandbytes") else []
    settings = {"all": True, "commit": commits["plain"], "index_commit": commits["two_tokenizers_index"], "bits": bits}
    results = hub.run(LOAD, job(inputs, **settings), package=False, home=tmp_path / "home")
    for name in ("plain", "AutoModel", "code_revision", "eager", "auto", "disk"):
        assert_same(results[name], models["plain"], inputs)
    assert results["eager"]["attention"] == ["eager"] * 2
    assert results["plain"]["attention"] == ["sdpa"] * 2
    assert_same(results["two_tokenizers"], models["two_tokenizers"], inputs)
    assert results["of_five"] == 5  # the last commit; the one before can still be loaded by its revision
    assert "emb_seq: the index has" in results["refused"]
    assert results["memory"] == commits["memory"]
    assert results["bfloat16"]["dtype"] == "torch.bfloat16"
    assert 0 < results["bfloat16"]["embeddings"] < 0.1

    model = models["plain"]
    index = model.build_index(PASSAGES, show_progress_bar=False)
    ids = torch.tensor([results["prompt"]])
    config = model.retrieval_config_class(force_nsp_first=True)
    sequence = model.generate(ids, retriever=index, retrieval_config=config, max_new_tokens=8)[0, ids.shape[1] :]
    reply = results["pipeline"][0]["generated_text"][-1]["content"]
    assert reply == model.tokenizer.decode(sequence, skip_special_tokens=True)

    passage_ids = {passage["id"] for passage in PASSAGES}
    for width in bits:  # other weights may answer differently, but they search the same index
        assert results[f"{width} bits"]["trace"][0][0]["passages"][0]["id"] in passage_ids

    num_requests = len(hub.requests())
    offline = hub.run(LOAD, job(inputs), package=False, home=tmp_path / "home", variables={"HF_HUB_OFFLINE": "1"})
    assert_same(offline["plain"], models["plain"], inputs)
    assert len(hub.requests()) == num_requests


def test_the_code_needs_torch_and_transformers_and_an_index_names_what_it_needs(published, models):
    hub, commits = published
    process = hub.popen(WITHOUT_PACKAGES, package=False)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    ids, message, spoken, fingerprints = json.loads(out.splitlines()[-1])
    model, prompt = models["plain"], torch.tensor([[5, 6]])
    assert ids == model.generate(prompt, max_new_tokens=4).tolist()
    memory = model.build_memory([passage["text"] for passage in PASSAGES], show_progress_bar=False)
    config = MemoryConfig(weight=0.9, k=8, temperature=20.0)
    assert spoken == model.generate(prompt, memory=memory, memory_config=config, max_new_tokens=8).tolist()
    assert spoken != model.generate(prompt, max_new_tokens=8).tolist()
    assert fingerprints == [commits["datastore"]] * 2
    assert "needs pyarrow: pip install pyarrow" in message


def test_what_a_repository_holds(published, tmp_path):
    hub, _ = published
    names, card = listing(hub, "tester/two_tokenizers")
    model = CoSupForCausalLM.from_pretrained(hub.root.parent / "two_tokenizers")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    saved = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(names) - {".gitattributes"} == saved | {"README.md"}
    assert {"config.json", "generation_config.json", "training_facts.json"} <= saved
    assert {"chat_template.jinja", "emb_seq_tokenizer/tokenizer.json"} <= saved
    assert "model.safetensors.index.json" in listing(hub, "tester/plain")[0]
    metadata = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1].splitlines()
    assert {"license: mit", "library_name: transformers", "pipeline_tag: text-generation"} <= set(metadata)
    assert {"- retrieval-augmented-generation", "- tiny"} <= set(metadata)
    assert 'model.load_index("tester/two_tokenizers-index")' in card
    assert "GPT2LMHeadModel | BertModel" in card

    names, card = listing(hub, "tester/two_tokenizers-index", "dataset")
    for text in ("license: cc-by-sa-4.0", "n<1K", "viewer: false", "5 passages"):  # the first push gave the licence
        assert text in card
    assert {"index_config.json", "embeddings-00000.safetensors", "passages-00000.arrow"} <= set(names)

    names, card = listing(hub, "tester/plain-memory")
    assert set(names) - {".gitattributes"} == {"README.md", "memory_config.json", "model.safetensors"}
    assert "license: mit" in card
    assert 'model.load_memory("tester/plain-memory")' in card

    names, card = listing(hub, "tester/plain-datastore", "dataset")
    assert set(names) - {".gitattributes"} == {"README.md", "memory_config.json", "keys-00000.safetensors"}
    for text in ("license: mit", "viewer: false", f"of {len(PASSAGES)} texts", "float16"):
        assert text in card
    assert 'model.load_memory("tester/plain-datastore")' in card


@pytest.mark.parametrize("index", ["with its index", "without an index"])
def test_the_usage_block_of_the_card_runs_as_pasted(published, index):
    hub, _ = published
    repo = "tester/plain"
    if index == "without an index":
        repo = "tester/bare"
        hub.run(PUSH_BARE, hub.root.parent / "plain")
    card = listing(hub, repo)[1]
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert ("load_index" in code) == (index == "with its index")
    assert "who painted it?" in code
    # random weights never decide to retrieve
    forced = "retriever=index, retrieval_config=model.retrieval_config_class(force_nsp_first=True),"
    out = hub.call(code.replace("retriever=index,", forced), package=False).stdout
    assert "[1] " in out
    assert "Retrieval(row=0" in out


UPLOADS = {
    "model": "CoSupForCausalLM.from_pretrained(sys.argv[1] + '/plain').push_to_hub('victim', max_shard_size='70KB')",
    "dataset": "PassageIndex.from_pretrained(sys.argv[1] + '/index').push_to_hub('victim')",
}
# About half of each upload, and more than the five files that are sent at a time
STALL_AFTER_BYTES = {"model": 1_000_000, "dataset": 140_000}
LIST_VICTIM = """
import json, sys
from huggingface_hub import HfApi
print(json.dumps(HfApi().list_repo_files("tester/victim", repo_type=sys.argv[1])))
"""
LOAD_VICTIM = {
    "model": """
import json, torch
from transformers import AutoModel
model = AutoModel.from_pretrained("tester/victim", trust_remote_code=True)
print(json.dumps(model.fingerprint()))
""",
    "dataset": """
import json
from modeling_cosup import PassageIndex
index = PassageIndex.from_pretrained("tester/victim", verify=True)
print(json.dumps([passage["text"] for passage in index]))
""",
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_a_push_that_the_server_did_not_survive_is_completed_by_the_next_one(models, kind, tmp_path):
    models["plain"].save_pretrained(tmp_path / "plain")
    passages = [{"id": f"m{i}", "title": "", "text": f"radium {i}"} for i in range(400)]
    index = models["plain"].build_index(
        passages, save_directory=tmp_path / "index", shard_size=20, show_progress_bar=False
    )
    code = "import sys\nfrom modeling_cosup import CoSupForCausalLM, PassageIndex\n"
    code += f"{UPLOADS[kind]}\nprint(1)"
    with hub_server(tmp_path / "hub", stall_after_bytes=STALL_AFTER_BYTES[kind]) as hub:
        process = hub.popen(code, tmp_path)
        hub.wait_for_stall()
        hub.kill()
        process.kill()
        process.communicate()
        hub.start(stall_after_bytes=None)
        assert set(hub.run(LIST_VICTIM, kind)) <= {".gitattributes", "README.md"}  # not half of it
        arrived = {request["path"] for request in hub.requests("PUT") if request["status"] == 200}
        assert arrived

        num_requests = len(hub.requests())
        hub.run(code, tmp_path)
        new_requests = hub.requests()[num_requests:]
        assert not arrived & {request["path"] for request in new_requests if request["method"] == "PUT"}
        if kind == "model":
            assert hub.run(LOAD_VICTIM[kind], package=False) == models["plain"].fingerprint()
        else:
            assert hub.run(LOAD_VICTIM[kind]) == [passage["text"] for passage in index]


def test_stale_files_are_deleted_and_the_owners_card_is_kept(models, tmp_path):
    models["plain"].save_pretrained(tmp_path / "plain")
    code = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
from modeling_cosup import CoSupForCausalLM
api, model = HfApi(), CoSupForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("m", max_shard_size="200KB")
sharded = api.list_repo_files("tester/m")
words = b"---\\nlicense: mit\\n---\\nMy own words.\\n"
api.upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id="tester/m")
api.upload_file(path_or_fileobj=b"notes", path_in_repo="notes.txt", repo_id="tester/m")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="m")
model.push_to_hub("m", revision="other")
whole = api.list_repo_files("tester/m")
card = Path(hf_hub_download("tester/m", "README.md")).read_text()
print(json.dumps([sharded, whole, card, api.list_repo_files("tester/m", revision="other")]))
"""
    with hub_server(tmp_path / "hub") as hub:
        sharded, whole, card, branch = hub.run(code, tmp_path / "plain", tmp_path / "again")
    assert "model.safetensors.index.json" in sharded
    assert "model.safetensors" not in sharded
    assert "model.safetensors" in whole
    assert not any("-of-" in name or name.endswith("index.json") for name in whole)
    assert "notes.txt" in whole
    assert "My own words." in card
    assert sorted(whole) == sorted(branch)


def test_a_refusal_of_the_hub_is_reported_and_nothing_is_uploaded(models, tmp_path):
    models["plain"].save_pretrained(tmp_path / "plain")
    code = """
import json, sys
from modeling_cosup import CoSupForCausalLM
model = CoSupForCausalLM.from_pretrained(sys.argv[1])
try:
    model.push_to_hub("tester/m", **json.loads(sys.argv[2]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
    with hub_server(tmp_path / "hub") as hub:
        kind, message = hub.run(code, tmp_path / "plain", "{}", token="hf_wrong")
        assert kind == "HfHubHTTPError"
        assert "401" in message
        assert "hf_wrong" not in message
        kind, message = hub.run(code, tmp_path / "plain", '{"license": "my own licence"}')
        assert kind == "ValueError"
        assert "Invalid metadata in README.md" in message
        assert "license" in message
        assert not hub.requests("PUT")
        assert TOKEN not in (tmp_path / "hub" / "requests.jsonl").read_text()


def test_a_second_push_by_the_code_from_the_hub_keeps_the_facts(published):
    hub, _ = published
    code = """
import json
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from huggingface_hub import hf_hub_download
model = AutoModelForCausalLM.from_pretrained("tester/plain", trust_remote_code=True)
model.push_to_hub("tester/copy")
same = json.loads(Path(hf_hub_download("tester/copy", "training_facts.json")).read_text())
with torch.no_grad():
    next(model.parameters()).add_(1)
model.push_to_hub("tester/changed")
changed = json.loads(Path(hf_hub_download("tester/changed", "training_facts.json")).read_text())
print(json.dumps([same, changed, Path(hf_hub_download("tester/changed", "README.md")).read_text()]))
"""
    same, changed, card = hub.run(code, package=False)
    assert same["question"] == "who painted it?"
    assert same["license"] == changed["license"] == "mit"
    assert same["tags"] == changed["tags"] == ["tiny"]
    assert not {"question", "index"} & changed.keys()  # they are about the earlier weights
    assert "license: mit" in card
    assert "library_name: transformers" in card
    assert "A CoSup model" in card


def test_parts_are_pushed_and_load_without_any_code(models, tmp_path):
    pytest.importorskip("sentence_transformers")
    models["plain"].save_pretrained(tmp_path / "plain")
    push = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from modeling_cosup import CoSupForCausalLM
model, folder = CoSupForCausalLM.from_pretrained(sys.argv[1]), Path(sys.argv[2])
for name in ("gen", "emb"):
    (folder / name / ".git").mkdir(parents=True)
    (folder / name / ".git" / "config").write_text("https://user:secret@example.org")
    (folder / name / "optimizer.pt").write_text("x")
model.save_gen(folder / "gen", push_to_hub=True, repo_id="gen-alone")
model.save_emb_seq(folder / "emb", push_to_hub=True, repo_id="emb-alone")
print(json.dumps([HfApi().list_repo_files(f"tester/{name}-alone") for name in ("gen", "emb")]))
"""
    use = """
import json, re, sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
def usage_block(repo):
    card = Path(hf_hub_download(repo, "README.md")).read_text()
    return re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1]
exec(usage_block("tester/gen-alone"))
logits = float(model(torch.tensor([[5, 6, 7]])).logits.sum())
exec(usage_block("tester/emb-alone"))
print(json.dumps([logits, embeddings.tolist()]))
"""
    with hub_server(tmp_path / "hub") as hub:
        for names in hub.run(push, tmp_path / "plain", tmp_path / "parts"):
            assert not [name for name in names if "git/" in name or name.endswith(".pt")]
        logits, embeddings = hub.run(use, package=False)
    model = models["plain"]
    assert logits == pytest.approx(float(model(torch.tensor([[5, 6, 7]])).logits.sum()), rel=1e-4)
    passage = {"id": "1", "title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."}
    expected = model.build_index([passage], show_progress_bar=False).embeddings.numpy()
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_a_checkpoint_is_saved_even_if_its_source_is_gone(published, tmp_path):
    """Neither a deleted repository nor a malformed file of facts prevents saving."""
    hub, _ = published
    code = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from modeling_cosup import CoSupForCausalLM
model = CoSupForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("tester/gone")
model = CoSupForCausalLM.from_pretrained("tester/gone")
HfApi().delete_repo("tester/gone")
model.save_pretrained(sys.argv[2])
(Path(sys.argv[2]) / "training_facts.json").write_text("{")
CoSupForCausalLM.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])
print(json.dumps([(Path(folder) / "model.safetensors").exists() for folder in sys.argv[2:]]))
"""
    assert hub.run(code, hub.root.parent / "plain", tmp_path / "a", tmp_path / "b") == [True, True]


def test_names_that_are_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("HuggingFaceTB/SmolLM2-135M", "runs/yours"):
        assert is_repo_id(name)
    for name in ("runs/mine", str(tmp_path), "../x/y", "a/b/c", "gpt2", "", None):
        assert not is_repo_id(name)
