"""
Train an NLI model on training instances: a judge for Gr where none fits the data (answers of a few words, another language, a field of its own).

    python recipes/mine_hard_negatives.py --train_file train.jsonl --model sentence-transformers/all-MiniLM-L6-v2 --output_file mined.jsonl
    python recipes/train_nli.py --train_file mined.jsonl --validation_file heldout.jsonl --model_name_or_path microsoft/deberta-v3-small --output_dir nli
    python recipes/run_evaluation.py --nli_model nli --gr_hypothesis '{question} {sentence}' ...

A premise is a passage as Gr gives it to the model, a hypothesis a text as `--hypothesis` says. Two pairs come from a segment. Its passage entails its text. And
either another passage (the first of its `negatives`, else one of the same data set) does not entail it, or the passage does not entail a wrong text: that of
another instance (of a verdict, the other verdict), or the right one with its rarest word of the passage replaced by another rare word of it; in place of an
answer of a few words a name or number of the passage.
What is learnt is whether a passage supports an answer of this data. Say so next to figures: such a judge is neither the paper's, nor independent of the data
that the judged model has seen.

Any option of `transformers.TrainingArguments` may be given. The accuracy on pairs of `--validation_file` is printed by kind, and kept in `eval_results.json`.
"""

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from string import punctuation as PUNCTUATION

from shared.cli import clear_errors, parse, table

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer.data import load_instances
from trainer.judging.correctness import normalize_answer
from trainer.judging.figures import line
from trainer.judging.grounding import check_hypothesis, premise
from trainer.judging.intervals import Rate
from trainer.judging.nli import entailment_label

LABELS = {0: "not_entailment", 1: "entailment"}
KINDS = ("entailed", "other passage", "wrong text", "wrong word")
SENTENCE = 4  # words from which a text is more than an answer
RARE = 5  # words of a passage that may stand in the place of another
NAMES = re.compile(r"\b(?:[A-Z][\w'-]*(?: (?:of |the |de )?[A-Z][\w'-]*)*|\d[\d,.]*\d|\d)")
TRIES = 20  # segments that are drawn to find another passage and another text


