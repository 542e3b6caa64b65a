"""A tiny random model that retrieves, behind a real server on loopback."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt

from support.models import PASSAGES, make_model
