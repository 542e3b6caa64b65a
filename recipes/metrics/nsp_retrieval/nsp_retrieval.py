"""What a CoSup model retrieves: Ret, Ret-P, KILT's R-precision and recall@k, how often `[NSP]` is emitted, and what the query embedding finds."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
What a model that retrieves while it writes has retrieved, by passage id: Ret (a gold passage is among them), Ret-P (share of the distinct ones that are
gold), KILT's R-precision and recall@k, how often [NSP] was emitted, and MRR, nDCG@10 and R@k of a ranking by the query embedding, where there is one.
"""
INPUTS = """
Args:
    predictions (list of dict): {"id", "retrievals": [{"passages": [{"id"}, best first]}, ...]}: lines of predictions.jsonl. With "query_ranking" (ids, best
        first) there are figures of the ranking too.
    references (list of dict): {"id", "provenance": [[ids of one evidence set], ...]}: lines of an evaluation set, matched by id. Those with an empty
        provenance need no passage and count for `nsp_not_needed` only, unless their "meta" says "provenance_unknown".
    ks (list of int): of kilt_recall@k and query_recall@k; 1 and 5 by default.
    rankings (list of dict, optional): {"id", "corpus": [ids, best first], "pool": [...]}: lines of query/ranking.jsonl, in place of "query_ranking".
    ranking (str): which of them, "corpus" by default.

Returns:
    dict: ret, ret_precision, r_precision, kilt_recall@k, nsp_needed, nsp_not_needed, num_questions (with provenance) and, where all of these have a ranking,
    mrr, ndcg@10, query_recall@k. Shares between 0 and 1; NaN where there is no question of that kind.
"""
CITATION = """
@inproceedings{lee2024semiparametric,
  title={Semiparametric Token-Sequence Co-Supervision},
  author={Lee, Hyunji and Kim, Doyoung and Jun, Jihoon and Joo, Sejune and Jang, Joel and On, Kyoung-Woon and Seo, Minjoon},
  booktitle={Proceedings of ACL},
  year={2024}
}
"""
STRING = datasets.Value("string")
PREDICTION = {"id": STRING, "retrievals": [{"passages": [{"id": STRING}]}], "query_ranking": [STRING]}
REFERENCE = {"id": STRING, "provenance": [[STRING]], "meta": [STRING]}


class NSPRetrieval(evaluate.Metric):
    """Thin: the figures are computed by `trainer.judging`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": PREDICTION, "references": REFERENCE}),
        )

    def _download_and_prepare(self, dl_manager):
        try:
            importlib.import_module(
                "trainer.judging"
            )  # named at the top, evaluate would tell the user to install PyPI's other `trainer`
        except ImportError as error:
            raise ImportError(
                "This metric needs the package cosup (`pip install cosup`), whose `trainer` is not PyPI's package of that name."
            ) from error

    def compute(self, *, predictions, references, rankings=None, ranking="corpus", **options):
        """Whole lines of predictions and of an evaluation set will do: other fields are dropped."""
        from trainer.judging.matching import select_fields

        found = {str(row["id"]): row[ranking] for row in rankings or []}
        predictions = [
            {**row, "query_ranking": found.get(str(row["id"]), row.get("query_ranking"))} for row in predictions
        ]
        references = [
            {**row, "meta": ["provenance_unknown"] * bool((row.get("meta") or {}).get("provenance_unknown"))}
            for row in references
        ]
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions, references, ks=(1, 5)):
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.retrieval import emission, mean_scores, ranking_scores, retrieval_scores

        pairs, needing = match_by_id(predictions, references), {x["id"] for x in with_provenance(references)}
        asked = [(prediction, x["provenance"]) for prediction, x in pairs if x["id"] in needing]
        scores = mean_scores(
            [retrieval_scores(retrieved_ids(prediction), provenance, ks) for prediction, provenance in asked]
        )
        needed = [any(x["provenance"]) for _, x in pairs]
        not_needed = [not any(x["provenance"]) and not x["meta"] for _, x in pairs]
        emitted = emission([prediction for prediction, _ in pairs], needed, not_needed)
        scores |= {name: Mean.of(values).value for name, values in emitted.items()}
        scores["num_questions"] = len(asked)
        if all(prediction["query_ranking"] for prediction, _ in asked):
            scores |= mean_scores(
                [ranking_scores(prediction["query_ranking"], provenance, ks) for prediction, provenance in asked]
            )
        return scores
