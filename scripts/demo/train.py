"""Trains the demo model from generated text, by the clock.

    python scripts/demo/train.py --device cuda --minutes 6.5 --out build/demo/run

--minutes is all of it: starting Python, compiling, training, the last check and the saved checkpoint. Worker
processes generate the batches, the same for the same seed, stage and step. How many steps fit is up to the
machine; the stages and the learning rate follow the share of the time that is gone, so the decay always ends.
"""

import time

START = time.monotonic()

import argparse
import dataclasses
import os
import pathlib

import torch

import batches
import evaluate
from model import Config, Model, weighted_loss
from muon import Muon

TOKENIZER = pathlib.Path(__file__).resolve().parent.parent.parent / "models" / "demo" / "tokenizer.model"


@dataclasses.dataclass
class Stage:
    share: float  # of the training time, at most
    length: int  # tokens of a row
    rows: int  # a step
    recall: float  # share of rows that begin with a recall document
    mix: dict  # kind of the other documents -> share
    until: float = 1.1  # recall among six facts that ends the stage before its time is over


STAGES = [  # short rows until keys are told apart, which comes all at once; long rows alone do not bring it
    Stage(0.6, 256, 64, 0.50, {"pairs": 0.35, "sums": 0.30, "copies": 0.08, "patterns": 0.10, "chat": 0.12, "story": 0.05},
          until=0.9),
    Stage(0.4, 2048, 16, 0.75, {"sums": 0.30, "copies": 0.05, "patterns": 0.16, "chat": 0.22, "story": 0.27}),
]
UNTIL_STEPS = 500  # from one check of `until` to the next
CPU_ROWS = 0.1  # of them, on a CPU
WARMUP_STEPS = 100
DECAY_FROM = 0.5  # of the training time; then linear to FINAL_LR
FINAL_LR = 0.01
MUON_LR, ADAM_LR = 0.02, 0.004
FINISH = 0.02  # of the minutes: the last check and the checkpoint
LOG_STEPS = {"cuda": 200, "cpu": 25}
REPORTS = 5  # checks in training, evenly spread


class Clock:
    """What share of the training time is gone; it runs from now until `end` seconds after START."""

    def __init__(self, end):
        self.begin, self.end = time.monotonic() - START, end

    def progress(self):
        return min(1.0, (time.monotonic() - START - self.begin) / (self.end - self.begin))


def lr_factor(step, progress):
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, FINAL_LR + (1 - FINAL_LR) * (1 - progress) / (1 - DECAY_FROM))


def make_optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("layers."))]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [(Muon(matrices, lr=MUON_LR), MUON_LR), (adam, ADAM_LR)]


class Trainer:
    def __init__(self, run):
        self.device = run.device
        self.model = Model(Config()).to(run.device)
        self.optimizers = make_optimizers(self.model)
        self.loss = torch.compile(weighted_loss, dynamic=False) if run.device == "cuda" else weighted_loss

    def backward(self, ids, weights):
        """Gradients of one batch as batches.batch makes it; returns the loss, still on the device."""
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True).float()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(self.model, ids, weights)
        loss.backward()
        return loss.detach()

    def clear(self):
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, ids, weights, factor):
        loss = self.backward(ids, weights)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.clear()
        return loss


class Log:
    """A line every LOG_STEPS steps; `waited` is the share of the time in which the next batch was not ready."""

    def __init__(self, device):
        self.every, self.tokens = LOG_STEPS[device], 0
        self.restart()

    def restart(self):
        self.losses, self.since, self.waited, self.new = [], time.monotonic(), 0.0, 0

    def step(self, step, stage, progress, loss, tokens, waited):
        self.losses.append(loss)
        self.tokens += tokens
        self.new += tokens
        self.waited += waited
        if step % self.every:
            return
        mean = torch.stack(self.losses).mean().item()
        took = time.monotonic() - self.since
        print(f"step {step} length {stage.length} progress {progress:.3f} loss {mean:.4f} "
              f"{self.new / took:.0f} tokens/s waited {self.waited / took:.0%} "
              f"seconds {time.monotonic() - START:.0f}", flush=True)
        self.restart()


def train(run, trainer, encoder, streams):
    """Steps until the time is over; returns (steps, tokens)."""
    clock = Clock(60 * run.minutes * (1 - FINISH))
    log, step, end, reports = Log(run.device), 0, 0.0, 1
    for stage, stream in zip(STAGES, streams):
        end += stage.share
        while (progress := clock.progress()) < min(end, 1.0):
            asked = time.monotonic()
            ids, weights = next(stream)
            waited = time.monotonic() - asked
            loss = trainer.step(ids, weights, lr_factor(step, progress))
            step += 1
            log.step(step, stage, progress, loss, weights.numel(), waited)
            if progress >= reports / REPORTS:
                print("  " + evaluate.report(trainer.model, encoder, stage.length), flush=True)
                reports += 1
                log.restart()
            if stage is not STAGES[-1] and step % UNTIL_STEPS == 0 and evaluate.recall(
                    trainer.model, encoder, stage.length, 6) >= stage.until:
                print(f"keys are told apart after {step} steps", flush=True)
                break
    return step, log.tokens


def save(path, model, step, tokens):
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config), "step": step,
                "tokens": tokens}, path)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=6.5, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=pathlib.Path, default=TOKENIZER)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/demo/run"))
    parser.add_argument("--workers", type=int, help="processes that generate text (default: the CPUs but two)")
    run = parser.parse_args()
    run.workers = run.workers or max(1, os.cpu_count() - 2)
    return run


def main():
    run = arguments()
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    encoder = batches.Encoder(run.tokenizer)
    gpu = run.device == "cuda"
    # All workers start before CUDA does, which a forked process must not inherit.
    streams = [batches.stream(encoder, f"{run.seed} {i}", stage, stage.rows if gpu else max(1, int(CPU_ROWS * stage.rows)),
                              run.workers, gpu) for i, stage in enumerate(STAGES)]
    trainer = Trainer(run)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters} parameters, {run.workers} workers", flush=True)
    for stage, stream in zip(STAGES, streams):  # compiles
        trainer.backward(*next(stream)).item()
        trainer.clear()
        print(f"length {stage.length} ready after {time.monotonic() - START:.1f} s", flush=True)

    steps, tokens = train(run, trainer, encoder, streams)
    print("  " + evaluate.report(trainer.model, encoder, STAGES[-1].length), flush=True)
    run.out.mkdir(parents=True, exist_ok=True)
    save(run.out / "checkpoint.pt", trainer.model, steps, tokens)
    print(f"{steps} steps, {tokens} tokens, {time.monotonic() - START:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
