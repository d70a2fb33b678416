"""Tokens per second of transformers' Mamba and Mamba-2 on the CPU, in the shapes of `benches/decode.rs`.

Random weights, f32. Prints one JSON object a line. Needs: pip install torch transformers (5.23.0 was used).
"""
import argparse
import json
import time

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--generate", type=int, default=8)
parser.add_argument("--rounds", type=int, default=2)
args = parser.parse_args()

torch.manual_seed(0)
shapes = {
    "mamba-130m": (MambaForCausalLM, MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24)),
    "mamba2-130m": (
        Mamba2ForCausalLM,
        Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, n_groups=1,
                     state_size=128, tie_word_embeddings=True),
    ),
}
for name, (kind, config) in shapes.items():
    model = kind(config).eval()
    ids = torch.randint(0, 50000, (1, args.prompt))
    best = [0.0, 0.0]
    with torch.inference_mode():
        for _ in range(args.rounds):
            start = time.perf_counter()
            out = model(ids, use_cache=True)
            best[0] = max(best[0], args.prompt / (time.perf_counter() - start))
            cache = out.cache_params if hasattr(out, "cache_params") else out.past_key_values
            key = "cache_params" if hasattr(out, "cache_params") else "past_key_values"
            start = time.perf_counter()
            for i in range(args.generate):
                token = ids[:, i : i + 1]
                model(token, use_cache=True, **{key: cache})
            best[1] = max(best[1], args.generate / (time.perf_counter() - start))
    print(json.dumps({
        "model": name, "weights": "f32", "backend": f"transformers {transformers.__version__}", "prompt": args.prompt,
        "threads": torch.get_num_threads(), "prefill_tokens_per_s": best[0], "decode_tokens_per_s": best[1],
    }))
