"""Milliseconds of a training step of transformers' Mamba and Mamba-2 on the CPU: the models that `benches/train.rs --save FOLDER`
wrote, on the same tokens, with the same recipe: f32, clipping to a norm of 1, AdamW.

Run: python transformers_train.py FOLDER [--threads 2] [--json OUT.json]     (then join.py OURS.json OUT.json)
Needs: pip install torch transformers (5.23.0 was used). Without CUDA transformers runs its plain PyTorch path.
"""
import argparse
import json
import pathlib
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=pathlib.Path)
args = parser.parse_args()

torch.set_num_threads(args.threads)
draws = (torch.arange(args.batch * (args.tokens + 1), dtype=torch.int64) * 2654435761 % 2**32) >> 23
ids = draws.reshape(args.batch, args.tokens + 1)
rows = []
for name in ("mamba-2m", "mamba2-2m"):
    model = AutoModelForCausalLM.from_pretrained(args.folder / name, dtype=torch.float32).train()
    decays, others = [], []
    for parameter in model.parameters():
        (decays if parameter.dim() >= 2 else others).append(parameter)
    optimizer = torch.optim.AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-6, betas=(0.9, 0.95))
    times, first = [], None
    for step in range(args.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = loss.item() if first is None else first
        if step > 0:
            times.append((1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - used) / args.threads))
    ms, busy = (statistics.median(column) for column in zip(*times))
    tokens = args.batch * args.tokens
    rows.append({"case": f"{name} train B{args.batch} L{args.tokens}", "ms": ms, "busy_ms": busy,
                 "tokens_per_s": 1e3 * tokens / ms, "loss": first})
    print(json.dumps(rows[-1]), flush=True)
versions = {"transformers": transformers.__version__, "torch": torch.__version__}
if args.json:
    args.json.write_text(json.dumps({"versions": versions, "threads": args.threads, "rows": rows}, indent=1))
