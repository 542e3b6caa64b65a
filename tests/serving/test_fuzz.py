"""
Random requests to a real server: each gets an answer or an error in OpenAI's shape, and the server lives on.

`COSUP_FUZZ_EXAMPLES=1000 pytest -s -n 0 tests/serving/test_fuzz.py` sends 1,000 requests a test, other ones each time.
"""

import json
import os
from collections import Counter
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.served_world import MODEL, served_world

from serving.protocol import ChatBody, CompletionBody, EmbeddingBody, RetrievalBody

schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the schema of the API")

NUM_EXAMPLES = int(os.environ.get("COSUP_FUZZ_EXAMPLES", "0"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES or 20,
    derandomize=not NUM_EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
STATUSES: Counter[int] = Counter()  # of all responses
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "who?"}], "max_tokens": 4},
    "/v1/completions": {"model": MODEL, "prompt": "who?", "max_tokens": 4},
    "/v1/embeddings": {"model": MODEL, "input": ["a passage"]},
}


@pytest.fixture(scope="module")
def world():
    with served_world(max_position_embeddings=96, log_prompts=True) as world:
        yield world


@pytest.fixture(scope="module")
def http(world):
    with httpx.Client(base_url=world.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def operations(http):
    """The operations that take a body, by their path; of the schema that the server itself gives out."""
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    return {path: schema[path]["POST"] for path in GOOD}


@pytest.fixture(autouse=True, scope="module")
def alive(world, http):
    """In the end the server gives the right answer to a good request, and no slot is taken."""
    yield
    good = GOOD["/v1/chat/completions"]
    response = http.post("/v1/chat/completions", json=good | {"temperature": 0})
    expected = world.expected("who?", good["max_tokens"])
    assert response.json()["choices"][0]["message"]["content"].split() == expected.split()
    world.wait_until_idle()
    print(f"\n{STATUSES.total():,} requests: {dict(STATUSES)}")


def check(response: httpx.Response) -> None:
    """Check that a response is an answer, or an error that says whose fault it is."""
    STATUSES[response.status_code] += 1
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text
        else:
            assert {"choices", "data"} & set(response.json())
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].strip()
    assert "Traceback" not in error["message"]


def post(http: httpx.Client, path: str, body: Any, content_type: str = "application/json") -> None:
    """Send a body, as bytes or to be written as JSON, and check the response."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    check(http.post(path, content=content, headers={"content-type": content_type}))


# ---------------------------------------------------------------------- from the schema


@pytest.mark.parametrize("mode", schemathesis.GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", GOOD)
def test_requests_from_the_schema(http, operations, path, mode):
    @FUZZ
    @given(operations[path].as_strategy(generation_mode=mode), st.integers(1, 8))
    def run(case, max_tokens):
        body = case.body
        if isinstance(body, dict) and mode == schemathesis.GenerationMode.POSITIVE:
            body = body | {"model": MODEL}  # a random name is refused before anything else is looked at
            if "input" not in body:
                body["max_tokens"] = max_tokens
        post(http, path, body)

    run()


# ---------------------------------------------------------------------- next to good ones

NUMBERS = st.integers() | st.floats() | st.integers(-3, 9) | st.sampled_from([2**63, -(2**63), 10**30, 1e308])
TEXTS = st.text(max_size=12) | st.sampled_from(["[NSP]", "[CE]", "</s>", "", "\ud800"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PLAUSIBLE = {  # values that a request may have; the rest is random
    "candidates": st.lists(st.sampled_from(["p0", "p1", "p5"]), min_size=1, max_size=3),
    "force_nsp_first": st.booleans(),
    "forget_passages": st.sampled_from(["recompute", "mask", None]),
    "input": st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=3),
    "input_type": st.just("query"),
    "logprobs": st.booleans() | st.integers(0, 5),
    "max_retrievals": st.integers(0, 3),
    "messages": st.just([{"role": "system", "content": "Answer."}, {"role": "user", "content": "who? [NSP]"}]),
    "min_score": st.floats(-1, 1),
    "n": st.integers(1, 3),
    "passages": st.lists(st.sampled_from(["p0", {"text": "x", "metadata": {"page": 3}}]), max_size=2),
    "no_repeat_passages": st.booleans(),
    "prompt": st.lists(st.integers(0, 399), min_size=1, max_size=9) | st.lists(st.text(min_size=1), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=2) | st.lists(st.sampled_from("abc e".split()), max_size=4),
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(1, 3),
    "top_p": st.floats(0.01, 1),
}


@st.composite
def changed(draw, good, names):
    """Return a good body, or a part of one, in which up to three fields have other values or are missing."""
    body = dict(good)
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        kind = draw(st.integers(0, 9))
        if name == "retrieval":
            body[name] = draw(changed({}, [*RetrievalBody.model_fields, "top-k"]))
        elif kind < 6 and name in PLAUSIBLE:
            body[name] = draw(PLAUSIBLE[name])
        elif kind < 9:
            body[name] = draw(VALUES)
        else:
            body.pop(name, None)
    return body


BODIES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}


@pytest.mark.parametrize("path", BODIES)
def test_good_requests_with_changes(http, path):
    names = [name for name in BODIES[path].model_fields if name in PLAUSIBLE or name == "retrieval"]

    @FUZZ
    @given(changed(GOOD[path], names) | changed(GOOD[path], [*BODIES[path].model_fields, "unknown"]))
    def run(body):
        post(http, path, body)

    run()


# ---------------------------------------------------------------------- no JSON, or half of it


@FUZZ
@given(
    path=st.sampled_from(list(GOOD)),
    junk=st.binary(max_size=64),
    cut=st.integers(0, 60),
    content_type=st.sampled_from(["application/json", "text/plain", "application/x-www-form-urlencoded", "x", ""]),
)
def test_bytes(http, path, junk, cut, content_type):
    good = json.dumps(GOOD[path]).encode()
    for body in (junk, good[:cut], good[:cut] + junk + good[cut:]):
        post(http, path, body, content_type)


@FUZZ
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]), st.text(max_size=20))
def test_paths_and_methods(http, method, path):
    check(http.request(method, f"/v1/{quote(path)}"))
