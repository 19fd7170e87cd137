"""Two replicas behind HAProxy and nginx, the distribution's own, with the configurations of configs/, in plain and with TLS."""

import atexit
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
import warnings

import harness
import test_device
from harness import Server, in_threads, read_to_end, scale, wait_until
from test_service import Load

CONFIGS = os.path.join(harness.ROOT, "configs")
TOOLS = os.path.join(harness.ROOT, "build", "tools")  # scripts/setup.sh check


def program(name):
    for path in (os.path.join(TOOLS, "usr", directory, name) for directory in ("sbin", "bin")):
        if os.path.exists(path):
            return path
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def tool_environment():
    libraries = os.path.join(TOOLS, "usr", "lib", "x86_64-linux-gnu")
    return {**os.environ, **({"LD_LIBRARY_PATH": libraries} if os.path.isdir(libraries) else {})}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@functools.lru_cache
def certificate():
    """A directory with tls.crt and tls.key for localhost, and tls.pem, both in one, as HAProxy wants them."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    crt, key, both = (os.path.join(directory.name, "tls." + end) for end in ("crt", "key", "pem"))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", crt],
                   check=True, capture_output=True)
    with open(both, "w") as out:
        for path in (crt, key):
            with open(path) as f:
                out.write(f.read())
    return directory.name


def tls_context(newest=None):
    context = ssl.create_default_context(cafile=os.path.join(certificate(), "tls.crt"))
    context.set_alpn_protocols(["http/1.1"])
    if newest:
        context.set_ciphers("ALL:@SECLEVEL=0")  # else the client itself refuses old versions
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
    return context


class Recorder:
    """A replica that takes every request, answers it with 200 and keeps its bytes."""

    def __init__(self):
        self.requests, self.listening = [], socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self.serve, args=(self.listening.accept()[0],), daemon=True).start()

    def serve(self, connection):
        """One read is one request: the proxies send these small ones in one piece, and what hides behind one comes with it."""
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            while data := connection.recv(65536):
                if not data.startswith(b"GET /ready "):
                    time.sleep(0.05)  # the rest of a body
                    connection.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        data += connection.recv(65536)
                    connection.settimeout(20)
                    self.requests.append(data)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


class Names:
    """A name server at an address of its own that knows one name: a dictionary's."""

    def __init__(self, addresses):
        self.addresses, self.socket = addresses, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.address = f"127.53.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        self.socket.bind((self.address, 53))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                query, client = self.socket.recvfrom(4096)
                end = query.index(b"\0", 12)
                name = query[13:end].decode()  # one part, after its length
                question, kind = query[12:end + 5], query[end + 1:end + 3]
                found = self.addresses.get(name) if kind == b"\0\1" else None  # A
                answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(found) if found else b""
                flags = b"\x81\x80" if name in self.addresses else b"\x81\x83"  # no such name
                self.socket.sendto(query[:2] + flags + b"\0\1\0" + bytes([bool(found)]) + bytes(4) + question + answer, client)


def start_haproxy(ports, replicas, *flags, haproxy=program("haproxy"), pem=None, log=subprocess.DEVNULL):
    """As configured, in plain at the first port; with pem in TLS at the second."""
    env = {**tool_environment(), "GPTD_A": f"127.0.0.1:{replicas[0]}", "GPTD_B": f"127.0.0.1:{replicas[1]}",
           "GPTD_BIND": f"127.0.0.1:{ports[0]}", "GPTD_TLS_BIND": f"127.0.0.1:{ports[-1]}", **({"GPTD_CERT": pem} if pem else {})}
    command = [haproxy, "-f", os.path.join(CONFIGS, "haproxy", "haproxy.cfg")]
    subprocess.run([*command, "-c"], check=True, capture_output=True, env=env)
    return subprocess.Popen([*command, "-db", *flags], stdout=log, stderr=log, env=env)


