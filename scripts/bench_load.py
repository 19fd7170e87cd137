"""The load of bench_serve.py: what a run asks of a server, the connections, and the processes that drive them.

run_load() is the way in: it gives back a Record for every request, whatever became of it. Knows no figures.
"""
import array
import asyncio
import collections
import dataclasses
import http.client
import json
import multiprocessing
import random
import re
import resource
import time
import urllib.parse

START_DELAY = 0.05  # seconds from the last process's being ready to the common start


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the server is. `prefix` goes before every route; `key` is the bearer token, or None."""
    host: str
    port: int
    tls: bool
    prefix: str
    key: str

    @classmethod
    def parse(cls, url, key):
        parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not the address of a server")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls,
                   re.sub(r"(/v1)?/*$", "", parts.path), key)

    def headers(self):
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def ask(self, method, path, body=None, timeout=60):
        """One plain request: (status, body as bytes). Raises OSError where there is no answer."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout)
        try:
            headers = {**self.headers(), "Content-Type": "application/json"}
            connection.request(method, self.prefix + path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"not HTTP: {error!r}") from error
        finally:
            connection.close()

    def completion_bytes(self, body, keep_alive):
        """A whole POST /v1/completions as it goes over the wire."""
        data = json.dumps(body, separators=(",", ":")).encode()
        headers = {"Host": f"{self.host}:{self.port}", "Content-Type": "application/json", **self.headers(),
                   "Content-Length": len(data), **({} if keep_alive else {"Connection": "close"})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.prefix}/v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + data


