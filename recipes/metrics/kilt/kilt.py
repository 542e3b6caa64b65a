"""KILT's scores of answers, and the same where retrieval is complete."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
KILT's figures: accuracy, exact match, F1 and ROUGE-L of the answers; R-precision and KILT's recall@5 of the retrieved passages; and KILT-accuracy, -EM, -F1 and
-ROUGE-L, which count an answer only where R-precision is 1. They equal KILT's own code on the same predictions.
"""
INPUTS = """
Args:
    predictions (list of dict): {"id", "output": text, "retrievals": [{"passages": [{"id"}, best first]}, ...]}: lines of predictions.jsonl.
    references (list of dict): {"id", "answers": [...], "provenance": [[ids of one evidence set], ...]}: lines of an evaluation set, matched by id.
    rouge (bool): whether to compute ROUGE-L, which needs `pip install rouge`; True by default.

Returns:
    dict: accuracy, em, f1, rouge_l, kilt_accuracy, kilt_em, kilt_f1, kilt_rouge_l, r_precision, kilt_recall@5, between 0 and 1, and num_without_provenance:
    questions whose provenance is empty; their retrieval is wrong, as in KILT.
"""
CITATION = """
@inproceedings{petroni2021kilt,
  title={{KILT}: a Benchmark for Knowledge Intensive Language Tasks},
  author={Petroni, Fabio and Piktus, Aleksandra and Fan, Angela and Lewis, Patrick and Yazdani, Majid and De Cao, Nicola and Thorne, James and
          Jernite, Yacine and Karpukhin, Vladimir and Maillard, Jean and Plachouras, Vassilis and Rocktäschel, Tim and Riedel, Sebastian},
  booktitle={Proceedings of NAACL},
  year={2021}
}
"""
STRING = datasets.Value("string")
PREDICTION = {"id": STRING, "output": STRING, "retrievals": [{"passages": [{"id": STRING}]}]}
REFERENCE = {"id": STRING, "answers": [STRING], "provenance": [[STRING]]}


class KILT(evaluate.Metric):
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

    def compute(self, *, predictions, references, **options):
        """Whole lines of predictions and of an evaluation set will do: other fields are dropped."""
        from trainer.judging.matching import select_fields

        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions, references, rouge=True):
        from trainer.judging.correctness import kilt_scores
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.retrieval import kilt_recall_at_k, mean_scores, r_precision

        needing, rows = {x["id"] for x in with_provenance(references)}, []
        for prediction, x in match_by_id(predictions, references):
            retrieved, row = retrieved_ids(prediction), {"r_precision": 0.0, "kilt_recall@5": 0.0}
            if x["id"] in needing:
                row["r_precision"] = r_precision(retrieved, x["provenance"])
                row["kilt_recall@5"] = kilt_recall_at_k(retrieved, x["provenance"], 5)
            rows.append(kilt_scores(prediction["output"], x["answers"], row["r_precision"], rouge) | row)
        return mean_scores(rows) | {"num_without_provenance": len(rows) - len(needing)}
