"""
Retrievers over a corpus, by one contract: `len`, `find(ids)`, `ids_of(rows)`, `embed_queries(instances)`, `search(queries, k)` and `scores(query, rows)`.

Encoded corpora are kept under `index_dir`, by the content of model and passages.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PretrainedConfig

from modeling_cosup import CoSupConfig, CoSupForCausalLM, PassageIndex
from modeling_cosup.files_cosup import digest, digest_all
from modeling_cosup.index_files_cosup import map_tensors, read, write_tensors
from modeling_cosup.index_search_cosup import DeviceSearch, ExactSearch
from modeling_cosup.passages_cosup import checked_passages, read_corpus
from modeling_cosup.tokenization_cosup import render_passage
from trainer.judging.answers import embed_queries

from shared.indexes import open_index

SHARD_SIZE = 32768  # passages that are encoded, and lost when the process dies
SORTED = 2048  # that are sorted by length, and encoded between two steps of the progress bar


def is_cosup(name: str) -> bool:
    """Whether a name or path is a CoSup checkpoint, by its config; sentence-transformers models may have none."""
    try:
        return PretrainedConfig.get_config_dict(name)[0].get("model_type") == "cosup"
    except OSError:
        return False


class CoSupRetriever:
    """
    A CoSup checkpoint over its index, which is loaded, or built of the corpus.

    Args:
        args: `model`, `index` (and `index_uri`) or `corpus_file`, `index_dir`, `batch_size`, `device`, `dtype`.

    Raises:
        `ValueError`, `OSError`: for a corpus or an index that cannot be used.
    """

    def __init__(self, args: Any) -> None:
        self.batch_size = args.batch_size
        own_queries = (
            CoSupConfig.from_pretrained(args.model).query_from == "gen"
        )  # then Emb_seq has nothing to do where the index is there
        load_emb_seq = args.index is None or not own_queries
        self.model = (
            CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=load_emb_seq)
            .to(args.device)
            .eval()
        )
        if args.index:
            self.index = open_index(self.model, args.index, args.index_uri, search="exact")
        else:
            self.index = self.build(args.corpus_file, args.index_dir)
        if args.device != "cpu" and args.index_uri is None:  # what Milvus holds, Milvus searches
            self.index.to(args.device)

    def build(self, corpus_file: str, index_dir: str | None) -> PassageIndex:
        """The index of a corpus; under `index_dir` it is found again by the content of corpus and model."""
        if index_dir is None:
            return self.model.build_index(corpus_file, batch_size=self.batch_size)
        corpus = digest_all(passage for _, passage in checked_passages(read_corpus(corpus_file)))
        folder = Path(index_dir) / digest([corpus, self.model.fingerprint()])[:16]
        if folder.is_dir():
            print(f"The index of this corpus by this model is there: {folder}", flush=True)
            return self.model.load_index(str(folder), search="exact")
        folder.parent.mkdir(parents=True, exist_ok=True)
        return self.model.build_index(corpus_file, save_directory=folder, batch_size=self.batch_size)

    def __len__(self) -> int:
        return len(self.index)

    def find(self, ids: Iterable[str]) -> list[int]:
        """Rows of ids, -1 where there is none."""
        return self.index.find(ids).tolist()

    def ids_of(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows, `list[str]`."""
        return [passage["id"] for passage in self.index.get_passages(rows)]

    def embed_queries(self, instances: list[dict[str, Any]]) -> torch.Tensor:
        """Query embeddings, `torch.FloatTensor` of shape `(N, h)`."""
        return embed_queries(self.model, instances, self.batch_size)

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`(scores, rows)`, `numpy.ndarray` of shape `(N, k)`, best first, of the whole corpus."""
        return self.index.search(queries, k)

    def scores(self, query: torch.Tensor, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Scores of rows for one query, `numpy.ndarray`."""
        return self.index.get_embeddings(rows) @ query.numpy()


@dataclass
class Block:
    """Embeddings of consecutive passages, in memory or mapped: `torch.FloatTensor` of shape `(n, h)`."""

    embeddings: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeddings)


