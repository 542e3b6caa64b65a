"""A comparison of imported embeddings with the ones that sentence-transformers computes."""

import importlib.util

import torch
import torch.nn.functional as F

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, render_passage

SAMPLES = [
    {"title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."},
    {"title": "", "text": "Radium is a chemical element; it was discovered by Marie and Pierre Curie in 1898."},
    {
        "title": "A long one",
        "text": "Amsterdam is the capital of the Netherlands, a city of canals, bridges and bicycles. " * 60,
    },
]


@torch.no_grad()
def compare(model: CoSupForCausalLM, name: str, own_head: bool, own_queries: bool) -> None:
    """
    Compare the embeddings of a few passages with those that sentence-transformers computes, if it is installed.

    The passage prompt is the model's own. Where `encode_document` or `encode_query` reads another one, a line says so.

    Args:
        model ([`CoSupForCausalLM`]): the imported model.
        name (`str`): repository or folder of the retriever.
        own_head (`bool`): whether `emb_head` comes from the retriever; a new head is left out of the comparison.
        own_queries (`bool`): whether the retriever also makes the queries.

    Raises:
        `ValueError`: if they differ by more than 1e-4 of their length (2e-2 if weights are not float32).
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        print("sentence-transformers is not installed: embeddings were not compared with its own.", flush=True)
        return
    from sentence_transformers import SentenceTransformer

    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, SAMPLES, model.config))
    head = model.emb_head
    if not own_head:
        model.emb_head = None
    embeddings = model.encode_passages(ids, mask)  # (n, h)
    model.emb_head = head

    reference = SentenceTransformer(str(name), device="cpu", model_kwargs={"dtype": model.emb_seq.dtype})
    reference.max_seq_length = max(map(len, ids))  # --max_passage_length may have shortened passages
    texts = [render_passage(passage, model.config.passage_template) for passage in SAMPLES]
    vectors = reference.encode(texts, prompt=model.config.passage_prompt, show_progress_bar=False)
    expected = torch.tensor(vectors).float()  # (n, h)
    if model.config.similarity == "cosine":
        expected = F.normalize(expected, dim=-1)

    differences = (embeddings - expected).norm(dim=1) / expected.norm(dim=1)  # (n,)
    difference = float(differences.max())
    tolerance = 1e-4 if model.emb_seq.dtype == torch.float32 else 2e-2
    if not difference <= tolerance:  # NaN included
        raise ValueError(
            f"The embeddings differ from sentence-transformers' own by {difference:.1e} of their length: "
            f"{name} does something that its files do not say."
        )
    print(
        f"The embeddings equal sentence-transformers' own: they differ by at most {difference:.1e} of their length.",
        flush=True,
    )
    prompts = {"document": ("passage", model.config.passage_prompt)}
    if own_queries:
        prompts["query"] = ("query", model.config.query_prompt)
    for task, (option, prompt) in prompts.items():
        other = reference.prompts[task]
        if other != prompt:
            print(
                f"Note: sentence-transformers' encode_{task} puts {other!r} before a text; this import puts"
                f" {prompt!r}. For the former: --{option}_prompt {other!r}",
                flush=True,
            )
