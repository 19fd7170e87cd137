"""Trains the demo model from generated text.

    python scripts/demo/train.py --device cpu --minutes 50 --out build/demo/run

On a CPU that others use too, --ranks 2 (two processes of one thread that add up their gradients once a
step) loses less time waiting than two threads do.

--minutes buys a number of steps: each stage's speed is measured first and the step counts are then
fixed and kept in the checkpoint, so a pause or a resume (the same command again) changes nothing.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import batches
import evaluate
from model import Config, Model, weighted_loss
from muon import Muon


@dataclasses.dataclass
class Stage:
    share: float  # of the time
    length: int
    rows: int
    recall: float  # share of rows that begin with a recall document
    mix: dict


SHORT = {"sums": 0.30, "copies": 0.15, "patterns": 0.20, "chat": 0.22, "story": 0.13}
LATER = {"sums": 0.50, "copies": 0.05, "patterns": 0.15, "chat": 0.18, "story": 0.12}
STAGES = [
    Stage(0.15, 128, 32, 0.55, SHORT),
    Stage(0.37, 256, 24, 0.50, LATER),
    Stage(0.20, 768, 8, 0.65, LATER),
    Stage(0.28, 2048, 4, 0.70, LATER),
]
COMPILE_UP_TO = 512  # tokens; longer rows were faster without torch.compile on a CPU
WARMUP_STEPS = 40
DECAY_FROM = 0.55  # of the work; then linear to FINAL_LR
FINAL_LR = 0.03
MUON_LR, ADAM_LR = 0.02, 0.004


def lr_factor(run, step, progress):
    warm = run.lr * min(1.0, (step + 1) / WARMUP_STEPS)
    if progress < run.decay_from:
        return warm
    return warm * (FINAL_LR + (1 - FINAL_LR) * (1 - progress) / (1 - run.decay_from))


def loss_function(run, stage):
    if run.compile and (stage.length <= COMPILE_UP_TO or run.device == "cuda"):
        return torch.compile(weighted_loss, dynamic=False)
    return weighted_loss


def add_up_gradients(model, ranks):
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


def start_ranks(run):
    """Joins the processes of the run; rank 0 starts the others with its own command line."""
    if run.ranks == 1:
        return
    if run.rank == 0:
        for rank in range(1, run.ranks):
            subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)])
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(run.port))
    dist.init_process_group("gloo", rank=run.rank, world_size=run.ranks)


def take_step(run, model, optimizers, encoder, stage, step, factor):
    device = run.device
    rows = -(-stage.rows // run.ranks)
    seed = f"{run.seed} {run.rank}"
    ids, weights = batches.batch(encoder, seed, step, stage.length, rows, stage.recall, stage.mix)
    ids, weights = ids.to(device), weights.to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = loss_function(run, stage)(model, ids, weights)
    loss.backward()
    if run.ranks > 1:
        add_up_gradients(model, run.ranks)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, lr in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def plan_steps(run, encoder, config, old=None, done=0):
    """Steps of each stage: its share of run.minutes over the measured seconds of a step.

    With old steps of which `done` are behind us, only what is left is planned anew.
    """
    behind = []
    for n in old or [0] * len(STAGES):
        behind.append(min(n, done))
        done -= behind[-1]
    finished = [old is not None and b == n for b, n in zip(behind, old or behind)]
    left = sum(s.share for s, f in zip(STAGES, finished) if not f)
    steps = []
    for stage, b, f in zip(STAGES, behind, finished):
        if f or not stage.share:
            steps.append(b)
            continue
        model = Model(config).to(run.device)
        optimizers = make_optimizers(model)
        seconds = []
        for i in range(6):
            start = time.perf_counter()
            take_step(run, model, optimizers, encoder, stage, i, 0.0).item()
            seconds.append(time.perf_counter() - start)
        best = min(seconds[2:])
        steps.append(b + max(1, int(stage.share / left * run.minutes * 60 * 0.95 / best)))
        print(f"stage length {stage.length}: {best:.3f} s a step, {stage.length * stage.rows / best:.0f} tokens/s, "
              f"{steps[-1]} steps", flush=True)
    if run.ranks > 1:
        dist.broadcast_object_list(steps)
    return steps


def make_optimizers(model):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("layers."))]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [(Muon(matrices, lr=MUON_LR), MUON_LR), (adam, ADAM_LR)]


def save(path, model, optimizers, step, steps, config):
    new = path.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o, _ in optimizers],
                "step": step, "steps": steps, "config": dataclasses.asdict(config)}, new)
    new.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="+", help="share of the time of each stage")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=pathlib.Path("build/demo/tokenizer.model"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/demo/run"))
    parser.add_argument("--init", type=pathlib.Path, help="start from the weights of this run's checkpoint")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of each stage, in place of --minutes")
    parser.add_argument("--replan", action="store_true", help="on resuming: what is left shall take --minutes")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--eval-steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--decay-from", type=float, default=DECAY_FROM, help="share of the work")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--rank", type=int, default=0, help="set by rank 0 for the others")
    parser.add_argument("--port", type=int, default=29517)
    run = parser.parse_args()
    for stage, share in zip(STAGES, run.shares or []):
        stage.share = share
    start_ranks(run)
    torch.manual_seed(run.seed)
    run.out.mkdir(parents=True, exist_ok=True)
    checkpoint = run.out / "checkpoint.pt"
    encoder = batches.Encoder(run.tokenizer)
    config = Config(vocab_size=encoder.sp.vocab_size())
    model = Model(config).to(run.device)
    optimizers = make_optimizers(model)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device)
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, steps = state["step"], state["steps"]
        if run.steps:
            steps = run.steps
        elif run.replan:
            steps = plan_steps(run, encoder, config, steps, first)
        print(f"resumed at step {first}", flush=True)
    else:
        if run.init:
            model.load_state_dict(torch.load(run.init / "checkpoint.pt", map_location=run.device)["model"])
        steps = run.steps or plan_steps(run, encoder, config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {sum(steps)} steps, "
          f"{sum(n * s.length * s.rows for n, s in zip(steps, STAGES))} tokens", flush=True)

    start = time.perf_counter()
    total = sum(steps)
    losses = []
    for step in range(first, total):
        before, index = 0, 0
        while step >= before + steps[index]:
            before += steps[index]
            index += 1
        stage = STAGES[index]
        progress = sum(s.share for s in STAGES[:index]) + stage.share * (step - before) / steps[index]
        losses.append(take_step(run, model, optimizers, encoder, stage, step, lr_factor(run, step, progress)))
        done = step + 1
        if run.rank > 0:
            continue
        if done % 25 == 0 or done == total:
            mean = torch.stack(losses).mean().item()
            losses = []
            print(f"step {done}/{total} length {stage.length} progress {progress:.3f} loss {mean:.4f} "
                  f"seconds {time.perf_counter() - start:.0f}", flush=True)
        last = done == before + steps[index]
        if done % 25 == 0 or last:
            save(checkpoint, model, optimizers, done, steps, config)
        if done % run.eval_steps == 0 or last:
            print("  " + evaluate.report(model, encoder, stage.length), flush=True)


if __name__ == "__main__":
    main()
