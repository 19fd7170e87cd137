"""configs/: every file is read and means what it says; of the families' ones also that the published shapes are planned."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest

import harness

CONFIGS = os.path.join(harness.ROOT, "configs")
SHAPES = os.path.join(harness.ROOT, "tests", "bench", "models")
# Configurations whose model has its shapes in tests/bench/models, and its parameters in millions as published.
FAMILIES = {
    "bloom-560m": ("bloom-560m", 559), "gemma-2-9b": ("gemma-2-9b", 9242), "gemma-3-4b": ("gemma-3-4b", 3880),
    "gpt2": ("gpt2", 124), "llama-3.1-8b": ("llama-3-8b", 8030), "mistral-7b": ("mistral-7b", 7248),
    "mixtral-8x7b": ("mixtral-8x7b", 46703), "phi-3-mini": ("phi-3-mini", 3821), "pythia-1b": ("pythia-1b", 1012),
    "qwen2.5-7b": ("qwen2.5-7b", 7616), "qwen3-8b": ("qwen3-8b", 8191), "qwen3-30b-a3b": ("qwen3-30b-a3b", 30532),
}


class Configs(unittest.TestCase):
    def plan(self, name, *flags):
        """The plan of a configuration, as --dry-run prints it, or the message why there is none."""
        command = [harness.SERVER, "--config", os.path.join(CONFIGS, name + ".json"), "--dry-run", "--log-format", "json",
                   "--backend", "cpu", *flags]
        done = subprocess.run(command, capture_output=True, timeout=60, env=harness.NOT_VARIABLES)
        if done.returncode == 0:
            return json.loads(done.stdout)
        return json.loads(done.stderr.splitlines()[-1])["message"]

    def test_every_file_is_known(self):
        names = {name[:-5] for name in os.listdir(CONFIGS) if name.endswith(".json")}
        self.assertEqual(names, set(FAMILIES) | {"demo", "low-memory", "production"})

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd is not installed")
    def test_systemd(self):
        with tempfile.TemporaryDirectory() as directory:
            paths = [os.path.join(directory, name) for name in ("gptd.socket", "gptd.service")]
            for path in paths:
                with open(os.path.join(CONFIGS, "systemd", os.path.basename(path))) as f, open(path, "w") as out:
                    out.write(f.read().replace("/usr/local/bin/gptd", harness.SERVER))
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True, timeout=60)
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def test_families(self):
        for name, (shapes, millions) in FAMILIES.items():
            with self.subTest(name):
                with open(os.path.join(CONFIGS, name + ".json")) as f:
                    config = json.load(f)
                plan = self.plan(name, "--model", os.path.join(SHAPES, shapes), "--load-format", "dummy",
                                 "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "4")
                if isinstance(plan, str): # more than this machine has: the sum is told
                    self.assertRegex(plan, r"GiB are needed \(weights [0-9.]+, workspace .* the device has")
                    continue
                self.assertEqual(round(plan["n_parameters"] / 1e6), millions)
                self.assertEqual(plan["max_model_len"], config["max-model-len"])