@dataclasses.dataclass(frozen=True)
class Load:
    """One run. Either concurrency (streams) or rate (requests/s) is set. Lengths are in tokens, timeout in seconds."""
    target: Target
    model: str
    vocab: int
    run: int  # place in the list of runs: prompts differ by it
    seed: int
    concurrency: int
    rate: float
    n_requests: int
    n_warmup: int
    n_processes: int
    input_len: int
    output_len: int
    shared_prefix: int
    ignore_eos: bool
    temperature: float
    timeout: float
    keep_alive: bool

    def name(self):
        return f"rate {self.rate:g}/s" if self.rate else f"concurrency {self.concurrency}"

    def streams_of(self, process):
        """How many streams one process drives; with an open loop, how many connections it opens beforehand."""
        streams = self.concurrency or self.n_processes
        return streams // self.n_processes + (process < streams % self.n_processes)

    def requests_of(self, process):
        """The indices of the requests one process sends: its share by the streams that it has."""
        streams = self.concurrency or self.n_processes
        return [i for i in range(self.n_requests) if i % streams % self.n_processes == process]

    def arrivals(self):
        """Seconds from the start at which each request leaves, in an open loop. [n_requests]"""
        draw, now, times = random.Random(f"{self.seed} {self.run} arrivals"), 0.0, []
        for _ in range(self.n_requests):
            times.append(now)
            now += draw.expovariate(self.rate)
        return times

    def prompt(self, name):
        """input_len token ids: those of the shared prefix, then the request's own."""
        def ids(what, n):
            return random.Random(f"{self.seed} {self.run} {what}").choices(range(self.vocab), k=n)
        return ids("prefix", self.shared_prefix) + ids(name, self.input_len - self.shared_prefix)

    def request_bytes(self, name):
        body = {"model": self.model, "prompt": self.prompt(name), "max_tokens": self.output_len,
                "temperature": self.temperature, "stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return self.target.completion_bytes(body, self.keep_alive)


@dataclasses.dataclass
class Record:
    """What became of one request. Times are of the monotonic clock, in seconds."""
    index: int
    start: float
    end: float = 0.0
    late: float = 0.0  # open loop: seconds it left after its time
    chunks: array.array = dataclasses.field(default_factory=lambda: array.array("d"))  # when each came
    input_tokens: int = 0
    output_tokens: int = 0
    failure: str = None  # its kind: failures are counted by it
    detail: str = None

    def tokens_per_chunk(self):
        return self.output_tokens / len(self.chunks)

    def latencies(self):
        """Milliseconds by name; itl_ms is a list. What there is no measure of is left out."""
        first, last = self.chunks[0], self.chunks[-1]
        values = {"ttft_ms": (first - self.start) * 1e3, "e2e_ms": (self.end - self.start) * 1e3,
                  "itl_ms": [(b - a) * 1e3 for a, b in zip(self.chunks, self.chunks[1:])]}
        if self.output_tokens > 1:
            values["tpot_ms"] = (last - first) * 1e3 / (self.output_tokens - 1)
        return values


# ---- one connection ----

class Failure(Exception):
    """Why a request failed: (kind, detail)."""


class Answer:
    """Takes the bytes of one HTTP answer as they come and keeps when its chunks came. Knows nothing of sockets."""

    def __init__(self, chunks):
        self.chunks = chunks  # appended to: times
        self.status, self.headers = None, {}
        self.raw, self.body = b"", b""  # not yet taken apart: of the connection, of the event stream
        self.usage, self.closing_time, self.done = None, None, False
        self.complete = False  # the connection may be used again

    def feed(self, now, data):
        self.raw += data
        if self.status is None and not self._take_head():
            return
        if "chunked" in self.headers.get("transfer-encoding", ""):
            self.body += self._take_chunked()
        else:
            self.body, self.raw = self.body + self.raw, b""
            length = self.headers.get("content-length")
            self.complete = length is not None and len(self.body) >= int(length)
        if self.status == 200:
            self._take_events(now)

    def _take_head(self):
        end = self.raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self.raw[:end].decode("latin-1").split("\r\n")
        if not re.match(r"HTTP/1\.\d \d{3}", first):
            raise Failure("not HTTP", first[:100])
        self.status, self.raw = int(first[9:12]), self.raw[end + 4:]
        self.headers = {k.strip().lower(): v.strip().lower() for k, _, v in (line.partition(":") for line in lines)}
        return True

    def _take_chunked(self):
        """The payload of every HTTP chunk that is whole. Sets complete at the last one."""
        payload = []
        while (end := self.raw.find(b"\r\n")) >= 0:
            size = int(self.raw[:end].split(b";")[0], 16)
            after = end + 2 + size + 2
            if len(self.raw) < after:
                break
            payload.append(self.raw[end + 2:after - 2])
            self.raw = self.raw[after:]
            if size == 0:
                self.complete = True
                break
        return b"".join(payload)

    def _take_events(self, now):
        *lines, self.body = self.body.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_event(now, line[5:].strip())

    def _take_event(self, now, data):
        if data == b"[DONE]":
            self.done = True
            if not self.chunks and self.closing_time:
                self.chunks.append(self.closing_time)
            return
        event = json.loads(data)
        if "error" in event:
            raise Failure("error event", message_of(event))
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices")
        if not choices:
            return
        choice = choices[0]
        # The event of the finish_reason may carry no token: it is a chunk only where it is the only one.
        if choice.get("finish_reason") and not choice.get("text") and not choice.get("token_ids"):
            self.closing_time = now
        else:
            self.chunks.append(now)


class Connection(asyncio.Protocol):
    """One connection, for one request at a time. The hot path: bytes get their time here and are parsed when every
    socket that is ready in this turn of the loop has been read, so that parsing one delays the time of none."""

    def __init__(self):
        self.loop, self.transport = asyncio.get_running_loop(), None
        self.answer, self.finished = None, None
        self.received, self.scheduled, self.closed = [], False, False

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.received.append((time.monotonic(), data))
        self._schedule()

    def connection_lost(self, error):
        self.closed = True
        self._schedule()

    def _schedule(self):
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self._parse)

    def _parse(self):
        self.scheduled = False
        received, self.received = self.received, []
        if not self.finished or self.finished.done():
            return
        try:
            now = None
            for now, data in received:
                self.answer.feed(now, data)
            if self.answer.complete or self.closed:
                self.finished.set_result(now or time.monotonic())
        except Failure as failure:
            self.finished.set_exception(failure)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            self.finished.set_exception(Failure("broken answer", f"{error!r}"))

    async def exchange(self, data, answer, timeout):
        """Sends a request and feeds what comes to answer. Returns when its last byte came."""
        self.answer, self.finished = answer, self.loop.create_future()
        self.transport.write(data)
        if self.closed:
            self._schedule()
        return await asyncio.wait_for(self.finished, timeout)

    def reusable(self):
        return not self.closed and self.answer and self.answer.complete and \
            "close" not in self.answer.headers.get("connection", "")


