"""How far PyTorch itself is from F32 on each checkpoint of tests/vectors when it computes in 16 bits on the GPU.

    python3 tests/gpu/reference_errors.py > errors.txt

A line a checkpoint and type: directory, type, ||out - ref|| / ||ref|| in the quadratic mean over its rows (of which there
are eight: the worst of so few is chance). test_cuda_model takes the file and allows gptd 1.75 times as much. The reference
is transformers in F32 (FlashGPT: scripts/export_vectors.py's).
"""
import pathlib
import sys

import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import export_vectors  # noqa: E402


def forward_on_gpu(directory, dtype):
    """ids [n] -> logits [n, V] F32, computed in dtype."""
    model, _ = export_vectors.reference(directory)
    if isinstance(model, torch.nn.Module):
        model = model.to("cuda", dtype)
    else:
        # Experts one by one: the grouped product does not take odd sizes.
        loaded = export_vectors.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager",
                                                                     experts_implementation="eager")
        loaded = loaded.to("cuda").eval()
        model = lambda ids: loaded(ids, use_cache=False).logits  # noqa: E731

    def forward(ids):
        with torch.device("cuda"):  # FlashGPT makes its positions and mask where tensors are made
            return model(ids.to("cuda")[None])[0].float()
    return forward


@torch.no_grad()
def main():
    for path in sorted((ROOT / "tests/vectors").glob("*/expected.safetensors")):
        expected = load_file(path)
        ids = torch.cat([expected["prompt"], expected["generated"]]).long()
        rows = expected["rows"].long()
        source = path.resolve().parent  # of a case that has another's answers: that one
        exact = forward_on_gpu(source, torch.float32)(ids)[rows.to("cuda")]
        for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
            out = forward_on_gpu(source, dtype)(ids)[rows.to("cuda")]
            errors = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
            print(f"tests/vectors/{path.parent.name} {name} {errors.square().mean().sqrt().item():.6f}", flush=True)


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    main()
