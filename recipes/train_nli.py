"""
Train an NLI model on training instances, as a judge for Gr.

    python recipes/mine_hard_negatives.py --train_file train.jsonl --model sentence-transformers/all-MiniLM-L6-v2 \\
        --output_file mined.jsonl
    python recipes/train_nli.py --train_file mined.jsonl --validation_file heldout.jsonl \\
        --model_name_or_path microsoft/deberta-v3-small --output_dir nli
    python recipes/run_evaluation.py --nli_model nli --gr_hypothesis '{question} {sentence}' ...

It is for data that no other NLI model fits: answers of a few words, another language, or a special field.

A premise is a passage as Gr renders it; a hypothesis is a text as `--hypothesis` renders it. Each segment gives two
pairs. In the first, its passage entails its text. The second is not entailed, and is drawn from:

- another passage (the first of the segment's `negatives`, or else one of the same dataset) with the text
- the passage with the text of another instance (if the text is a verdict, with another verdict)
- the passage with a changed text: its rarest word of the passage is replaced by another rare word of the passage; an
  answer of a few words is replaced by a name or number of the passage

The model learns whether a passage supports an answer of this data. Say so next to its figures: such a judge is not the
paper's, and it is not independent of the data on which the judged model was trained.

Any option of `transformers.TrainingArguments` may be given. The accuracy on pairs of `--validation_file` is printed
for each kind of pair, and saved in `eval_results.json`.
"""

import random
import re
from collections import Counter, defaultdict
from string import punctuation as PUNCTUATION

from shared.cli import check_options, clear_errors, parse, table

from shared.arguments import NLIArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([NLIArguments, "transformers.training_args.TrainingArguments"], __doc__)

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trainer.data import load_instances
from trainer.judging.figures import figure_line
from trainer.judging.grounding import check_hypothesis, premise
from trainer.judging.intervals import Rate
from trainer.judging.nli import entailment_label
from trainer.questions import normalize_answer

from shared.processes import set_cpu_threads
from shared.progress_bars import progress_bars

Pair = tuple[str, str, str]  # premise, hypothesis, kind
Segment = tuple[str, dict]  # question, and the segment of an instance

LABELS = {0: "not_entailment", 1: "entailment"}
KINDS = ("entailed", "other passage", "wrong text", "wrong word")
SENTENCE = 4  # words of the shortest text that counts as a sentence rather than an answer of a few words
RARE = 5  # the replacement of a word is drawn from this many of the rarest words of a passage
NAMES = re.compile(r"\b(?:[A-Z][\w'-]*(?: (?:of |the |de )?[A-Z][\w'-]*)*|\d[\d,.]*\d|\d)")
TRIES = 20  # segments that are drawn in search of another passage and another text


def main() -> None:
    """Read the options and train."""
    nli, args = parse([NLIArguments, TrainingArguments], __doc__)
    with progress_bars(hidden=bool(args.disable_tqdm)):
        train(nli, args)