class Client:
    """A process's connections: the idle ones are kept, the latest first."""

    def __init__(self, load):
        self.load, self.idle = load, []

    async def connect(self):
        target = self.load.target
        try:
            _, connection = await asyncio.wait_for(asyncio.get_running_loop().create_connection(
                Connection, target.host, target.port, ssl=target.tls or None), self.load.timeout)
            return connection
        except (OSError, asyncio.TimeoutError) as error:
            raise Failure("no connection", str(error) or "timeout") from error

    async def open(self, n):
        """Opens n connections beforehand. What fails here fails again, and is counted, when a request needs it."""
        if self.load.keep_alive:
            opened = await asyncio.gather(*(self.connect() for _ in range(n)), return_exceptions=True)
            self.idle += [c for c in opened if isinstance(c, Connection)]

    async def acquire(self):
        while self.idle:
            connection = self.idle.pop()
            if not connection.closed:
                return connection
        return await self.connect()

    def release(self, connection):
        if self.load.keep_alive and connection.reusable():
            self.idle.append(connection)
        else:
            connection.transport.abort()

    async def send(self, index, data, due=None):
        """One request from its sending to its end, as a Record. due: when it should have left, in an open loop."""
        record = Record(index, time.monotonic())
        record.late = record.start - due if due else 0.0
        connection, answer = None, Answer(record.chunks)
        try:
            connection = await self.acquire()
            record.end = await connection.exchange(data, answer, self.load.timeout)
            self.judge(record, answer)
        except asyncio.TimeoutError:
            record.failure, record.detail = "timeout", f"after {self.load.timeout:g} s, {len(record.chunks)} chunks"
        except Failure as failure:
            record.failure, record.detail = failure.args
        finally:
            record.end = record.end or time.monotonic()
            if connection:
                self.release(connection)
        return record

    def judge(self, record, answer):
        """Fills in the record's tokens. Raises Failure for an answer that is not what was asked for."""
        if answer.status is None:
            raise Failure("no answer", "the connection was closed")
        if answer.status != 200:
            raise Failure(f"HTTP {answer.status}", message_of(answer.body))
        if not answer.done:
            raise Failure("no [DONE]", f"the stream ended after {len(record.chunks)} chunks")
        usage, wanted = answer.usage or {}, self.load.output_len
        record.input_tokens = usage.get("prompt_tokens", self.load.input_len)
        record.output_tokens = usage.get("completion_tokens", len(record.chunks))
        exact = self.load.ignore_eos
        if not record.chunks or record.output_tokens > wanted or (exact and record.output_tokens < wanted):
            raise Failure("wrong number of tokens", f"{record.output_tokens}, not {wanted}")


def message_of(answer):
    """The message of an error, given as JSON bytes or as the object; what there is where it has none."""
    try:
        error = (json.loads(answer) if isinstance(answer, bytes) else answer)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:200]
    except (ValueError, KeyError, TypeError):
        return str(answer)[:200]


# ---- one process ----

async def closed_loop(client, requests, n_streams):
    """Sends every (index, bytes), n_streams at a time. Returns the records."""
    waiting, records = collections.deque(requests), []

    async def stream():
        while waiting:
            records.append(await client.send(*waiting.popleft()))
    await asyncio.gather(*(stream() for _ in range(n_streams)))
    return records


async def open_loop(client, requests, arrivals, start):
    """Sends every (index, bytes) at start + arrivals[index]. Returns the records."""
    tasks = []
    for index, data in requests:
        due = start + arrivals[index]
        await asyncio.sleep(due - time.monotonic())
        tasks.append(asyncio.create_task(client.send(index, data, due)))
    return await asyncio.gather(*tasks)


async def drive(load, process, pipe):
    """A process's part of a run: prepare, warm up, say so, wait for the start, send. Returns what the parent wants."""
    n_streams = load.streams_of(process)
    requests = [(i, load.request_bytes(i)) for i in load.requests_of(process)]
    warmup = [(i, load.request_bytes(f"warmup {i}")) for i in range(process, load.n_warmup, load.n_processes)]
    client = Client(load)
    await client.open(n_streams)
    warmed = await closed_loop(client, warmup, n_streams)
    pipe.send("ready")
    start = pipe.recv()
    await asyncio.sleep(start - time.monotonic())
    cpu = time.process_time()
    if load.rate:
        records = await open_loop(client, requests, load.arrivals(), start)
    else:
        records = await closed_loop(client, requests, n_streams)
    return {"records": records, "warmup": warmed, "cpu_seconds": time.process_time() - cpu}


def process_main(load, process, pipe):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pipe.send(asyncio.run(drive(load, process, pipe)))


# ---- one run ----

def run_load(load):
    """Runs the processes of a load. Returns (records in order of index, warm-up's records, facts for the report)."""
    workers = []
    for process in range(load.n_processes):
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.Process(target=process_main, args=(load, process, theirs), daemon=True)
        worker.start()
        theirs.close()
        workers.append((worker, ours))
    try:
        for _, pipe in workers:
            pipe.recv()
        hits = prefix_cache_hits(load.target)
        start = time.monotonic() + START_DELAY
        for _, pipe in workers:
            pipe.send(start)
        results = [pipe.recv() for _, pipe in workers]
    except EOFError:
        raise RuntimeError("a process of the load generator ended early (its error is above)") from None
    for worker, _ in workers:
        worker.join()
    after = prefix_cache_hits(load.target)
    records = sorted((r for result in results for r in result["records"]), key=lambda r: r.index)
    cpu = [result["cpu_seconds"] for result in results]
    facts = {"start": start, "cpu_seconds": cpu, "hits": None if hits is None or after is None else after - hits}
    return records, [r for result in results for r in result["warmup"]], facts


def prefix_cache_hits(target):
    """Prompt tokens found in the prefix cache so far, by /metrics; None where that does not say."""
    try:
        status, body = target.ask("GET", "/metrics")
    except OSError:
        return None
    values = re.findall(r"^gptd_prefix_cache_hits_total(?:\{.*\})? (\S+)", body.decode("utf-8", "replace"), re.M)
    return int(sum(map(float, values))) if status == 200 and values else None
