"""Fixtures for all tests."""

import gc

import pytest
import torch

from support.models import PASSAGES, make_model, make_tokenizer
from support.recipes import write_inputs

pytest_plugins = ["support.hub_server", "support.milvus_server"]  # their fixtures: `hub` and `milvus_server`

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def pytest_collection_finish():
    gc.freeze()  # every train() collects garbage, and would look at all objects of the imported libraries


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer=tokenizer)


@pytest.fixture
def passages():
    return [dict(passage) for passage in PASSAGES]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two tiny models of different architecture and width, and a small dataset, on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
