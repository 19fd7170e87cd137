"""scripts/bench_serve.py: exact counts, and every failure counted."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

import harness
from harness import Server, ServerTest, wait_until

SCRIPT = os.path.join(harness.ROOT, "scripts", "bench_serve.py")


def start(server, path, *flags):
    command = [sys.executable, SCRIPT, "--url", f"http://127.0.0.1:{server.port}", "--json", path, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def measure(server, *flags, during=lambda: None):
    """Runs the script; during() runs beside it. (exit status, what it printed, the runs of its JSON)."""
    with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
        path = os.path.join(directory, "bench.json")
        process = start(server, path, *flags)
        try:
            during()
            printed = process.communicate(timeout=60 * harness.scale(1, 4))[0]
        finally:
            process.kill()
        if not os.path.exists(path):
            raise AssertionError(printed)
        with open(path) as f:
            return process.returncode, printed, json.load(f)["runs"]


class BenchServe(ServerTest):
    def check_run(self, run, n_requests, input_len, output_len):
        self.assertEqual((run["n_requests"], run["completed"], run["failed"]), (n_requests, n_requests, 0))
        self.assertEqual([r["index"] for r in run["requests"]], list(range(n_requests)))
        self.assertEqual({r["input_tokens"] for r in run["requests"]}, {input_len})
        self.assertEqual({r["output_tokens"] for r in run["requests"]}, {output_len})
        self.assertEqual(run["output_tokens"], n_requests * output_len)
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            self.assertLessEqual(run[name]["p50"], run[name]["p99"], name)

    def test_closed_loop(self):
        status, printed, runs = measure(self.server, "--requests", "20", "--concurrency", "1", "4", "--input-len", "65",
                                        "--output-len", "16", "--processes", "2")
        self.assertEqual((status, len(runs)), (0, 2), printed)
        for run in runs:
            self.check_run(run, 20, 65, 16)
            self.assertEqual(run["prefix_cache_hit_tokens"], 0)
        self.assertIn("vocabulary 1600", printed)
        self.assertRegex(printed, r"output tokens/s +[\d,]+ +[\d,]+\n")

    def test_open_loop(self):
        status, printed, runs = measure(self.server, "--requests", "20", "--rate", "100", "--input-len", "80",
                                        "--output-len", "8", "--shared-prefix", "64", "--vocab", "1600")
        self.assertEqual(status, 0, printed)
        self.check_run(runs[0], 20, 80, 8)
        self.assertEqual(runs[0]["prefix_cache_hit_tokens"], 20 * 64)

    def test_refused(self):
        status, printed, runs = measure(self.server, "--requests", "3", "--warmup", "0", "--input-len", "2048",
                                        "--vocab", "1600")
        self.assertEqual((status, runs[0]["failed"]), (1, 3), printed)
        self.assertEqual(runs[0]["failures"]["HTTP 400"]["count"], 3)


@harness.not_on_a_gpu("the load is over before the server can be killed in its midst")
class BenchServeKilled(unittest.TestCase):
    def test_killed(self):
        server = Server()

        def kill():
            wait_until(lambda: server.metrics()["gptd_generation_tokens_total"] > 500, 20, "the load came")
            server.kill()
        status, printed, runs = measure(server, "--requests", "400", "--concurrency", "8", "--warmup", "0",
                                        "--output-len", "256", "--vocab", "1600", during=kill)
        run = runs[0]
        self.assertEqual(status, 1, printed)
        self.assertEqual((run["n_requests"], len(run["requests"])), (400, 400))
        self.assertEqual(run["completed"] + run["failed"], 400)
        self.assertEqual(sum(failure["count"] for failure in run["failures"].values()), run["failed"])
        self.assertIn("no [DONE]", run["failures"])
        self.assertIn("no connection", run["failures"])


if __name__ == "__main__":
    unittest.main()
