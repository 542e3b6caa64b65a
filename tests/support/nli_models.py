"""
Tiny NLI models, trained in a few seconds on a relation that is known: a premise entails a hypothesis if both name the same colour.

The other words say nothing, and some of them (`UNSEEN`) never occur in training, so that answers on held-out pairs are learned, not remembered.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

COLOURS = ["red", "blue", "green", "black"]
FILLERS = [f"w{i}" for i in range(10)]
UNSEEN = [f"v{i}" for i in range(4)]
MARKS = ["Title", ":", "."]  # what a passage and a sentence also hold; trained, or an answer would be a matter of luck
WORDS = [*COLOURS, *FILLERS, *UNSEEN, "premise", "hypothesis", *MARKS, "0", "1"]


def colour_pair(generator, fillers=FILLERS):
    """`(premise, hypothesis, whether it is entailed)`."""
    colour, entailed = generator.choice(COLOURS), generator.random() < 0.5
    other = colour if entailed else generator.choice([each for each in COLOURS if each != colour])
    premise = generator.choices(fillers, k=generator.randint(1, 5))
    premise.insert(generator.randint(0, len(premise)), colour)
    full_stop = " ." if generator.random() < 0.3 else ""
    return " ".join(premise), f"{generator.choice(fillers)} {other}{full_stop}", entailed


def held_out_pairs(n, seed=1):
    """Pairs with words that no model was trained on."""
    generator = random.Random(seed)
    return [colour_pair(generator, UNSEEN + FILLERS[:2]) for _ in range(n)]


def _tokenizer(special, template, **names):
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token=special[-1])
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = template([(token, i) for i, token in enumerate(special)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def _train(model, batch, steps):
    torch.manual_seed(0)
    generator, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        model(**batch([colour_pair(generator, FILLERS + MARKS) for _ in range(64)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_classifier(labels=("contradiction", "neutral", "ENTAILMENT"), steps=350):
    """A BERT and its tokenizer; entailed pairs get the last label, others the first."""

    def template(tokens):
        return processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=tokens
        )

    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = _tokenizer(
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        template,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**sizes, **no_dropout, max_position_embeddings=64, id2label=dict(enumerate(labels)))
    )

    def batch(pairs):
        inputs = tokenizer([p for p, _, _ in pairs], [h for _, h, _ in pairs], padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([len(labels) - 1 if entailed else 0 for *_, entailed in pairs])}

    return _train(model, batch, steps), tokenizer


def make_t5(steps=200):
    """A T5 and its tokenizer, which reads `premise: … hypothesis: …` and writes "1" or "0"."""

    def template(tokens):
        return processors.TemplateProcessing(single="$A </s>", special_tokens=tokens)

    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer = _tokenizer(["<pad>", "</s>", "<unk>"], template, **names)
    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 4,
    }
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    )

    def batch(pairs):
        inputs = tokenizer([f"premise: {p} hypothesis: {h}" for p, h, _ in pairs], padding=True, return_tensors="pt")
        return {
            **inputs,
            "labels": tokenizer([str(int(entailed)) for *_, entailed in pairs], return_tensors="pt")["input_ids"],
        }

    return _train(model, batch, steps), tokenizer
