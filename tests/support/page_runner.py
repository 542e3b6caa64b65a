"""
The code of a page, in a fork that has imported everything already; see `support.forks`.

    python -c "from support.page_runner import run_page; run_page(path)"

A traceback shows the page with the number of the line.
"""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from support.markdown_pages import blocks_of


def read_environment_again() -> None:
    """Let the Hub's client read the variables again that name server, cache and token; its import has read them."""
    import datasets.config
    import huggingface_hub.constants
    import huggingface_hub.hf_api
    import transformers.dynamic_module_utils

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    transformers.dynamic_module_utils.HF_MODULES_CACHE = os.path.join(os.environ["HF_HOME"], "modules")


def run_page(page: str) -> None:
    """Run the Python blocks of a page one after another in one namespace, those that are marked left out."""
    read_environment_again()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(Path(page)):
        if block.language == "python" and block.not_run is None:
            code = "\n" * (block.line - 1) + block.code  # so that the numbers of its lines are those of the page
            try:
                exec(compile(code, page, "exec"), namespace)
            except BaseException as error:
                assert error.__traceback__ is not None
                traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))  # from the page on
                sys.exit(1)
