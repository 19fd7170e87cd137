"""EleutherAI's lm-evaluation-harness, as `local-completions`: the scores of transformers on the same checkpoint."""

import importlib.util
import json
import os
import unittest

import harness
from harness import ServerTest

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lm_eval", "evaluate.py")
SPEC = importlib.util.find_spec("lm_eval")


def tolerance(reference):
    """What is at all likely is compared closely (measured: 0.0004). The rest are wrong codes, of which the model is sure:
    there BF16 changes much (measured: 3 %; transformers' own BF16 against its F32: 10 %)."""
    return 0.002 if reference > -5 else 0.05 * -reference


# 700 MB with what it needs: see `make check-clients`. (A folder beside this file has its name, and no origin.)
@unittest.skipUnless(SPEC and SPEC.origin, "lm_eval is not installed (see scripts/setup.sh clients)")
@unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "the reference is the demo model's")
class LmEval(ServerTest):
    flags = ("--deterministic",)

    def test_scores(self):
        spec = importlib.util.spec_from_file_location("evaluate", PATH)
        evaluate = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(evaluate)
        found, printed = evaluate.evaluate(
            "--model", "local-completions", "--model_args",
            f"model={self.server.name},base_url=http://127.0.0.1:{self.server.port}/v1/completions,"
            f"tokenizer={self.server.model},tokenizer_backend=huggingface,add_bos_token=True,num_concurrent=8,max_length=2048")
        self.assertTrue(found, printed)
        with open(evaluate.REFERENCE) as f:
            reference = json.load(f)
        for name in ("acc", "exact_match", "sums"):
            self.assertEqual(found[name], reference[name], name)
        self.assertEqual(len(found["choices"]), len(reference["choices"]))
        for i, (mine, theirs) in enumerate(zip(found["choices"], reference["choices"])):
            for (value, greedy), (expected, expected_greedy) in zip(mine, theirs, strict=True):
                self.assertEqual(greedy, expected_greedy, i)
                self.assertAlmostEqual(value, expected, delta=tolerance(expected), msg=f"document {i}")


if __name__ == "__main__":
    unittest.main()
