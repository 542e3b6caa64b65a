"""Judge a model on an evaluation set: recall of its query embeddings, and what it retrieves and answers while generating."""

import contextlib
import random
import re
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from modeling_cosup import RetrievalConfig, Retriever
from modeling_cosup.tokenization_cosup import encode_prompt, pad_rows

from ..data import tokenize_instance
from .correctness import exact_match
from .grounding import split_sentences
from .intervals import Mean, Rate
from .matching import gold_ids, provenance_unknown

METRIC_NAMES = {  # as reports and model cards say them
    "recall@1": "recall@1 of the query embedding",
    "recall@5": "recall@5 of the query embedding",
    "retrieval_accuracy": "first passage retrieved while generating is right",
    "exact_match": "exact match, own retrieval",
    "exact_match_gold_passage": "exact match, gold passage given",
    "exact_match_no_retrieval": "exact match, retrieval switched off",
    "needless_retrieval": "questions that need no passage: retrieved",
    "exact_match_no_passage": "questions that need no passage: exact match",
    "k_precision": "K-precision: words between [Cs] and [CE] that stand in their passage",
}
MODES = ("retrieval", "gold", "off", "forced", "wrong")  # see `retrieval_settings`


@dataclass
class Answer:
    """
    What a model wrote for one question.

    Args:
        text (`str`): without passages.
        retrieved (`list[str]`): the best passage of each retrieval, in order.
        cited (`str`): to be read: a numbered citation behind each grounded span, and the passages below.
        output_with_citations (`str`): as ALCE wants it: `[n]` before the end of each grounded sentence, where n counts the distinct passages.
        retrievals (`list[dict]`): `{"passage_ids", "scores", "titles", "texts", "grounded_text"}`, in order.
        num_generated_tokens (`int`): tokens that were decoded.
    """

    text: str
    retrieved: list = field(default_factory=list)
    cited: str = ""
    output_with_citations: str = ""
    retrievals: list = field(default_factory=list)
    num_generated_tokens: int = 0


# ---------------------------------------------------------------------- running the model


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode without gradients; the mode before comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def embed_queries(model, instances, batch_size=32):
    """
    Query embeddings of questions: the hidden state at an `[NSP]` right behind the prompt.

    Returns:
        `torch.FloatTensor` of shape `(len(instances), h)` on the CPU.
    """
    prompts = [[*encode_prompt(model.tokenizer, x["input"], x["instruction"]), model.config.nsp_token_id] for x in instances]
    embeds = torch.empty(len(prompts), model.config.embedding_size)
    with evaluating(model):
        for rows, batch in _batches(model, prompts, batch_size, "Embedding questions"):
            if model.config.query_from == "gen":
                embeds[rows] = model(**batch, return_logits=False, use_cache=False).query_embeds.float().cpu()
            else:  # what an encoder reads, Gen need not
                embeds[rows] = model.encode_queries(**batch).float().cpu()
    return embeds


def recall(model, index: Retriever, instances, ks=(1, 5), batch_size=32):
    """
    Recall@k over the whole index: a gold passage among the k nearest to the query. Questions without provenance do not count.

    Returns:
        `dict[int, Rate]`.
    """
    asked = [instance for instance in instances if instance["provenance"]]
    _, rows = index.search(embed_queries(model, asked, batch_size), k=max(ks))
    passages = iter(index.get_passages(rows[rows >= 0]))  # an approximate search may find fewer
    found = [[next(passages)["id"] in gold_ids(x) for row in nearest if row >= 0] for x, nearest in zip(asked, rows.tolist(), strict=True)]
    return {k: Rate(sum(any(hits[:k]) for hits in found), len(asked)) for k in ks}