class Proxies:
    """What each of them must do. A subclass says how to start one: start_proxy(directory, port, replicas' ports)."""

    def replica(self, *flags, **keywords):
        server = Server("--drain-delay", "2", *flags, **keywords)
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        return server

    def front(self, replicas):
        return self.fronts(replicas, False)[0]

    def fronts(self, replicas, tls):
        """The proxy's ports: for plain HTTP, and for TLS if that is asked for."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        ports = (free_port(), free_port())
        process = self.start_proxy(directory.name, ports, [r.port for r in replicas], tls)
        self.addCleanup(lambda: (process.kill(), process.wait()))

        def answers():
            try:
                return self.ask(ports[tls], "GET", "/ready", tls=tls)[0] == 200
            except OSError:
                return False
        wait_until(answers, 20, f"{self.name} answers")
        return ports

    @staticmethod
    def connection(port, tls):
        if tls:
            return http.client.HTTPSConnection("localhost", port, timeout=60, context=tls_context())
        return http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, port, method, path, body=None, tls=False, **headers):
        with contextlib.closing(self.connection(port, tls)) as connection:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()

    @harness.not_on_a_gpu("a library stands in for the GPU's")
    def test_token_by_token(self):
        """Of a replica that makes a token a millisecond: what comes at once is a few tokens, not a buffer full of them."""
        with test_device.faulty() as (gptd, _):
            replicas = [self.replica("--backend", "cuda", program=gptd) for _ in range(2)]
            body = json.dumps({"model": replicas[0].name, "prompt": "x", "max_tokens": scale(400, 100), "ignore_eos": True,
                               "stream": True})
            ports = [self.fronts(replicas, tls)[tls] for tls in (False, True)]
            for tls, port in enumerate(ports):
                with self.subTest(tls=tls):
                    connection = self.connection(port, tls)
                    connection.connect()
                    with connection.sock as s:
                        s.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                                  f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
                        self.check_token_by_token(s.recv)
            with self.subTest("HTTP/2, as a browser speaks it"), self.curl("-N", ports[1], body) as curl:
                self.check_token_by_token(lambda n: os.read(curl.stdout.fileno(), n))

    @staticmethod
    def curl(flags, port, body):
        return subprocess.Popen(["curl", "-sS", flags, "--http2", "--max-time", "20", f"https://localhost:{port}/v1/completions",
                                 "--cacert", os.path.join(certificate(), "tls.crt"), "--json", body], stdout=subprocess.PIPE)

    def check_token_by_token(self, read):
        n = scale(400, 100)
        data, times = b"", []
        while b"[DONE]" not in data:
            got = read(65536)
            self.assertTrue(got, data[-500:])
            data += got
            times.append((time.monotonic(), data.count(b"data: ")))
        self.assertGreater(times[-1][1], n * 0.9)
        self.assertGreater(len(times), n / 20)  # pieces; of a proxy that fills buffers three
        half = next(t for t, events in times if events >= times[-1][1] / 2)
        share = (half - times[0][0]) / (times[-1][0] - times[0][0])
        self.assertTrue(0.25 < share < 0.75, share)

    def test_tls(self):
        replica = self.replica()
        plain, port = self.fronts([replica, replica], True)
        body = {"model": replica.name, "prompt": "12+30=", "max_tokens": 4, "temperature": 0, "stop": "\n"}
        with self.subTest("HTTP/2, as curl speaks it"):
            with self.curl("-i", port, json.dumps(body)) as curl:
                answer = curl.stdout.read().decode()
            self.assertRegex(answer, r"^HTTP/2 200")
            self.assertIn('"text":"42"', answer)
            self.assertRegex(answer, r"(?i)\nstrict-transport-security: max-age=31536000\r?\n")
        for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
            with self.subTest(name), socket.create_connection(("127.0.0.1", port), 20) as s, \
                    tls_context(version).wrap_socket(s, server_hostname="localhost") as wrapped:
                self.assertEqual(wrapped.version(), name)
        with self.subTest("TLS 1.1"), socket.create_connection(("127.0.0.1", port), 20) as s, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is old
            with self.assertRaisesRegex(ssl.SSLError, "(?i)protocol.version"):
                tls_context(ssl.TLSVersion.TLSv1_1).wrap_socket(s, server_hostname="localhost")
        with self.subTest("plain HTTP"):
            before = replica.metrics()["gptd_request_success_total{finished_reason=\"stop\"}"]
            self.assertEqual(self.ask(plain, "POST", "/v1/completions", body, Authorization="Bearer sk-x")[0], 403)
            self.assertEqual(self.ask(plain, "GET", "/v1/models")[0], 403)
            with contextlib.closing(self.connection(plain, False)) as connection:
                connection.request("GET", "/?a=b")
                answer = connection.getresponse()
                self.assertEqual((answer.status, answer.headers["Location"]), (308, "https://127.0.0.1/?a=b"))
            self.assertEqual(replica.metrics()["gptd_request_success_total{finished_reason=\"stop\"}"], before)
        self.assertEqual(self.ask(port, "GET", "/metrics", tls=True)[0], 404)

    @harness.not_quick
    def test_what_is_passed_on(self):
        """What gptd refuses (a bare LF, a header over two lines, two lengths) and what smuggles a second request: a replica gets
        one clean request, or none."""
        begin = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        hidden = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        cases = {
            "clean": begin + b"Content-Length: 2\r\n\r\n{}",
            "bare LF": (begin + b"Content-Length: 2\r\n\r\n{}").replace(b"\r\n", b"\n"),
            "one bare LF": begin + b"X-A: 1\nContent-Length: 2\r\n\r\n{}",
            "bare LF in chunks": begin + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
            "obs-fold": begin + b"X-A: 1\r\n  2\r\nContent-Length: 2\r\n\r\n{}",
            "obs-fold in Transfer-Encoding": begin + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 2\r\n\r\n{}",
            "both lengths": begin + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
            "two Content-Lengths": begin + b"Content-Length: 2\r\nContent-Length: %d\r\n\r\n{}" % (2 + len(hidden)) + hidden,
            "a space before the colon": begin + b"Content-Length : %d\r\n\r\n" % len(hidden) + hidden,
            "a CR alone": begin + b"X-A: 1\rTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
            "not chunked": begin + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        }
        recorder = Recorder()
        self.addCleanup(recorder.listening.close)
        port, passed = self.front([recorder, recorder]), set()
        for name, request in cases.items():
            with self.subTest(name):
                recorder.requests.clear()
                with socket.create_connection(("127.0.0.1", port), 20) as s:
                    s.sendall(request)
                    status = read_to_end(s)[0]
                self.assertIn(status, (200, 400, 501))
                self.assertEqual(len(recorder.requests), status == 200)
                if status == 200:
                    passed.add(name)
                    head, _, body = recorder.requests[0].partition(b"\r\n\r\n")
                    self.assertNotRegex(head, rb"[^\r]\n|\r[^\n]|\n[ \t]")
                    self.assertEqual(len(re.findall(rb"(?im)^(?:content-length|transfer-encoding):", head)), 1, head)
                    self.assertIn(body, (b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"0\r\n\r\n"))
        self.assertLessEqual(passed, {"clean", "bare LF", "one bare LF", "bare LF in chunks", "obs-fold", "both lengths"})
        self.assertIn("clean", passed)

    def test_kill(self):
        """SIGKILL under load: lost is at most what each client has on its way, and all go on with the other replica."""
        replicas = [self.replica() for _ in range(2)]
        port, lost, n = self.front(replicas), [], scale(16, 6)
        loads = [Load(port, replicas[0].name, 1) for _ in range(n)]
        try:
            for load in loads:
                load.progress()
            replicas[0].process.kill()
            time.sleep(1)
            for i, load in enumerate(loads):
                if load.failures:
                    lost += load.end()
                    loads[i] = Load(port, replicas[0].name, 1)
            self.assertLessEqual(len(lost), n)
            for load in loads:
                load.progress()
        finally:
            later = [failure for load in loads for failure in load.end()]
        self.assertEqual(later, [], lost)

    def test_rolling_restart(self):
        """One replica after the other is replaced under load, and no request fails."""
        replicas = [self.replica() for _ in range(2)]
        port = self.front(replicas)
        load = Load(port, replicas[0].name, scale(16, 6))
        try:
            for i in range(2):
                load.progress()
                number = replicas[i].port
                self.assertEqual(replicas[i].stop(seconds=60), 0, replicas[i].log[-20:])
                load.progress()
                replicas[i] = self.replica("--port", str(number))
                wait_until(lambda: load.failures or replicas[i].metrics()["gptd_generation_tokens_total"] > 0, 30,
                           "it gets its share")
            load.progress()
        finally:
            failures = load.end()
        self.assertEqual(failures, [])

    @harness.not_on_a_gpu("a library stands in for the GPU's")
    def test_slow_replica(self):
        with test_device.faulty() as (gptd, _), tempfile.NamedTemporaryFile("w") as fault:
            fault.write("slow")
            fault.flush()
            replicas = [self.replica("--backend", "cuda", program=gptd),
                        self.replica("--backend", "cuda", program=gptd, env={"FAULTY_BACKEND": fault.name})]
            port = self.front(replicas)
            body = {"model": replicas[0].name, "prompt": "x", "max_tokens": 20, "ignore_eos": True}

            def client():
                return [self.ask(port, "POST", "/v1/completions", body)[0] for _ in range(scale(20, 8))]
            statuses = sum(in_threads(client, [()] * 6), [])
            self.assertEqual(set(statuses), {200})
            served = [r.metrics()["gptd_generation_tokens_total"] / 20 for r in replicas]
            self.assertEqual(sum(served), len(statuses))
            self.assertLess(served[1], len(statuses) / 4, served)

    def conversations(self, port, model, with_header):
        """Share of the prompts' tokens that come from prefix caches, of conversations that grow turn by turn."""
        sentence = "The cat sat on the mat and looked at the moon for a long time. "
        prompts = {i: f"Conversation {i}, {'with' if with_header else 'without'}. " + sentence * 40 for i in range(12)}
        cached = total = 0
        for turn in range(3):
            # Each turn in another order: else taking turns would send each to where it was.
            for i in sorted(prompts, key=lambda i: (i + turn) % len(prompts)):
                prompts[i] += sentence
                headers = {"X-Session-Id": f"session-{i}"} if with_header else {}
                status, answer = self.ask(port, "POST", "/v1/completions",
                                          {"model": model, "prompt": prompts[i], "max_tokens": 1}, **headers)
                self.assertEqual(status, 200, answer)
                usage = json.loads(answer)["usage"]
                cached += usage["prompt_tokens_details"]["cached_tokens"]
                total += usage["prompt_tokens"]
        return cached / total

    @harness.not_quick
    def test_conversations(self):
        replicas = [self.replica() for _ in range(2)]
        port = self.front(replicas)
        without, with_header = (self.conversations(port, replicas[0].name, h) for h in (False, True))
        print(f"{self.name}: of prompts' tokens reused: {with_header:.0%} with x-session-id, {without:.0%} without", flush=True)
        self.assertGreater(with_header, 0.55)  # of two thirds
        self.assertGreater(with_header, without + 0.2)
        used = [r.metrics()["gptd_prompt_tokens_total"] for r in replicas]
        self.assertGreater(min(used), 0)

    def test_no_metrics_from_outside(self):
        replicas = [self.replica() for _ in range(2)]
        port = self.front(replicas)
        self.assertEqual([self.ask(port, "GET", path)[0] for path in ("/metrics", "/debug/state", "/health", "/v1/models")],
                         [404, 404, 200, 200])


