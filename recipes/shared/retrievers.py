"""
Retrievers over a corpus: a CoSup checkpoint, or a sentence-transformers model.

Both have `len`, `find(ids)`, `ids_of(rows)`, `embed_queries(instances)`, `search(queries, k)`, `scores(query, rows)`.
Encoded corpora are kept under `index_dir`; the names of their folders and files are hashes of model and passages.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PretrainedConfig

from modeling_cosup import CoSupConfig, CoSupForCausalLM, PassageIndex
from modeling_cosup.files_cosup import digest, digest_all, locked, replacing_file
from modeling_cosup.folders_cosup import read_tensors, write_tensors
from modeling_cosup.index_search_cosup import DeviceSearch, ExactSearch
from modeling_cosup.passages_cosup import checked_passages, read_corpus
from modeling_cosup.tokenization_cosup import render_passage
from trainer.judging.answers import embed_queries

from shared.indexes import open_index

SHARD_SIZE = 32768  # passages that are encoded between two writes: a process that dies loses no more than these
SORT_SIZE = 2048  # passages that are sorted by length and encoded between two steps of the progress bar


def is_cosup(name: str) -> bool:
    """Return whether a name or path is a CoSup checkpoint. A sentence-transformers model may have no config."""
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except OSError:
        return False
    return config.get("model_type") == "cosup"


class CoSupRetriever:
    """
    A CoSup checkpoint over its index, which is loaded or built from the corpus.

    Args:
        args: `model`, `index` (and `index_uri`) or `corpus_file`, `index_dir`, `batch_size`, `device`, `dtype`.

    Raises:
        `ValueError`, `OSError`: for a corpus or an index that cannot be used.
    """

    def __init__(self, args: Any) -> None:
        self.batch_size = args.batch_size
        gen_makes_queries = CoSupConfig.from_pretrained(args.model).query_from == "gen"
        load_emb_seq = args.index is None or not gen_makes_queries
        model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=load_emb_seq)
        self.model = model.to(args.device).eval()
        if args.index:
            self.index = open_index(self.model, args.index, args.index_uri, search="exact")
        else:
            self.index = self.build(args.corpus_file, args.index_dir)
        if args.device != "cpu" and args.index_uri is None:  # an index in Milvus is searched there
            self.index.to(args.device)

    def build(self, corpus_file: str, index_dir: str | None) -> PassageIndex:
        """Build the index of a corpus, or load it from `index_dir` if the same model built it for the same corpus."""
        if index_dir is None:
            return self.model.build_index(corpus_file, batch_size=self.batch_size)
        corpus_digest = digest_all(passage for _, passage in checked_passages(read_corpus(corpus_file)))
        folder = Path(index_dir) / digest([corpus_digest, self.model.fingerprint()])[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        busy = f"{folder}: another process embeds this corpus; waiting"
        with locked(lock, busy, on_wait=partial(print, flush=True)):
            if folder.is_dir():
                print(f"Loading the index of this corpus by this model from {folder}", flush=True)
                return self.model.load_index(str(folder), search="exact")
            return self.model.build_index(corpus_file, save_directory=folder, batch_size=self.batch_size)

    def __len__(self) -> int:
        return len(self.index)

    def find(self, ids: Iterable[str]) -> list[int]:
        """Return the rows of passage ids, -1 for an unknown id."""
        return self.index.find(ids).tolist()

    def ids_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the passage ids of rows."""
        return [passage["id"] for passage in self.index.get_passages(rows)]

    def embed_queries(self, instances: list[dict[str, Any]]) -> torch.Tensor:
        """Return query embeddings, `torch.FloatTensor` of shape `(N, h)`."""
        return embed_queries(self.model, instances, self.batch_size)

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the whole corpus: `(scores, rows)`, `numpy.ndarray` of shape `(N, k)`, best first."""
        return self.index.search(queries, k)

    def scores(self, query: torch.Tensor, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the scores of rows for one query."""
        return self.index.get_embeddings(rows) @ query.numpy()


@dataclass
class Block:
    """Embeddings of consecutive passages, in memory or mapped: `torch.FloatTensor` of shape `(n, h)`."""

    embeddings: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeddings)


