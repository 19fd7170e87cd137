"""What a service manager gives and is told: a socket, readiness, a watchdog; and a server that is replaced under load."""

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import harness
import test_device
from harness import Server, parse_events, scale, wait_until


class Manager:
    """Receives what a server says to NOTIFY_SOCKET."""

    def __init__(self, test, abstract=False):
        if abstract:
            self.name = f"@gptd-test-{os.getpid()}-{id(self)}"
        else:
            directory = tempfile.TemporaryDirectory()
            test.addCleanup(directory.cleanup)
            self.name = os.path.join(directory.name, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        test.addCleanup(self.socket.close)
        self.socket.bind(self.name.replace("@", "\0", 1))
        self.env = {"NOTIFY_SOCKET": self.name}

    def next(self, seconds=20):
        if not select.select([self.socket], [], [], seconds * scale(1, 4))[0]:
            return None
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def next_but_beats(self):
        while True:
            said = self.next()
            if said != {"WATCHDOG": "1"}:
                return said


class Told(unittest.TestCase):
    def test_life(self):
        for abstract in (False, True):
            manager = Manager(self, abstract)
            server = Server(env=manager.env)
            self.assertEqual(manager.next(), {"READY": "1", "STATUS": f"serving {server.name}"})
            before = time.monotonic_ns() // 1000
            server.process.send_signal(signal.SIGHUP)
            said = manager.next()
            self.assertEqual((said["RELOADING"], manager.next()), ("1", {"READY": "1"}))
            self.assertTrue(before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(manager.next(), {"STOPPING": "1", "STATUS": "draining"})
            self.assertEqual(server.stop(None), 0)
            self.assertIsNone(manager.next(0))

    def test_nobody_there(self):
        for name in ("/nowhere/notify", "@gptd-nobody", "vsock:2:1", "", "/" + "x" * 300):
            server = Server(env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "300000"})
            self.assertEqual(server.complete(prompt="Once", max_tokens=1)["usage"]["completion_tokens"], 1)
            server.check_stopped()

    def test_watchdog(self):
        manager = Manager(self)
        server = Server(env={**manager.env, "WATCHDOG_USEC": "1500000"})
        self.assertEqual(manager.next()["READY"], "1")
        times = []
        while len(times) < 6:
            self.assertEqual(manager.next(), {"WATCHDOG": "1"})
            times.append(time.monotonic())
        self.assertLess(max(b - a for a, b in zip(times, times[1:])), scale(1.5, 6))
        self.assertGreater(times[-1] - times[0], 1)  # not all the time, either
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(manager.next_but_beats()["STOPPING"], "1")
        self.assertEqual(server.stop(None), 0)

    def test_not_its_watchdog(self):
        manager = Manager(self)
        server = Server(env={**manager.env, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"})
        self.assertEqual(manager.next()["READY"], "1")
        self.assertIsNone(manager.next(1))
        server.check_stopped()

    @harness.not_on_a_gpu("a library stands in for the GPU's")
    def test_watchdog_of_a_stuck_engine(self):
        manager = Manager(self)
        with test_device.faulty() as (program, fail):
            server = Server("--backend", "cuda", "--stall-timeout", "0.4", program=program,
                            env={**manager.env, "WATCHDOG_USEC": "900000"})
            self.assertEqual(manager.next()["READY"], "1")
            fail("hang")
            asking = threading.Thread(target=lambda: server.completions(prompt="Once", max_tokens=50))
            asking.start()
            wait_until(lambda: server.get("/health").status == 503, 10, "/health fails")
            while manager.next(0):  # what came before
                pass
            self.assertIsNone(manager.next(1.5))
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(manager.next()["STOPPING"], "1")
            self.assertEqual(server.stop(None), 3)
            asking.join()


def listener():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("127.0.0.1", 0))
    s.listen(4096)
    return s


class Load:
    """Clients that ask one request after the other, over connections that are kept as long as the server keeps them."""

    def __init__(self, port, model, n, headers=None):
        self.port, self.model = port, model
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.ended, self.answers, self.failures = threading.Event(), [0] * n, []
        self.threads = [threading.Thread(target=self.client, args=(i,)) for i in range(n)]
        for t in self.threads:
            t.start()

    def client(self, i):
        connection = None
        while not self.ended.is_set() and not self.failures:
            n, stream = (1 + self.answers[i] * 7 % scale(300, 60)), i % 2 == 0
            body = {"model": self.model, "prompt": "Once upon a time", "max_tokens": n, "ignore_eos": True, "stream": stream}
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("POST", "/v1/completions", json.dumps(body), self.headers)
                answer = connection.getresponse()
                text = answer.read()
                finish = parse_events(text)[-1] if stream else json.loads(text)
                assert answer.status == 200 and finish["choices"][0]["finish_reason"] == "length", (answer.status, text[-300:])
                if stream:
                    assert text.endswith(b"data: [DONE]\n\n"), text[-300:]
                if answer.headers.get("Connection", "").lower() == "close":
                    connection = connection.close()
                self.answers[i] += 1
            except (OSError, AssertionError, http.client.HTTPException, ValueError, KeyError, IndexError) as e:
                self.failures.append(f"client {i}, after {self.answers[i]} answers: {e!r}")
        if connection:
            connection.close()

    def progress(self):
        """Waits until each client has had two more answers."""
        goal = [n + 2 for n in self.answers]
        wait_until(lambda: self.failures or all(n >= g for n, g in zip(self.answers, goal)), 60, "every client goes on")

    def end(self):
        self.ended.set()
        for t in self.threads:
            t.join()
        return self.failures


class Passed(unittest.TestCase):
    def start(self, listening, *flags):
        server = Server(*flags, listener=listening)
        self.addCleanup(lambda: server.process.poll() is None and server.kill())
        self.assertEqual(server.port, listening.getsockname()[1])
        return server

    def replace_under_load(self, replaced):
        """replaced(old server, socket) gives the new one. No request fails, time and again."""
        with listener() as s:
            server = self.start(s)
            load = Load(server.port, server.name, scale(16, 6))
            try:
                for _ in range(scale(4, 2)):
                    load.progress()
                    server = replaced(server, s)
                load.progress()
            finally:
                failures = load.end()
            self.assertEqual(failures, [])
            server.check_stopped()

    def test_upgrade(self):
        """The new process takes over from the old one."""
        def replaced(old, s):
            server = self.start(s)
            self.assertEqual(old.stop(seconds=60), 0, old.log[-20:])
            return server
        self.replace_under_load(replaced)

    def test_restart(self):
        """The old process ends before the new one begins: clients wait in the socket meanwhile."""
        def replaced(old, s):
            self.assertEqual(old.stop(seconds=60), 0, old.log[-20:])
            return self.start(s)
        self.replace_under_load(replaced)

    def test_nobody_is_accepted_while_loading(self):
        with listener() as s:
            with socket.create_connection(s.getsockname()) as early:  # before there is a server
                early.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                server = self.start(s)
                early.settimeout(20)
                self.assertIn(b" 200 ", early.recv(4096))
            server.check_stopped()

    def test_once_more_on_a_kept_connection(self):
        """Whoever read an answer without `Connection: close` may ask again, and is told then."""
        with listener() as s:
            server = self.start(s)
            connection = server.connect()
            self.assertEqual(server.get("/health", connection=connection).status, 200)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: any("draining" in line for line in server.log), 5, "it drains")
            time.sleep(0.3)
            answer = server.request("POST", "/v1/completions", {"model": server.name, "prompt": "Once"}, connection=connection)
            self.assertEqual((answer.status, answer.headers["Connection"].lower()), (200, "close"))
            self.assertEqual(server.stop(None), 0)

    def test_idle_connections_do_not_hold_it(self):
        with listener() as s:
            server = self.start(s, "--header-timeout", "3600")
            kept = server.connect()
            self.assertEqual(server.get("/health", connection=kept).status, 200)
            began = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - began, scale(4, 16))
            kept.close()

    def test_what_is_no_socket(self):
        def ended(env, fd):
            launch = harness.PASS_SOCKET.replace('LISTEN_FDS="1", ', "")
            done = subprocess.run([sys.executable, "-c", launch, str(fd), harness.SERVER, "--model", harness.MODEL, "--port", "0"],
                                  env={**harness.NOT_VARIABLES, **env}, pass_fds=[fd], stderr=subprocess.PIPE, text=True,
                                  timeout=60)
            return done.returncode, done.stderr
        with listener() as s, open(os.devnull) as file, socket.socket() as deaf, socket.socket(socket.AF_UNIX) as local:
            local.bind(f"\0gptd-test-{os.getpid()}-local")
            local.listen()
            for fd, n, words in ((s.fileno(), "2", "it takes one"), (file.fileno(), "1", "no socket that listens"),
                                 (deaf.fileno(), "1", "no socket that listens"), (local.fileno(), "1", "no socket that listens")):
                status, log = ended({"LISTEN_FDS": n}, fd)
                self.assertEqual(status, 4, log)
                self.assertIn(words, log)

    def test_not_its_socket(self):
        for variables in ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "x", "LISTEN_PID": "x"}):
            server = Server(env=variables)
            self.assertEqual(server.get("/health").status, 200)
            server.check_stopped()


if __name__ == "__main__":
    unittest.main()
