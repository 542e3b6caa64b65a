"""
Random requests to a real server: each gets an answer or an error in OpenAI's shape, and the server lives on.

`COSUP_FUZZ_EXAMPLES=1000 pytest tests/serving/test_fuzz.py -n 0` sends 1,000 requests a test, new ones in each run.
"""

import json
import os
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.served_world import MODEL, served_world

schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the schema of the API")

NUM_EXAMPLES = int(os.environ.get("COSUP_FUZZ_EXAMPLES", "0"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES or 12,
    derandomize=not NUM_EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "who?"}], "max_tokens": 4},
    "/v1/completions": {"model": MODEL, "prompt": "who?", "max_tokens": 4},
    "/v1/embeddings": {"model": MODEL, "input": ["a passage"]},
}


@pytest.fixture(scope="module")
def world():
    with served_world(max_position_embeddings=96) as world:
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


def check(response: httpx.Response) -> None:
    """Check that a response is an answer, or an error that says whose fault it is."""
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
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.sampled_from(["[NSP]", "[CE]", "</s>", ""])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
RETRIEVAL = st.dictionaries(
    st.sampled_from(
        "top_k max_retrievals force_nsp_first forbid_nsp candidates min_score no_repeat_passages forget_passages"
        " passages stream_passages output_query_embeds titel".split()
    ),
    st.booleans() | st.integers(-1, 5) | st.lists(st.sampled_from(["p0", "p1", "nobody"]), max_size=3) | VALUES,
    max_size=3,
)


@st.composite
def changed_bodies(draw, good, names):
    """Return a good body in which one to three fields have another value or are missing."""
    body = dict(good)
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        if name == "retrieval":
            body[name] = draw(RETRIEVAL)
        elif draw(st.integers(0, 9)) == 0:
            body.pop(name, None)
        else:
            body[name] = draw(VALUES)
    return body


@pytest.mark.parametrize("path", GOOD)
def test_good_requests_with_changes(http, operations, path):
    schema = operations[path].schema.raw_schema["components"]["schemas"]
    (names,) = [list(body["properties"]) for body in schema.values() if "model" in body.get("properties", {})][:1]

    @FUZZ
    @given(changed_bodies(GOOD[path], [*names, "unknown"]))
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
    response = http.request(method, httpx.URL(http.base_url.join("/"), path=f"/v1/{path}"))
    if method != "OPTIONS" or response.status_code >= 400:
        check(response)
