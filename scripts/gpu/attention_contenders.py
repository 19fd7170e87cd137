"""The contenders of bench_attention.py: for each case ours and the calls of others over the same fresh random inputs,
captured in CUDA graphs, checked against each other and against float64, then timed in turn."""
import functools
import gc
import random
import sys
import warnings

import torch

from gpu import torch_parts

ac, attention_times = torch_parts.ac, torch_parts.attention_times  # tests/gpu

DTYPE, PAGE = torch.bfloat16, 64
MOST_ERROR, STRETCH = 1e-2, 64  # of outputs, over so many rows: late rows of a prompt are small beside the first
REPLAY_SECONDS, MOST_CALLS, EXPECTED_FLOPS = 3e-3, 20, 500e12
READ_SHAPES = [(2048, 4, 4), (4096, 4, 8), (4096, 8, 8), (8192, 4, 8)]  # block, rounds, warps


class Wrong(Exception):
    """An output is not what it should be."""


def fresh(*shape):
    return torch.randn(*shape, device=ac.DEVICE, dtype=DTYPE)


def heads_of(case):
    return ac.Heads(DTYPE, case.dim, case.q, case.kv)


class Ours:
    """A call of our library that writes `out`. tables: block tables [sets, S, max_blocks], of each call the next set;
    kept: what the params point to"""
    def __init__(self, library, name, params, out, kept, tables=None):
        self.library, self.name, self.params, self.out, self.kept, self.tables = library, name, params, out, kept, tables

    def __call__(self, i):
        if self.tables is not None:
            self.params.block_table = self.tables[i % len(self.tables)].data_ptr()
        self.library.run(self.name, self.params)
        return self.out


class Contender:
    """call(i): call i of a graph; its output has the shape [rows, H, D] or one that reshapes to it. options: of the float64
    reference for what computes something of its own; None: its output has to be that of the first contender"""
    def __init__(self, name, call, options=None):
        self.name, self.call, self.options, self.graph, self.out = name, call, options, None, None

    def capture(self, n_calls):
        def keep_last(i):
            self.out = self.call(i)
        keep_last(0)
        self.graph = attention_times.captured(keep_last, n_calls)

    def replay_poisoned(self):
        """Twice, since the first replay may leave to the second what it should not"""
        for _ in range(2):
            self.out.fill_(float("nan"))
            self.graph.replay()

    def rows(self):
        return self.out.reshape(-1, *self.out.shape[-2:])


class Setup:
    """A case ready to be captured. sequence(i): keys, values and queries of sequence i as the last call of a graph sees them"""
    def __init__(self, case, contenders, sequence, n_calls=None):
        self.case, self.contenders, self.sequence = case, contenders, sequence
        expected = case.flops() / EXPECTED_FLOPS
        self.n_calls = n_calls or max(1, min(MOST_CALLS, int(REPLAY_SECONDS / expected)))


def sequence_of(q, k, v, heads):
    """q [n, H, D], k, v [length, KV, D] as attention_check has a sequence"""
    s = object.__new__(ac.Sequence)
    s.heads, s.n, s.length, s.q, s.k, s.v = heads, len(q), len(k), q, k, v
    return s


# ---- calls of others ------------------------------------------------------------------------------------------------

def sdpa(backend, q, k, v):
    """PyTorch's, causal. q, k, v: [n, H, s, D], as many heads of each"""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(_):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return call


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)


def flex_alibi(q, k, v, slopes):
    """q [n, H, s, D], k, v [n, KV, s, D]"""
    from torch.nn.attention.flex_attention import create_block_mask
    s = q.shape[2]
    mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, s, s, device=ac.DEVICE)

    def biased(score, _b, h, i, j):
        return score + slopes[h] * (j - i)
    return lambda _: compiled_flex()(q, k, v, score_mod=biased, block_mask=mask, enable_gqa=True).transpose(1, 2)


