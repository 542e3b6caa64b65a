"""
Load a server with the embedded engine, and compare it with generate_many over the same questions.

    python recipes/benchmarks/server_load.py --model cosup-quickstart --index cosup-quickstart/index \\
        --eval_file data/quickstart/eval.jsonl --output_file serving.json
    python recipes/benchmarks/server_load.py --quick true    # takes seconds, only shows that it runs

Server and engine run as in recipes/serve.py: the model decodes in a process of its own, or with `--decode_in thread`
in the server's. The clients have a process of their own. Sections:
    `throughput`: answers and tokens a second, whole and streamed, against generate_many with as many rows at a time
    `latency`: time to the first text of a stream, with one client and with all
    `soak`: all clients for --seconds; some close their streams, some disconnect. Memory is sampled every second

Arms take turns. CPU seconds of the server are those of HTTP and decoding; generate_many has no HTTP and no clients.
Every answer that was finished is compared with that of generate_many: text, passages and number of tokens; in float32
all should be equal. The exit status is 1 if an answer was lost or differs, or a slot stays taken.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import numpy as np
import torch

from modeling_cosup import Completion, CoSupConfig, CoSupForCausalLM, RetrievalConfig, Retriever
from modeling_cosup.files_cosup import write_json
from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.tokenization_cosup import encode_prompt

from measuring import (
    Meter,
    memory_samples,
    print_hardware,
    print_table,
    resident_bytes,
    spread,
    spread_text,
    take_turns,
    thinned,
)
from random_world import World
from server_clients import CANCELLED, DISCONNECTED, PLAIN, STREAMED, Job, Outcome
from serving.api import ApiSettings, build_app
from serving.decoding_process import DecodingProcess
from serving.embedded_engine import EmbeddedEngine
from serving.running import EngineServer, open_socket, url_of
from serving.served_model import ServedModel
from shared.indexes import open_index

SECTIONS = ("throughput", "latency", "soak")
SOAK_SHARES = {PLAIN: 0.5, STREAMED: 0.3, CANCELLED: 0.1, DISCONNECTED: 0.1}
MODEL = "benchmark"
MB = 1e6


@dataclass
class BenchmarkArguments:
    """What to measure, and how."""

    model: str | None = field(default=None, metadata={"help": "Name or path of a CoSup checkpoint."})
    index: str | None = field(default=None, metadata={"help": "Name or path of its index."})
    eval_file: str | None = field(default=None, metadata={"help": "Evaluation instances: their questions are asked."})
    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "Sections to run."})
    num_clients: int = field(default=200, metadata={"help": "Clients at a time."})
    num_questions: int = field(
        default=600, metadata={"help": "The first questions of the file; more than it has are repeated."}
    )
    decode_in: str = field(default="process", metadata={"help": "Where the engine decodes: process or thread."})
    max_running: int = field(default=32, metadata={"help": "Rows at a time, of the server and of generate_many."})
    max_new_tokens: int = field(default=64, metadata={"help": "Decoded tokens of an answer."})
    seconds: float = field(default=60, metadata={"help": "`soak`: its duration."})
    num_single: int = field(default=30, metadata={"help": "`latency`: questions of the single client."})
    repeats: int = field(default=3, metadata={"help": "`throughput`: timed rounds of every arm, after a warm-up."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads of torch; defaults to all cores."})
    pin: bool = field(
        default=False,
        metadata={"help": "Decode on core 0, HTTP and clients on core 1: other jobs move nothing from core to core."},
    )
    seed: int = field(default=0, metadata={"help": "Of what the clients do."})
    quick: bool = field(default=False, metadata={"help": "A random tiny model: shows that it runs, measures nothing."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})

    def __post_init__(self) -> None:
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"--sections holds {min(unknown)!r}, expected some of {', '.join(SECTIONS)}.")
        if self.decode_in not in ("process", "thread"):
            raise ValueError(f"--decode_in {self.decode_in}: expected process or thread.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: its folder does not exist.")
        if self.quick:
            self.num_clients, self.num_questions, self.max_running, self.max_new_tokens = 6, 12, 4, 8
            self.seconds, self.num_single, self.repeats = 1, 2, 1
            self.decode_in = "thread"  # another process would make another random model
        elif not (self.model and self.index and self.eval_file):
            raise ValueError("--model, --index and --eval_file are needed, or --quick true.")


class Service:
    """
    A model with its index behind a real server on loopback, and the answers that it should give.

    Args:
        args (`BenchmarkArguments`): options.
        model ([`CoSupForCausalLM`]), index ([`Retriever`]), questions (`list[str]`): what is served and asked.
        retrieval_config ([`RetrievalConfig`]): of every answer.
        retrieval (`dict`): the same as fields of a request.
    """

    def __init__(
        self,
        args: BenchmarkArguments,
        model: CoSupForCausalLM,
        index: Retriever,
        questions: list[str],
        retrieval: dict[str, Any],
    ) -> None:
        self.args = args
        self.model = model
        self.index = index
        self.questions = questions
        self.retrieval = retrieval
        limits = {"max_running": args.max_running, "max_waiting": 2 * args.num_clients}
        self.processes = ["self"]  # of server and engine, in /proc
        if args.decode_in == "thread":
            self.engine = EmbeddedEngine.in_thread(model, index, **limits)
        else:
            decoding = DecodingProcess(load_served_model, args)
            self.engine = EmbeddedEngine(decoding, limits["max_waiting"])
            self.processes.append(str(decoding.pid))
        self.answers = self.generate()
        self.base_url = ""
        self.clients: subprocess.Popen[str] | None = None

    def generate(self) -> list[Completion]:
        """Return the answers of generate_many."""
        prompts = [encode_prompt(self.model.tokenizer, question) for question in self.questions]
        return self.model.generate_many(
            prompts,
            retriever=self.index,
            retrieval_config=RetrievalConfig(**self.retrieval),
            batch_size=self.args.max_running,
            max_new_tokens=self.args.max_new_tokens,
            do_sample=False,
            show_progress_bar=False,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Serve on a free port, and keep the process of the clients, while the context lasts."""
        bound = open_socket("127.0.0.1", 0)
        server = EngineServer(build_app(self.engine, ApiSettings(MODEL)), self.engine)

        def serve() -> None:
            self._pin(0, {1})  # threads that it starts too
            server.run([bound])

        for process in self.processes[1:]:
            for task in Path(f"/proc/{process}/task").iterdir():
                self._pin(int(task.name), {0})
        self._pin(0, {0})  # the thread of generate_many
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("The server did not start.")
            time.sleep(0.01)
        self.base_url = f"{url_of(bound)}/v1"
        command = [sys.executable, "-c", "import server_clients; server_clients.main()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            with subprocess.Popen(command, cwd=Path(__file__).parent, **pipes) as self.clients:
                self._pin(self.clients.pid, {1})
                yield
        finally:
            server.should_exit = True
            thread.join()

    def _pin(self, thread: int, cores: set[int]) -> None:
        """Let a thread, 0 for this one, run on these cores alone, if the options say so."""
        if self.args.pin:
            os.sched_setaffinity(thread, cores)

    def ask(self, num_clients: int, num_questions: int | None = None, **options: Any) -> "Round":
        """Let clients send their requests, and return what they got."""
        body = {"model": MODEL, "max_tokens": self.args.max_new_tokens, "retrieval": self.retrieval}
        job = Job(
            base_url=self.base_url,
            questions=self.questions[:num_questions],
            body=body,
            num_clients=num_clients,
            seed=self.args.seed,
            **options,
        )
        assert self.clients is not None and self.clients.stdin is not None and self.clients.stdout is not None
        cpu_before = self.cpu_seconds()
        print(json.dumps(asdict(job)), file=self.clients.stdin, flush=True)
        result = json.loads(self.clients.stdout.readline())
        cpu_seconds = [after - before for before, after in zip(cpu_before, self.cpu_seconds(), strict=True)]
        outcomes = [Outcome(**outcome) for outcome in result["outcomes"]]
        return Round(result["seconds"], cpu_seconds, result["cpu_seconds"], outcomes)

    def cpu_seconds(self) -> list[float]:
        """Return the CPU seconds that the server, and the decoding process if there is one, have taken."""
        seconds = []
        for process in self.processes:
            numbers = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks = int(numbers[11]) + int(numbers[12])  # of user and system
            seconds.append(ticks / os.sysconf("SC_CLK_TCK"))
        return seconds

    def resident_bytes(self) -> int:
        """Return the resident memory of server and engine."""
        return sum(resident_bytes("VmRSS", process) for process in self.processes)

    def faults(self, outcomes: list[Outcome]) -> list[str]:
        """Return, in words, what is wrong with answers: lost, or other than those of generate_many."""
        faults = []
        for outcome in outcomes:
            question = self.questions[outcome.question]
            if outcome.error:
                faults.append(f"{outcome.kind}, {question!r}: {outcome.error}")
            elif outcome.finished:
                expected = self.answers[outcome.question]
                same_text = outcome.text.split() == expected.text.split()
                same_passages = outcome.passages == [retrieval.passage_ids for retrieval in expected.retrievals]
                same_tokens = outcome.tokens == expected.num_generated_tokens
                if not (same_text and same_passages and same_tokens):
                    faults.append(f"{outcome.kind}, {question!r}: {outcome.text!r}, expected {expected.text!r}")
            elif outcome.kind in (PLAIN, STREAMED):
                faults.append(f"{outcome.kind}, {question!r}: lost")
        return faults

    def busy(self, timeout: float = 10) -> str:
        """Return which slots and places in the queue are still taken after `timeout` seconds; empty where none is."""
        end = time.monotonic() + timeout
        while True:
            load = self.engine.load()
            if not load.running and not load.waiting:
                return ""
            if time.monotonic() > end:
                return f"{load.running} running and {load.waiting} waiting after all clients left"
            time.sleep(0.05)


@dataclass
class Round:
    """
    Seconds that all requests took, CPU seconds of the server, of its decoding process, if there is one, and of the
    clients, and what became of each request.
    """

    seconds: float
    cpu_seconds: list[float]
    client_cpu_seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)