@dataclass
class NLIArguments:
    """What is trained, on what."""

    train_file: str = field(metadata={"help": "Training instances: JSON Lines (.gz) or a dataset name."})
    model_name_or_path: str = field(metadata={"help": "An encoder, or an NLI model to go on with."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Held-out instances in the same format, for the accuracy."}
    )
    hypothesis: str = field(
        default="{question} {sentence}",
        metadata={"help": "How a text is read: the --gr_hypothesis of the evaluation."},
    )
    max_length: int = field(
        default=320, metadata={"help": "Tokens of a pair; a longer one loses the end of its premise."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many segments, drawn at random."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same of the held-out ones."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads of a single process on a CPU."})


def main():
    """Train, judge, save."""
    nli, args = parse([NLIArguments, TrainingArguments], __doc__)
    if nli.num_threads:
        torch.set_num_threads(nli.num_threads)
    with clear_errors():
        check_hypothesis(nli.hypothesis)
        set_seed(args.seed)
        train = make_pairs(load_instances(nli.train_file), nli.hypothesis, args.seed, nli.max_train_samples)
        held_out = nli.validation_file and make_pairs(
            load_instances(nli.validation_file, "validation"), nli.hypothesis, args.seed, nli.max_eval_samples
        )
        tokenizer, labels = (
            AutoTokenizer.from_pretrained(nli.model_name_or_path),
            labels_of(AutoConfig.from_pretrained(nli.model_name_or_path)),
        )
        label2id = {name: i for i, name in labels.items()}
        model = AutoModelForSequenceClassification.from_pretrained(
            nli.model_name_or_path, num_labels=2, id2label=labels, label2id=label2id, ignore_mismatched_sizes=True
        )
    entailed = entailment_label(model.config)
    tokenizer.model_max_length = min(nli.max_length, tokenizer.model_max_length)

    def tokenized(pairs):
        room = nli.max_length - tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [len(ids) for ids in tokenizer([h for _, h, _ in pairs], add_special_tokens=False)["input_ids"]]
        if full := sum(length >= room for length in lengths):
            raise ValueError(
                f"{full} of {len(pairs)} hypotheses leave no room for a premise: up to {max(lengths)} of --max_length {nli.max_length} tokens."
            )
        rows = tokenizer(
            [p for p, *_ in pairs], [h for _, h, _ in pairs], truncation="only_first", max_length=nli.max_length
        )
        return Dataset.from_dict(
            {**rows, "labels": [entailed if kind == "entailed" else 1 - entailed for *_, kind in pairs]}
        )

    with clear_errors():
        datasets = {"train_dataset": tokenized(train), "eval_dataset": tokenized(held_out) if held_out else None}
    trainer = Trainer(
        model, args, processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), **datasets
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if held_out:
        right = trainer.predict(datasets["eval_dataset"]).predictions.argmax(1) == np.array(
            datasets["eval_dataset"]["labels"]
        )
        kinds = {"all": right} | {kind: right[[each == kind for *_, each in held_out]] for kind in KINDS}
        rates = {kind: Rate(int(own.sum()), len(own)) for kind, own in kinds.items() if len(own)}
        if trainer.is_world_process_zero():
            print(table([(f"accuracy, {kind}", line(rate.to_dict(), "accuracy")) for kind, rate in rates.items()]))
        trainer.save_metrics(
            "eval", {f"eval_accuracy_{kind.replace(' ', '_')}": rate.value for kind, rate in rates.items()}
        )


def labels_of(config):
    """Labels of the model that is trained, `{0: name, 1: name}`: those of an NLI model of two labels, whose head goes on, else new ones."""
    try:
        entailment_label(config)
    except ValueError:
        return LABELS
    return dict(config.id2label) if len(config.id2label) == 2 else LABELS


def make_pairs(instances, hypothesis, seed=0, max_segments=None):
    """
    NLI pairs of training instances.

    Args:
        instances (`list[dict]`): as [`~trainer.data.load_instances`] gives them.
        hypothesis (`str`): template with `{sentence}` and, if need be, `{question}`.
        seed (`int`): of what is drawn.
        max_segments (`int`, *optional*): use only so many segments.

    Returns:
        `list[tuple[str, str, str]]`: premise, hypothesis and one of `KINDS`, the first of which alone is entailed.

    Raises:
        `ValueError`: when no instance has a passage, or all passages and all texts of a data set are the same.
    """
    generator, by_dataset = random.Random(seed), defaultdict(list)
    for instance in instances:
        by_dataset[instance["dataset"]] += [
            (instance["input"], segment) for segment in instance["segments"] if segment["passage"] is not None
        ]
    segments = [(question, segment, own) for own in by_dataset.values() for question, segment in own]
    if not segments:
        raise ValueError(f"None of {len(instances)} instances has a passage: there is no pair.")
    generator.shuffle(segments)
    pairs, frequencies = [], {id(own): count_words(own) for own in by_dataset.values()}
    for question, segment, own in segments[:max_segments]:
        if false := false_claims(question, segment, own, frequencies[id(own)], generator):
            made = [(segment["passage"], segment["text"], "entailed"), generator.choice(false)]
            pairs += [
                (premise(p["title"], p["text"]), hypothesis.format(question=question, sentence=sentence), kind)
                for p, sentence, kind in made
            ]
    if not pairs:
        raise ValueError(
            f"{len(segments)} segments give no pair that is not entailed: all of a data set have the same passage and the same text."
        )
    return pairs


def count_words(segments):
    """`Counter` of the words of texts and passages of a data set."""
    return Counter(
        word
        for _, each in segments
        for text in (each["text"], each["passage"]["text"])
        for word in normalize_answer(text).split()
    )


def false_claims(question, segment, segments, frequency, generator):
    """
    What no passage says.

    Args:
        question (`str`).
        segment (`dict`): `{"text", "passage", "negatives"}`.
        segments (`list[tuple[str, dict]]`): questions and segments of its data set.
        frequency (`Counter`): of their words.
        generator (`random.Random`).

    Returns:
        `list[tuple[dict, str, str]]`: passage, text and the kind of the pair, one of each kind as far as there is one.
    """
    passage, text = segment["passage"], segment["text"]
    right, label = normalize_answer(text), is_label(text, segments)
    drawn = [generator.choice(segments)[1] for _ in range(TRIES)]
    others = segment["negatives"] or [
        other["passage"] for other in drawn if other["passage"]["text"] != passage["text"]
    ]
    wrong = [
        other["text"]
        for other in drawn
        if normalize_answer(other["text"]) != right and is_label(other["text"], segments) == label
    ]
    made = [(other, text, "other passage") for other in others[:1]] + [
        (passage, other, "wrong text") for other in wrong[:1]
    ]
    if label:
        return made
    if len(text.split()) >= SENTENCE:
        changed = change_word(question, text, passage, frequency, generator)
    else:
        names = [
            name
            for name in NAMES.findall(passage["text"])
            if normalize_answer(name) not in right and right not in normalize_answer(name)
        ]
        changed = generator.choice(names) if names else None
    return made + [(passage, changed, "wrong word")] * (changed is not None)


def change_word(question, text, passage, frequency, generator):
    """The text with its rarest word that the passage holds and the question does not replaced by another rare word of the passage; `None` without both."""
    words, told = text.split(), passage["text"].split()
    asked, right = set(normalize_answer(question).split()), set(normalize_answer(text).split())
    held = set(normalize_answer(passage["text"]).split()) - asked
    spots = [(frequency[normalize_answer(word)], i) for i, word in enumerate(words) if normalize_answer(word) in held]
    others = sorted(
        (frequency[bare], bare, word)
        for word in set(told)
        if (bare := normalize_answer(word)) and bare in held - right
    )
    if not spots or not others:
        return None
    _, spot = min(spots)
    _, _, other = generator.choice(others[:RARE])
    words[spot] = words[spot].replace(words[spot].strip(PUNCTUATION), other.strip(PUNCTUATION))
    return " ".join(words)


def is_label(text, segments):
    """Whether a text is one of the few that a data set repeats (`supports`): a name of the passage would then be no likely answer."""
    texts = [segment["text"] for _, segment in segments[:200]]
    return texts.count(text) > max(1, len(texts) / 5)


if __name__ == "__main__":
    main()
