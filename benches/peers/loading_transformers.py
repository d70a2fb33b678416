"""Loads the folder that `cargo bench -p mamba-benches --bench loading -- --folder F` made with transformers.

Run: python loading_transformers.py F [rounds]

Prints the best times in ms of reading model.safetensors once, of `from_pretrained` in f32 and bf16, and from its start to the
logits of one token, after which nothing is left to be read lazily.
"""

import pathlib
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def best(rounds, act):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main():
    folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    weights = folder / "model.safetensors"
    print(f"read once {best(rounds, weights.read_bytes):.0f} ms, {weights.stat().st_size / 1e6:.0f} MB")
    for dtype in (torch.float32, torch.bfloat16):
        load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # noqa: E731

        @torch.no_grad()
        def logits():
            return load()(torch.tensor([[1]])).logits.float().sum().item()

        load()
        print(f"{dtype}: loaded {best(rounds, load):.0f} ms, first logits {best(rounds, logits):.0f} ms")


if __name__ == "__main__":
    main()
