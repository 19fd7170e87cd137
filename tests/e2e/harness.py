"""What the end-to-end tests share: a gptd process, a small HTTP client, raw sockets.

The tests know the HTTP contract and nothing of the server's code. run.py sets the module's variables.
"""

import contextlib
import http.client
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SERVER = os.path.join(ROOT, "build", "gptd")
MODEL = os.path.join(ROOT, "models", "demo")
BACKEND = "cpu"
QUICK = False  # sanitizer builds: the same paths with less of everything

NOT_VARIABLES = {k: v for k, v in os.environ.items() if not k.startswith("GPTD_")}


def scale(full, quick):
    return quick if QUICK else full


def not_on_a_gpu(reason):
    return unittest.skipIf(BACKEND == "cuda", reason)


def not_quick(test):
    return unittest.skipIf(QUICK, "it is no other with sanitizers")(test)


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds * scale(1, 4)
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)


class Response:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json()["error"]

    def __repr__(self):
        return f"{self.status} {self.body[:500]!r}"


class StreamError(Exception):
    """The in-band error that ends a stream without [DONE]."""


def parse_events(raw):
    """The JSON events of a whole event stream; raises where it does not end as it must."""
    if isinstance(raw, bytes):
        raw = raw.decode("utf-8")
    events, done = [], False
    for block in raw.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        assert not done, f"after [DONE]: {block!r}"
        assert block.startswith("data: "), f"not an event: {block!r}"
        if block == "data: [DONE]":
            done = True
            continue
        event = json.loads(block[6:])
        if "error" in event:
            raise StreamError(event["error"]["message"])
        events.append(event)
    if not done:
        raise AssertionError(f"cut without [DONE] after {len(events)} events: ...{raw[-200:]!r}")
    return events


def join_events(events):
    """{choice index: (text, finish_reason, token_ids)} of a stream."""
    joined = {}
    for event in events:
        for choice in event["choices"]:
            text, reason, ids = joined.get(choice["index"], ("", None, []))
            assert reason is None, f"choice {choice['index']} goes on after its end"
            ids = ids + choice.get("token_ids", [])
            joined[choice["index"]] = (text + choice["text"], choice["finish_reason"], ids)
    return joined