def fa3_whole(fa3, q, k, v, window_left):
    """q [n, s, H, D], k, v [n, s, KV, D]"""
    window = {} if window_left < 0 else {"window_size": (window_left, 0)}
    return lambda _: fa3.flash_attn_func(q, k, v, causal=True, **window)


def fa3_paged(fa3, pages, q, **more):
    """q: [S, n_queries, H, D]"""
    return lambda i: fa3.flash_attn_with_kvcache(q, *pages.by_token, cache_seqlens=pages.lens, causal=True,
                                                 page_table=pages.tables[i % len(pages.tables)], **more)


def fa3_decode(rig, case, pages, q):
    """With its scheduler's metadata computed once, beforehand, where that works"""
    try:
        metadata = rig.fa3.get_scheduler_metadata(case.n_seqs, 1, pages.tables.shape[2] * PAGE, case.q, case.kv, case.dim,
                                                  pages.lens, qkv_dtype=DTYPE, page_size=PAGE, causal=True)
        call = fa3_paged(rig.fa3, pages, q, scheduler_metadata=metadata)
        call(0)
        return call
    except Exception as error:
        rig.note(f"FA3 decode {case.n_seqs} x {case.length}: without its scheduler's metadata: {first_line(error)}")
        return fa3_paged(rig.fa3, pages, q)


# ---- cases ----------------------------------------------------------------------------------------------------------

