"""Muon (Keller Jordan's optimizer for the matrices of hidden layers), written plainly.

The momentum of each matrix is replaced by the nearest (semi-)orthogonal one, found with five steps of
a Newton-Schulz iteration; matrices of one shape are stacked so that they share the multiplications.
"""

import torch


def orthogonalize(g, steps=5):
    """g (N, rows, cols) -> about U V^T of each g = U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.01):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()],
                         {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            gradients = [p.grad for p in params]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            updates = torch._foreach_lerp(gradients, buffers, momentum)
            rows, cols = params[0].shape
            update = orthogonalize(torch.stack(updates)) * max(1.0, rows / cols) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, update.unbind(), alpha=-group["lr"])
