"""An index in Milvus whose server is killed while answers are written, and started again."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import serve

from modeling_cosup import MilvusPassageIndex, RetrievalConfig, RetrievalError
from modeling_cosup.tokenization_cosup import encode_prompt
from support.models import PASSAGES, make_model
from support.serving import running_server

from serving.api import ApiSettings
from serving.arguments import ServeArguments
from shared.memory_options import MemoryOptions

pytest.importorskip("pymilvus", reason="pymilvus is not installed")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")

QUESTIONS = ["who?", "when was it?", "radium", "in Warsaw"]
SEARCHES = {"force_nsp_first": True, "max_retrievals": 1}


class Killing:
    """An index whose server is killed before its third search."""

    def __init__(self, index, server):
        self.index, self.server = index, server
        self.searches = 0

    def __getattr__(self, name):
        return getattr(self.index, name)

    def __len__(self):
        return len(self.index)

    def search(self, *args, **kwargs):
        self.searches += 1
        if self.searches == 3:
            self.server.kill()
        return self.index.search(*args, **kwargs)


def ask(url, question, max_tokens=8, stream=False, **retrieval):
    """Return the status and the body of a chat; of a stream its text."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    response = httpx.post(f"{url}/v1/chat/completions", json={**body, "retrieval": retrieval}, timeout=60)
    return response.status_code, response.text if stream else response.json()


def text_of(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"].split()


def test_a_killed_index_server_fails_searches_alone_and_is_found_again(milvus_server, tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "tiny")
    in_folder = model.build_index(PASSAGES, show_progress_bar=False)
    MilvusPassageIndex.from_index(in_folder, milvus_server.uri, "wiki", show_progress_bar=False).close()
    prompts = [encode_prompt(model.tokenizer, question) for question in QUESTIONS]

    def answers(retriever, **options):
        options = {"retrieval_config": RetrievalConfig(**SEARCHES), "max_new_tokens": 8, "batch_size": 1, **options}
        return model.generate_many(prompts, retriever=retriever, show_progress_bar=False, **options)

    expected = answers(in_folder)
    free = {"retrieval_config": RetrievalConfig(forbid_nsp=True), "max_new_tokens": 200}
    long_text = answers(in_folder, **free)[1].text.split()
    of_many = model.load_index("wiki", uri=milvus_server.uri, max_retries=0)
    args = {"index": "wiki", "index_uri": milvus_server.uri, "index_timeout": 2.0}
    engine = serve.open_engine(ServeArguments(model=str(tmp_path / "tiny"), **args), MemoryOptions())
    with running_server(engine, ApiSettings("tiny")) as url, ThreadPoolExecutor() as pool:
        assert text_of(ask(url, QUESTIONS[0], **SEARCHES)) == expected[0].text.split()
        long_answer = pool.submit(ask, url, QUESTIONS[1], 200, forbid_nsp=True)
        with pytest.raises(RetrievalError, match="The search failed after 2 finished rows: .*no answer") as error:
            answers(Killing(of_many, milvus_server), output_file=tmp_path / "answers.jsonl")
        assert len(error.value.finished) == 2
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2

        start = time.monotonic()
        searching = [pool.submit(ask, url, question, **SEARCHES) for question in QUESTIONS]
        streaming = pool.submit(ask, url, QUESTIONS[0], stream=True, **SEARCHES)
        for future in searching:
            status, body = future.result()
            assert (status, body["error"]["code"]) == (502, "search_failed")
            assert body["error"]["message"] == "The index cannot be searched (ConnectionError)."
        assert streaming.result()[0] == 502
        assert time.monotonic() - start < 10  # each search is tried twice, half a second apart
        assert text_of(ask(url, QUESTIONS[0], forbid_nsp=True))
        assert text_of(long_answer.result()) == long_text
        assert httpx.get(f"{url}/health").status_code == 200

        milvus_server.start()
        for question, answer in zip(QUESTIONS, expected, strict=True):
            assert text_of(ask(url, question, **SEARCHES)) == answer.text.split()
        resumed = answers(of_many, output_file=tmp_path / "answers.jsonl")
    assert [answer.token_ids for answer in resumed] == [answer.token_ids for answer in expected]
    assert [answer.retrievals[0].passage_ids for answer in resumed] == [
        answer.retrievals[0].passage_ids for answer in expected
    ]
    of_many.close()
