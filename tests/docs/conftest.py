"""What the code of the pages is run with."""

import pytest

from support.hub_server import hub_server
from support.hub_store import HubStore
from support.stand_ins import copy_stand_ins, put_on_hub, variables, write_stand_ins


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    write_stand_ins(folder)
    return folder


@pytest.fixture(scope="session")
def hub_folder(stand_ins, tmp_path_factory):
    """The folder of a server's repositories, and of the Hugging Face folder of its clients."""
    folder = tmp_path_factory.mktemp("docs_hub")
    put_on_hub(HubStore(folder / "hub"), stand_ins, tmp_path_factory.mktemp("on_hub"))
    return folder


@pytest.fixture(scope="module")
def hub_variables(hub_folder):
    """The variables with which a program uses the server."""
    pytest.importorskip("jsonschema", reason="jsonschema, which the test Hub checks cards with, is not installed")
    with hub_server(hub_folder / "hub") as hub:
        yield variables(hub, hub_folder / "hf_home")


@pytest.fixture
def folder(stand_ins, tmp_path):
    """A copy of the folder of stand-ins, for one test."""
    copy_stand_ins(stand_ins, tmp_path)
    return tmp_path
