"""
Upload a saved index to Milvus several times, and die by SIGKILL each time, at a batch or after a request.

Launched by test_milvus.py. Arguments: the index's folder, then for each upload `uri collection batch moment`. Each
upload is a forked process, because importing takes longest.
"""

import os
import signal
import sys

from modeling_cosup import PassageIndex
from modeling_cosup.milvus_client_cosup import MilvusConnection, milvus_packages
from modeling_cosup.milvus_cosup import MilvusPassageIndex


def upload_and_die(folder: str, uri: str, collection: str, batch: int, moment: str) -> None:
    """Die before or after batch number `batch` is sent, or after the request `moment`."""
    num_batches = 0
    call = MilvusConnection.call

    def call_and_die(self, method, *args, **kwargs):
        nonlocal num_batches
        if method == "upsert":
            num_batches += 1
        is_last_batch = method == "upsert" and num_batches == batch
        if is_last_batch and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(self, method, *args, **kwargs)
        if is_last_batch or method == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    MilvusConnection.call = call_and_die  # type: ignore[method-assign]  # a test's replacement
    MilvusPassageIndex.from_index(PassageIndex.from_pretrained(folder), uri, collection, show_progress_bar=False)


folder, *uploads = sys.argv[1:]
milvus_packages()
for start in range(0, len(uploads), 4):
    uri, collection, batch, moment = uploads[start : start + 4]
    child = os.fork()
    if child == 0:
        upload_and_die(folder, uri, collection, int(batch), moment)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
