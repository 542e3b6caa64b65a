"""A visitor of a server that runs in the same process: one request, and then the end of the process."""

import os
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request


def start_visitor(url: str) -> None:
    """
    Let a thread wait until the server answers, print what it says, and end the process with exit code 0.

    Args:
        url (`str`): a page, or OpenAI's API (it ends in `/v1`), which is asked a question.
    """
    threading.Thread(target=visit, args=[url], daemon=True).start()


def visit(url: str) -> None:
    """Print what the server answers, as soon as it does, and end the process."""
    try:
        wait_for(url)
        print(answer_of(url), flush=True)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # the server might still be starting, and an interruption would be an error


def wait_for(url: str, timeout: float = 100) -> None:
    """Wait until a server answers, even if it has no such page."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer in {timeout} seconds.")


def answer_of(url: str) -> str:
    """Return the page, or the answer to a question."""
    if not url.endswith("/v1"):
        return urllib.request.urlopen(url, timeout=30).read().decode()
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    messages = [{"role": "user", "content": "who painted the night watch?"}]
    (model,) = client.models.list().data
    return str(client.chat.completions.create(model=model.id, messages=messages).choices[0].message.content)
