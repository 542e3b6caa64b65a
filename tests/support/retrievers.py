"""Tiny retrievers, saved by sentence-transformers itself."""

import torch
from tokenizers import processors

from support.models import make_emb_seq, make_gen, make_tokenizer


def retriever(folder, architecture="bert", pooling="mean", modules=(), max_seq_length=96, **kwargs):
    """
    Write a tiny Gen, and a retriever as sentence-transformers saves it. Return the options that name both.

    The tokenizer of the retriever puts `<s>` and `</s>` around a text.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = make_tokenizer(texts=["The retriever has a tokenizer of its own, which knows painters and radium."])
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=tokens
    )
    make_emb_seq(architecture, hidden_size=16).save_pretrained(folder / "parts")
    tokenizer.save_pretrained(folder / "parts")
    transformer = Transformer(str(folder / "parts"), max_seq_length=max_seq_length)
    model = SentenceTransformer(modules=[transformer, Pooling(16, pooling), *modules], **kwargs)
    model.save(str(folder / "retriever"))
    make_gen("llama").save_pretrained(folder / "gen")
    make_tokenizer().save_pretrained(folder / "gen")
    return ["--gen", folder / "gen", "--emb_seq", folder / "retriever"]


def dense(width=24, bias=False, activation=torch.nn.Identity):
    from sentence_transformers.models import Dense

    torch.manual_seed(3)
    return Dense(16, width, bias=bias, activation_function=activation())


def normalize():
    from sentence_transformers.models import Normalize

    return Normalize()
