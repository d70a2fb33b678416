"""Times a training step of mamba_ssm's models on a GPU: bf16 autocast, f32 weights, AdamW, clipping to a norm of 1.

Run: python upstream_train.py OUTPUT.json [--models mamba-130m …] [--batch 8] [--tokens 2048]
     (needs torch, triton, transformers, mamba_ssm and causal-conv1d, with their CUDA extensions)

Random weights and tokens. A step is forward, cross-entropy, backward, clipping, the optimizer (torch's fused AdamW), and reading
the loss; the median of its times on the wall clock, in milliseconds. `peak_gib` is the most memory that tensors held at once.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from mamba_ssm import __version__ as version
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

VOCAB = 50277
MODELS = {
    "mamba-130m": dict(d_model=768, n_layer=24, ssm_cfg={"layer": "Mamba1"}),
    "mamba2-130m": dict(d_model=768, n_layer=24, ssm_cfg={"layer": "Mamba2"}),
}


def measure(name, batch, tokens, steps):
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(vocab_size=VOCAB, **MODELS[name]), device="cuda", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, VOCAB, (batch, tokens + 1), device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(5):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    ms = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"ms": ms, "peak_gib": peak, "tokens_per_s": batch * tokens / ms * 1e3}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        case = f"{name} bf16 train B{args.batch} L{args.tokens}"
        row = {"case": case, **measure(name, args.batch, args.tokens, args.steps)}
        print(f"| {case} | {row['ms']:.1f} ms | {row['peak_gib']:.1f} GiB |", flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "mamba_ssm": version, "gpu": torch.cuda.get_device_name()}
    with open(args.output, "w") as file:
        json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