# Execs a program as a service manager would: with a listening socket as descriptor 3.
PASS_SOCKET = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])"""


class Server:
    """A gptd process on a free port, or on a socket that it is given. files: its RLIMIT_NOFILE, soft and hard."""

    def __init__(self, *flags, model=None, env=None, wait=True, program=None, listener=None, files=None):
        self.model = model or MODEL
        self.name = os.path.basename(os.path.normpath(self.model))
        self.started = time.monotonic()
        passed = [sys.executable, "-c", PASS_SOCKET, str(listener.fileno())] if listener else []
        self.process = subprocess.Popen(
            [*passed, program or SERVER, "--model", self.model, *([] if program else ["--backend", BACKEND]),
             "--host", "127.0.0.1", "--port", "0", "--drain-delay", "0", "--log-format", "json", *flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**NOT_VARIABLES, **(env or {})}, pass_fds=[listener.fileno()] if listener else (),
            preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, files)))
        self.log, self.port, self.ready_after = [], None, None
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if wait:
            self.wait_ready()

    def _read_log(self):
        for line in self.process.stderr:
            line = line.decode("utf-8", "replace").rstrip("\n")
            self.log.append(line)
            match = re.search(r"ready .* http://[^ ]+:(\d+)", line)
            if match and not self.port:
                self.ready_after = time.monotonic() - self.started
                self.port = int(match.group(1))
                self._ready.set()
        self._ready.set()

    def wait_ready(self):
        self._ready.wait(60)
        if not self.port:
            self.process.kill()
            raise AssertionError("gptd did not start:\n" + "\n".join(self.log[-30:]))

    def log_entries(self):
        return [json.loads(line) for line in self.log]

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def stop(self, how=signal.SIGTERM, seconds=30):
        """Ends the process (how None: it is ending); its exit status. A sanitizer's complaint shows there."""
        if how and self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(seconds * scale(1, 4))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("gptd did not end:\n" + "\n".join(self.log[-30:]))
        self._reader.join()
        self.process.stderr.close()
        return self.process.returncode

    def check_stopped(self, how=signal.SIGTERM):
        status = self.stop(how)
        if status != 0:
            raise AssertionError(f"gptd ended with {status}:\n" + "\n".join(self.log[-60:]))

    # ---- HTTP ----

    def connect(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method, path, body=None, headers=None, connection=None):
        own = connection is None
        connection = connection or self.connect()
        try:
            headers = dict(headers or {})
            if body is not None and not isinstance(body, (bytes, str)):
                body = json.dumps(body)
            if body is not None:
                headers.setdefault("Content-Type", "application/json")
            connection.request(method, path, body.encode() if isinstance(body, str) else body, headers)
            answer = connection.getresponse()
            return Response(answer.status, answer.headers, answer.read())
        finally:
            if own:
                connection.close()

    def get(self, path, **kw):
        return self.request("GET", path, **kw)

    def post(self, path, body, **kw):
        return self.request("POST", path, body, **kw)

    def completions(self, headers=None, **fields):
        """The whole response, whatever its status."""
        return self.post("/v1/completions", {"model": self.name, **fields}, headers=headers)

    def complete(self, **fields):
        """The answer of a request that must succeed."""
        answer = self.completions(**fields)
        assert answer.status == 200, answer
        return answer.json()

    def text(self, prompt, **fields):
        return self.complete(prompt=prompt, **fields)["choices"][0]["text"]

    def stream(self, **fields):
        """The events of a stream that must succeed."""
        answer = self.completions(stream=True, **fields)
        assert answer.status == 200, answer
        return parse_events(answer.body)

    def chat_completions(self, messages, headers=None, **fields):
        """The whole response, whatever its status. messages: a list, or what the user says."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.post("/v1/chat/completions", {"model": self.name, "messages": messages, **fields}, headers=headers)

    def chat(self, messages, **fields):
        """The answer of a chat that must succeed."""
        answer = self.chat_completions(messages, **fields)
        assert answer.status == 200, answer
        return answer.json()

    def chat_stream(self, messages, **fields):
        """The events of a stream that must succeed."""
        answer = self.chat_completions(messages, stream=True, **fields)
        assert answer.status == 200, answer
        return parse_events(answer.body)

    def tokenize(self, text, **fields):
        answer = self.post("/tokenize", {"model": self.name, "prompt": text, **fields})
        assert answer.status == 200, answer
        return answer.json()["tokens"]

    def metrics(self, **keywords):
        """{name with labels other than model_name: value}"""
        values = {}
        for line in self.get("/metrics", **keywords).body.decode().splitlines():
            if line.startswith("#"):
                continue
            series, value = line.rsplit(" ", 1)
            series = re.sub(r'model_name="(?:[^"\\]|\\.)*",?', "", series).replace("{}", "")
            values[series] = float(value)
        return values

    def wait_idle(self, seconds=20, **keywords):
        """Until nothing runs, nothing waits and every KV block is free."""
        def idle():
            m = self.metrics(**keywords)
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
            return not any(m["gptd_" + name] for name in names)
        wait_until(idle, seconds, "nothing runs, every block is free")

    # ---- raw sockets ----

    def socket(self, timeout=15, receive_buffer=None):
        s = socket.socket()
        if receive_buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        s.settimeout(timeout * scale(1, 4))
        s.connect(("127.0.0.1", self.port))
        return s

    def raw(self, data, timeout=15):
        """Sends bytes, reads to the end of the connection: (status or None, everything read, whether it was closed)."""
        with self.socket(timeout) as s:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                s.sendall(data)
            return read_to_end(s)

    def completion_bytes(self, headers="", **fields):
        body = json.dumps({"model": self.name, **fields}).encode()
        return (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
                f"Content-Length: {len(body)}\r\n\r\n").encode() + body

    # ---- the process ----

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self, peak=False):
        name = "VmHWM" if peak else "VmRSS"
        with open(f"/proc/{self.process.pid}/status") as f:
            return int(re.search(name + r":\s+(\d+) kB", f.read()).group(1)) * 1024


def same_server(*flags, **keywords):
    """One whose answers may be compared bit for bit, on a GPU, too."""
    return Server("--deterministic", *flags, **keywords)


def read_to_end(s):
    data, closed = b"", False
    try:
        while chunk := s.recv(65536):
            data += chunk
        closed = True
    except (TimeoutError, socket.timeout):
        pass
    except ConnectionResetError:
        closed = True
    match = re.match(rb"HTTP/1\.[01] (\d{3})", data)
    return (int(match.group(1)) if match else None), data, closed


def read_until(s, marker, data=b""):
    while marker not in data:
        chunk = s.recv(65536)
        if not chunk:
            raise AssertionError(f"closed before {marker!r}: {data[-300:]!r}")
        data += chunk
    return data


def readable(s, seconds):
    return bool(select.select([s], [], [], seconds)[0])


def in_threads(function, arguments):
    """function(*a) for every a at once; the results in order. The first exception is raised."""
    results, errors = [None] * len(arguments), []

    def call(i):
        try:
            results[i] = function(*arguments[i])
        except BaseException as e:  # noqa: BLE001: reported to the test below
            errors.append(e)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(arguments))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


class ServerTest(unittest.TestCase):
    """A test case with one server for all its tests, started with `flags`, which must end well."""

    flags = ()
    model = None
    server = None

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.flags, model=cls.model)

    @classmethod
    def tearDownClass(cls):
        cls.server.check_stopped()


# A checkpoint that is a config.json and nothing else.
TINY_CONFIG = {"architectures": ["FlashGPT"], "vocab_size": 97, "max_seq_len": 256, "embed_dim": 64, "num_heads": 4,
               "num_layers": 2, "mlp_ratio": 4}


@contextlib.contextmanager
def tiny_model():
    with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
        path = os.path.join(directory, "tiny")
        os.mkdir(path)
        with open(os.path.join(path, "config.json"), "w") as f:
            json.dump(TINY_CONFIG, f)
        yield path


class TinyServerTest(ServerTest):
    """The same on random weights without a tokenizer: prompts and answers are token ids."""

    @classmethod
    def setUpClass(cls):
        cls._tiny = tiny_model()
        cls.model = cls._tiny.__enter__()
        cls.flags = ("--load-format", "dummy", *cls.flags)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        try:
            super().tearDownClass()
        finally:
            cls._tiny.__exit__(None, None, None)
