"""What several tests share: tiny models, the slow reference generation, a Hub, a Milvus server, NLI models."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
# failed assertions of these helpers show their values too
pytest.register_assert_rewrite("support.evaluation_world", "support.generation", "support.indexes")
