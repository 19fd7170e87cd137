"""A Triton kernel that only reads: the ceiling of memory bandwidth. A file of its own, since Triton reads its source."""
import triton
import triton.language as tl


@triton.jit
def read_kernel(x, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """x: int32, a multiple of BLOCK * ROUNDS for each program. The sums are written so that no read is dropped."""
    place = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(ROUNDS):
        total += tl.load(x + place + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total))


def launcher(x, out, block, rounds, n_warps):
    """A function that reads all of x; out has a place for each program."""
    grid = (x.numel() // (block * rounds),)
    return lambda: read_kernel[grid](x, out, BLOCK=block, ROUNDS=rounds, num_warps=n_warps)