class SentenceRetriever:
    """
    A sentence-transformers model over a corpus, with exact search.

    Passage ids and embeddings are held in memory; with `index_dir` the embeddings are mapped from files.

    Args:
        args: `model`, `corpus_file`, `index_dir`, `batch_size`, `passage_template`, `device`, `dtype`.

    Raises:
        `ValueError`: for a corpus with a missing field or a repeated id, or a similarity other than cosine and dot.
        `OSError`: for a model that cannot be loaded.
    """

    def __init__(self, args: Any) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{args.model} is not a CoSup checkpoint; any other retriever needs pip install sentence-transformers."
            ) from None
        options = {} if args.dtype == "auto" else {"model_kwargs": {"dtype": args.dtype}}
        self.model = SentenceTransformer(args.model, device=args.device, **options).eval()
        if self.model.similarity_fn_name not in ("cosine", "dot"):
            raise ValueError(f"{args.model} compares by {self.model.similarity_fn_name}, expected cosine or dot.")
        self.template = args.passage_template
        self.batch_size = args.batch_size
        self.ids: list[str] = []
        self.rows: dict[str, int] = {}  # passage id -> row
        folder = None if args.index_dir is None else Path(args.index_dir) / self.fingerprint()
        passages = self.read_passages(args.corpus_file)
        blocks = []
        with tqdm(desc="Encoding passages", unit=" passages", smoothing=0) as bar:
            while shard := list(islice(passages, SHARD_SIZE)):
                blocks.append(Block(self.encode_shard(shard, folder, bar)))
        if not blocks:
            raise ValueError(f"{args.corpus_file}: the corpus holds no passage.")
        self.exact = ExactSearch(blocks)
        self.searcher = self.exact if args.device == "cpu" else DeviceSearch(blocks, args.device)

    def read_passages(self, corpus_file: str) -> Iterator[dict[str, str]]:
        """Read the passages of the corpus, one at a time, and keep their ids."""
        for where, passage in checked_passages(read_corpus(corpus_file)):
            if passage["id"] in self.rows:
                raise ValueError(f"{where}: id {passage['id']!r} is already in the corpus; ids must be unique.")
            self.rows[passage["id"]] = len(self.ids)
            self.ids.append(passage["id"])
            yield passage

    def fingerprint(self) -> str:
        """Return a hash (hex) of everything that determines an embedding: weights, tokenizer, modules, prompts, ..."""
        model = self.model
        modules = (str(model), model.prompts, model.default_prompt_name, model.max_seq_length)
        texts = (self.template, model.similarity_fn_name, sorted(model.tokenizer.get_vocab().items()))
        total = hashlib.sha256(repr(modules).encode())
        total.update(repr(texts).encode())
        for name, weights in sorted(model.state_dict().items()):
            total.update(f"{name} {tuple(weights.shape)} {weights.dtype}".encode())
            total.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]

    def encode_shard(self, passages: list[dict[str, str]], folder: Path | None, bar: tqdm) -> torch.Tensor:
        """Return embeddings, `torch.FloatTensor` of shape `(n, h)`, from the file in `folder` if they are there."""
        if folder is None:
            return self.encode(passages, bar)
        path = folder / f"{digest_all(passages)[:16]}.safetensors"
        if path.exists():
            bar.update(len(passages))
        else:
            embeddings = self.encode(passages, bar)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(path) as unfinished:
                write_tensors(unfinished, {"embeddings": embeddings})
        return read_tensors(path)["embeddings"]

    def encode(self, passages: list[dict[str, str]], bar: tqdm) -> torch.Tensor:
        """Embed passages: `torch.FloatTensor` of shape `(n, h)`."""
        texts = [render_passage(passage, self.template) for passage in passages]
        options = {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": False}
        embeddings = []
        for start in range(0, len(texts), SORT_SIZE):
            batch = texts[start : start + SORT_SIZE]
            embeddings.append(self.normalized(self.model.encode_document(batch, **options)))
            bar.update(len(batch))
        return torch.cat(embeddings)

    def normalized(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return embeddings in float32 on the CPU, of unit length if the model compares by the cosine."""
        embeddings = embeddings.float().cpu()
        if self.model.similarity_fn_name == "cosine":
            embeddings = F.normalize(embeddings, dim=-1)
        return embeddings

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Iterable[str]) -> list[int]:
        """Return the rows of passage ids, -1 for an unknown id."""
        return [self.rows.get(id, -1) for id in ids]

    def ids_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the passage ids of rows."""
        return [self.ids[row] for row in rows]

    def embed_queries(self, instances: list[dict[str, Any]]) -> torch.Tensor:
        """Return query embeddings, `torch.FloatTensor` of shape `(N, h)`, of the inputs without instructions."""
        texts = [re.sub(r"\s*\[SEP\]\s*", " ", instance["input"]) for instance in instances]
        options = {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": True}
        return self.normalized(self.model.encode_query(texts, **options))

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the whole corpus: `(scores, rows)`, `numpy.ndarray` of shape `(N, k)`, best first."""
        return self.searcher.search(queries, k)

    def scores(self, query: torch.Tensor, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the scores of rows for one query."""
        return (self.exact.gather(np.asarray(rows, np.int64)) @ query).numpy()
