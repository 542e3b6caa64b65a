"""
Scores of what a CoSup model retrieves: Ret, Ret-P, KILT's R-precision and recall@k, how often `[NSP]` is emitted, and
figures of the ranking by the query embedding.
"""

import importlib
from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = """
Scores what a model retrieved while it wrote, by passage id: Ret (a gold passage was retrieved), Ret-P (share of the
distinct retrieved passages that are gold), KILT's R-precision and recall@k, how often [NSP] was emitted, and, if there
is a ranking by the query embedding, its MRR, nDCG@10 and R@k.
"""
INPUTS = """
Args:
    predictions (list of dict): lines of predictions.jsonl: {"id", "retrievals": [{"passages": [{"id"}, best first]},
        ...]}. An optional "query_ranking" (ids, best first) adds the figures of the ranking.
    references (list of dict): lines of an evaluation set, matched by id: {"id", "provenance": [[ids of one evidence
        set], ...]}. A question with an empty provenance needs no passage and counts for `nsp_not_needed` only, or not
        at all if its "meta" says "provenance_unknown".
    ks (list of int): the k of kilt_recall@k and query_recall@k; 1 and 5 by default.
    num_passages (int): how many passages were ranked. A query_recall@k with as many places is left out, as in an
        evaluation: nothing can be missed.
    rankings (list of dict, optional): lines of query/ranking.jsonl, in place of "query_ranking": {"id", "corpus":
        [ids, best first], "pool": [...]}.
    ranking (str): which of the rankings to use, "corpus" by default.

Returns:
    dict: ret, ret_precision, r_precision, kilt_recall@k, nsp_needed and nsp_not_needed; num_questions, the number of
    questions with provenance; if these have rankings, also mrr, ndcg@10 and query_recall@k. If only some of them have
    one, it is an error. Figures are between 0 and 1, or NaN if there is no question to which they apply.
"""
CITATION = """
@inproceedings{lee2024semiparametric,
  title={Semiparametric Token-Sequence Co-Supervision},
  author={Lee, Hyunji and Kim, Doyoung and Jun, Jihoon and Joo, Sejune and Jang, Joel and On, Kyoung-Woon and
          Seo, Minjoon},
  booktitle={Proceedings of ACL},
  year={2024}
}
"""
STRING = datasets.Value("string")
PREDICTION = {"id": STRING, "retrievals": [{"passages": [{"id": STRING}]}], "query_ranking": [STRING]}
REFERENCE = {"id": STRING, "provenance": [[STRING]], "meta": [STRING]}


class NSPRetrieval(evaluate.Metric):
    """A thin wrapper: `trainer.judging` computes the figures."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": PREDICTION, "references": REFERENCE}),
        )

    def _download_and_prepare(self, dl_manager) -> None:
        # Not imported at the top of the file, or evaluate would tell the user to install PyPI's other `trainer`.
        try:
            importlib.import_module("trainer.judging")
        except ImportError as error:
            raise ImportError(
                "This metric needs the package cosup (`pip install cosup`), whose `trainer` is not PyPI's package of "
                "that name."
            ) from error

    def compute(
        self,
        *,
        predictions: list[dict],
        references: list[dict],
        rankings: list[dict] | None = None,
        ranking: str = "corpus",
        **options,
    ) -> dict:
        """Accept whole lines of predictions and of an evaluation set; fields that are not needed are dropped."""
        from trainer.judging.matching import check_rows, select_fields
        from trainer.questions import provenance_unknown

        check_rows(predictions=predictions, references=references)
        lacking = sum(ranking not in row for row in rankings or [])
        if lacking:
            raise ValueError(f"{lacking} of {len(rankings)} rankings have no {ranking!r}.")
        ranking_of = {str(row["id"]): row[ranking] for row in rankings or []}
        if len(ranking_of) < len(rankings or []):
            raise ValueError(f"{len(rankings) - len(ranking_of)} of the rankings repeat the id of another.")
        if rankings and ranking_of.keys().isdisjoint(str(prediction["id"]) for prediction in predictions):
            raise ValueError("None of the rankings has the id of a prediction: they are of another set.")
        with_rankings = []
        for prediction in predictions:
            query_ranking = ranking_of.get(str(prediction["id"]), prediction.get("query_ranking"))
            with_rankings.append({**prediction, "query_ranking": query_ranking})
        # The library needs columns of one type: `meta` becomes a list of the flags that are set.
        with_flags = []
        for reference in references:
            flags = ["provenance_unknown"] if provenance_unknown(reference) else []
            with_flags.append({**reference, "meta": flags})
        return super().compute(
            predictions=select_fields(with_rankings, PREDICTION),
            references=select_fields(with_flags, REFERENCE),
            **options,
        )

    def _compute(
        self,
        predictions: list[dict],
        references: list[dict],
        ks: Sequence[int] = (1, 5),
        num_passages: int | None = None,
    ) -> dict:
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.retrieval import emission, mean_scores, ranking_scores, retrieval_scores

        pairs = match_by_id(predictions, references)
        needing = {reference["id"] for reference in with_provenance(references)}
        judged = [
            (prediction, reference["provenance"]) for prediction, reference in pairs if reference["id"] in needing
        ]
        rows = [retrieval_scores(retrieved_ids(prediction), provenance, ks) for prediction, provenance in judged]
        scores = mean_scores(rows)
        needed = [any(reference["provenance"]) for _, reference in pairs]
        not_needed = [not any(reference["provenance"]) and not reference["meta"] for _, reference in pairs]
        emitted = emission([prediction for prediction, _ in pairs], needed, not_needed)
        scores |= {name: Mean.of(values).value for name, values in emitted.items()}
        scores["num_questions"] = len(judged)
        num_ranked = sum(prediction["query_ranking"] is not None for prediction, _ in judged)
        if 0 < num_ranked < len(judged):
            raise ValueError(
                f"{len(judged) - num_ranked} of {len(judged)} questions with provenance have no ranking by the query "
                "embedding."
            )
        if num_ranked:
            if num_passages is not None:
                ks = [k for k in ks if k < num_passages]  # among as many places as passages, nothing is missed
            rows = [ranking_scores(prediction["query_ranking"], provenance, ks) for prediction, provenance in judged]
            scores |= mean_scores(rows)
        return scores