@unittest.skipUnless(program("haproxy"), "haproxy is not installed")
class HAProxy(Proxies, unittest.TestCase):
    name = "haproxy"

    def start_proxy(self, directory, ports, replicas, tls):
        return start_haproxy(ports, replicas, pem=os.path.join(certificate(), "tls.pem") if tls else None)

    @harness.not_quick
    @unittest.skipIf(os.geteuid() or subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode,
                     "needs root that may have mounts of its own, for another resolv.conf")
    def test_names(self):
        """Replicas by name, as with Docker: one that comes back at another address is found, one whose name has gone is left."""
        names = Names({"gptd-a": "127.0.0.1"})
        self.addCleanup(names.socket.close)
        replica, port = self.replica(), free_port()
        with tempfile.NamedTemporaryFile("w") as resolv:
            resolv.write(f"nameserver {names.address}\n")
            resolv.flush()
            env = {**tool_environment(), "GPTD_A": f"gptd-a:{replica.port}", "GPTD_B": f"gptd-b:{replica.port}",
                   "GPTD_BIND": f"127.0.0.1:{port}"}
            haproxy = subprocess.Popen(
                ["unshare", "--mount", "/bin/sh", "-c", 'mount --bind "$1" /etc/resolv.conf && exec "$2" -f "$3" -db', "sh",
                 resolv.name, program("haproxy"), os.path.join(CONFIGS, "haproxy", "haproxy.cfg")],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
            self.addCleanup(lambda: (haproxy.kill(), haproxy.wait()))

            def ready():
                with contextlib.suppress(OSError):
                    return self.ask(port, "GET", "/ready")[0] == 200
            wait_until(ready, 10, "HAProxy finds gptd-a, though there is no gptd-b")
            self.assertEqual(replica.stop(), 0)
            wait_until(lambda: not ready(), 10, "HAProxy misses it")
            moved = self.replica("--host", "127.0.0.2", "--port", str(replica.port))
            self.assertFalse(ready())
            names.addresses["gptd-a"] = "127.0.0.2"
            wait_until(ready, 10, "HAProxy finds where it has gone")
            moved.kill()


@unittest.skipUnless(program("nginx"), "nginx is not installed")
class Nginx(Proxies, unittest.TestCase):
    name = "nginx"

    def start_proxy(self, directory, ports, replicas, tls):
        paths = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        for name in os.listdir(os.path.join(CONFIGS, "nginx")):
            with open(os.path.join(CONFIGS, "nginx", name)) as f:
                text = f.read()
            for old, new in (("worker_processes auto", "worker_processes 2"), ("\nhttp {", f"\nhttp {{ access_log off; {paths}"),
                             ("listen 8080", f"listen 127.0.0.1:{ports[0]}"), ("listen 8443", f"listen 127.0.0.1:{ports[1]}"),
                             ("127.0.0.1:8000", f"127.0.0.1:{replicas[0]}"), ("127.0.0.1:8001", f"127.0.0.1:{replicas[1]}"),
                             ("/etc/gptd/tls", certificate())):
                text = text.replace(old, new)
            with open(os.path.join(directory, name), "w") as f:
                f.write(text)
        path = os.path.join(directory, "nginx-tls.conf" if tls else "nginx.conf")
        own = f"daemon off; pid {directory}/pid; error_log {directory}/error.log;" + (" user root;" if os.geteuid() == 0 else "")
        command = [program("nginx"), "-p", directory, "-c", path, "-e", f"{directory}/error.log", "-g", own]
        subprocess.run([*command, "-t"], check=True, capture_output=True, env=tool_environment())
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tool_environment(),
                                preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Metrics(unittest.TestCase):
    @unittest.skipUnless(program("promtool"), "promtool is not installed")
    def test_promtool(self):
        server = Server()
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        for fields in ({}, {"stream": True}, {"temperature": 9}, {"n": 3}):
            server.completions(prompt="Once", max_tokens=3, **fields)
        done = subprocess.run([program("promtool"), "check", "metrics"], input=server.get("/metrics").body, capture_output=True,
                              timeout=60, env=tool_environment())
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))


if __name__ == "__main__":
    unittest.main()
