"""The passage index: texts, ids, token ids and exact embeddings of a corpus, searched through FAISS."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .tokenization_cosup import (encode_passages_for_emb_seq, encode_passages_for_gen, pad_rows)

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]
try:
    import pyarrow as pa
except ImportError:
    pa = None

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE, EMBEDDINGS_FILE, PASSAGES_FILE = "index_config.json", "embeddings.safetensors", "passages.arrow"


class PassageIndex:
    """
    A corpus in Emb_seq's space: what `generate(retriever=...)` searches.

    Args:
        passages (`pyarrow.Table`): columns `id`, `title`, `text` (strings) and `input_ids` (lists of int32, as Gen reads the passage).
        embeddings (`torch.FloatTensor` of shape `(M, h)`): of the same rows.
        fingerprint (`dict`): of the model that made the embeddings, see [`CoSupForCausalLM.fingerprint`].

    Raises:
        `ImportError`: when faiss or pyarrow is missing.
    """

    def __init__(self, passages, embeddings, fingerprint):
        _require_packages()
        if len(passages) != len(embeddings):
            raise ValueError(f"The index has {len(passages)} passages but {len(embeddings)} embeddings.")
        self.passages = passages
        self.embeddings = embeddings
        self.fingerprint = fingerprint
        self._rows = None
        self._faiss = faiss.IndexFlatIP(embeddings.shape[1])
        self._faiss.add(embeddings.numpy())

    @classmethod
    def build(cls, passages, model, tokenizer=None, batch_size=64, show_progress_bar=True):
        """
        Embed a corpus.

        Args:
            passages (iterable of `dict`): each `{"id", "title", "text"}`; `title` may be empty or missing.
            model ([`CoSupForCausalLM`]): with Emb_seq in memory; it runs where it is, in its dtype.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's own.
            batch_size (`int`): passages per forward; batches are sorted by length.
            show_progress_bar (`bool`): a tqdm bar.

        Returns:
            [`PassageIndex`].

        Raises:
            `ValueError`: names the row of a passage with a missing field, an empty text or an id that was there before.
        """
        _require_packages()
        passages = check_passages(passages)
        if tokenizer is not None:
            model.tokenizer = tokenizer
        gen_ids = encode_passages_for_gen(model.tokenizer, passages, model.config)
        emb_seq_ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
        embeddings = _embed(model, emb_seq_ids, batch_size, show_progress_bar)
        columns = {name: pa.array([passage[name] for passage in passages], pa.large_string()) for name in ("id", "title", "text")}
        table = pa.table({**columns, "input_ids": pa.array(gen_ids, pa.large_list(pa.int32()))})
        return cls(table, embeddings, model.fingerprint())

    def search(self, query_embeds, k=1, candidates=None):
        """
        The nearest passages by exact inner product.

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): of the model that built the index; any float dtype and device.
            k (`int`): passages per query, at most as many as the index holds.

        Returns:
            `(scores, indices)`: `numpy.ndarray` of float32 and int64, both `(N, k)`, best first; `index[i]` is a passage.
        """
        queries = np.ascontiguousarray(torch.as_tensor(query_embeds).detach().float().cpu().numpy())
        if queries.shape[-1] != self.embeddings.shape[1]:
            raise ValueError(f"Queries have {queries.shape[-1]} dimensions, the index has {self.embeddings.shape[1]}.")
        k = min(k, len(self))
        if len(queries) == 0:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        if candidates is not None:
            scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
            for i, pool in enumerate(candidates):
                pool = np.arange(len(self)) if pool is None else pool
                own = self.embeddings.numpy()[pool] @ queries[i]
                best = np.argsort(-own)[:k]
                scores[i, : len(best)], rows[i, : len(best)] = own[best], pool[best]
            return scores, rows
        return self._faiss.search(queries, k)

    def __len__(self):
        return len(self.passages)

    def __getitem__(self, row):
        """The passage of a row: `{"id", "title", "text", "input_ids"}`."""
        return {name: column[row].as_py() for name, column in zip(self.passages.column_names, self.passages.columns, strict=True)}

    def get_passages(self, rows):
        """The passages of several rows."""
        return [self[row] for row in rows]

    def rows_of(self, ids):
        """Rows of passage ids."""
        return np.array([self.row_of(id) for id in ids])

    def row_of(self, passage_id):
        """Row of a passage id; `KeyError` when the index lacks it."""
        if self._rows is None:
            self._rows = {id: row for row, id in enumerate(self.passages["id"].to_pylist())}
        return self._rows[passage_id]

    def check_model(self, model):
        """
        Raise unless `model` searches the space that this index holds.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        expected = model.fingerprint()
        different = [name for name in expected if self.fingerprint.get(name) != expected[name]]
        if different:
            lines = [f"  {name}: the index has {_short(self.fingerprint.get(name))}, the model {_short(expected[name])}" for name in different]
            raise ValueError("This index was built by another model; build it again with this one.\n" + "\n".join(lines))

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory):
        """
        Write the index as a folder: `index_config.json`, `embeddings.safetensors`, `passages.arrow`.

        The folder appears under its name only when it is complete; an index that stood there before is replaced.

        Args:
            save_directory (`str` or `Path`): created with its parents.

        Raises:
            `OSError`: when the folder cannot be written, or `save_directory` exists and is not an index.
        """
        save_directory = self.check_save_directory(save_directory)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{save_directory.name}.", suffix=".unfinished", dir=save_directory.parent))
        try:
            save_file({"embeddings": self.embeddings.contiguous()}, unfinished / EMBEDDINGS_FILE)
            with pa.OSFile(str(unfinished / PASSAGES_FILE), "wb") as file, pa.ipc.new_file(file, self.passages.schema) as writer:
                writer.write_table(self.passages)
            config = {"format_version": FORMAT_VERSION, "num_passages": len(self), "embedding_size": self.embeddings.shape[1]}
            (unfinished / CONFIG_FILE).write_text(json.dumps({**config, "fingerprint": self.fingerprint}, indent=2) + "\n")
            unfinished.chmod(0o755)  # mkdtemp's folder is private
            replaced = unfinished.with_suffix(".replaced")
            if save_directory.exists():
                os.replace(save_directory, replaced)
            try:
                os.replace(unfinished, save_directory)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, save_directory)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @staticmethod
    def check_save_directory(save_directory):
        """
        Raise now what `save_pretrained` would raise after an hour of embedding; its parents are created.

        Raises:
            `OSError`: when the folder cannot be written, or exists and is neither empty nor an index.
        """
        save_directory = Path(save_directory)
        if save_directory.exists() and any(save_directory.iterdir()) and not (save_directory / CONFIG_FILE).exists():
            raise FileExistsError(f"{save_directory} exists, is not empty and is not a passage index; choose another folder.")
        save_directory.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=save_directory.parent).close()
        return save_directory

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None, **kwargs):
        """
        Load a saved index: texts are memory-mapped, embeddings read, FAISS built from them. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository on the Hub.
            revision (`str`, *optional*): of the repository.
            **kwargs: for `huggingface_hub.snapshot_download`.

        Raises:
            `FileNotFoundError`: when the folder is not a complete index.
            `ValueError`: for a format version that this release does not read, or files that do not belong together.
        """
        _require_packages()
        folder = Path(name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError

            files = [CONFIG_FILE, EMBEDDINGS_FILE, PASSAGES_FILE]
            try:
                folder = Path(snapshot_download(str(name_or_path), repo_type="dataset", revision=revision, allow_patterns=files, **kwargs))
            except (HFValidationError, OSError) as error:
                raise FileNotFoundError(f"{name_or_path} is not a folder, and no dataset repository of this name could be loaded: {error}") from error
        for name in (CONFIG_FILE, EMBEDDINGS_FILE, PASSAGES_FILE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} is not a complete passage index: {name} is missing.")
        config = _read(folder / CONFIG_FILE, lambda path: json.loads(path.read_text()))
        if config.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{folder / CONFIG_FILE} has format_version {config.get('format_version')}, this release reads {FORMAT_VERSION}.")
        passages = _read(folder / PASSAGES_FILE, lambda path: pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        embeddings = _read(folder / EMBEDDINGS_FILE, lambda path: load_file(path)["embeddings"])
        if not len(passages) == len(embeddings) == config["num_passages"]:
            raise ValueError(f"{folder}: {len(passages)} passages, {len(embeddings)} embeddings, expected {config['num_passages']} of both.")
        return cls(passages, embeddings, config["fingerprint"])


def _read(path, reader):
    try:
        return reader(path)
    except Exception as error:  # json, pyarrow and safetensors each raise their own
        raise ValueError(f"{path} is damaged: {error}") from error


def check_passages(passages):
    """
    A corpus as a list of `{"id", "title", "text"}`, checked.

    Raises:
        `ValueError`: names the row, what was found and what was expected.
    """
    checked, rows = [], {}
    for row, passage in enumerate(passages):
        if not isinstance(passage, Mapping):
            raise ValueError(f"Corpus row {row} is {passage!r}, expected a dict with 'id', 'title' and 'text'.")
        for name in ("id", "text"):
            value = passage.get(name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"Corpus row {row}: {name!r} is {value!r}, expected a string that is not empty.")
        title = passage.get("title") or ""
        if not isinstance(title, str):
            raise ValueError(f"Corpus row {row}: 'title' is {title!r}, expected a string.")
        if passage["id"] in rows:
            raise ValueError(f"Corpus row {row}: id {passage['id']!r} already stands in row {rows[passage['id']]}; ids must be unique.")
        rows[passage["id"]] = row
        checked.append({"id": passage["id"], "title": title, "text": passage["text"]})
    if not checked:
        raise ValueError("The corpus holds no passage.")
    return checked


@torch.no_grad()
def _embed(model, token_ids, batch_size, show_progress_bar):
    """Embeddings `(M, h)` in float32 on the CPU, in the order of `token_ids`; batches of similar length, longest first."""
    from tqdm.auto import tqdm

    training = model.training
    order = sorted(range(len(token_ids)), key=lambda row: -len(token_ids[row]))
    embeddings = torch.empty(len(token_ids), model.config.embedding_size)
    model.eval()
    try:
        with tqdm(total=len(order), desc="Embedding passages", unit="passage", disable=not show_progress_bar) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = pad_rows([token_ids[row] for row in rows], device=model.device)
                embeddings[rows] = model.encode_passages(ids, mask).float().cpu()
                bar.update(len(rows))
    finally:
        model.train(training)
    return embeddings


def _require_packages():
    missing = [pip for module, pip in ((faiss, "faiss-cpu"), (pa, "pyarrow")) if module is None]
    if missing:
        raise ImportError(f"A passage index needs {' and '.join(missing)}: pip install {' '.join(missing)} (on a GPU machine faiss-gpu).")


def _short(value):
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)
