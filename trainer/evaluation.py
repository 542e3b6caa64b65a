"""Judge a model on an evaluation set: recall of its query embeddings, and what it retrieves and answers while generating."""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_cosup import info_nce
from modeling_cosup.tokenization_cosup import encode_passages_for_gen, encode_prompt, pad_rows

from .batching import BatchFacts
from .data import tokenize_instance
from .duplicates import global_batch
from .intervals import Mean, Rate
from .metrics import exact_match, gold_ids

METRIC_NAMES = {  # as reports and model cards say them
    "recall@1": "recall@1 of the query embedding",
    "recall@5": "recall@5 of the query embedding",
    "retrieval_accuracy": "first passage retrieved while generating is right",
    "exact_match": "exact match, own retrieval",
    "exact_match_gold_passage": "exact match, gold passage given",
    "exact_match_no_retrieval": "exact match, retrieval switched off",
    "needless_retrieval": "questions that need no passage: retrieved",
    "exact_match_no_passage": "questions that need no passage: exact match",
}


@dataclass
class Answer:
    """What a model wrote for one question: `text` without passages, the ids it retrieved in order, and the text with citations."""

    text: str
    retrieved: list = field(default_factory=list)
    cited: str = ""


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
            embeds[rows] = model(**batch, return_logits=False, use_cache=False).query_embeds.float().cpu()
    return embeds


def recall(model, index, instances, ks=(1, 5), batch_size=32):
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


def answer(model, instances, index=None, mode="retrieval", batch_size=32, max_new_tokens=64):
    """
    Answers to questions.

    Args:
        model (`CoSupForCausalLM`), instances (`list[dict]`): evaluation instances.
        index (`PassageIndex`): searched (`"retrieval"`) or read (`"gold"`).
        mode (`str`): `"retrieval"`: Gen decides when to retrieve. `"gold"`: the first passage of the first set of `provenance` stands behind the
            prompt, and the answer ends with its grounded text. `"off"`: `[NSP]` cannot be emitted.
        batch_size, max_new_tokens (`int`): as in generate().

    Returns:
        `list[Answer]`.
    """
    config, tokenizer = model.config, model.tokenizer
    prompts = [list(encode_prompt(tokenizer, x["input"], x["instruction"])) for x in instances]
    if mode == "gold":
        gold = [index[index.row_of(x["provenance"][0][0])] for x in instances]
        passages = encode_passages_for_gen(tokenizer, gold, config)
        prompts = [[*prompt, config.nsp_token_id, *ids, config.cs_token_id] for prompt, ids in zip(prompts, passages, strict=True)]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "batch_size": batch_size}
    if mode == "retrieval":
        options["retriever"] = index
    else:
        options["suppress_tokens"] = [config.cs_token_id, config.nsp_token_id]
    if mode == "gold":
        options["eos_token_id"] = [config.ce_token_id, *model.generation_config.eos_token_id]
    with evaluating(model):
        completions = model.generate_many(prompts, description=f"Answering ({mode})", **options)
    return [Answer(done.text, [retrieval.passage_id for retrieval in done.retrievals], done.cited_text) for done in completions]


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
    return [
        {**x, "segments": [{"text": x["answers"][0], "passage": passages[x["provenance"][0][0]] if x["provenance"] else None}]} for x in instances
    ]


def evaluate_model(model, index, instances, batch_size=32, max_new_tokens=64):
    """
    Everything that one evaluation set says about a model and an index.

    Returns:
        `(dict[str, Rate], list[Answer])`: the metrics, and the answers with retrieval, one per instance.
        `recall@k`: of the query embedding, over the whole index. `retrieval_accuracy`: the first passage retrieved while generating is gold
        (not retrieving is wrong). `exact_match`, `exact_match_gold_passage`, `exact_match_no_retrieval`: of questions that need a passage, with
        the model's own retrieval, with the gold passage, with retrieval switched off. `needless_retrieval` and `exact_match_no_passage`: of
        questions without provenance, the share that retrieves, and the share answered right.
    """
    needs = [i for i, x in enumerate(instances) if x["provenance"]]
    free = [i for i, x in enumerate(instances) if not x["provenance"]]
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


def retrieval_metrics(query_embeds, passage_embeds, facts, temperature=1.0, ks=(1, 5), chunk_size=1024):
    """
    NSP loss and recall@k of queries over all distinct passages of a set.

    Args:
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): of all batches.
        facts (`list[BatchFacts]`): of the same batches, in the same order.
        temperature (`float`): of the NSP loss.

    Returns:
        `(dict, numpy.ndarray, numpy.ndarray)`: `nsp_loss`, `num_passages`, `num_queries` and, with queries, `recall@k`; the rows of distinct passages; for
        each query which of these is its own. Another passage that is right for a query is neither a negative nor a miss, a tie is a miss.
    """
    starts = np.cumsum([0] + [len(each.passage_keys) for each in facts])
    merged = BatchFacts(
        passage_keys=[key for each in facts for key in each.passage_keys],
        positive_keys=[key for each in facts for key in each.positive_keys],
        query_keys=[key for each in facts for key in each.query_keys],
        passage_labels=[int(start) + label for each, start in zip(facts, starts, strict=False) for label in each.passage_labels],
    )
    batch = global_batch([merged], 0)
    rows, pairs = np.flatnonzero(~batch.repeated), batch.no_negatives
    row_of_group = {int(batch.passage_groups[row]): i for i, row in enumerate(rows)}
    labels = np.array([row_of_group[int(batch.passage_groups[label])] for label in merged.passage_labels], dtype=np.int64)
    passages, losses, ranks = torch.from_numpy(passage_embeds[rows]), [], []
    for start in range(0, len(labels), chunk_size):
        queries, positives = torch.from_numpy(query_embeds[start : start + chunk_size]), torch.from_numpy(labels[start : start + chunk_size])
        right = torch.zeros(len(queries), len(rows), dtype=torch.bool)
        for query, row in pairs[:, (pairs[0] >= start) & (pairs[0] < start + chunk_size)].T.tolist():
            right[query - start, row_of_group[int(batch.passage_groups[row])]] = True
        loss, scores = info_nce(queries, passages, positives, right, temperature, return_scores=True)
        losses.append(loss)
        own = scores.gather(1, positives[:, None])
        ranks.append(torch.where(own[:, 0].isfinite(), (scores >= own).sum(1) - 1, len(rows)))  # -inf where it is right too; NaN finds nothing
    metrics = {"nsp_loss": float(torch.cat(losses).mean()) if len(labels) else 0.0, "num_passages": len(rows), "num_queries": len(labels)}
    if len(labels):
        metrics |= {f"recall@{k}": float((torch.cat(ranks) < k).double().mean()) for k in ks}
    return metrics, rows, labels