def train(nli: NLIArguments, args: TrainingArguments) -> None:
    """Make pairs, train on them, save the model, and measure its accuracy on held-out pairs."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 its gradients can be NaN: pytorch issue 196678
    with clear_errors():
        set_cpu_threads(nli.num_threads, args.use_cpu)
        check_hypothesis(nli.hypothesis)
        set_seed(args.seed)
        train_pairs = make_pairs(load_instances(nli.train_file), nli.hypothesis, args.seed, nli.max_train_samples)
        eval_pairs = []
        if nli.validation_file:
            instances = load_instances(nli.validation_file, "validation")
            eval_pairs = make_pairs(instances, nli.hypothesis, args.seed, nli.max_eval_samples)
        tokenizer = AutoTokenizer.from_pretrained(nli.model_name_or_path)
        labels = labels_of(AutoConfig.from_pretrained(nli.model_name_or_path))
        model = AutoModelForSequenceClassification.from_pretrained(
            nli.model_name_or_path,
            use_safetensors=True,
            num_labels=2,
            id2label=labels,
            label2id={name: i for i, name in labels.items()},
            ignore_mismatched_sizes=True,
        )
    entailed = entailment_label(model.config)
    tokenizer.model_max_length = min(nli.max_length, tokenizer.model_max_length)
    with clear_errors():
        train_dataset = tokenize_pairs(train_pairs, tokenizer, nli.max_length, entailed)
        eval_dataset = tokenize_pairs(eval_pairs, tokenizer, nli.max_length, entailed) if eval_pairs else None
    trainer = Trainer(
        model,
        args,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if eval_dataset is not None:
        predicted = trainer.predict(eval_dataset).predictions.argmax(1)  # (n,)
        rates = accuracies(predicted == np.array(eval_dataset["labels"]), eval_pairs)
        if trainer.is_world_process_zero():
            rows = [(f"accuracy, {kind}", figure_line(rate.to_dict(), "accuracy")) for kind, rate in rates.items()]
            print(table(rows))
        metrics = {f"eval_accuracy_{kind.replace(' ', '_')}": rate.value for kind, rate in rates.items()}
        trainer.save_metrics("eval", metrics)


def tokenize_pairs(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, entailed: int) -> Dataset:
    """
    Return a dataset of token ids and labels.

    Args:
        pairs (`list[Pair]`): pairs from [`make_pairs`].
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        max_length (`int`): maximum number of tokens of a pair; premises are cut to fit.
        entailed (`int`): label of an entailed pair, 0 or 1; all others get the other label.

    Raises:
        `ValueError`: if a hypothesis leaves no room for a premise.
    """
    premises = [pair[0] for pair in pairs]
    hypotheses = [pair[1] for pair in pairs]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    lengths = [len(ids) for ids in tokenizer(hypotheses, add_special_tokens=False)["input_ids"]]
    num_too_long = sum(length >= room for length in lengths)
    if num_too_long:
        raise ValueError(
            f"{num_too_long} of {len(pairs)} hypotheses leave no room for a premise: "
            f"up to {max(lengths)} of --max_length {max_length} tokens."
        )
    rows = tokenizer(premises, hypotheses, truncation="only_first", max_length=max_length)
    labels = [entailed if kind == "entailed" else 1 - entailed for _, _, kind in pairs]
    return Dataset.from_dict({**rows, "labels": labels})


def accuracies(is_right: np.ndarray, pairs: list[Pair]) -> dict[str, Rate]:
    """Return the accuracy over all pairs, under "all", and over the pairs of each kind that occurs."""
    rates = {"all": Rate(int(is_right.sum()), len(is_right))}
    for kind in KINDS:
        of_kind = is_right[[pair[2] == kind for pair in pairs]]
        if len(of_kind):
            rates[kind] = Rate(int(of_kind.sum()), len(of_kind))
    return rates


def labels_of(config: PretrainedConfig) -> dict[int, str]:
    """Return the labels `{0: name, 1: name}` to train with: an NLI model with two labels keeps its own."""
    try:
        entailment_label(config)
    except ValueError:
        return LABELS
    if len(config.id2label) != 2:
        return LABELS
    return dict(config.id2label)


def make_pairs(instances: list[dict], hypothesis: str, seed: int = 0, max_segments: int | None = None) -> list[Pair]:
    """
    Make NLI pairs from training instances.

    Args:
        instances (`list[dict]`): training instances, as [`~trainer.data.load_instances`] returns them.
        hypothesis (`str`): template with `{sentence}` and optionally `{question}`.
        seed (`int`): seed of everything that is drawn.
        max_segments (`int`, *optional*): use only this many segments.

    Returns:
        `list[tuple[str, str, str]]`: premise, hypothesis and one of `KINDS`, of which only the first is entailed.

    Raises:
        `ValueError`: if no instance has a passage, or all segments of each dataset have the same passage and text.
    """
    by_dataset: dict[str, list[Segment]] = defaultdict(list)
    for instance in instances:
        for segment in instance["segments"]:
            if segment["passage"] is not None:
                by_dataset[instance["dataset"]].append((instance["input"], segment))
    drawn = []
    for dataset, segments in by_dataset.items():
        drawn += [(dataset, question, segment) for question, segment in segments]
    if not drawn:
        raise ValueError(f"None of {len(instances)} instances has a passage: there is no pair.")
    generator = random.Random(seed)
    generator.shuffle(drawn)
    frequencies = {dataset: count_words(segments) for dataset, segments in by_dataset.items()}
    pairs = []
    for dataset, question, segment in drawn[:max_segments]:
        claims = false_claims(question, segment, by_dataset[dataset], frequencies[dataset], generator)
        if not claims:
            continue
        true_claim = (segment["passage"], segment["text"], "entailed")
        for passage, text, kind in (true_claim, generator.choice(claims)):
            rendered = hypothesis.format(question=question, sentence=text)
            pairs.append((premise(passage["title"], passage["text"]), rendered, kind))
    if not pairs:
        raise ValueError(
            f"{len(drawn)} segments give no pair that is not entailed: "
            "all segments of a dataset have the same passage and the same text."
        )
    return pairs


def count_words(segments: list[Segment]) -> Counter:
    """Return how often each word occurs in texts and passages of a dataset."""
    counts: Counter = Counter()
    for _, segment in segments:
        for text in (segment["text"], segment["passage"]["text"]):
            counts.update(normalize_answer(text).split())
    return counts


def false_claims(
    question: str, segment: dict, segments: list[Segment], frequency: Counter, generator: random.Random
) -> list[tuple[dict, str, str]]:
    """
    Make pairs of a passage and a text that the passage does not support.

    Args:
        question (`str`): the question of the segment.
        segment (`dict`): `{"text", "passage", "negatives"}`.
        segments (`list[tuple[str, dict]]`): all questions and segments of the dataset.
        frequency (`Counter`): how often each word occurs in the dataset.
        generator (`random.Random`): the source of random choices.

    Returns:
        `list[tuple[dict, str, str]]`: passage, text and kind; at most one of each kind.
    """
    passage, text = segment["passage"], segment["text"]
    answer = normalize_answer(text)
    text_is_label = is_label(text, segments)
    others = [generator.choice(segments)[1] for _ in range(TRIES)]
    claims = []

    other_passages = segment["negatives"]
    if not other_passages:
        other_passages = [other["passage"] for other in others if other["passage"]["text"] != passage["text"]]
    if other_passages:
        claims.append((other_passages[0], text, "other passage"))

    for other in others:
        # a label becomes wrong by another label, a free text by another free text
        if normalize_answer(other["text"]) != answer and is_label(other["text"], segments) == text_is_label:
            claims.append((passage, other["text"], "wrong text"))
            break

    if text_is_label:
        return claims
    if len(text.split()) >= SENTENCE:
        changed = change_word(question, text, passage, frequency, generator)
    else:
        changed = draw_name(answer, passage, generator)
    if changed is not None:
        claims.append((passage, changed, "wrong word"))
    return claims


def draw_name(answer: str, passage: dict, generator: random.Random) -> str | None:
    """
    Draw a name or number from the passage.

    It neither holds the answer nor is part of it. If there is none, return `None`.
    """
    names = []
    for name in NAMES.findall(passage["text"]):
        normalized = normalize_answer(name)
        if normalized not in answer and answer not in normalized:
            names.append(name)
    return generator.choice(names) if names else None


def change_word(question: str, text: str, passage: dict, frequency: Counter, generator: random.Random) -> str | None:
    """
    Return the text with one word replaced by another rare word of the passage; `None` if there are no such words.

    The word that is replaced is the rarest one that is in the passage but not in the question.
    """
    words = text.split()
    text_words = set(normalize_answer(text).split())
    question_words = set(normalize_answer(question).split())
    passage_words = set(normalize_answer(passage["text"]).split()) - question_words
    spots = []
    for i, word in enumerate(words):
        normalized = normalize_answer(word)
        if normalized in passage_words:
            spots.append((frequency[normalized], i))
    replacements = []
    for word in set(passage["text"].split()):
        normalized = normalize_answer(word)
        if normalized and normalized in passage_words - text_words:
            replacements.append((frequency[normalized], normalized, word))
    if not spots or not replacements:
        return None
    _, spot = min(spots)
    _, _, replacement = generator.choice(sorted(replacements)[:RARE])
    words[spot] = words[spot].replace(words[spot].strip(PUNCTUATION), replacement.strip(PUNCTUATION))
    return " ".join(words)


def is_label(text: str, segments: list[Segment]) -> bool:
    """
    Return whether a text is one of the few that a dataset repeats, such as `supports`.

    In such a dataset, a name from the passage would be an unlikely answer.
    """
    texts = [segment["text"] for _, segment in segments[:200]]
    return texts.count(text) > max(1, len(texts) / 5)


if __name__ == "__main__":
    main()
