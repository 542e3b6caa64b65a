"""The deployment files fit together and name options that exist. No container is started."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from serving.arguments import ServeArguments
from serving.vllm_client import SESSION_HEADER

FOLDER = Path(__file__).parents[2] / "recipes/serving"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]


def option_names(command):
    return [word.removeprefix("--") for word in command if word.startswith("--")]


def test_the_api_is_started_with_options_that_it_has(services):
    command = services["api"]["command"]
    names = option_names(command)
    assert set(names) <= {field.name for field in fields(ServeArguments)}
    options = dict(zip(names, command[1::2], strict=True))
    args = ServeArguments(
        **{**options, "port": int(options["port"]), "api_key": ["key"], "max_running": 1, "max_waiting": 1}
    )
    assert not args.is_open
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]
    for service in services.values():  # nothing else is open to the network
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_addresses_and_dependencies_are_services(services):
    nginx = (FOLDER / "nginx.conf").read_text()
    upstreams = dict(re.findall(r"server (\w+):(\d+) resolve", nginx))
    assert upstreams == {"gen": "8000", "query": "8000"}
    for name in upstreams:
        command = services[name]["command"]
        assert command[command.index("--port") + 1] == "8000"
    listens = dict(re.findall(r"listen (\d+); location / { proxy_pass http://(\w+); }", nginx))
    api = services["api"]["command"]
    for option, upstream in (("--gen_url", "gen"), ("--query_url", "query")):
        host, port = re.fullmatch(r"http://(\w+):(\d+)/v1", api[api.index(option) + 1]).groups()
        assert host == "balancer"
        assert listens[port] == upstream
    for service in services.values():
        assert set(service.get("depends_on", [])) <= services.keys()
    header = SESSION_HEADER.lower().replace("-", "_")
    assert nginx.count(f"hash $http_{header} consistent;") == 2


def test_gen_is_served_twice_and_queries_are_pooled(services):
    gen, query, encoder = (services[name]["command"] for name in ("gen", "query", "encoder"))
    pooling = ["--runner", "pooling", "--convert", "embed"]
    assert query == gen[:2] + pooling + gen[2:]
    assert encoder == ["--model", "/served/emb_seq", *query[2:]]
