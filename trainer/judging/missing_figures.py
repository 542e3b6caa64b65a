"""The conditions under which a figure does not exist."""

from .figures import RETRIEVAL_WHILE_GENERATING, Figure, Need

_MISSING_WITHOUT: dict[Need, str] = {
    "gold": "no question has gold passages",
    "judge": "there is no NLI model",
    "no_passage": "every question needs a passage",
}
_KILT = ("accuracy", "em", "f1", "rouge_l")
_GATED = tuple(f"kilt_{name}" for name in _KILT)
# Why figures are missing although there is what they need -> their names.
_MISSING_IF: dict[str, tuple[str, ...]] = {
    "Gen learns no tokens (supervision: nsp)": ("ntp_loss",),
    "no query has a negative": ("nsp_loss", "matryoshka_loss", "nsp_accuracy", "gradient_cosine", "gradient_ratio"),
    "every query's passage is right for all others": ("reverse_nsp_loss",),
    "symmetric_nsp is not set": ("reverse_nsp_loss",),
    "gradient_cosine_steps is not set": ("gradient_cosine", "gradient_ratio"),
    "no instance has several [NSP]": ("first_query_recall@k", "later_query_recall@k"),
    "matryoshka_dims is not set": ("matryoshka_loss",),
    "nothing is distilled": ("distillation_loss", "target_entropy", "student_entropy", "target_max"),
    "no instance was too long, and candidates_from is not set": ("num_left_out",),
    "no [NSP] is trained": ("nsp_predicted",),
    "no MLP memory is trained with kl_weight": ("knn_kl",),
    "there is no query": ("num_negatives",),
    "training has not ended": ("peak_memory",),
    "the system does not say": ("peak_memory",),
    "the model does not search": (
        *(entry.name for entry in RETRIEVAL_WHILE_GENERATING),
        "cor_minus",
        *_GATED,
        "gr_success",
        "gr_failure",
    ),
    "there are no more than k passages": (
        "query_recall@k",
        "first_query_recall@k",
        "later_query_recall@k",
        "hit_rate@k",
    ),
    "no question has an answer that one passage could hold (verdicts, whole sentences, lists)": ("hit_rate@k",),
    "the search is exact": ("ann_recall@k",),
    "log_indicators is not set": ("indicator_1",),
    "its metric lacks what it needs, such as an NLI model": ("cor",),
    "no question has answers": (*_KILT, *_GATED, "em_not_needed"),
    "all answers are lists": (*_KILT, *_GATED, "em_not_needed"),
    "rouge is not installed": ("rouge_l", "kilt_rouge_l"),
    "no question is of FEVER": ("fever_label", "fever_nli"),
    "no question has meta.qa_pairs": ("str_em", "str_hit"),
    "no question has meta.answers, lists of aliases": ("list_f1",),
    "no question has meta.claims": ("claim_recall",),
    "no answer holds grounded text": ("gr", "gr_success", "gr_failure", "k_precision"),
    "nothing was retrieved": ("citation_recall", "citation_precision"),
    "there is no memory, or it is an MLP": ("ngram_overlap",),
    "anywhere but in the evaluate module correctness": ("cor_success", "cor_failure"),
    "anywhere but in the name of the metric of Cor": ("short_answer",),
}


def missing_if(entry: Figure) -> list[str]:
    """Return when a figure does not exist. Tables then show [`MISSING`], and results files leave it out."""
    conditions = [_MISSING_WITHOUT[need] for need in entry.needs]
    conditions += [condition for condition, names in _MISSING_IF.items() if entry.name in names]
    return conditions
