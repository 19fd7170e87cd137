#!/usr/bin/env python3
"""convert_flashgpt.py: a state_dict saved in each of the usual ways becomes the same checkpoint. Needs PyTorch."""
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import convert_flashgpt  # noqa: E402
from export_vectors import FlashGPT, randomize  # noqa: E402

SHAPE = dict(vocab_size=97, max_seq_len=40, embed_dim=24, num_heads=3, num_layers=2, mlp_ratio=2.1)


def prefixed(state, prefix):
    return {prefix + name: t for name, t in state.items()}


class Convert(unittest.TestCase):
    def setUp(self):
        self.state = randomize(FlashGPT(**SHAPE), seed=torch.seed() % 2**31).state_dict()
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)

    def convert(self, saved, *flags, heads=3):
        path, out = Path(self.directory.name) / "saved.pt", Path(self.directory.name) / "out"
        torch.save(saved, path)
        try:
            convert_flashgpt.main([str(path), "--out", str(out), "--num-heads", str(heads), *flags])
        except SystemExit as refused:
            return str(refused), None
        return json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")

    def test_every_way_of_saving(self):
        for saved in (self.state, {"model_state_dict": self.state, "epoch": 3}, {"state_dict": self.state},
                      {"model": prefixed(self.state, "module.")}, prefixed(self.state, "_orig_mod."),
                      prefixed(self.state, "_orig_mod.module.")):
            config, tensors = self.convert(saved)
            self.assertEqual(config.pop("architectures"), ["FlashGPT"])
            inner = int(config["embed_dim"] * config.pop("mlp_ratio"))
            self.assertEqual(inner, int(SHAPE["embed_dim"] * SHAPE["mlp_ratio"]))
            self.assertEqual(config, {key: value for key, value in SHAPE.items() if key != "mlp_ratio"})
            self.assertEqual(set(tensors), set(self.state) - {"lm_head.weight"})
            for name, t in tensors.items():
                self.assertTrue(torch.equal(t, self.state[name]), name)

    def test_what_has_no_place_is_left_out(self):
        _, tensors = self.convert({**self.state, "blocks.0.attn.mask": torch.ones(40, 40).tril()})
        self.assertNotIn("blocks.0.attn.mask", tensors)

    def test_an_output_layer_of_its_own(self):
        config, tensors = self.convert({**self.state, "lm_head.weight": self.state["lm_head.weight"] + 1})
        self.assertIs(config["tie_word_embeddings"], False)
        self.assertIn("lm_head.weight", tensors)

    def test_types_and_ids(self):
        config, tensors = self.convert(self.state, "--dtype", "bfloat16", "--eos-token-id", "2")
        self.assertEqual(config["eos_token_id"], 2)
        self.assertEqual({t.dtype for t in tensors.values()}, {torch.bfloat16})

    def test_refusals(self):
        for saved, heads, message in ((self.state, 5, "does not divide"), ({"a": 1}, 3, "holds no state_dict"),
                                      ({"a": torch.ones(2)}, 3, "not a FlashGPT"),
                                      ({n: t.double() for n, t in self.state.items()}, 3, "choose a --dtype")):
            error, tensors = self.convert(saved, heads=heads)
            self.assertIsNone(tensors)
            self.assertIn(message, error)

    def test_without_pytorch(self):
        def run(*arguments):
            code = "import sys; sys.modules['torch'] = None; import convert_flashgpt; convert_flashgpt.main()"
            return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT / "scripts", text=True,
                                  capture_output=True)
        told = run("--help")
        self.assertEqual((told.returncode, told.stderr), (0, ""))
        self.assertIn("--num-heads", told.stdout)
        refused = run("model.pt", "--num-heads", "3", "--out", "nowhere")
        self.assertEqual(refused.returncode, 1)
        self.assertTrue(refused.stderr.startswith("PyTorch and safetensors are needed"), refused.stderr)


if __name__ == "__main__":
    unittest.main()
