"""Times of transformers' Mamba and Mamba-2 on the CPU, in the cases of `benches/decode.rs` (random weights, f32).

Run: python transformers_models.py [--threads 2] > transformers.json      Needs: pip install torch transformers (5.23.0 was used).

The best of several rounds counts; each model runs in a process of its own, whose most memory is `peak_mib`. `join.py` joins the two.
"""
import argparse
import json
import resource
import subprocess
import sys
import time

SHAPES = {"mamba-130m": dict(vocab_size=50280), "mamba2-130m": dict(
    vocab_size=50288, num_heads=24, head_dim=64, n_groups=1, state_size=128, tie_word_embeddings=True)}


def measure(name, args):
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    kind, config = (Mamba2ForCausalLM, Mamba2Config) if name.startswith("mamba2") else (MambaForCausalLM, MambaConfig)
    model = kind(config(hidden_size=768, num_hidden_layers=24, **SHAPES[name])).eval()
    ids = torch.randint(0, 50000, (1, args.prompt))
    best = [float("inf")] * 2
    with torch.inference_mode():
        for _ in range(args.rounds):
            start = time.perf_counter()
            out = model(ids, use_cache=True)
            best[0] = min(best[0], time.perf_counter() - start)
            key = "cache_params" if hasattr(out, "cache_params") else "past_key_values"
            cache = getattr(out, key)
            start = time.perf_counter()
            for i in range(args.generate):
                model(ids[:, i : i + 1], use_cache=True, **{key: cache})
            best[1] = min(best[1], (time.perf_counter() - start) / args.generate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for what, tokens, seconds in ((f"prefill {args.prompt}", args.prompt, best[0]), ("decode", 1, best[1])):
        yield {"case": f"{name} f32 {what}", "ms": 1000 * seconds, "tokens_per_s": tokens / seconds, "peak_mib": peak}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if len(args.models) == 1:
        rows = list(measure(args.models[0], args))
        import torch
        import transformers

        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    else:
        rows, versions = [], {}
        for name in args.models:
            alone = [sys.executable, *sys.argv, "--models", name]
            answer = json.loads(subprocess.run(alone, stdout=subprocess.PIPE, check=True).stdout)
            rows += answer["rows"]
            versions = answer["versions"]
    json.dump({"versions": versions, "threads": args.threads, "rows": rows}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
