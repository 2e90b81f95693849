"""The server under load, beside our own decode loop and beside `transformers serve`.

    python benchmarks/serve.py RUN --out DIR                  # RUN: an imported SmolLM2, float32
    gptjax export RUN FOLDER
    python benchmarks/serve.py RUN --peer-python PYTHON --peer-model FOLDER --out DIR
    python benchmarks/serve.py RUN --soak 10 --out DIR        # minutes; an hour: --soak 60

Each round asks, one after the other, our decode loop (prefill and loop of 1 and of --clients rows, in this process) and
the server (a process of its own: 1 client and --clients at once, prompts of ids, greedy, the end token forbidden). So a
ratio compares neighbours in time; both sides count the prompts' pass. First tokens: four clients at once, whose time is
compared with what the same server's /metrics say of its prefills and calls of the decode loop in that round. The peer
gets the very weights (float32) and --peer-clients conversations at once; tokens are counted by our tokenizer on both.

The soak keeps --clients busy with requests of random length, a tenth of which leave early, and reads the server's
resident memory: the slope is that of a line through what lies behind minute 2.

Writes DATE_serve.json. Takes httpx; Linux.
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
from report import facts, spread, write_report

from gptjax.generation.engine import decode, decode_params, prefill
from gptjax.model.cache import round_up_length
from gptjax.ops.decoding import decode_dtype
from gptjax.runs.load import load_model
from gptjax.runtime.process import tune_process

NEVER = np.array([-1], np.int32)  # stop ids that no row meets


class Server:
    """A server in a process of its own; `ready` is a path that answers 200 once it serves."""

    def __init__(self, command: list[str], port: int, ready: str, log: Path):
        self.url = f"http://127.0.0.1:{port}"
        self._file = log.open("wb")
        self.process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                if httpx.get(self.url + ready, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                sys.exit(f"{command[0]} ended:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        sys.exit(f"{command[0]} did not begin to serve:\n{log.read_text()[-2000:]}")

    def metrics(self) -> dict[str, float]:
        """The numbers without labels that /metrics tells."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = (re.fullmatch(r"([a-z_]+) ([0-9.e+-]+)", line) for line in lines)
        return {m[1]: float(m[2]) for m in found if m}

    def resident(self) -> float:
        """MB of resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def close(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], leave: int = 0) -> tuple[float, int, str]:
    """(seconds to the first piece, pieces, text) of a streamed answer; with `leave`, the client goes after so many."""
    begun, first, pieces, text = time.perf_counter(), 0.0, 0, ""
    async with client.stream("POST", path, json=body | {"stream": True}, timeout=600) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            said = json.loads(line[6:])
            if not said.get("choices"):
                continue
            choice = said["choices"][0]
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if piece:
                first = first or time.perf_counter() - begun
                pieces, text = pieces + 1, text + piece
            if leave and pieces >= leave:
                break
    return first, pieces, text


async def at_once(url: str, path: str, bodies: list[dict[str, Any]]) -> tuple[float, list[tuple[float, int, str]]]:
    """(seconds, answers) of as many clients as bodies."""
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None)) as client:
        begun = time.perf_counter()
        answers = await asyncio.gather(*(stream(client, path, body) for body in bodies))
        return time.perf_counter() - begun, list(answers)


def loop(model: Any, args: argparse.Namespace) -> Any:
    """A function that times prefill and decode loop of some rows, as benchmarks/decode.py does: tokens a second."""
    import dataclasses

    dtype = decode_dtype(model.decoder.cfg.dtype)
    decoder = model.decoder.clone(cfg=dataclasses.replace(model.decoder.cfg.anywhere(), dtype=dtype))
    weights = jax.block_until_ready(decode_params(model.params, dtype))

    def run(rows: int) -> float:
        prompt_BL = np.random.default_rng(1).integers(0, 1000, (rows, args.prompt)).astype(np.int32)
        length_B = np.full(rows, args.prompt, np.int32)
        slots = round_up_length(args.prompt + args.new, decoder.context)
        padded_BL = np.pad(prompt_BL, ((0, 0), (0, round_up_length(args.prompt, decoder.context) - args.prompt)))
        constant = {"copy_B": np.zeros(rows, np.int32), "last_B": length_B + args.new - 1}
        begun = time.perf_counter()
        state = prefill(decoder, weights, padded_BL, length_B, slots, False)
        rest = (constant, {}, np.uint32(0), NEVER, np.zeros(rows, bool), np.int32(args.new))
        jax.block_until_ready(decode(decoder, weights, state, *rest))
        return rows * args.new / (time.perf_counter() - begun)

    return run


def ids_bodies(count: int, args: argparse.Namespace, rng: random.Random, eos: int) -> list[dict[str, Any]]:
    """Requests of random prompts of ids, none with a beginning that another has."""
    settings = {"model": args.peer_model, "max_tokens": args.new, "temperature": 0, "logit_bias": {str(eos): -100}}
    return [settings | {"prompt": [rng.randrange(1000) for _ in range(args.prompt)]} for _ in range(count)]


def measure(server: Server, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    run, rng, eos = loop(model, args), random.Random(0), model.tokenizer.eos_id
    for rows in (1, args.clients):
        run(rows)  # compiles
    rounds = []
    for _ in range(args.rounds):
        found: dict[str, float] = {}
        for clients in (1, args.clients):
            alone = run(clients)
            seconds, _ = asyncio.run(at_once(server.url, "/v1/completions", ids_bodies(clients, args, rng, eos)))
            found |= {
                f"loop_{clients}_tokens_per_second": alone,
                f"server_{clients}_tokens_per_second": clients * args.new / seconds,
                f"ratio_{clients}": clients * args.new / seconds / alone,
            }
        before = server.metrics()
        _, answers = asyncio.run(at_once(server.url, "/v1/completions", ids_bodies(4, args, rng, eos)))
        after = server.metrics()
        spent = {name: after[name] - before[name] for name in after if name in before}
        prefill_s = spent["gptjax_prefill_seconds_total"] / spent["gptjax_prefills_total"]
        chunk_s = spent["gptjax_decode_seconds_total"] / spent["gptjax_decode_chunks_total"]
        found |= {
            "first_token_of_4_s": max(first for first, _, _ in answers),
            "four_prefills_two_chunks_s": 4 * prefill_s + 2 * chunk_s,
        }
        found["first_token_ratio"] = found["first_token_of_4_s"] / found["four_prefills_two_chunks_s"]
        rounds.append(found)
        print(json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
    return {"rounds": rounds} | {name: spread([r[name] for r in rounds]) for name in rounds[0]}


def conversations(count: int, round_: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Conversations that no round before had, so that nothing of them is there to reuse but the system message."""
    ask = "Tell me about the history, the geography and the people of {}, in a long and careful text. " * 6
    places = [
        "France",
        "Japan",
        "Kenya",
        "Peru",
        "India",
        "Norway",
        "Egypt",
        "Chile",
        "Spain",
        "Ghana",
        "Nepal",
        "Cuba",
    ]
    settings = {"temperature": 0, "max_tokens": args.new, "model": args.peer_model}
    return [
        settings | {"messages": [{"role": "user", "content": f"{round_ + 2} people ask: {ask.replace('{}', p)}"}]}
        for p in places[:count]
    ]


