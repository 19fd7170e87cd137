"""Two replicas behind HAProxy and nginx, the distribution's own, with the configurations of configs/."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import harness
import test_device
from harness import Server, in_threads, scale, wait_until
from test_service import Load

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


def config_of(path, port, replicas):
    with open(os.path.join(harness.ROOT, "configs", path)) as f:
        text = f.read()
    for old, new in ((":8080", f"127.0.0.1:{port}"), ("listen 8080", f"listen 127.0.0.1:{port}"),
                     ("127.0.0.1:8000", f"127.0.0.1:{replicas[0]}"), ("127.0.0.1:8001", f"127.0.0.1:{replicas[1]}")):
        text = text.replace(old, new)
    return text


def start_haproxy(directory, port, replicas, *flags, haproxy=program("haproxy"), log=subprocess.DEVNULL):
    path = os.path.join(directory, "haproxy.cfg")
    with open(path, "w") as f:
        f.write(config_of("haproxy/haproxy.cfg", port, replicas))
    command = [haproxy, "-f", path]
    subprocess.run([*command, "-c"], check=True, capture_output=True, env=tool_environment())
    return subprocess.Popen([*command, "-db", *flags], stdout=log, stderr=log, env=tool_environment())


class Proxies:
    """What each of them must do. A subclass says how to start one: start_proxy(directory, port, replicas' ports)."""

    def replica(self, *flags, **keywords):
        server = Server("--drain-delay", "2", *flags, **keywords)
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        return server

    def front(self, replicas):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        port = free_port()
        process = self.start_proxy(directory.name, port, [r.port for r in replicas])
        self.addCleanup(lambda: (process.kill(), process.wait()))

        def answers():
            try:
                return self.ask(port, "GET", "/ready")[0] == 200
            except OSError:
                return False
        wait_until(answers, 20, f"{self.name} answers")
        return port

    @staticmethod
    def ask(port, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @harness.not_on_a_gpu("a library stands in for the GPU's")
    def test_token_by_token(self):
        """Of a replica that makes a token a millisecond: what comes at once is a few tokens, not a buffer full of them."""
        with test_device.faulty() as (gptd, _):
            replicas = [self.replica("--backend", "cuda", program=gptd) for _ in range(2)]
            port, n = self.front(replicas), scale(400, 100)
            body = json.dumps({"model": replicas[0].name, "prompt": "x", "max_tokens": n, "ignore_eos": True, "stream": True})
            with socket.create_connection(("127.0.0.1", port), 20) as s:
                s.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                          f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
                data, times = b"", []
                while b"[DONE]" not in data:
                    got = s.recv(65536)
                    self.assertTrue(got, data[-500:])
                    data += got
                    times.append((time.monotonic(), data.count(b"data: ")))
            self.assertGreater(times[-1][1], n * 0.9)
            self.assertGreater(len(times), n / 5)  # pieces
            half = next(t for t, events in times if events >= times[-1][1] / 2)
            share = (half - times[0][0]) / (times[-1][0] - times[0][0])
            self.assertTrue(0.25 < share < 0.75, share)

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

    start_proxy = staticmethod(start_haproxy)


@unittest.skipUnless(program("nginx"), "nginx is not installed")
class Nginx(Proxies, unittest.TestCase):
    name = "nginx"

    def start_proxy(self, directory, port, replicas):
        path = os.path.join(directory, "nginx.conf")
        paths = "".join(f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = re.sub(r"^http \{", f"http {{ access_log off; {paths}", config_of("nginx/nginx.conf", port, replicas), flags=re.M)
        with open(path, "w") as f:
            f.write(text.replace("worker_processes auto", "worker_processes 2"))
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
