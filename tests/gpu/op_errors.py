"""How far PyTorch's own ops are from float64 when they compute in 16 bits on the GPU.

    python3 tests/gpu/op_errors.py > errors.txt

A line an op and type: type, ||out - ref|| / ||ref||, name. test_cuda_ops takes the file and allows gptd 1.25 times as much.
Inputs are drawn as that suite draws them, and are exact in their type; what a model does in several ops is done in several.
"""
import torch
import torch.nn.functional as F

ROWS, DIM, INNER, EPS, SCALE = 256, 1024, 1376, 1e-5, 11.3
KINDS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu": F.relu}


def rms(x, w, b):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


def layer(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b, EPS)


NORMS = {"rms": rms, "layer": layer}


def gated(kind):
    return lambda x: KINDS[kind](x[:, :x.shape[1] // 2]) * x[:, x.shape[1] // 2:]


def rotated(x, cos, sin):
    """As transformers does, with cos and sin of x's type. x: [rows, heads * dim], the halves of each head as they are"""
    x = x.view(x.shape[0], -1, 2 * cos.shape[1])
    low, high = x.chunk(2, dim=-1)
    cos, sin = (torch.cat((t, t), dim=-1)[:, None] for t in (cos.to(x.dtype), sin.to(x.dtype)))
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).flatten(1)


def cases():
    """(name, f, inputs): inputs of the 16-bit type, or the angles, which are F32"""
    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.float64)

    x, r = normal(ROWS, DIM), normal(ROWS, DIM)
    w, b = normal(INNER, DIM) * DIM ** -0.5, normal(INNER)
    both = normal(2 * INNER, DIM) * DIM ** -0.5
    scale, shift = normal(DIM), normal(DIM)
    angles = torch.outer(torch.arange(ROWS, device="cuda").float(), 10000 ** (-torch.arange(32, device="cuda") / 32))
    cos, sin = angles.cos(), angles.sin()
    yield "linear", F.linear, (x, w)
    yield "linear, bias", F.linear, (x, w, b)
    yield "linear, added", lambda out, x, w: out + F.linear(x, w), (normal(ROWS, INNER), x, w)
    yield "linear, bias, added", lambda out, x, w, b: out + F.linear(x, w, b), (normal(ROWS, INNER), x, w, b)
    for name, norm in NORMS.items():
        def linear(x, w, *norms, norm=norm):
            return F.linear(norm(x, *norms), w)
        yield f"norm {name}", norm, (x, scale, shift)
        yield f"norm {name}, added", lambda out, x, *rest, norm=norm: out + norm(x, *rest), (r, x, scale, shift)
        yield f"norm {name}, linear", linear, (x, w, scale, shift)
        yield f"norm {name}, linear, rope", \
            lambda x, w, s, b, cos, sin, f=linear: rotated(f(x, w, s, b), cos, sin), (x, w[:1344], scale, shift, cos, sin)
        for kind, activation in KINDS.items():
            yield f"norm {name}, linear, {kind}", \
                lambda *inputs, f=linear, a=activation: a(f(*inputs)), (x, w, scale, shift)
            yield f"norm {name}, linear, {kind}, gated", \
                lambda *inputs, f=linear, a=gated(kind): a(f(*inputs)), (x, both, scale, shift)
    for kind, activation in KINDS.items():
        yield kind, activation, (x,)
        yield f"{kind}, gated", gated(kind), (x,)
    yield "rope", rotated, (x, cos, sin)
    yield "embedding", lambda x: x, (x,)
    yield "embedding, scaled", lambda x: x * SCALE, (x,)
    yield "embedding, positions", lambda x, r: x + r, (x, r)
    yield "embedding, scaled, positions", lambda x, r: x * SCALE + r, (x, r)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    for name, f, inputs in cases():
        for dtype_name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
            rounded = [x if x.dtype == torch.float32 else x.to(dtype) for x in inputs]
            out, exact = f(*rounded).double(), f(*(x.double() for x in rounded))
            print(f"{dtype_name} {((out - exact).norm() / exact.norm()).item():.6g} {name}", flush=True)


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    main()
