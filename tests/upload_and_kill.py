"""Uploads a saved index to Milvus and dies by SIGKILL at a batch, before or after it was sent. Launched by test_milvus.py."""

import os
import signal
import sys

from modeling_cosup import PassageIndex
from modeling_cosup.milvus_client_cosup import MilvusConnection
from modeling_cosup.milvus_cosup import MilvusPassageIndex

folder, uri, collection, batch, moment = sys.argv[1:]
batches, call = 0, MilvusConnection.call


def call_and_die(self, method, *args, **kwargs):
    global batches
    batches += method == "upsert"
    if method == "upsert" and batches == int(batch) and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = call(self, method, *args, **kwargs)
    if (method == "upsert" and batches == int(batch)) or method == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


MilvusConnection.call = call_and_die  # type: ignore[method-assign]
MilvusPassageIndex.from_index(PassageIndex.from_pretrained(folder), uri, collection, show_progress_bar=False)
