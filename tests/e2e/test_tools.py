"""What people put between themselves and a server: schemathesis for its description, LangChain's client, litellm."""

import asyncio
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import unittest

import harness
from harness import ServerTest, same_server, scale

HERE = os.path.dirname(os.path.abspath(__file__))


def has(package):
    return importlib.util.find_spec(package) is not None


def needs(package):
    """Skips without the package, but not where CI is set: nobody reads there what was skipped."""
    return unittest.skipUnless(has(package) or os.environ.get("CI"),
                               f"{package} is not installed (see scripts/setup.sh check)")


@needs("schemathesis")
@unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "the limits are the demo model's")
class Description(ServerTest):
    """Requests made of /openapi.json, right and wrong ones; openapi_hooks.py says more."""

    flags = ("--api-key", "key")

    def run_schemathesis(self, seed):
        with open(os.path.join(self.server.model, "config.json")) as f:
            vocab_size = json.load(f)["vocab_size"]
        command = [os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run",
                   f"http://127.0.0.1:{self.server.port}/openapi.json", "--header", "Authorization: Bearer key",
                   "--phases", "coverage,fuzzing", "--max-examples", str(scale(25, 8)), "--seed", str(seed), "--no-shrink",
                   "--suppress-health-check", "all", "--generation-database", "none", "--no-color"]
        environment = {**os.environ, "PYTHONPATH": HERE, "SCHEMATHESIS_HOOKS": "openapi_hooks",
                       "OPENAPI_TEST_MODEL": self.server.name, "OPENAPI_TEST_VOCAB_SIZE": str(vocab_size)}
        with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
            return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)

    def test_answers_are_as_described(self):
        seed = int(os.environ.get("SCHEMATHESIS_SEED") or random.getrandbits(32))
        done = self.run_schemathesis(seed)
        print(f"schemathesis: SCHEMATHESIS_SEED={seed}", done.stdout.strip().split("\n")[-1].strip("= "))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        ended = {k: v for k, v in self.metrics().items() if k.startswith("gptd_request_success_total")}
        self.assertGreater(sum(ended.values()), scale(50, 10), ended)  # the engine was reached
        self.wait_idle()

    def metrics(self):
        text = self.server.get("/metrics", headers={"Authorization": "Bearer key"}).body.decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}

    def wait_idle(self):
        def idle():
            return not any(v for k, v in self.metrics().items() if k.startswith("gptd_kv_cache_usage_ratio"))
        harness.wait_until(idle, 20, "every block is free")


if __name__ == "__main__":
    unittest.main()