class SentenceRetriever:
    """
    A sentence-transformers model over a corpus, by exact search. Ids of passages and embeddings are held; with `index_dir` the embeddings are mapped.

    Args:
        args: `model`, `corpus_file`, `index_dir`, `batch_size`, `passage_template`, `device`, `dtype`.

    Raises:
        `ValueError`: for a corpus with a missing field or an id that stands there twice; for a similarity that is not an inner product.
        `OSError`: for a model that cannot be loaded.
    """

    def __init__(self, args: Any) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{args.model} is no CoSup checkpoint; any other retriever needs pip install sentence-transformers."
            ) from None
        options = {} if args.dtype == "auto" else {"model_kwargs": {"dtype": args.dtype}}
        self.model = SentenceTransformer(args.model, device=args.device, **options).eval()
        if self.model.similarity_fn_name not in ("cosine", "dot"):
            raise ValueError(f"{args.model} compares by {self.model.similarity_fn_name}, expected cosine or dot.")
        self.template, self.batch_size = args.passage_template, args.batch_size
        self.rows, self.ids, blocks = {}, [], []
        folder = None if args.index_dir is None else Path(args.index_dir) / self.fingerprint()
        passages = self.read(args.corpus_file)
        with tqdm(desc="Encoding passages", unit=" passages", smoothing=0) as bar:
            while shard := list(islice(passages, SHARD_SIZE)):
                blocks.append(Block(self.encode_shard(shard, folder, bar)))
        if not blocks:
            raise ValueError(f"{args.corpus_file}: the corpus holds no passage.")
        self.exact = ExactSearch(blocks)
        self.searcher = self.exact if args.device == "cpu" else DeviceSearch(blocks, args.device)

    def read(self, corpus_file: str) -> Iterator[dict[str, str]]:
        """Passages of the corpus, one at a time; their ids are kept."""
        for where, passage in checked_passages(read_corpus(corpus_file)):
            if passage["id"] in self.rows:
                raise ValueError(f"{where}: id {passage['id']!r} stands in the corpus twice; ids must be unique.")
            self.rows[passage["id"]] = len(self.ids)
            self.ids.append(passage["id"])
            yield passage

    def fingerprint(self) -> str:
        """What decides an embedding: weights, tokenizer, modules, prompts and template; hex `str`."""
        total = hashlib.sha256(
            repr(
                (str(self.model), self.model.prompts, self.model.default_prompt_name, self.model.max_seq_length)
            ).encode()
        )
        total.update(
            repr(
                (self.template, self.model.similarity_fn_name, sorted(self.model.tokenizer.get_vocab().items()))
            ).encode()
        )
        for name, weights in sorted(self.model.state_dict().items()):
            total.update(f"{name} {tuple(weights.shape)} {weights.dtype}".encode())
            total.update(weights.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()[:16]

    def encode_shard(self, passages: list[dict[str, str]], folder: Path | None, bar: tqdm) -> torch.Tensor:
        """Embeddings of passages, `torch.FloatTensor` of shape `(n, h)`; those that are kept in `folder` are not made again."""
        path = None if folder is None else folder / f"{digest_all(passages)[:16]}.safetensors"
        if path is None or not path.exists():
            texts, parts = [render_passage(passage, self.template) for passage in passages], []
            for start in range(0, len(texts), SORTED):
                part = texts[start : start + SORTED]
                parts.append(
                    self.normalized(
                        self.model.encode_document(
                            part, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
                        )
                    )
                )
                bar.update(len(part))
            embeddings = torch.cat(parts)
            if path is not None:
                folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")
                write_tensors(unfinished, {"embeddings": embeddings})
                unfinished.replace(path)
        else:
            bar.update(len(passages))
        return embeddings if path is None else read(path, map_tensors)["embeddings"]

    def normalized(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Float32 on the CPU; of unit length where the model compares by the cosine."""
        embeddings = embeddings.float().cpu()
        return F.normalize(embeddings, dim=-1) if self.model.similarity_fn_name == "cosine" else embeddings

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Iterable[str]) -> list[int]:
        """Rows of ids, -1 where there is none."""
        return [self.rows.get(id, -1) for id in ids]

    def ids_of(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows, `list[str]`."""
        return [self.ids[row] for row in rows]

    def embed_queries(self, instances: list[dict[str, Any]]) -> torch.Tensor:
        """Query embeddings, `torch.FloatTensor` of shape `(N, h)`: of the inputs alone, without instructions."""
        texts = [re.sub(r"\s*\[SEP\]\s*", " ", instance["input"]) for instance in instances]
        return self.normalized(
            self.model.encode_query(texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=True)
        )

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`(scores, rows)`, `numpy.ndarray` of shape `(N, k)`, best first, of the whole corpus."""
        return self.searcher.search(queries, k)

    def scores(self, query: torch.Tensor, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Scores of rows for one query, `numpy.ndarray`."""
        return (self.exact.gather(np.asarray(rows, np.int64)) @ query).numpy()