# ---------------------------------------------------------------------- sections


def throughput(service: Service) -> dict[str, Any]:
    """Ask all questions, whole and streamed, in turns with generate_many."""
    args = service.args

    def generate() -> Round:
        cpu_before = service.cpu_seconds()[0]
        start = time.perf_counter()
        service.generate()
        return Round(time.perf_counter() - start, [service.cpu_seconds()[0] - cpu_before])

    arms: dict[str, Callable[[], Round]] = {
        "generate_many": generate,
        "served": lambda: service.ask(args.num_clients),
        "served, streamed": lambda: service.ask(args.num_clients, shares={STREAMED: 1.0}),
    }
    measured = take_turns(arms, args.repeats, Meter(torch.device("cpu")))
    num_tokens = sum(answer.num_generated_tokens for answer in service.answers)
    rows, results = [], []
    faults: list[str] = []
    for name, arm in measured.items():
        arm.seconds = [measured_round.seconds for measured_round in arm.results]  # by the clients' clock
        for measured_round in arm.results:
            faults += service.faults(measured_round.outcomes)
        seconds = statistics.median(arm.seconds)
        cpu_seconds = zip(*[measured_round.cpu_seconds for measured_round in arm.results], strict=True)
        result = {
            "arm": name,
            "seconds": spread(arm.seconds),
            "cpu_seconds": [spread(list(of_one)) for of_one in cpu_seconds],
            "client_cpu_seconds": spread([measured_round.client_cpu_seconds for measured_round in arm.results]),
            "answers_per_second": len(service.questions) / seconds,
            "tokens_per_second": num_tokens / seconds,
            "speed_to_generate_many": spread(arm.ratios(measured["generate_many"])),
        }
        results.append(result)
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                " + ".join(f"{of_one['median']:.2f}" for of_one in result["cpu_seconds"]),
                f"{result['client_cpu_seconds']['median']:.2f}",
                f"{result['answers_per_second']:.1f}",
                f"{result['tokens_per_second']:.0f}",
                spread_text(result["speed_to_generate_many"]),
            ]
        )
    print(f"\n{len(service.questions)} questions, {args.num_clients} clients, {args.max_running} rows at a time")
    print_table(
        [
            "arm",
            "s",
            "CPU s (HTTP + decoding)",
            "CPU s of clients",
            "answers/s",
            "tokens/s",
            "x generate_many (min to max)",
        ],
        rows,
    )
    return {"arms": results, "faults": faults}


