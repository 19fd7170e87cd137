#!/usr/bin/env python3
"""Runs the tasks beside it with lm-evaluation-harness; alone, makes reference.json with transformers, in F32.

    python tests/e2e/lm_eval/evaluate.py      # in an environment with torch, transformers, sentencepiece, protobuf,
                                              # accelerate and lm_eval[hf]; about a minute
"""

import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
REFERENCE = HERE / "reference.json"


def samples(directory, task):
    [path] = glob.glob(f"{directory}/*/samples_{task}_*.jsonl")
    with open(path) as f:
        return sorted(map(json.loads, f), key=lambda sample: sample["doc_id"])


def results(directory):
    """Scores, and of each document what they are of: [log-likelihood, greedy] of every choice, or the text."""
    [path] = glob.glob(f"{directory}/*/results_*.json")
    with open(path) as f:
        scores = json.load(f)["results"]
    choices = [[[round(float(value), 6), greedy == "True"] for value, greedy in sample["filtered_resps"]]
               for sample in samples(directory, "gptd_choices")]
    return {"acc": scores["gptd_choices"]["acc,none"], "exact_match": scores["gptd_sums"]["exact_match,none"],
            "choices": choices, "sums": [sample["filtered_resps"][0] for sample in samples(directory, "gptd_sums")]}


def evaluate(*arguments):
    """lm_eval's command with these arguments, of this Python, without network; (results or None, what it printed)."""
    with tempfile.TemporaryDirectory(prefix="gptd-lm-eval-") as directory:
        command = [sys.executable, "-m", "lm_eval", "run", "--include_path", str(HERE), "--log_samples",
                   "--tasks", "gptd_choices,gptd_sums", "--output_path", directory, *arguments]
        environment = {**os.environ, "HF_HOME": os.path.join(directory, "huggingface"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=600)
        return (results(directory) if done.returncode == 0 else None), done.stdout


def main():
    found, printed = evaluate("--model", "hf", "--batch_size", "8", "--device", "cpu",
                              "--model_args", "pretrained=models/demo,dtype=float32,add_bos_token=True")
    if not found:
        sys.exit(printed)
    found["made_by"] = "tests/e2e/lm_eval/evaluate.py"
    with open(REFERENCE, "w") as f:
        f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
