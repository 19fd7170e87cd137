#!/usr/bin/env python3
"""Measures a running OpenAI-compatible server: streams of POST /v1/completions from several processes.

    python3 scripts/bench_serve.py --url http://127.0.0.1:8000 --concurrency 1 64 256 --input-len 512 --output-len 256
    python3 scripts/bench_serve.py --rate 4 8 --requests 200 --json rate.json --plot rate.png

Closed loop (--concurrency): so many streams, each sending its next request when the last one has ended. Open loop
(--rate): requests leave at random (Poisson) times, so many per second, whether or not earlier ones have ended. Several
values run in turn.

Prompts are random token ids, sent as ids, so that lengths are exact; they differ from run to run and from request to
request, so that no prefix is found again but the --shared-prefix (and all of it where a --seed is given twice).

What is measured, for each request, with a chunk being an event of the stream that carries tokens:
  TTFT   from sending to the first chunk, the connection included where one is opened
  ITL    between one chunk and the next; a server that puts several tokens in a chunk shows in "tokens per chunk"
  TPOT   from the first chunk to the last, divided by tokens - 1
  E2E    from sending to [DONE]
The steady decode rate is output tokens/s while every stream was decoding and none was waiting for its first token.

Connections are kept and used again. Closed loop: all are opened before the clock starts; open loop: as they are needed.
--no-keep-alive opens one for each request.
A failed request (no connection, status not 200, an error in the stream, no [DONE], wrong number of tokens, over
--timeout) is reported, and counts in no rate and no latency.

Exit status: 0; 1 with failures; 2 where nothing could be measured.
"""
import argparse
import json
import os
import sys
import time

import bench_report
from bench_load import Load, Target, message_of, run_load

MAX_VOCAB = 1 << 24


def stop(message, status=2):
    print(f"bench_serve: {message}", file=sys.stderr)
    sys.exit(status)


def load_pyplot():
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
        return matplotlib.pyplot
    except ImportError:
        stop("--plot needs matplotlib, which is not installed (pip install matplotlib)")


def first_model(target):
    """The id of the first of /v1/models."""
    status, body = target.ask("GET", "/v1/models")
    try:
        return json.loads(body)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        stop(f"/v1/models named no model ({status}: {message_of(body)}): give --model (and --api-key)")


def accepts(target, model, token):
    """Whether a prompt of this one token id is taken: so is every id below the size of the vocabulary."""
    body = {"model": model, "prompt": [token], "max_tokens": 1}
    status, answer = target.ask("POST", "/v1/completions", body)
    if status not in (200, 400):
        stop(f"looking for the vocabulary's size: {status}: {message_of(answer)}")
    return status == 200


def vocabulary_size(target, model):
    """Found by halving, from which token ids the server takes: no route of the API tells it."""
    low, high = 0, MAX_VOCAB
    if not accepts(target, model, low) or accepts(target, model, high):
        stop("the server does not tell token ids within its vocabulary from others: give --vocab")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accepts(target, model, middle) else (low, middle)
    return high


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError("must be over 0")
        return value
    return parse


def not_negative(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server [%(default)s]")
    add("--model", help="[the first of /v1/models]")
    add("--api-key", help="bearer token [none]")
    add("--requests", type=positive(int), metavar="N", help="a run [4 per stream, at least 16; 10 seconds of --rate]")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=positive(int), nargs="+", metavar="C", help="streams, a run for each [1]")
    how.add_argument("--rate", type=positive(float), nargs="+", metavar="R", help="arrivals per second, a run for each")
    add("--input-len", type=positive(int), default=128, metavar="TOKENS", help="of each prompt [%(default)s]")
    add("--output-len", type=positive(int), default=128, metavar="TOKENS", help="of each answer [%(default)s]")
    add("--shared-prefix", type=not_negative, default=0, metavar="LEN",
        help="tokens at the beginning of the prompt that all requests of a run share [0]")
    add("--vocab", type=positive(int), metavar="N", help="prompts are of ids below it [found by asking the server]")
    add("--seed", type=int, help="of prompts and arrivals [the clock's; printed]")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="answers are exactly --output-len long; without it they may be shorter [on]")
    add("--temperature", type=float, default=0.0, help="[0]")
    add("--warmup", type=not_negative, metavar="N", help="requests before each run, not measured [1 per stream; 8]")
    add("--processes", type=positive(int), default=min(8, os.cpu_count()), metavar="P", help="[%(default)s]")
    add("--timeout", type=positive(float), default=600.0, metavar="SECONDS", help="of a request [%(default)g]")
    add("--keep-alive", action=argparse.BooleanOptionalAction, default=True, help="use connections again [on]")
    add("--json", metavar="FILE", help="write all figures there, every request's too")
    add("--plot", metavar="FILE", help="draw them there (.png, .svg, .pdf); needs matplotlib")
    arguments = parser.parse_args()
    if arguments.shared_prefix > arguments.input_len:
        parser.error("--shared-prefix is longer than --input-len")
    if arguments.seed is None:
        arguments.seed = time.time_ns() // 1000
    return arguments


def make_loads(arguments, target):
    """One Load for each value of --rate or --concurrency."""
    model = arguments.model or first_model(target)
    vocab = arguments.vocab or vocabulary_size(target, model)
    for run, value in enumerate(arguments.rate or arguments.concurrency or [1]):
        n = arguments.requests or (max(1, round(10 * value)) if arguments.rate else max(16, 4 * value))
        concurrency = None if arguments.rate else min(value, n)
        warmup = arguments.warmup if arguments.warmup is not None else concurrency or 8
        yield Load(target, model, vocab, run, arguments.seed, concurrency, value if arguments.rate else None, n, warmup,
                   min(arguments.processes, concurrency or n), arguments.input_len, arguments.output_len,
                   arguments.shared_prefix, arguments.ignore_eos, arguments.temperature, arguments.timeout,
                   arguments.keep_alive)


def main():
    arguments = parse_arguments()
    pyplot = load_pyplot() if arguments.plot else None
    try:
        loads = list(make_loads(arguments, Target.parse(arguments.url, arguments.api_key)))
    except (OSError, ValueError) as error:
        stop(f"--url {arguments.url}: {error}")
    title = (f"{loads[0].model} at {arguments.url}: input {arguments.input_len} (shared {arguments.shared_prefix}), "
             f"output {arguments.output_len} tokens, vocabulary {loads[0].vocab}, seed {arguments.seed}")
    runs, records_of_runs = [], []
    for load in loads:
        print(f"{load.name()}: {load.n_requests} requests ...", file=sys.stderr, flush=True)
        try:
            records, warmup, facts = run_load(load)
        except RuntimeError as error:
            stop(error)
        runs.append(bench_report.summarize(load, records, warmup, facts))
        records_of_runs.append(records)
    print(title + "\n")
    bench_report.print_table(runs)
    if arguments.json:
        options = {k: v for k, v in vars(arguments).items() if k != "api_key"}
        with open(arguments.json, "w") as f:
            json.dump({"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "model": loads[0].model, "vocab": loads[0].vocab,
                       "options": options, "runs": runs}, f, indent=1)
    if pyplot:
        bench_report.draw(pyplot, arguments.plot, title, runs, records_of_runs)
    return 1 if any(run["failures"] or run["warmup_failures"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