def whole(rig, case):
    """Prompts without a context: gqa, mha, d64, d256, window, alibi"""
    heads, n, s = heads_of(case), case.n_seqs, case.length
    q, k, v = fresh(n * s, heads.q, heads.dim), fresh(n * s, heads.kv, heads.dim), fresh(n * s, heads.kv, heads.dim)
    cu = ac.device_ints([i * s for i in range(n + 1)])

    def ours(name, slopes=None):
        out = torch.empty_like(q)
        p = attention_times.dense_params(q, k, v, out, n, cu, heads)
        p.window_left, p.alibi_slopes = case.window_left, None if slopes is None else slopes.data_ptr()
        call = Ours(rig.library, "prefill", p, out, (q, k, v, cu, slopes))
        return Contender(name, call, ac.Options(left=case.window_left, slopes=slopes))

    by_sequence = [x.view(n, s, -1, heads.dim) for x in (q, k, v)]
    if case.group == "alibi":
        slopes = ac.alibi(heads.q).float()
        contenders = [ours("ours", slopes), ours("plain")]
        contenders += rig.try_make("flex", lambda: flex_alibi(*(x.transpose(1, 2) for x in by_sequence), slopes))
    else:
        contenders = [ours("ours")]
        if case.window_left < 0:
            repeated = [x.repeat_interleave(heads.q // x.shape[2], 2).transpose(1, 2) for x in by_sequence]
            contenders += [Contender("cuDNN", sdpa("CUDNN_ATTENTION", *repeated)),
                           Contender("FA2", sdpa("FLASH_ATTENTION", *repeated))]
        if rig.fa3:
            contenders.append(Contender("FA3", fa3_whole(rig.fa3, *by_sequence, case.window_left)))
    return Setup(case, contenders, lambda i: sequence_of(*(x[i] for x in by_sequence), heads))


class Pages:
    """The caches of a case, n_sets of them, in pages in random order: as ours are laid out [pages, KV, PAGE, D] and, for
    FlashAttention-3, [pages, PAGE, KV, D]"""
    def __init__(self, case, n_sets, for_fa3):
        per_sequence = -(-case.length // PAGE)
        n_pages = n_sets * case.n_seqs * per_sequence
        self.case, self.heads = case, heads_of(case)
        self.k, self.v = (fresh(n_pages, case.kv, PAGE, case.dim) for _ in range(2))
        self.tables = torch.randperm(n_pages, device=ac.DEVICE).to(torch.int32).view(n_sets, case.n_seqs, per_sequence)
        self.lens = ac.device_ints([case.length] * case.n_seqs)
        self.by_token = [x.transpose(1, 2).contiguous() for x in (self.k, self.v)] if for_fa3 else None

    def params(self, q, out, cu):
        """cu: cu_seqlens_q on the device, or None"""
        p = attention_times.dense_params(q, self.k, self.v, out, self.case.n_seqs, self.lens, self.heads)
        p.cu_seqlens_q, p.cu_seqlens_k = None if cu is None else cu.data_ptr(), None
        p.kv_stride, p.kv_head_stride = self.heads.dim, PAGE * self.heads.dim
        p.kv_block_stride = self.heads.kv * PAGE * self.heads.dim
        p.context_lens, p.block_table = self.lens.data_ptr(), self.tables.data_ptr()
        p.block_size, p.max_blocks, p.max_context = PAGE, self.tables.shape[2], max(self.case.length, 32768)
        return p

    def keys_and_values(self, i, in_set=0):
        """Of sequence i of a set: [length, KV, D] each"""
        table = self.tables[in_set, i].long()
        return [x[table].transpose(1, 2).flatten(0, 1)[:self.case.length] for x in (self.k, self.v)]


def paged(rig, case):
    """New tokens of one sequence over its context in pages, and the same without pages"""
    heads, n = heads_of(case), case.n_queries
    pages, q = Pages(case, 1, rig.fa3), fresh(n, heads.q, heads.dim)
    k, v = pages.keys_and_values(0)
    cu_q, cu_k = ac.device_ints([0, n]), ac.device_ints([0, case.length])
    outs = [torch.empty_like(q) for _ in range(2)]
    dense = attention_times.dense_params(q, k, v, outs[1], 1, cu_q, heads)
    dense.cu_seqlens_k = cu_k.data_ptr()
    contenders = [Contender("ours", Ours(rig.library, "prefill", pages.params(q, outs[0], cu_q), outs[0], (pages, q, cu_q),
                                         pages.tables), ac.Options()),
                  Contender("dense", Ours(rig.library, "prefill", dense, outs[1], (q, k, v, cu_q, cu_k)))]
    if rig.fa3:
        contenders.append(Contender("FA3", fa3_paged(rig.fa3, pages, q[None])))
    return Setup(case, contenders, lambda _: sequence_of(q, k, v, heads))


def decode(rig, case):
    """As attention_times.time_decode has it: the calls of a graph take their pages in turn from sets beyond L2 in all"""
    heads = heads_of(case)
    n_sets = max(1, min(64, (256 << 20) // case.kv_bytes() + 1))
    n_calls, with_fa3 = max(n_sets, 16), rig.fa3 if case.dim == 128 else None
    pages, q = Pages(case, n_sets, with_fa3), fresh(case.n_seqs, heads.q, heads.dim)

    def ours(settled):
        out = torch.empty_like(q)
        p = pages.params(q, out, None)
        scratch = rig.library.scratch(p)
        p.scratch, p.scratch_bytes, p.settled = scratch.data_ptr(), scratch.numel(), settled
        return Ours(rig.library, "decode", p, out, (pages, q, scratch), pages.tables)

    contenders = [Contender("ours", ours(0), ac.Options()), Contender("settled", ours(1))]
    if with_fa3:
        contenders.append(Contender("FA3", fa3_decode(rig, case, pages, q[:, None])))
    last = (n_calls - 1) % n_sets
    return Setup(case, contenders, lambda i: sequence_of(q[i:i + 1], *pages.keys_and_values(i, last), heads), n_calls)


# ---- checks and times -----------------------------------------------------------------------------------------------

def worst_error(out, reference):
    """The largest ||out - reference|| / ||reference|| over stretches of rows; NaN where there is one"""
    stretch = min(STRETCH, len(out))
    norms = [x.flatten(1).norm(dim=1).square().view(-1, stretch).sum(1) for x in
             (out.float() - reference.float(), reference.float())]
    return float((norms[0] / norms[1]).sqrt().max())


def check(setup):
    """Every contender's output of the last call of its graph, replayed"""
    for contender in setup.contenders:
        contender.replay_poisoned()
    if ac.DEVICE == "cuda":
        torch.cuda.synchronize()
    for contender in setup.contenders:
        if contender.options:
            check_rows(setup, contender)
        else:
            error = worst_error(contender.rows(), setup.contenders[0].rows())
            if not error <= MOST_ERROR:
                raise Wrong(f"{contender.name} is {error:.1e} from ours, nothing timed")


def check_rows(setup, contender):
    """The last row of all and three by chance, every head, against float64"""
    n_seqs, n = setup.case.n_seqs, setup.case.n_queries
    for sequence, row in [(n_seqs - 1, n - 1)] + [(random.randrange(n_seqs), random.randrange(n)) for _ in range(3)]:
        part = setup.sequence(sequence).part(row, row + 1)
        exact = ac.attend(part, contender.options, True)[0]
        error = ac.relative(contender.rows()[sequence * n + row], exact[0])
        if not error <= MOST_ERROR:
            raise Wrong(f"{contender.name}: query {row} of sequence {sequence} is {error:.1e} from float64, nothing timed")


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


class Rig:
    """What is the same for every case. note(words): told of what cannot be measured"""
    def __init__(self, library, fa3_directory, n_replays, note):
        if ac.DEVICE == "cuda" and not torch.cuda.is_available():
            raise SystemExit("this PyTorch sees no GPU")
        warnings.filterwarnings("ignore")  # of backends that do not fit
        self.library, self.n_replays, self.note, self.fa3 = ac.Library(library), n_replays, note, None
        if fa3_directory:
            sys.path.insert(0, fa3_directory)
        try:
            import flash_attn_interface
            self.fa3 = flash_attn_interface
        except Exception as error:
            note(f"without FlashAttention-3: {first_line(error)}")

    def versions(self):
        return f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}"

    def try_make(self, name, make):
        """[the contender], or [] with a note"""
        try:
            return [Contender(name, make())]
        except Exception as error:
            self.note(f"{name}: {first_line(error)}")
            return []

    def bandwidth(self):
        """Rows of what reading 4 GiB reaches"""
        try:
            from gpu.read_kernel import launcher
            x = torch.randint(-1 << 31, (1 << 31) - 1, (1 << 30,), dtype=torch.int32, device=ac.DEVICE)
            out = torch.empty(x.numel() // 2048, dtype=torch.int32, device=ac.DEVICE)
            return [{"by": "Triton, {} x {}, {} warps".format(*shape),
                     "GB/s": 4 * x.numel() / torch_parts.median_ms(launcher(x, out, *shape)) / 1e6} for shape in READ_SHAPES]
        except Exception as error:
            self.note(f"read bandwidth: {first_line(error)}")
            return []

    def measure(self, case):
        """Contender -> microseconds of a call. Those of others that fail are left out with a note; a wrong output raises"""
        setup = {"paged": paged, "decode": decode}.get(case.group, whole)(self, case)
        running = []
        for contender in setup.contenders:
            try:
                contender.capture(setup.n_calls)
                running.append(contender)
            except Exception as error:
                if isinstance(contender.call, Ours):
                    raise
                self.note(f"{contender.name} of {case.group} {case.heads()} {case.n_seqs} x {case.length}: {first_line(error)}")
        setup.contenders = running
        check(setup)
        graphs = [contender.graph for contender in running]
        attention_times.medians(graphs, 2)  # warms up
        times = attention_times.medians(graphs, self.n_replays)
        return {contender.name: ms * 1e3 / setup.n_calls for contender, ms in zip(running, times)}

    def free(self):
        """What the last case held; False if the device answers no more"""
        gc.collect()
        try:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            return True
        except RuntimeError:
            return False
