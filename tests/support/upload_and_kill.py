"""
Uploads a saved index to Milvus, several times, and each time dies by SIGKILL at a batch or behind a request. Launched by test_milvus.py.

Arguments: the index's folder, then for each upload `uri collection batch moment`. Each upload is a forked process: importing takes longest.
"""

import os
import signal
import sys

from modeling_cosup import PassageIndex
from modeling_cosup.milvus_client_cosup import MilvusConnection, milvus_packages
from modeling_cosup.milvus_cosup import MilvusPassageIndex


def upload_and_die(folder, uri, collection, batch, moment):
    """Before or after batch number `batch` is sent, or after the request `moment`."""
    batches, call = 0, MilvusConnection.call

    def call_and_die(self, method, *args, **kwargs):
        nonlocal batches
        batches += method == "upsert"
        last = method == "upsert" and batches == batch
        if last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(self, method, *args, **kwargs)
        if last or method == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    MilvusConnection.call = call_and_die  # type: ignore[method-assign]
    MilvusPassageIndex.from_index(PassageIndex.from_pretrained(folder), uri, collection, show_progress_bar=False)


folder, *uploads = sys.argv[1:]
milvus_packages()
for uri, collection, batch, moment in zip(*[iter(uploads)] * 4, strict=True):
    if (child := os.fork()) == 0:
        upload_and_die(folder, uri, collection, int(batch), moment)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
