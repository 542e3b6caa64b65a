"""
Programs that run in forks of one process which has imported torch, transformers and this project already.

An import takes about ten seconds of a core, and the tests start dozens of programs. A fork is a process of its own: it
can be killed, joins a process group, and has its own exit code and output. It shares nothing but the imported modules
with the others: no model, no process group, no thread.

A second process forks programs that must not find this project's packages: it has never imported them.

Not for programs that check what an import does, or that need other variables when it happens. The variables of the
Hub's client are an exception: a fork whose `env` sets `HF_ENDPOINT` reads them again.
"""

import atexit
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "accelerate",
    "datasets",
    "peft",  # from_pretrained and the Trainer import it where it is installed, and it takes more than a second
    "torch.distributed.fsdp",
    "trainer.judging.judge",
    "trainer.reports.evaluation",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
OF_THIS_PROJECT = ("modeling_cosup", "trainer")
ENVIRONMENT = {  # of all programs; a variable that a single test sets is not part of it
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
}
_servers: dict[bool, subprocess.Popen[str]] = {}


def run_forked(
    *command: Any,
    world_size: int = 1,
    cwd: Path = ROOT,
    stdin: str = "",
    timeout: float = 600,
    env: Mapping[str, str | None] | None = None,
    package: bool = True,
) -> subprocess.CompletedProcess[str]:
    """
    Run a Python program without the network and with one thread, and wait for its end.

    Args:
        command: the script with its arguments, or `-c` with the code and its arguments.
        world_size (`int`): number of ranks, which get the variables that torchrun sets. If one of them fails, the
            others are killed.
        cwd (`Path`): its working directory.
        stdin (`str`): its input.
        timeout (`float`): seconds after which it is killed.
        env (`Mapping[str, str | None]`, *optional*): further variables; `None` removes one.
        package (`bool`): `False` for a process in which this project's packages and `support` cannot be imported.

    Returns:
        `subprocess.CompletedProcess`: the output of all ranks, and the first exit code that is not 0 (negative for a
        signal).
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(stdin, encoding="utf-8")
        request = {
            "command": [str(word) for word in command],
            "world_size": world_size,
            "cwd": str(cwd),
            "package": package,
        }
        code = _ask({**request, "env": dict(env or {}), **files}, timeout, package)
        output = {name: Path(files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr")}
    return subprocess.CompletedProcess(request["command"], code, **output)


def _ask(request: dict[str, Any], timeout: float, package: bool) -> int:
    """Send a request to a server, which is started first if it does not run, and return the exit code."""
    server = _servers.get(package)
    if server is None or server.poll() is not None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # not as a file: its folder would hide packages
        command = [sys.executable, "-m", "support.forks", *([] if package else ["--without-package"])]
        server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)
        _servers[package] = server
        atexit.register(_end, server)
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({**request, "timeout": timeout}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"The server of forked programs ended with {server.wait()}.")
    return int(answer)


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()  # ends its loop
    server.wait(timeout=60)


# ---------------------------------------------------------------------- the server


def serve() -> None:
    """Run the programs that are asked for, one after another. A fork returns from here into its program's end."""
    for line in sys.stdin:
        request = json.loads(line)
        print(_launch(request), flush=True)


def _launch(request: dict[str, Any]) -> int:
    """Fork the ranks of a program, and return the first exit code that is not 0."""
    port = _free_port() if request["world_size"] > 1 else 0
    running = set()
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(request["timeout"]))  # ends a program that hangs
            _become(request, rank, port)
        running.add(pid)
    code = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        code = code or os.waitstatus_to_exitcode(status)
        if code:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read_hub_variables() -> None:
    """Let the Hub's client read again which server, cache and token it uses; its import has read the variables."""
    import datasets.config
    import huggingface_hub.constants
    import huggingface_hub.hf_api
    import transformers.dynamic_module_utils

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    transformers.dynamic_module_utils.HF_MODULES_CACHE = os.path.join(os.environ["HF_HOME"], "modules")


class Blocker:
    """A finder that does not find this project's packages, even if they are installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in (*OF_THIS_PROJECT, "support"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _hide_packages() -> None:
    """Make this project's packages, and `support`, impossible to import."""
    assert not set(OF_THIS_PROJECT) & set(sys.modules)
    for name in [name for name in sys.modules if name.partition(".")[0] == "support"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]


def _become(request: dict[str, Any], rank: int, port: int) -> None:
    """Run the program in this process, as `python` would, and exit."""
    os.setsid()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(request[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.chdir(request["cwd"])
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if "HF_ENDPOINT" in request["env"]:
        _read_hub_variables()
    if port:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(request["world_size"]), LOCAL_WORLD_SIZE=str(request["world_size"]))
    first, *arguments = request["command"]
    if first == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        sys.path[0] = ""
        if not request["package"]:
            _hide_packages()
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *arguments]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    without_package = "--without-package" in sys.argv
    for module in PRELOADED:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) and not (without_package and package in OF_THIS_PROJECT):
            importlib.import_module(module)
    gc.freeze()  # a fork's collections would look at all objects of the imported libraries, and copy their pages
    serve()