def latency(service: Service) -> dict[str, Any]:
    """Measure the time to the first text with one client, and with all of them."""
    args = service.args
    rounds = {
        1: service.ask(1, args.num_single, shares={STREAMED: 1.0}),
        args.num_clients: service.ask(args.num_clients, shares={STREAMED: 1.0}),
    }
    results, rows = [], []
    faults: list[str] = []
    for num_clients, measured in rounds.items():
        faults += service.faults(measured.outcomes)
        results.append({"clients": num_clients, **latencies(measured.outcomes)})
        counts = [str(results[-1][name]) for name in ("clients", "answers", "with_text")]
        rows.append([*counts, *latency_cells(results[-1])])
    header = ["clients", "answers", "with text", "first text p50 ms", "p95 ms", "whole answer p50 ms", "p95 ms"]
    print_table(header, rows)
    return {"loads": results, "faults": faults}


def latencies(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the times of finished answers; an answer without text has no time to its first text."""
    finished = [outcome for outcome in outcomes if outcome.finished]
    first_token = [outcome.first_token for outcome in finished if outcome.first_token is not None]
    result: dict[str, Any] = {"answers": len(outcomes), "with_text": len(first_token)}
    for name, seconds in (("first_token", first_token), ("total", [outcome.total for outcome in finished])):
        if seconds:
            p50, p95 = np.percentile(seconds, [50, 95]).tolist()
            result[name] = {"p50": p50, "p95": p95}
    return result


def latency_cells(result: dict[str, Any]) -> list[str]:
    """Return the milliseconds of [`latencies`] as a table shows them."""
    cells = []
    for name in ("first_token", "total"):
        for quantile in ("p50", "p95"):
            cells.append(f"{1000 * result[name][quantile]:.0f}" if name in result else "—")
    return cells


def soak(service: Service) -> dict[str, Any]:
    """Keep all clients busy; some of them break off."""
    args = service.args
    with memory_samples(service.resident_bytes) as samples:
        measured = service.ask(args.num_clients, shares=SOAK_SHARES, seconds=args.seconds)
    faults = service.faults(measured.outcomes)
    if busy := service.busy():
        faults.append(busy)
    sent = Counter(outcome.kind for outcome in measured.outcomes)
    finished = Counter(outcome.kind for outcome in measured.outcomes if outcome.finished)
    rows = [[kind, str(sent[kind]), str(finished[kind])] for kind in SOAK_SHARES]
    print(
        f"\n{args.num_clients} clients for {measured.seconds:.0f} s: {len(faults)} answers lost or other than expected"
    )
    print_table(["requests", "sent", "finished"], rows)
    print("\nResident memory of the server, MB: " + ", ".join(f"{sample / MB:.0f}" for sample in thinned(samples)))
    return {
        "seconds": measured.seconds,
        "sent": sent,
        "finished": finished,
        "resident_bytes": samples,
        "faults": faults,
    }


# ---------------------------------------------------------------------- what is served


def opened(args: BenchmarkArguments) -> Service:
    """Return the service of the options."""
    if args.quick:
        world = World(SimpleNamespace(gen=None, shape="tiny", dtype="float32", seed=args.seed), torch.device("cpu"))
        questions = [" ".join(world.words[number : number + 4]) for number in range(args.num_questions)]
        return Service(args, world.model, world.index(60), questions, {"force_nsp_first": True, "max_retrievals": 2})
    model, index = load_parts(args)
    lines = itertools.cycle(read_lines(args.eval_file))
    questions = [line["input"] for line in itertools.islice(lines, args.num_questions)]
    return Service(args, model, index, questions, {})


def load_parts(args: BenchmarkArguments) -> tuple[CoSupForCausalLM, Retriever | None]:
    """Load model and index."""
    load_emb_seq = CoSupConfig.from_pretrained(args.model).query_from != "gen"
    model = CoSupForCausalLM.from_pretrained(args.model, load_emb_seq=load_emb_seq).eval()
    return model, open_index(model, args.index, None)


def load_served_model(args: BenchmarkArguments) -> ServedModel:
    """Load what the decoding process serves."""
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, index = load_parts(args)
    return ServedModel(model, index, max_running=args.max_running)


def main() -> None:
    """Run the sections, print tables and write the numbers."""
    (args,) = parse([BenchmarkArguments], __doc__)
    with clear_errors():
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        results: dict[str, Any] = {**print_hardware(torch.device("cpu")), "arguments": vars(args)}
        service = opened(args)
        sections = {"throughput": throughput, "latency": latency, "soak": soak}
        faults = []
        with service.running():
            for name in args.sections:
                results[name] = sections[name](service)
                faults += results[name]["faults"]
                if args.output_file:
                    write_json(args.output_file, results)
    if faults:
        sys.exit(f"error: {len(faults)} faults, the first: {faults[0]}")


if __name__ == "__main__":
    main()
