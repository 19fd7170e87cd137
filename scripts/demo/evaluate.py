"""Checks of a model in training: share of held-out sums and recalls whose every token is the likeliest."""

import functools

import torch

import tasks


@torch.no_grad()
def greedy_right(model, pairs, rows=16):
    """pairs [(prompt ids, answer ids)] -> list of bool. One pass: greedy gives the answer if and only if
    each answer token is the likeliest after the ones before it."""
    device = model.embed_tokens.weight.device
    right = []
    for start in range(0, len(pairs), rows):
        part = pairs[start:start + rows]
        width = max(len(p) + len(a) for p, a in part) - 1
        ids = torch.zeros(len(part), width, dtype=torch.long)
        for i, (prompt, answer) in enumerate(part):
            whole = (prompt + answer)[:-1]
            ids[i, :len(whole)] = torch.tensor(whole)
        with torch.autocast(device.type, torch.bfloat16):
            best = model(ids.to(device)).argmax(-1).cpu()
        for i, (prompt, answer) in enumerate(part):
            right.append(best[i, len(prompt) - 1:len(prompt) - 1 + len(answer)].tolist() == answer)
    return right


def continuation(encoder, prompt, answer):
    ids, whole = encoder.ids(prompt), encoder.ids(prompt + answer)
    assert whole[:len(ids)] == ids, (prompt, answer)
    return ids, whole[len(ids):]


@functools.cache
def sum_pairs(encoder, count):
    return [continuation(encoder, p, a) for p, a in tasks.sum_prompts(count)]


@functools.cache
def recall_pairs(encoder, length, count, n_keys):
    """[(depth, prompt ids, answer ids)] with prompts of about `length` tokens at ten depths."""
    found = []
    for i in range(count):
        depth = (i % 10) / 9
        prompt, answer, _ = tasks.recall_prompt(f"train {length} {i}", length - 8, depth, lambda t: len(encoder.ids(t)), n_keys)
        found.append((depth, *continuation(encoder, prompt, answer + ".")))
    return found


def recall(model, encoder, length, n_keys, count=20):
    """Share of recalls among n_keys facts that are right."""
    pairs = recall_pairs(encoder, length, count, n_keys)
    right = greedy_right(model, [(p, a) for _, p, a in pairs], rows=max(1, 4096 // length))
    return sum(right) / len(right)


def report(model, encoder, length, sums=200, recalls=20):
    """A line of figures, and nothing else changed."""
    model.eval()
    right = greedy_right(model, sum_pairs(encoder, sums), rows=100)
    line = f"sums {sum(right) / len(right):.3f}"
    for n_keys in (1, 6):
        pairs = recall_pairs(encoder, length, recalls, n_keys)
        right = greedy_right(model, [(p, a) for _, p, a in pairs], rows=max(1, 4096 // length))
        by_depth = {}
        for (depth, _, _), ok in zip(pairs, right):
            by_depth.setdefault(depth, []).append(ok)
        depths = " ".join(f"{sum(v)}/{len(v)}" for _, v in sorted(by_depth.items()))
        line += f" recall@{length} of {n_keys}: {sum(right) / len(right):.3f} by depth {depths}"
    model.train()
    return line
