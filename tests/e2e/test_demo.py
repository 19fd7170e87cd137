"""The demo checkpoint's answers, through every way the KV cache is used: recall breaks when paging or reuse is wrong."""

import pathlib
import subprocess
import sys
import unittest

import harness
from harness import Server

MEASURE = pathlib.Path(harness.__file__).resolve().parent.parent.parent / "scripts" / "demo" / "measure.py"


@unittest.skipUnless(pathlib.Path(harness.MODEL).name == "demo", "another model is served")
class Demo(unittest.TestCase):
    def measure(self, *flags):
        server = Server(*flags)
        try:
            lengths = harness.scale(["300", "2040"], ["2040"])
            answer = subprocess.run(
                [sys.executable, MEASURE, "--url", f"http://127.0.0.1:{server.port}", "--check", "--crowded", "6",
                 "--sums", str(harness.scale(200, 40)), "--repeats", "1", "--lengths", *lengths],
                capture_output=True, text=True)
            self.assertEqual(answer.returncode, 0, answer.stdout + answer.stderr)
        finally:
            server.kill()

    @unittest.skipIf(harness.QUICK, "the others are harder")
    def test_as_started(self):
        self.measure()

    def test_small_blocks_small_chunks(self):
        cache = ("--kv-cache-memory-bytes", "8M") if harness.QUICK else ()
        self.measure("--block-size", "16", "--max-num-batched-tokens", "64", "--max-num-seqs", "8", *cache)

    @unittest.skipIf(harness.QUICK, "the one before has it")
    def test_cache_too_small(self):
        self.measure("--kv-cache-memory-bytes", "8M", "--max-num-seqs", "16")


if __name__ == "__main__":
    unittest.main()
