"""
Tiny NLI models, trained in seconds on a known relation: a premise entails a hypothesis if both name the same colour.

The other words mean nothing. Some of them (`UNSEEN`) never occur in training, so that right answers on held-out pairs
are learned and not remembered.
"""

import random
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

COLOURS = ["red", "blue", "green", "black"]
FILLERS = [f"w{i}" for i in range(10)]
UNSEEN = [f"v{i}" for i in range(4)]
# Passages and sentences hold these too. They are in the training pairs, or answers would be a matter of luck.
MARKS = ["Title", ":", "."]
WORDS = [*COLOURS, *FILLERS, *UNSEEN, "premise", "hypothesis", *MARKS, "0", "1"]

CLEAR = 3.0  # logits by which a right answer must exceed any other; rounding changes them by less than 1e-4

LabelledPair = tuple[str, str, bool]  # premise, hypothesis, whether it is entailed

# Premises of one repeated filler, which tests of truncation use.
REPEATED: list[LabelledPair] = [
    (f"{colour} {'w1 ' * 8}", f"w2 {named}", colour == named)
    for colour in ("red", "blue")
    for named in ("red", "blue")
]


def colour_pair(generator: random.Random, fillers: Sequence[str] = FILLERS) -> LabelledPair:
    """Draw a pair whose premise and hypothesis name the same colour in half of the cases."""
    colour = generator.choice(COLOURS)
    entailed = generator.random() < 0.5
    other_colours = [name for name in COLOURS if name != colour]
    named = colour if entailed else generator.choice(other_colours)
    premise = generator.choices(fillers, k=generator.randint(1, 8))
    premise.insert(generator.randint(0, len(premise)), colour)
    full_stop = " ." if generator.random() < 0.3 else ""
    return " ".join(premise), f"{generator.choice(fillers)} {named}{full_stop}", entailed


def held_out_pairs(n: int, seed: int = 1) -> list[LabelledPair]:
    """Draw pairs with words that no model was trained on."""
    generator = random.Random(seed)
    return [colour_pair(generator, UNSEEN + FILLERS[:2]) for _ in range(n)]


def make_classifier(
    labels: Sequence[str] = ("contradiction", "neutral", "ENTAILMENT"), steps: int = 800
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train a BERT, and return it with its tokenizer; entailed pairs have the last label, others the first."""

    def template(special_tokens):
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        return processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special_tokens)

    tokenizer = _tokenizer(
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        template,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        id2label=dict(enumerate(labels)),
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)

    def batch_of(pairs):
        premises = [premise for premise, _, _ in pairs]
        hypotheses = [hypothesis for _, hypothesis, _ in pairs]
        targets = [len(labels) - 1 if entailed else 0 for _, _, entailed in pairs]
        inputs = tokenizer(premises, hypotheses, padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor(targets)}

    return _train(model, batch_of, steps), tokenizer


def make_t5(steps: int = 400) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train a T5 that reads `premise: … hypothesis: …` and writes "1" or "0", and return it with its tokenizer."""

    def template(special_tokens):
        return processors.TemplateProcessing(single="$A </s>", special_tokens=special_tokens)

    tokenizer = _tokenizer(
        ["<pad>", "</s>", "<unk>"],
        template,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)

    def batch_of(pairs):
        texts = [f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis, _ in pairs]
        targets = [str(int(entailed)) for _, _, entailed in pairs]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        return {**inputs, "labels": tokenizer(targets, return_tensors="pt")["input_ids"]}

    return _train(model, batch_of, steps), tokenizer


def _tokenizer(special_tokens: list[str], template: Callable, **options) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; the last of `special_tokens` is for unknown ones."""
    vocabulary = {word: i for i, word in enumerate([*special_tokens, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens[-1]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = template([(token, i) for i, token in enumerate(special_tokens)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **options)


def _train(model: PreTrainedModel, batch_of: Callable, steps: int) -> PreTrainedModel:
    """
    Train until every answer to further pairs is clear, so that no test depends on how a machine rounds; raise an
    `AssertionError` if that takes more than `steps`. With 0 steps, nothing is trained.
    """
    torch.manual_seed(0)
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        model(**batch_of([training_pair(generator) for _ in range(64)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            further = [*REPEATED, *(training_pair(generator) for _ in range(256))]
            if smallest_margin(model, batch_of(further)) > CLEAR:
                return model.eval()
    assert not steps, f"After {steps} steps an answer is still not clear."
    return model.eval()


def training_pair(generator: random.Random) -> LabelledPair:
    """Draw a pair with words of the training data."""
    return colour_pair(generator, FILLERS + MARKS)


@torch.no_grad()
def smallest_margin(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Return by how much the logit of a right label exceeds that of any other: the smallest margin of a batch."""
    labels = batch["labels"].reshape(-1, 1)  # (N, 1): one label of a classifier, or the tokens that a T5 writes
    logits = model(**batch).logits.flatten(0, -2)  # (N, labels)
    right = logits.gather(1, labels)
    others = logits.scatter(1, labels, -torch.inf)
    return float((right[:, 0] - others.amax(1)).min())