def against_peer(server: Server, peer: Server, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    rounds = []
    for round_ in range(args.rounds + 1):
        found = {}
        for name, one in (("server", server), ("peer", peer)):
            seconds, answers = asyncio.run(
                at_once(one.url, "/v1/chat/completions", conversations(args.peer_clients, round_, args))
            )
            tokens = sum(len(model.tokenizer.encode(text)) for _, _, text in answers)
            found |= {f"{name}_tokens_per_second": tokens / seconds, f"{name}_tokens": tokens}
        found["ratio"] = found["server_tokens_per_second"] / found["peer_tokens_per_second"]
        print(json.dumps(found), flush=True)
        rounds += [found] if round_ else []  # the first one is the peer's warm-up
    return {"rounds": rounds} | {name: spread([r[name] for r in rounds]) for name in rounds[0]}


def soak(server: Server, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    rng, eos, end = random.Random(1), model.tokenizer.eos_id, time.monotonic() + 60 * args.soak
    count = {"answers": 0, "left": 0, "errors": 0}
    memory: list[tuple[float, float]] = []
    begun = time.monotonic()

    def watch() -> None:
        while time.monotonic() < end:
            memory.append(((time.monotonic() - begun) / 60, server.resident()))
            time.sleep(5)

    async def busy(client: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            [body] = ids_bodies(1, args, rng, eos)
            body["prompt"] = body["prompt"][: rng.randint(1, args.prompt)]
            body["max_tokens"] = rng.randint(1, args.new)
            leave = rng.randint(1, 5) if rng.random() < 0.1 else 0
            try:
                await stream(client, "/v1/completions", body, leave)
                count["left" if leave else "answers"] += 1
            except httpx.HTTPError:
                count["errors"] += 1

    async def all_busy() -> None:
        async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=None)) as client:
            await asyncio.gather(*(busy(client) for _ in range(args.clients)))

    thread = threading.Thread(target=watch)
    thread.start()
    asyncio.run(all_busy())
    thread.join()
    late = np.array([(t, mb) for t, mb in memory if t > 2])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(late) > 2 else float("nan")
    found = count | {"minutes": args.soak, "mb_a_minute_after_2": slope, "mb_first_last": [memory[0][1], memory[-1][1]]}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024, help="of the server")
    parser.add_argument("--peer-python", default="", help="interpreter with torch and transformers[serving]")
    parser.add_argument("--peer-model", default="any", help="folder of the exported run, and the name in requests")
    parser.add_argument("--peer-clients", type=int, default=8)
    parser.add_argument("--soak", type=float, default=0, help="minutes; nothing else is measured")
    parser.add_argument("--peer-flags", nargs="*", default=[], help="of transformers serve, without their dashes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report: dict[str, Any] = facts(f"{cpu[1] if cpu else 'CPU'}, {len(os.sched_getaffinity(0))} cores", "jax", "numpy")
    report["setting"] = {name: str(value) for name, value in vars(args).items()}
    port = free_port()
    command = [sys.executable, "-m", "gptjax", "serve", args.run, "--port", str(port), "--slots", str(args.clients),
               "--context", str(args.context), "--name", args.peer_model]  # fmt: skip
    server = Server(command, port, "/health", args.out / "serve.log")
    model = load_model(args.run, None)
    try:
        if args.soak:
            report["soak"] = soak(server, model, args)
        elif args.peer_python:
            port = free_port()
            words = ["-m", "transformers.cli.transformers", "serve", args.peer_model, "--port", str(port), "--device",
                     "cpu", "--dtype", "float32", *(f"--{flag}" for flag in args.peer_flags)]  # fmt: skip
            peer = Server([args.peer_python, *words], port, "/health", args.out / "peer.log")
            report["against_transformers_serve"] = against_peer(server, peer, model, args)
            peer.close()
        else:
            report["load"] = measure(server, model, args)
    finally:
        report["exit_code"] = server.close()
    kind = "soak" if args.soak else "peer" if args.peer_python else "load"
    print(f"wrote {write_report(report, args.out, f'serve_{kind}')}")


if __name__ == "__main__":
    tune_process()
    main()
