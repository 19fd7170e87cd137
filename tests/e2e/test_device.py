"""A device that cannot be used, has no memory, fails or hangs: libgptd_cuda.so is tests/e2e/faulty_backend.c here."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest

import harness
from harness import Server, read_to_end, read_until, scale, wait_until


@contextlib.contextmanager
def faulty(fault="", library="tests/faulty/libgptd_cuda.so"):
    """A directory with the program and a CUDA library: (the program, fail), where fail(word) makes the device fail so."""
    build = os.path.dirname(harness.SERVER)
    with tempfile.TemporaryDirectory(prefix="faulty-", dir=build) as directory:
        program = os.path.join(directory, "gptd")
        os.link(harness.SERVER, program)
        if library:
            shutil.copy(os.path.join(build, library), os.path.join(directory, "libgptd_cuda.so"))

        def fail(word):  # at once, so that no half of it is read
            path = os.path.join(directory, "fault")
            with open(path + ".new", "w") as f:
                f.write(word)
            os.rename(path + ".new", path)

        fail(fault)
        harness.NOT_VARIABLES["FAULTY_BACKEND"] = os.path.join(directory, "fault")
        yield program, fail


def ended(program, *flags, env=None):
    """Of a start that must fail: exit status, log."""
    done = subprocess.run([program, "--model", harness.MODEL, "--port", "0", *flags], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, timeout=60,
                          env={**harness.NOT_VARIABLES, **(env or {})})
    return done.returncode, done.stderr


@harness.not_on_a_gpu("a library stands in for the GPU's")
class DeviceStart(unittest.TestCase):
    def refused(self, status, words, *flags, fault="", library="tests/faulty/libgptd_cuda.so"):
        with faulty(fault, library) as (program, _):
            got, log = ended(program, "--backend", "cuda", *flags)
        self.assertEqual(got, status, log)
        for word in words:
            self.assertIn(word, log)
        return log

    def compiled(self, directory, name, *flags):
        path = os.path.join(directory, name)
        subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-x", "none", "-o", path, *flags], check=True)
        return path

    def test_library(self):
        self.refused(3, ["the CUDA backend cannot be loaded", "libgptd_cuda.so"], library=None)
        self.refused(3, ["the CUDA backend cannot be loaded", "libgptd_cuda.so"], library=__file__)
        with tempfile.TemporaryDirectory() as directory:
            library = self.compiled(directory, "empty.so")
            self.refused(3, ["is not gptd's CUDA backend"], library=library)
            blas = self.compiled(directory, "libcublasLt.so.99", "-Wl,-soname,libcublasLt.so.99")
            library = self.compiled(directory, "needs.so", "-Wl,--no-as-needed", blas)
            self.refused(3, ["libcublasLt.so.99", "LD_LIBRARY_PATH", "nvidia-cublas"], library=library)

    def test_no_usable_gpu(self):
        log = self.refused(3, ["Faulty 7000 has compute capability 7.0"], fault="probe")
        self.assertNotIn(harness.MODEL, log)  # it has no part in it

    @unittest.skipIf(harness.QUICK, "a sanitizer's library must come before others")
    def test_auto_says_why_it_is_the_cpu(self):
        # As on a machine with the driver: its device file seems to be there.
        source = ('#define _GNU_SOURCE\n#include <fcntl.h>\n#include <string.h>\n#include <unistd.h>\n'
                  'int access(const char *path, int mode)\n'
                  '{ return strcmp(path, "/dev/nvidiactl") ? faccessat(AT_FDCWD, path, mode, 0) : 0; }\n')
        with faulty("probe") as (program, _):
            preload = os.path.join(os.path.dirname(program), "driver.so")
            subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", preload], input=source, text=True, check=True)
            env = {"LD_PRELOAD": preload}
            status, log = ended(program, "--dry-run", env=env)
            self.assertEqual(status, 0, log)
            self.assertIn("on the CPU, for the GPU cannot be used: Faulty 7000", log)
            status, log = ended(program, "--dry-run", "--dtype", "bfloat16", env=env)
            self.assertEqual(status, 2, log)
            self.assertIn("Faulty 7000 has compute capability 7.0, as told: dtype: the CPU computes", log)

    def test_out_of_memory(self):
        self.refused(2, ["device: no memory for its scratch"], fault="create")
        self.refused(2, ["no 0.031 GiB for the KV cache", "now has 0.999 GiB"], "--kv-cache-memory-bytes", "32M",
                     "--max-num-batched-tokens", "512", fault="alloc")
        self.refused(2, ["GiB are needed", "the device has 0.900 GiB"], "--kv-cache-memory-bytes", "4G")

    def test_fault_while_loading(self):
        self.refused(3, ["copy: broke, as told"], fault="copy")

    def test_dtype(self):
        self.refused(1, ["--dtype", "auto|bfloat16|float16"], "--dtype", "float32")
        status, log = ended(harness.SERVER, "--backend", "cpu", "--dtype", "bfloat16")
        self.assertEqual(status, 2)
        self.assertIn("dtype: the CPU computes with the weights as they are", log)

    def test_it_serves(self):
        for fault in ("", "graph"):  # without memory for graphs, steps run op by op
            with faulty(fault) as (program, _):
                server = Server("--backend", "cuda", program=program)
                answer = server.complete(prompt="Once", max_tokens=5, return_token_ids=True)
                self.assertEqual(answer["choices"][0]["token_ids"], [1500] * 5)
                server.check_stopped()


@harness.not_on_a_gpu("a library stands in for the GPU's")
class DeviceFault(unittest.TestCase):
    MOST = 1900  # tokens, and milliseconds: what runs when the fault comes

    def running(self, server, count):
        """Streams that have said something."""
        streams = []
        for i in range(count):
            s = server.socket(30)
            s.sendall(server.completion_bytes("Connection: close\r\n", prompt=f"Once {i}", stream=True,
                                              max_tokens=self.MOST, ignore_eos=True))
            streams.append((s, read_until(s, b"data: ")))
        return streams

    def expect_told(self, streams, message):
        for s, data in streams:
            _, rest, closed = read_to_end(s)
            s.close()
            data += rest
            self.assertTrue(closed)
            self.assertNotIn(b"[DONE]", data)
            self.assertEqual(data.count(b'data: {"error"'), 1, data[-500:])
            self.assertIn(message, data[data.index(b'data: {"error"'):].decode())

    def probe(self, server, path):
        try:
            return server.get(path).status
        except OSError:
            return None  # it has ended

    def fault(self, fault):
        """One fault with four streams running and four requests waiting; what /health said just then."""
        queued = []
        with faulty() as (program, fail):
            server = Server("--backend", "cuda", "--max-num-seqs", "4", program=program)
            streams = self.running(server, 4)
            waiting = [threading.Thread(target=lambda: queued.append(server.completions(prompt="Twice", max_tokens=2)))
                       for _ in range(4)]
            for t in waiting:
                t.start()
            wait_until(lambda: server.metrics()["gptd_num_requests_waiting"] == 4, 10, "four wait")
            self.assertEqual(server.get("/health").status, 200)
            fail(fault)
            began = time.monotonic()
            for t in waiting:
                t.join()
            health = self.probe(server, "/health")
            try:
                self.assertEqual(server.completions(prompt="New", max_tokens=1).status, 503)
            except OSError:
                pass  # it has ended
            self.assertNotEqual(self.probe(server, "/health"), 200)
            self.expect_told(streams, f"{fault}: broke, as told")
            self.assertEqual([a.status for a in queued], [500] * 4, queued)
            for answer in queued:
                self.assertIn(f"{fault}: broke, as told", answer.error["message"])
            self.assertEqual(server.stop(None), 3, server.log[-10:])
            self.assertLess(time.monotonic() - began, scale(5, 20))
            self.assertTrue(any("the device failed: " in line and f"{fault}: broke, as told" in line
                                for line in server.log), server.log[-10:])
        return health

    def test_faults(self):
        said = [self.fault(fault) for fault in ("linear", "sample", "wait")]
        self.assertIn(503, said)  # for a second at most, then the process has ended

    def test_fault_while_draining(self):
        with faulty() as (program, fail):
            server = Server("--backend", "cuda", program=program)
            streams = self.running(server, 2)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: any("draining" in line for line in server.log), 5, "it drains")
            fail("wait")
            self.expect_told(streams, "wait: broke, as told")
            self.assertEqual(server.stop(None, 10), 3, server.log[-10:])

    def test_crash(self):
        """The last words: the signal, the op, a backtrace; and the status is the signal's."""
        if harness.QUICK:
            self.skipTest("sanitizers have last words of their own")
        for fault, how, words in (("crash", signal.SIGSEGV, "SIGSEGV at address 0x1234, the engine at "),
                                  ("abort", signal.SIGABRT, "SIGABRT, the engine at ")):
            with faulty() as (program, fail):
                server = Server("--backend", "cuda", program=program)
                streams = self.running(server, 1)
                fail(fault)
                self.assertEqual(server.stop(None, 10), -how)
                for s, _ in streams:
                    s.close()
                last = next(i for i, line in enumerate(server.log) if "crashed: " in line)
                self.assertRegex(json.loads(server.log[last])["message"], words + r"\w+ of layer \d+$")
                frames = [line for line in server.log[last + 1:] if "[0x" in line]
                self.assertGreater(len(frames), 3, server.log)
                self.assertTrue(any("libgptd_cuda.so" in line for line in frames), frames)

    def test_hang(self):
        with faulty() as (program, fail):
            server = Server("--backend", "cuda", "--stall-timeout", "0.5", program=program)
            streams = self.running(server, 3)
            fail("hang")
            began = time.monotonic()
            wait_until(lambda: self.probe(server, "/health") == 503, 5, "/health fails")
            self.assertGreater(time.monotonic() - began, 0.4)
            self.assertEqual(server.get("/health").error["message"], "the engine makes no progress")
            state = server.get("/debug/state").json()
            self.assertEqual((state["trouble"], state["engine"]["op"], state["engine"]["busy"]),
                             ("the engine makes no progress", "wait", True))
            self.assertGreater(state["engine"]["seconds_since_progress"], 0.5)
            self.assertEqual((state["engine"]["last_step"]["sequences"], state["exchanges"]), (3, 4))
            cpu = server.cpu_seconds()
            time.sleep(0.5)
            self.assertLess(server.cpu_seconds() - cpu, 0.1, "streams that wait cost nothing")
            self.assertIsNone(server.process.poll())
            server.process.send_signal(signal.SIGTERM)
            self.expect_told(streams, "shutting down")
            self.assertEqual(server.stop(None, 10), 3, server.log[-10:])
            self.assertTrue(any("has made no progress for" in line for line in server.log), server.log[-10:])

    def test_hang_is_seen_within_two_seconds(self):
        with faulty() as (program, fail):
            server = Server("--backend", "cuda", program=program)
            self.running(server, 1)
            fail("hang")
            began = time.monotonic()
            wait_until(lambda: self.probe(server, "/health") == 503, 10, "/health fails")
            self.assertLess(time.monotonic() - began, scale(3, 5))  # some for a busy machine
            server.kill()

    def test_hang_of_an_idle_engine(self):
        with faulty() as (program, fail):
            server = Server("--backend", "cuda", "--stall-timeout", "0.5", program=program)
            fail("hang")
            self.assertEqual(self.probe(server, "/health"), 200)
            time.sleep(0.7)
            self.assertEqual(self.probe(server, "/health"), 200)
            with server.socket() as s:
                s.sendall(server.completion_bytes(prompt="Once", max_tokens=3))
                wait_until(lambda: self.probe(server, "/health") == 503, 10, "/health fails")
            server.kill()


if __name__ == "__main__":
    unittest.main()
