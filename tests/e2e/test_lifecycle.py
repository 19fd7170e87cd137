"""Starting, draining, ending; options as a user meets them; what an idle server costs."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import unittest

import harness
from harness import Server, in_threads, not_on_a_gpu, parse_events, read_to_end, read_until, scale, tiny_model, wait_until
from test_sameness import dechunk


END_OF_CUDA = {"cpu": 0, "cuda": 3}  # seconds that the driver may take to clear away after a process


def gptd(*flags, env=None, seconds=60):
    """Runs gptd to its end: (exit status, stdout, stderr)."""
    done = subprocess.run([harness.SERVER, "--backend", harness.BACKEND, *flags], capture_output=True, text=True, timeout=seconds,
                          env={**harness.NOT_VARIABLES, **(env or {})})
    return done.returncode, done.stdout, done.stderr


class Start(unittest.TestCase):
    def test_exec_to_ready(self):
        times = []
        for _ in range(scale(3, 1)):
            server = Server()
            times.append(server.ready_after)
            answered = server.get("/ready")
            self.assertEqual(answered.status, 200)
            server.check_stopped()
        print(f"\nexec to ready: {1e3 * min(times):.0f} ms (best of {len(times)})")

    def test_dry_run(self):
        status, out, err = gptd("--model", harness.MODEL, "--dry-run")
        self.assertEqual((status, err), (0, ""))
        for word in ("weights", "workspace", "history", "KV cache", "blocks", "tokens", "total"):
            self.assertIn(word, out)
        status, out, _ = gptd("--model", harness.MODEL, "--dry-run", "--log-format", "json", "--block-size", "16",
                              "--kv-cache-memory-bytes", "64M")
        plan = json.loads(out)
        self.assertEqual(status, 0)
        self.assertLessEqual(plan["kv_cache_bytes"], 64 << 20)
        [group] = plan["kv_groups"]
        self.assertEqual(group["window"], 0)
        self.assertGreater(plan["kv_cache_bytes"], (64 << 20) - group["block_bytes"])
        self.assertEqual(plan["kv_cache_bytes"], group["n_blocks"] * group["block_bytes"])
        self.assertEqual(plan["kv_tokens"], group["n_blocks"] * 16)
        parts = ("weights", "workspace", "history", "scratch", "kv_cache")
        self.assertEqual(plan["total_bytes"], sum(plan[f"{part}_bytes"] for part in parts))
        # What is refused is the same sum; a larger cache also has larger tables in the scratch.
        room = plan["memory_bytes"] - plan["total_bytes"] + plan["kv_cache_bytes"]
        status, _, _ = gptd("--model", harness.MODEL, "--dry-run", "--block-size", "16", "--kv-cache-memory-bytes",
                            str(room * 98 // 100))
        self.assertEqual(status, 0)
        status, _, _ = gptd("--model", harness.MODEL, "--dry-run", "--block-size", "16", "--kv-cache-memory-bytes",
                            str(room + (64 << 20)))
        self.assertEqual(status, 2)
        weights = os.path.getsize(os.path.join(harness.MODEL, "model.safetensors"))
        self.assertLess(abs(weights - plan["weights_bytes"]), 65536)

    def test_too_big(self):
        status, _, err = gptd("--model", harness.MODEL, "--kv-cache-memory-bytes", "900T", "--dry-run")
        self.assertEqual(status, 2)
        self.assertTrue(re.search(r"\d", err), err)
        with tiny_model() as path:
            status, _, err = gptd("--model", path, "--load-format", "dummy", "--max-model-len", "1000", "--dry-run")
            self.assertEqual(status, 2)
            self.assertIn("256", err)

    def test_usage_errors(self):
        for flags, env, words in (
                ([], {}, ["--model"]),
                (["--modle", "x"], {}, ["--modle", '"model"']),
                (["--model", "x", "--port", "66000"], {}, ["--port", "65535", "66000"]),
                (["--model", "x"], {"GPTD_PORT": "x"}, ["GPTD_PORT", "environment"]),
                (["--model", "x"], {"GPTD_PROT": "1"}, ["GPTD_PROT", '"port"']),
                (["--model", "x", "--config", "/nonexistent"], {}, ["/nonexistent"])):
            with self.subTest(flags=flags, env=env):
                status, out, err = gptd(*flags, env=env)
                self.assertEqual((status, out), (1, ""))
                for word in words:
                    self.assertIn(word, err)

    def test_help_and_version(self):
        status, out, err = gptd("--help")
        self.assertEqual((status, err), (0, ""))
        for flag in ("--model", "--host", "--port", "--max-model-len", "--kv-cache-memory-bytes", "--api-key-file"):
            self.assertIn(flag, out)
        status, out, _ = gptd("--version")
        self.assertEqual(status, 0)
        self.assertRegex(out, r"^gptd \d+\.\d+\.\d+")

    def test_config_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
            json.dump({"served_model_name": "from-file", "max-model-len": 64, "max-logprobs": 3}, f)
            f.flush()
            server = Server("--config", f.name, "--max-logprobs", "2", env={"GPTD_MAX_MODEL_LEN": "80"})
        server.name = "from-file"
        self.assertEqual(server.completions(prompt=[5] * 70, max_tokens=10, logprobs=2).status, 200)
        self.assertEqual(server.completions(prompt=[5] * 70, max_tokens=11).status, 400)
        self.assertEqual(server.completions(prompt=[5], logprobs=3).status, 400)
        server.check_stopped()

    def test_example_configurations(self):
        directory = os.path.join(harness.ROOT, "configs")
        for name in ("demo.json", "low-memory.json", "production.json"): # the others: test_configs.py
            with self.subTest(name=name):
                with open(os.path.join(directory, name)) as f:
                    values = json.load(f)
                flags = ["--config", os.path.join(directory, name), "--model", harness.MODEL, "--dry-run"]
                if "api-key-file" in values:
                    with tempfile.NamedTemporaryFile("w") as keys:
                        keys.write("sk-test\n")
                        keys.flush()
                        status, _, err = gptd(*flags, "--api-key-file", keys.name)
                else:
                    status, _, err = gptd(*flags)
                self.assertEqual(status, 0, err)

    def test_missing_model(self):
        status, _, err = gptd("--model", "/nonexistent/model")
        self.assertEqual(status, 2)
        self.assertIn("/nonexistent/model", err)

    def test_broken_model(self):
        with tempfile.TemporaryDirectory() as directory:
            for name in os.listdir(harness.MODEL):
                if not name.endswith(".safetensors"):
                    os.symlink(os.path.join(harness.MODEL, name), os.path.join(directory, name))
            with open(os.path.join(harness.MODEL, "model.safetensors"), "rb") as f:
                weights = f.read()
            with open(os.path.join(directory, "model.safetensors"), "wb") as f:
                f.write(weights[:-100])
            status, _, err = gptd("--model", directory)
            self.assertEqual(status, 2)
            self.assertIn("model.safetensors", err)

    def test_port_in_use(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = str(s.getsockname()[1])
            status, _, err = gptd("--model", harness.MODEL, "--port", port)
            self.assertEqual(status, 4)
            self.assertIn(port, err)
            self.assertIn("in use", err)
        status, _, err = gptd("--model", harness.MODEL, "--host", "203.0.113.7", "--port", "0")
        self.assertEqual(status, 4)
        self.assertIn("203.0.113.7", err)

    @not_on_a_gpu("weights are copied there: nothing reads the file once it is loaded")
    def test_weights_cut_short(self):
        # The file shrinks under the map: the process says which one, with its own exit status.
        with tempfile.TemporaryDirectory() as directory:
            for name in os.listdir(harness.MODEL):
                with open(os.path.join(harness.MODEL, name), "rb") as f, open(os.path.join(directory, name), "wb") as g:
                    g.write(f.read())
            server = Server(model=directory)
            os.truncate(os.path.join(directory, "model.safetensors"), 4096)
            try:
                server.completions(prompt="Once", max_tokens=20)
            except OSError:
                pass
            except Exception as e:  # http.client's own, when the server is gone
                self.assertIn(type(e).__name__, ("RemoteDisconnected", "BadStatusLine", "IncompleteRead"))
            self.assertEqual(server.stop(None), 5, server.log[-3:])
            self.assertTrue(any("model.safetensors" in line for line in server.log), server.log[-3:])


    def test_hosts(self):
        for host in ("localhost", "::1"):
            try:
                socket.create_server(("::1", 0), family=socket.AF_INET6).close()
            except OSError:
                if host == "::1":
                    continue  # no IPv6 on this machine
            server = Server("--host", host)
            with contextlib.closing(http.client.HTTPConnection(host, server.port, timeout=20)) as connection:
                self.assertEqual(server.get("/ready", connection=connection).status, 200)
            server.check_stopped()

    def test_nobody_reads_the_log(self):
        # A full pipe at stderr must not stop the server.
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        command = [harness.SERVER, "--model", harness.MODEL, "--backend", harness.BACKEND, "--port", str(port),
                   "--drain-delay", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=harness.NOT_VARIABLES)

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            headers = {"x-request-id": "x" * 100, "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", "{}", headers)
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return answer.status

        def answers():
            try:
                return ask() == 400
            except OSError:
                return False

        wait_until(answers, 20, "it answers")
        for _ in range(600):  # of more than 200 bytes each: over the 64 KiB of a pipe
            self.assertEqual(ask(), 400)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)
        self.assertLess(len(process.stderr.read()), 600 * 200)
        process.stderr.close()

    def test_as_pid_1(self):
        # As in a container: the kernel drops signals that PID 1 has no handler for.
        try:
            subprocess.run(["unshare", "--pid", "--fork", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("unshare --pid needs root")
        command = ["unshare", "--pid", "--fork", "--kill-child",
                   harness.SERVER, "--model", harness.MODEL, "--backend", harness.BACKEND, "--port", "0",
                   "--drain-delay", "0"]
        outer = subprocess.Popen(command, stderr=subprocess.PIPE, env=harness.NOT_VARIABLES)
        for line in outer.stderr:
            if b"ready" in line:
                break
        with open(f"/proc/{outer.pid}/task/{outer.pid}/children") as f:
            pids = f.read().split()
        if not pids:
            outer.kill()
            self.skipTest("the kernel does not list a process's children")
        os.kill(int(pids[0]), signal.SIGTERM)
        self.assertEqual(outer.wait(20), 0)
        outer.stderr.close()


class End(unittest.TestCase):
    def streams(self, server, count, max_tokens, n=1):
        out = []
        for i in range(count):
            s = server.socket(60)
            s.sendall(server.completion_bytes("Connection: close\r\n", prompt="Once upon", seed=i, stream=True,
                                              max_tokens=max_tokens, n=n, ignore_eos=True))
            out.append(s)
        return [(s, read_until(s, b"data: ")) for s in out]

    def finish(self, streams, max_tokens):
        for s, data in streams:
            _, rest, closed = read_to_end(s)
            s.close()
            events = parse_events(dechunk((data + rest).split(b"\r\n\r\n", 1)[1]))
            self.assertEqual(events[-1]["choices"][0]["finish_reason"], "length")

    def test_sigterm_under_load(self):
        for how in (signal.SIGTERM, signal.SIGINT):
            server = Server("--drain-delay", "0.5")
            max_tokens = scale(300, 60)
            streams = self.streams(server, scale(40, 10), max_tokens)
            server.process.send_signal(how)
            wait_until(lambda: self.probe(server, "/ready") != 200, 5, "not ready any more")
            self.assertEqual(self.probe(server, "/health"), 200)
            self.finish(streams, max_tokens)
            self.assertEqual(server.stop(None), 0, server.log[-20:])
            with self.assertRaises(OSError):
                server.socket()

    @staticmethod
    def probe(server, path):
        try:
            return server.get(path).status
        except OSError:
            return None

    def test_requests_while_draining(self):
        server = Server("--drain-delay", "0.3")
        connection = server.connect()
        self.assertEqual(server.get("/health", connection=connection).status, 200)
        streams = self.streams(server, 4, scale(1500, 300))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        self.assertEqual(server.completions(prompt="Once", max_tokens=1).status, 200, "still taken during the delay")
        time.sleep(0.5)
        if server.process.poll() is None:  # a kept connection is told to go elsewhere
            try:
                body = {"model": server.name, "prompt": "x"}
                answer = server.request("POST", "/v1/completions", body, connection=connection)
                self.assertEqual(answer.status, 503)
                self.assertGreaterEqual(int(answer.headers["Retry-After"]), 1)
                self.assertEqual(answer.headers["Connection"].lower(), "close")
            except (OSError, ConnectionError):
                pass  # closed already
        self.finish(streams, scale(1500, 300))
        self.assertEqual(server.stop(None), 0)

    @staticmethod
    def ask_until_refused(server):
        """The answers of one connection after the other, (status, whole text), until no further one is taken."""
        answers = []
        while True:
            with socket.socket() as s:
                s.settimeout(0.1)
                try:
                    s.connect(("127.0.0.1", server.port))
                except OSError:  # the server drops handshakes just before it closes its socket
                    return answers
                s.settimeout(15 * scale(1, 4))
                s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answers.append(read_to_end(s)[:2])

    @not_on_a_gpu("which takes seconds to start")
    def test_sigterm_amid_new_clients(self):
        # Who is connected is answered, also at the very end; libmicrohttpd's own way to stop listening aborts now and then.
        n_answers = 0
        with tiny_model() as path:
            for i in range(scale(40, 8)):
                server = Server("--load-format", "dummy", "--http-threads", "16", model=path)
                end = threading.Timer(0.002 * (i % 8), server.process.send_signal, [signal.SIGTERM])
                end.start()
                for answers in in_threads(self.ask_until_refused, [(server,)] * 4):
                    n_answers += len(answers)
                    for status, text in answers:
                        self.assertEqual(status, 200, text)
                        self.assertTrue(text.endswith(b"}"), text)
                end.join()
                server.check_stopped(None)
        self.assertGreater(n_answers, 0)

    def test_silent_client(self):
        # It has a second to ask, and no longer.
        server = Server()
        with server.socket() as s:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            s.sendall(server.completion_bytes(prompt="Once", max_tokens=1))
            status, text, closed = read_to_end(s)
            self.assertEqual(status, 503, text)
            self.assertIn(b"connection: close", text.lower())
            self.assertTrue(closed)
        self.assertEqual(server.stop(None), 0)
        server = Server()
        with server.socket() as s:
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            self.assertTrue(read_to_end(s)[2])
        self.assertEqual(server.stop(None), 0)
        self.assertLess(time.monotonic() - began, scale(3, 10) + END_OF_CUDA[harness.BACKEND])

    def test_second_signal(self):
        server = Server()
        streams = self.streams(server, 8, 1800, n=32)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(10)
        self.assertLess(time.monotonic() - began, scale(1, 5) + END_OF_CUDA[harness.BACKEND])
        self.assertEqual(status, 128 + signal.SIGTERM)
        for s, _ in streams:
            s.close()
        server.kill()

    def test_drain_timeout(self):
        server = Server("--drain-timeout", "0.3")
        (stream, data), = self.streams(server, 1, 1800)
        server.process.send_signal(signal.SIGTERM)
        _, rest, _ = read_to_end(stream)
        stream.close()
        data += rest
        if b"[DONE]" not in data:  # it was too long for the timeout: cut, and told so
            self.assertIn(b'data: {"error"', data)
        self.assertEqual(server.stop(None), 0)

    def test_idle_end(self):
        server = Server()
        began = time.monotonic()
        server.check_stopped()
        self.assertLess(time.monotonic() - began, scale(2, 10) + END_OF_CUDA[harness.BACKEND])


class Costs(unittest.TestCase):
    def test_idle_cpu_and_memory(self):
        server = Server("--kv-cache-memory-bytes", "32M")
        server.complete(prompt="Once upon a time", n=4, max_tokens=100)
        open_connection = server.socket()
        time.sleep(0.5)
        before, seconds = server.cpu_seconds(), 3
        time.sleep(seconds)
        used = server.cpu_seconds() - before
        print(f"\nidle: {100 * used / seconds:.1f} % of a CPU; resident {server.rss_bytes() / 2**20:.0f} MiB "
              f"(weights {os.path.getsize(os.path.join(harness.MODEL, 'model.safetensors')) / 2**20:.0f}, KV up to 32)")
        self.assertLessEqual(used, 0.05)
        open_connection.close()
        server.check_stopped()

    def test_nothing_leaks(self):
        # Rounds of everything that can happen to a request: descriptors and memory settle.
        server = Server("--kv-cache-memory-bytes", "32M")

        def one_round():
            for i in range(scale(60, 10)):
                server.complete(prompt=f"Once {i}", max_tokens=3, n=2)
                server.completions(prompt=5)
                s = server.socket()
                s.sendall(server.completion_bytes(prompt="Once", max_tokens=500, stream=True, ignore_eos=True))
                s.recv(100)
                s.close()
            server.wait_idle()
            return server.metrics()

        one_round()
        first, second = one_round(), one_round()
        most = first["process_open_fds"] + 2
        wait_until(lambda: server.metrics()["process_open_fds"] <= most, 10, "descriptors are back")
        growth = second["process_resident_memory_bytes"] - first["process_resident_memory_bytes"]
        print(f"\nresident memory after {scale(60, 10)} more rounds: {growth / 1024:+.0f} KiB")
        if not harness.QUICK:  # a sanitizer keeps what is freed
            self.assertLess(growth, 4 << 20)
        server.check_stopped()


if __name__ == "__main__":
    unittest.main()
