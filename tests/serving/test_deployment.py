"""The deployment files fit together and name options that exist. No container is started."""

import re
from collections import defaultdict
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


def test_what_is_open_is_open_to_this_machine_and_asks_for_a_password(services):
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports == {
        "api": ["127.0.0.1:8000:8000"],
        "milvus": ["127.0.0.1:19530:19530"],
        "encoder": ["127.0.0.1:8003:8000"],
    }
    assert services["encoder"]["profiles"] == ["encoder"]
    settings = services["milvus"]["environment"]
    assert settings["COMMON_SECURITY_AUTHORIZATIONENABLED"] == "true"
    password = settings["COMMON_SECURITY_DEFAULTROOTPASSWORD"]
    assert password.startswith("${MILVUS_PASSWORD:?")  # compose stops without it
    assert services["api"]["environment"]["MILVUS_TOKEN"] == f"root:{password}"


def test_services_that_share_a_gpu_share_its_memory(services):
    shares = defaultdict(list)  # of each GPU's memory
    for name, service in services.items():
        if "deploy" not in service:
            continue
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert "replicas" not in service["deploy"] and "count" not in device, name  # all would get the first GPU
        command = service["command"]
        share = 0.9  # vLLM's own
        if "--gpu-memory-utilization" in command:
            share = float(command[command.index("--gpu-memory-utilization") + 1])
        for number in device["device_ids"]:
            shares[number].append(share)
    assert len(shares) == 4
    assert all(sum(parts) < 1 for parts in shares.values())


def test_the_image_has_the_versions_of_the_tests():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all(" -c constraints.txt" in line for line in installs)
    copied = next(i for i, line in enumerate(lines) if line.startswith("COPY") and "constraints.txt" in line)
    assert copied < lines.index(installs[0])


def test_addresses_and_dependencies_are_services(services):
    nginx = (FOLDER / "nginx.conf").read_text()
    servers = dict(re.findall(r"server ([\w-]+):(\d+) resolve", nginx))
    with_gpu = {name for name, service in services.items() if "deploy" in service}
    assert servers == dict.fromkeys(with_gpu - {"encoder"}, "8000")
    for name in servers:
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
    gen, second_gen, query, encoder = (services[name]["command"] for name in ("gen-1", "gen-2", "query", "encoder"))
    assert second_gen == gen
    pooling = ["--runner", "pooling", "--convert", "embed"]
    assert query == gen[:2] + pooling + gen[2:]
    assert encoder == ["--model", "/served/emb_seq", *query[2:]]
