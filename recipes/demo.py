"""
Ask a CoSup checkpoint in a browser: the answer streams, with each retrieved passage next to the text that it grounds.

    python recipes/demo.py --model cosup-quickstart --index cosup-quickstart/index \\
        --examples "What is the job of Bokre Thosaba?" "Count from 2 to 8."
    python recipes/demo.py --base_url http://127.0.0.1:8000/v1    # the model runs in a server, recipes/serve.py

This file and the folder `demo_parts` need no other file of the project, because a checkpoint carries its own code.
Unchanged, this file is also the `app.py` of a Space, with `demo_parts` next to it; `recipes/space` has the other two
files of a Space and says how to make one. In a Space, options come from environment variables: COSUP_MODEL,
COSUP_INDEX, COSUP_INDEX_URI, COSUP_MEMORY, COSUP_ALLOW_FAISS_FILES (1: FAISS may read the files of an approximate
search), COSUP_REVISION, COSUP_INDEX_REVISION, COSUP_INSTRUCTION, COSUP_EXAMPLES (questions, separated by `|`),
COSUP_UPLOAD (0: users cannot upload corpora, and Emb_seq is not loaded), COSUP_BASE_URL and OPENAI_API_KEY. An empty
variable counts as not set. An index in Milvus (COSUP_INDEX_URI) also needs the package cosup[milvus]. Gradio itself
reads GRADIO_SERVER_NAME and GRADIO_SERVER_PORT. The page loads nothing from other servers. The demo runs the code of
the checkpoint, so name one that you trust; with --base_url it runs none, and needs only gradio and openai.
"""

import sys
from pathlib import Path

from demo_parts.answers import CSS
from demo_parts.options import parse
from demo_parts.uploads import MAX_BYTES


def main() -> None:
    """Start the demo."""
    args = parse(description=__doc__)  # --help and a wrong option do not wait for gradio
    from demo_parts.page import Demo, gr

    if not args.base_url and not Path(args.model).exists():
        print(f"{args.model}: no such folder; looking for it on the Hugging Face Hub.", file=sys.stderr, flush=True)
    try:
        page = Demo(args).page()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to download
    page.launch(
        max_file_size=MAX_BYTES,
        css=CSS,
        theme=gr.themes.Default(**fonts),
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
