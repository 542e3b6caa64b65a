"""Gen in a GGUF file for `recipes/benchmarks/gpu.py`: whole or in pieces, checked and converted once."""

import hashlib

import numpy as np
import pytest
import torch

import support.benchmarks  # noqa: F401  (makes gpu_parts importable)

from gpu_parts import weights
from gpu_parts.runner import Skip


def test_pieces_of_a_gguf_file_are_put_together_and_checked(tmp_path):
    content = bytes(range(256)) * 9
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    for number in range(12):  # part10 comes after part9
        (pieces / f"small.gguf.part{number}").write_bytes(content[200 * number : 200 * number + 200])
    (pieces / "small.gguf.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  small.gguf\n")
    path = weights.gguf_file(pieces, tmp_path / "out")
    assert path == tmp_path / "out" / "small.gguf"
    assert path.read_bytes() == content
    (pieces / "small.gguf.part11").unlink()
    with pytest.raises(ValueError, match="is a piece missing or damaged"):
        weights.gguf_file(pieces, tmp_path / "out")


def test_a_gguf_file_needs_the_package(tmp_path, monkeypatch):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(weights, "is_installed", lambda package: False)
    with pytest.raises(Skip, match="gguf is not installed, and --gen .* is a GGUF file"):
        weights.given_gen(str(tmp_path / "small.gguf"), tmp_path / "out")
    assert weights.given_gen("no/such/place", tmp_path) == "no/such/place"  # transformers says what is wrong


def test_a_gguf_file_becomes_a_checkpoint(tmp_path):
    gguf = pytest.importorskip("gguf")
    tensors = write_gguf(gguf, tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "small.gguf").unlink()
    for number, start in enumerate(range(0, len(content), 4000)):
        (tmp_path / f"small.gguf.part{number}").write_bytes(content[start : start + 4000])
    folder = weights.given_gen(str(tmp_path), tmp_path / "out")
    model = weights.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = weights.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd.weight"]))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.from_numpy(tensors["blk.0.ffn_up.weight"]))
    assert tokenizer.decode(tokenizer("ab b")["input_ids"]) == "ab b"
    (tmp_path / "small.gguf.part0").unlink()
    assert weights.given_gen(str(tmp_path), tmp_path / "out") == folder  # converted once


def write_gguf(gguf, path):
    """Write a Llama of one layer as a GGUF file, and return its tensors."""
    tokens = ["<s>", "</s>", "<pad>", "a", "b", "Ġ", "ab"]
    width, inner = 8, 16
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), width), "output_norm.weight": (width,)}
    for name, shape in (
        ("attn_q", (width, width)),
        ("attn_k", (width, width)),
        ("attn_v", (width, width)),
        ("attn_output", (width, width)),
        ("ffn_gate", (inner, width)),
        ("ffn_up", (inner, width)),
        ("ffn_down", (width, inner)),
        ("attn_norm", (width,)),
        ("ffn_norm", (width,)),
    ):
        shapes[f"blk.0.{name}.weight"] = shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
