"""
Use the installed package once: build a tiny model and an index, save both, load them and generate with a citation.

    python smoke_test.py             # in a folder outside of the checkout
    python .ci/smoke_test.py .       # the packages of this checkout

It needs the extra `cpu`, no network, and a few seconds. Without an argument it fails if the packages are not installed
ones.
"""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_cosup
import trainer
from modeling_cosup import CoSupForCausalLM, RetrievalConfig
from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import facts_of
from modeling_cosup.tokenization_cosup import encode_prompt

PASSAGES = [
    {"id": "p1", "title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."},
    {"id": "p2", "title": "Radium", "text": "Marie Curie discovered radium."},
]


def tiny_model() -> CoSupForCausalLM:
    """Return a tied model with random weights, whose tokenizer knows the 256 bytes."""
    vocabulary = {byte: id for id, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return CoSupForCausalLM.from_gen_and_emb_seq(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def main() -> None:
    """Build, save, load and generate."""
    for package in (modeling_cosup, trainer):
        place = Path(package.__file__).parent
        print(f"{package.__name__}: {place}")
        assert len(sys.argv) > 1 or "site-packages" in place.parts, f"{place} is not an installed package"
    with tempfile.TemporaryDirectory() as folder:
        built = tiny_model()
        built.save_pretrained(folder)
        built.build_index(PASSAGES, show_progress_bar=False).save_pretrained(f"{folder}/index")
        model = AutoModelForCausalLM.from_pretrained(folder)  # importing the package has registered it
        index = model.load_index(f"{folder}/index")
        settings = RetrievalConfig(force_nsp_first=True, max_retrievals=1)
        prompt = list(encode_prompt(model.tokenizer, "Who painted the Night Watch?"))
        (answer,) = model.generate_many([prompt], retriever=index, retrieval_config=settings, max_new_tokens=8)
        card = model_card(model, "me/tiny", facts_of(model))  # from the template that is installed with the package
    (retrieval,) = answer.retrievals
    assert retrieval.passages[0] in PASSAGES, retrieval
    assert PASSAGES[0]["text"] in answer.cited_text or PASSAGES[1]["text"] in answer.cited_text
    assert "me/tiny" in card
    print(answer.cited_text)


if __name__ == "__main__":
    main()