def answer(
    model, instances, index=None, mode="retrieval", batch_size=32, max_new_tokens=64, candidates=None, top_k=1, max_retrievals=None, seed=0,
    output_file=None, on_completion=None, show_progress_bar=True,
):  # fmt: skip
    """
    Answers to questions.

    Args:
        model (`CoSupForCausalLM`), instances (`list[dict]`): evaluation instances.
        index ([`Retriever`]): searched or read, unless the mode is `"off"`.
        mode (`str`): see [`retrieval_settings`].
        batch_size, max_new_tokens (`int`): as in generate().
        candidates (`list`, *optional*): for each question the ids of the passages among which it searches.
        top_k (`int`), max_retrievals (`int`, *optional*): of [`RetrievalConfig`], where the model searches.
        seed (`int`): of mode `"wrong"`.
        output_file, on_completion, show_progress_bar: as in generate_many().

    Returns:
        `list[Answer]`.
    """
    prompts = [list(encode_prompt(model.tokenizer, x["input"], x["instruction"])) for x in instances]
    settings = retrieval_settings(mode, instances, index, candidates, top_k, max_retrievals, seed)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "batch_size": batch_size, "output_file": output_file, "on_completion": on_completion}
    options |= {"description": f"Answering ({mode})", "show_progress_bar": show_progress_bar}
    with evaluating(model):
        completions = model.generate_many(prompts, retriever=None if mode == "off" else index, retrieval_config=settings, **options)
    return [make_answer(done, len(prompt), model.tokenizer) for done, prompt in zip(completions, prompts, strict=True)]


def retrieval_settings(mode, instances, index=None, candidates=None, top_k=1, max_retrievals=None, seed=0):
    """
    How the questions of an evaluation retrieve.

    Args:
        mode (`str`): `"retrieval"`: Gen decides when, and its query finds what. `"forced"`: the same, but every answer begins with `[NSP]`. `"off"`: `[NSP]` is
            never emitted. `"gold"`: every answer begins with `[NSP]` and gets the passages of the first set of `provenance`, in order. `"wrong"`: the same with
            as many passages that are not gold, drawn at random from the question's `candidates`, or from the index where it has none.
        others: see [`answer`].

    Returns:
        [`RetrievalConfig`].

    Raises:
        `ValueError`: for an unknown mode; with counts, for questions without provenance in `"gold"` and `"wrong"`, or without a wrong passage to draw.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if mode == "off":
        return RetrievalConfig(forbid_nsp=True)
    if mode in ("retrieval", "forced"):
        return RetrievalConfig(top_k, max_retrievals, force_nsp_first=mode == "forced", candidates=candidates)
    if without := sum(not x["provenance"] for x in instances):
        raise ValueError(f"{without} of {len(instances)} questions have no provenance: mode {mode!r} needs gold passages.")
    passages = [x["provenance"][0] for x in instances] if mode == "gold" else wrong_passages(instances, index, seed)
    return RetrievalConfig(force_nsp_first=True, passages=passages)


def wrong_passages(instances: list[dict], index: Retriever, seed: int = 0) -> list[list[str]]:
    """For each question as many ids of random passages that are not gold as its first set of `provenance` holds; which, depends on seed and question alone."""
    rows = index.live_rows()
    passages = [_wrong_passages(x, index, rows, random.Random(f"{seed} {x['id']}")) for x in instances]
    if without := sum(not ids for ids in passages):
        raise ValueError(f"{without} of {len(instances)} questions have no passage but gold ones: mode 'wrong' has nothing to give them.")
    return passages


def _wrong_passages(instance: dict, index: Retriever, rows: NDArray[np.int64], generator: random.Random) -> list[str]:
    gold, count = gold_ids(instance), len(instance["provenance"][0])
    if instance.get("candidates"):
        wrong = [id for id in instance["candidates"] if id not in gold]
    else:
        drawn = generator.sample(range(len(rows)), min(len(rows), count + len(gold)))  # enough, even if all gold passages are drawn
        wrong = [passage["id"] for passage in index.get_passages(rows[drawn]) if passage["id"] not in gold]
    return generator.sample(wrong, min(count, len(wrong)))


def make_answer(done, start, tokenizer):
    """[`Answer`] of a [`Completion`] whose prompt had `start` tokens: positions of its trace count from the prompt's first."""
    numbers, pieces, retrievals, position = {}, [], [], 0
    for retrieval in done.retrievals:
        first, end = (column - start for column in retrieval.grounded_span)
        marks = "".join(f"[{numbers.setdefault(id, len(numbers) + 1)}]" for id in retrieval.passage_ids)
        grounded = tokenizer.decode(done.token_ids[first:end], skip_special_tokens=True).strip()
        before = tokenizer.decode(done.token_ids[position : max(position, retrieval.position - start)], skip_special_tokens=True)
        pieces += [before, *(cite(sentence, marks) for sentence in split_sentences(grounded))]
        position = end
        names = {name: [passage[name.removesuffix("s")] for passage in retrieval.passages] for name in ("titles", "texts")}
        retrievals.append({"passage_ids": retrieval.passage_ids, "scores": retrieval.scores, **names, "grounded_text": grounded})
    pieces.append(tokenizer.decode(done.token_ids[position:], skip_special_tokens=True))
    output = " ".join(piece.strip() for piece in pieces if piece.strip())
    return Answer(done.text, [retrieval.passage_id for retrieval in done.retrievals], done.cited_text, output, retrievals, done.num_generated_tokens)


