"""Fixtures of the tests of generation."""

import pytest

from support.generation import question_inputs, question_steer
from support.models import PASSAGES


@pytest.fixture
def index(model):
    return model.build_index(PASSAGES, show_progress_bar=False)


@pytest.fixture
def inputs(model):
    """A left-padded batch of prompts, one for each question."""
    return question_inputs(model)


@pytest.fixture
def steer(model):
    """A logits processor that makes the random model retrieve."""
    return question_steer(model)
