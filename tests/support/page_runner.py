"""
The code and the commands of pages, in forks that have imported everything already; see `support.forks`.

    python -c "from support.page_runner import run_page; run_page()" docs/memory.md
    python -c "from support.page_runner import run_script; run_script()" recipes/generate.py --model out "when?"
    python -c "from support.page_runner import run_server; run_server()" URL recipes/serve.py --model out
"""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.markdown_pages import blocks_of
from support.visitor import start_visitor

SERVER = "127.0.0.1:8000"  # that pages ask
MODEL = "cosup-quickstart"  # that it serves, a folder of the stand-ins
ARGUMENT = "who painted the night watch?"  # of a block that reads `sys.argv`


def run_page() -> None:
    """
    Run the Python blocks of a page one after another in one namespace, those that are marked left out.

    A traceback shows the page with the number of the line. If a block asks the server of the page, it is there.
    """
    page = sys.argv[1]
    sys.argv = [page, ARGUMENT]
    blocks = [block for block in blocks_of(Path(page)) if block.language == "python" and block.not_run is None]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        address = SERVER
        if any(SERVER in block.code for block in blocks):
            address = stack.enter_context(served())
        for block in blocks:
            # blank lines, so that the numbers of its lines are those of the page
            code = "\n" * (block.line - 1) + block.code.replace(SERVER, address)
            try:
                exec(compile(code, page, "exec"), namespace)
            except BaseException as error:
                assert error.__traceback__ is not None
                traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))  # from the page on
                sys.exit(1)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Serve the model of the stand-ins on a free port; yield the address."""
    sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # where `serving` is
    from modeling_cosup import CoSupForCausalLM
    from support.serving import running_server

    from serving.api import ApiSettings
    from serving.embedded_engine import EmbeddedEngine

    model = CoSupForCausalLM.from_pretrained(MODEL)
    engine = EmbeddedEngine.in_thread(model, model.load_index(f"{MODEL}/index"))
    with running_server(engine, ApiSettings(MODEL)) as url:
        yield url.removeprefix("http://")


def run_script() -> None:
    """Run a script with its options."""
    _, script, *options = sys.argv
    sys.argv = [script, *options]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def run_server() -> None:
    """Run a script that serves at a URL, until a visitor has been there."""
    start_visitor(sys.argv.pop(1))
    run_script()
