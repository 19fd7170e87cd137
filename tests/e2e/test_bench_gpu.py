"""scripts/bench_gpu.py: its arithmetic on made-up ceilings, its readers, and its server sections on the demo model.

What it does in PyTorch needs a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest

import harness

sys.path.append(os.path.join(harness.ROOT, "scripts"))
from gpu import cost, report, serving, trace  # noqa: E402

MODELS = os.path.join(harness.ROOT, "tests", "bench", "models")
LLAMA = cost.Model.load(os.path.join(MODELS, "llama-3-8b"))

# Times in us of the four linears of a layer, and of lm_head.
TABLES = {
    "bandwidth": [{"by": "a", "GB/s": 3000.0}, {"by": "b", "GB/s": 4000.0}],
    "gemm": [{"T": 1, "qkv us": 10.0, "o us": 10.0, "gate_up us": 50.0, "down us": 30.0, "lm_head us": 240.0, "TFLOP/s": 4.0},
             {"T": 64, "qkv us": 20.0, "o us": 20.0, "gate_up us": 60.0, "down us": 40.0, "lm_head us": 320.0, "TFLOP/s": 200.0},
             {"T": 8192, "qkv us": 700.0, "o us": 500.0, "gate_up us": 3000.0, "down us": 1500.0, "TFLOP/s": 600.0}],
    "attention": [{"s": 1024, "FA2 TFLOP/s": 200.0}, {"s": 8192, "FA2 TFLOP/s": 250.0, "ours TFLOP/s": 300.0},
                  {"s": 32768, "FA2 TFLOP/s": None}],
}


class Cost(unittest.TestCase):
    def test_bytes_and_flops(self):
        """Llama 3 8B has 8.03 G parameters, 0.525 G of them in the embedding; KV of a token is 128 KiB."""
        self.assertAlmostEqual(LLAMA.token_weight_bytes() / 2, 8.03e9 - 0.525e9, delta=0.01e9)
        self.assertEqual(LLAMA.kv_bytes(1), 128 * 1024)
        self.assertEqual(LLAMA.linear_flops(3), 6 * LLAMA.layer_weights())
        self.assertEqual(LLAMA.attention_flops(10), 2 * 100 * 4096 * 32)
        small = cost.Model.load(os.path.join(MODELS, "llama-3.2-1b"))
        self.assertAlmostEqual(small.token_weight_bytes() / 2, 1.236e9, delta=0.001e9)  # tied: all of it is read

    def test_rooflines(self):
        c = cost.Ceilings(TABLES)
        self.assertEqual(c.bandwidth, 4e12)
        self.assertAlmostEqual(c.decode_linear_seconds(LLAMA, 64), 32 * 140e-6 + 320e-6)
        weights, kv = LLAMA.token_weight_bytes() / 4e12, 64 * 1000 * 131072 / 4e12
        self.assertAlmostEqual(cost.decode_roofline(c, LLAMA, 64, 1000), 32 * 140e-6 + 320e-6 + kv)
        self.assertAlmostEqual(cost.decode_roofline(c, LLAMA, 1, 1000), max(weights, 32 * 100e-6 + 240e-6) + kv / 64)
        self.assertAlmostEqual(cost.bandwidth_share(c, LLAMA, 1, 0, 2 * weights), 0.5)
        prefill = 2 * 32 * 5700e-6 + 2 * LLAMA.attention_flops(8192) / 300e12
        self.assertAlmostEqual(cost.prefill_roofline(c, LLAMA, 2, 8192, 8192), prefill)
        self.assertAlmostEqual(cost.prefill_roofline(c, LLAMA, 1, 64, 8192),
                               32 * 140e-6 + LLAMA.attention_flops(64) / 200e12)
        whole = cost.prefill_roofline(c, LLAMA, 128, 1024, 8192) + 2 * 99 * cost.decode_roofline(c, LLAMA, 64, 1074)
        self.assertAlmostEqual(cost.run_roofline(c, LLAMA, 64, 2, 1024, 100, 8192), whole)

    def test_unmeasured(self):
        c = cost.Ceilings()
        self.assertIsNone(cost.bandwidth_share(c, LLAMA, 1, 0, 1.0))
        self.assertIsNone(cost.decode_roofline(c, LLAMA, 64, 1000))
        self.assertIsNone(cost.prefill_roofline(c, LLAMA, 1, 1024, 8192))
        self.assertIsNone(cost.run_roofline(c, LLAMA, 64, 1, 1024, 256, 8192))
        self.assertIsNone(cost.decode_roofline(cost.Ceilings(TABLES), LLAMA, 100, 1000))  # no GEMM of that size
        self.assertIsNone(cost.ratio(None, 2.0))


class Readers(unittest.TestCase):
    def test_trace(self):
        """Two loads; in the second a step is a kernel of 100 us, a gap of 20, one of 80, a gap of 50."""
        ms = 1000 * 1000
        lines = ["k 1000 2000 old", "k 0 0 no times", "k 3000"]
        for i in range(10):
            begin = 1000 * ms + i * 250_000
            lines += [f"k {begin} {begin + 100_000} embedding_kernel<x, y>", f"k {begin + 120_000} {begin + 200_000} gemm"]
        parts = trace.loads(trace.parse(lines))
        self.assertEqual([len(p) for p in parts], [1, 20])
        found = trace.idle(parts[1], 0.0013)  # the last five steps
        self.assertEqual((found["steps"], found["gap us p50"], found["gap us p90"]), (5, 50.0, 50.0))
        self.assertAlmostEqual(found["busy share"], 5 * 180 / (5 * 250 - 50))
        self.assertAlmostEqual(found["idle us per step"], (5 * 20 + 4 * 50) / 5)

    def test_trace_of_graphs(self):
        lines = ["g 1000 2000 7", "c 2100 2200 1", "g 2300 3300 7", "k 3200 3400 sample", "g 3500 4000 7"]
        found = trace.idle(trace.parse(lines), 1.0)
        self.assertEqual((found["steps"], found["gap us p50"]), (3, 0.1))
        self.assertRaises(ValueError, trace.idle, trace.parse(["nothing"]), 1.0)

    def test_trace_of_kernels(self):
        few = "_ZN46_GLOBAL__N__4a94b29f_13_linear_few_cu_54e0203b17linear_few_kernelI13__nv_bfloat16S1_Li1EEEvNS_8few_argsE"
        lines = ["k 1000 2000 16embedding_kernelI6__halfEv14embedding_args", f"k 1500 6000 {few}", "k 1600 6500 nvjet_hsh_64x8",
                 "k 7000 8000 16embedding_kernelI6__halfEv14embedding_args", f"k 7500 11000 {few}", "c 11000 11200 1"]
        rows = {row["kernel"]: row for row in trace.kernels(trace.parse(lines), 1.0)}
        name = trace.short_name(few)
        self.assertEqual(name, "linear_few_kernel I13__nv_bfloat16S1_Li1E")
        self.assertAlmostEqual(rows[name]["us a step"], 3.5)
        self.assertAlmostEqual(rows["nvjet_hsh_64x8"]["a step"], 0.5)
        self.assertAlmostEqual(sum(row["us a step"] for row in rows.values()), 5.1)
        self.assertRaises(ValueError, trace.kernels, trace.parse(["k 1 2 other"]), 1.0)

    def test_watch(self):
        text = "0, 345, 70.0\n100, 1980, 600.0\n90, 1900, [N/A]\n50, 1960, 500.0\n1"
        self.assertEqual(serving.watch_means(text, ["a", "b", "c"]), {"a": 75.0, "b": 1970.0, "c": 550.0})
        self.assertEqual(serving.watch_means("", ["a"]), {})

    def test_host_times(self):
        def sample(running, prompts, steps, host, launch):
            return {"gptd_num_requests_running": running, "gptd_prompt_tokens_total": prompts, "gptd_engine_steps_total": steps,
                    "gptd_engine_host_seconds_total": host, "gptd_engine_launch_seconds_total": launch}
        warming, prefill = sample(1, 0, 0, 0.0, 0.0), sample(8, 900, 10, 1.0, 1.0)
        steady, later, ending = sample(8, 900, 110, 1.001, 1.004), sample(8, 900, 210, 1.003, 1.006), sample(3, 900, 300, 2.0, 2.0)
        times = serving.host_times([warming, prefill, steady, later, ending], 8)
        self.assertAlmostEqual(times["host us"], 15.0)
        self.assertAlmostEqual(times["launch us"], 30.0)
        self.assertEqual(serving.host_times([warming, ending], 8), {"host us": None, "launch us": None})


class Report(unittest.TestCase):
    def test_met(self):
        tables = {**TABLES, "decode": [
            {"heads": "d128 32/8", "sequences": 1, "context": 1024, "us": 8.0, "KV MB": 4.2, "GB/s": 520.0,
             "settled us": 8.0, "settled GB/s": 520.0},
            {"heads": "d128 32/8", "sequences": 1, "context": 4096, "us": 14.0, "KV MB": 16.8, "GB/s": 1200.0,
             "settled us": 14.0, "settled GB/s": 1200.0},
            {"heads": "d128 32/8", "sequences": 64, "context": 2048, "us": 160.0, "KV MB": 537.0, "GB/s": 3300.0,
             "settled us": 150.0, "settled GB/s": 3500.0}],
            "prefill": [{"heads": "d128 16/16", "s": s, "ours / FA2": r, "FA2 TFLOP/s": 300.0}
                        for s, r in ((512, 1.0), (1024, 0.9))]}
        lines = {line.what: line for line in report.summary(tables, cost.Ceilings(tables), ["a", "b"], [64])}
        met = {what: line.met for what, line in lines.items()}
        self.assertEqual(met["paged decode attention, as the engine calls it, KV >= 256 MB, share of bandwidth"], True)
        self.assertIsNone(met["paged decode attention, nothing settled, KV >= 256 MB, share of bandwidth"])
        self.assertEqual(met["paged decode attention, batch 1, 1024 tokens"], True)
        self.assertEqual(met["paged decode attention, batch 1, 4096 tokens"], False)
        self.assertEqual(met["prefill attention, d128 16 heads, 16k tokens, over FA2"], False)
        self.assertIsNone(met["64 streams, steady, share of roofline"])
        self.assertEqual(lines["64 streams, steady, share of roofline"].measured, "not measured")


@harness.not_on_a_gpu("what needs a GPU is to fail here")
class Run(unittest.TestCase):
    def test_server_sections(self):
        with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as out:
            done = subprocess.run(
                [sys.executable, os.path.join(harness.ROOT, "scripts", "bench_gpu.py"), "--bundle", os.path.dirname(harness.SERVER),
                 "--backend", "cpu", "--models", harness.MODEL, harness.MODEL, "--demo", harness.MODEL, "--quick", "--out", out,
                 "--streams", "2", "--only", "decode", "batch1", "streams", "deterministic", "start", "--limit", "120"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
            results = {name.rsplit(".")[-1]: os.path.join(out, name) for name in os.listdir(out)}
            with open(results["json"]) as f:
                tables = json.load(f)["tables"]
            with open(results["md"]) as f:
                text = f.read()
        self.assertEqual(done.returncode, 1, done.stdout)  # decode attention cannot be measured here, and says so
        self.assertRegex(done.stdout, "FAILED decode: .*(torch|GPU)")
        self.assertEqual(done.stdout.count("FAILED"), 1, done.stdout)
        self.assertGreater(tables["batch1"][0]["decode tokens/s"], 0)
        self.assertGreater(tables["batch1"][0]["host us"] or 1, 0)  # none if no two samples met its decoding
        self.assertEqual((tables["streams"][0]["streams"], tables["streams"][0]["in"]), (2, 1024))
        self.assertGreater(tables["streams"][0]["whole tokens/s"], 0)
        self.assertGreater(tables["streams"][0]["steady tokens/s"] or 1, 0)  # none if the two never decoded together
        self.assertEqual([row["streams"] for row in tables["deterministic"]], [1, 2])
        self.assertGreater(tables["deterministic"][0]["share"], 0)
        self.assertEqual([row["what"] for row in tables["start"]], [f"demo, {n}" for n in ("first", "second")] * 2)
        self.assertIn("## not measured", text)


if __name__ == "__main__":
    unittest.main()