def cite(sentence, marks):
    """A sentence with `marks` before its closing punctuation."""
    end = re.search(r"[.!?]*[\"'”’)\]]*$", sentence).start()
    return f"{sentence[:end]} {marks}{sentence[end:]}"


def ntp_loss(model, instances):
    """
    NTP loss of the first answer of each question, grounded on the first passage of its first set of `provenance`.

    Args:
        instances (`list[dict]`): training instances, e.g. of [`reference_instances`].

    Returns:
        [`Mean`] over trained tokens.
    """
    sums, weights = [], []
    for instance in tqdm(instances, desc="NTP loss", unit="instance"):
        tokenized = tokenize_instance(instance, model.tokenizer, model.emb_seq_tokenizer, model.config)
        ids, labels = (torch.tensor([tokenized[name]], device=model.device) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with evaluating(model):
            loss = model(input_ids=ids, labels=labels, output_query_embeds=False).ntp_loss
        sums.append(float(loss) * count)
        weights.append(count)
    return Mean(sums, weights)


def reference_instances(instances, corpus):
    """Evaluation instances as training instances: the first answer on the first gold passage, or free text where there is no provenance."""
    passages = {passage["id"]: passage for passage in corpus}
    return [{**x, "segments": [{"text": x["answers"][0], "passage": passages[x["provenance"][0][0]] if x["provenance"] else None}]} for x in instances]


def evaluate_model(model, index, instances, batch_size=32, max_new_tokens=64):
    """
    Everything that one evaluation set says about a model and an index.

    Returns:
        `(dict[str, Rate], list[Answer])`: the metrics, and the answers with retrieval, one per instance.
        `recall@k`: of the query embedding, over the whole index. `retrieval_accuracy`: the first passage retrieved while generating is gold
        (not retrieving is wrong). `exact_match`, `exact_match_gold_passage`, `exact_match_no_retrieval`: of questions that need a passage, with
        the model's own retrieval, with the gold passage, with retrieval switched off. `needless_retrieval` and `exact_match_no_passage`: of
        questions that need no passage, the share that retrieves, and the share answered right.
    """
    needs = [i for i, x in enumerate(instances) if x["provenance"]]
    free = [i for i, x in enumerate(instances) if not (x["provenance"] or provenance_unknown(x))]
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    answers = answer(model, instances, index, "retrieval", **options)
    asked = [instances[i] for i in needs]
    metrics = {f"recall@{k}": rate for k, rate in recall(model, index, asked, batch_size=batch_size).items()}

    def matches(found, questions):
        return Rate(sum(exact_match(a.text, x["answers"]) for a, x in zip(found, questions, strict=True)), len(questions))

    metrics["retrieval_accuracy"] = Rate(sum(answers[i].retrieved[:1] != [] and answers[i].retrieved[0] in gold_ids(instances[i]) for i in needs), len(needs))
    metrics["exact_match"] = matches([answers[i] for i in needs], asked)
    metrics["exact_match_gold_passage"] = matches(answer(model, asked, index, "gold", **options), asked)
    metrics["exact_match_no_retrieval"] = matches(answer(model, asked, None, "off", **options), asked)
    if free:
        metrics["needless_retrieval"] = Rate(sum(bool(answers[i].retrieved) for i in free), len(free))
        metrics["exact_match_no_passage"] = matches([answers[i] for i in free], [instances[i] for i in free])
    return metrics, answers


# ---------------------------------------------------------------------- helpers


def _batches(model, prompts, batch_size, description):
    """`(rows, {"input_ids", "attention_mask"})`, padded on the left, prompts of similar length together, under a progress bar."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with tqdm(total=len(prompts), desc=description, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad_rows([prompts[row] for row in rows], side="left", device=model.device)
            yield rows, {"input_ids": ids, "attention_mask": mask}
            bar.update(len(rows))
