"""Tokens per second of llama.cpp's Mamba and Mamba-2 on the CPU, in the shapes of `benches/decode.rs`.

Run: python llama_cpp.py PATH/llama-bench [--types f32 f16] [--threads 2]

Writes GGUF files with random weights to a temporary folder, runs llama-bench on each and prints one JSON object a line, with
the keys of `cargo bench -p mamba-benches --bench decode -- --json`. Needs: pip install gguf.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np

D_MODEL, LAYERS, D_CONV = 768, 24, 4
D_INNER = 2 * D_MODEL
TYPES = {"f32": (np.float32, gguf.LlamaFileType.ALL_F32), "f16": (np.float16, gguf.LlamaFileType.MOSTLY_F16)}


def write(path, arch, kind):
    rng = np.random.default_rng(0)
    matrix_type, file_type = TYPES[kind]
    uniform = lambda *shape: rng.uniform(-0.03, 0.03, shape).astype(np.float32)  # noqa: E731
    matrix = lambda *shape: uniform(*shape).astype(matrix_type)  # noqa: E731
    mamba2 = arch == "mamba2"
    d_state, dt_rank, vocab = (128, 24, 50288) if mamba2 else (16, 48, 50280)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(file_type)
    writer.add_ssm_conv_kernel(D_CONV)
    writer.add_ssm_inner_size(D_INNER)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(dt_rank)
    if mamba2:
        writer.add_ssm_group_count(1)
    writer.add_tensor("token_embd.weight", matrix(vocab, D_MODEL))
    writer.add_tensor("output_norm.weight", np.ones(D_MODEL, np.float32))
    conv_dim = D_INNER + 2 * d_state if mamba2 else D_INNER
    heads = dt_rank if mamba2 else D_INNER
    for i in range(LAYERS):
        add = lambda name, value: writer.add_tensor(f"blk.{i}.{name}", value)  # noqa: B023, E731
        add("attn_norm.weight", np.ones(D_MODEL, np.float32))
        add("ssm_in.weight", matrix(D_INNER + conv_dim + dt_rank if mamba2 else 2 * D_INNER, D_MODEL))
        add("ssm_conv1d.weight", uniform(conv_dim, D_CONV))
        add("ssm_conv1d.bias", uniform(conv_dim))
        add("ssm_dt.bias", rng.uniform(-7, -2, heads).astype(np.float32))
        if mamba2:
            add("ssm_a", -rng.uniform(1, 16, (heads, 1)).astype(np.float32))
            add("ssm_d", np.ones((heads, 1), np.float32))
            add("ssm_norm.weight", np.ones((1, D_INNER), np.float32))
        else:
            add("ssm_x.weight", matrix(dt_rank + 2 * d_state, D_INNER))
            add("ssm_dt.weight", matrix(D_INNER, dt_rank))
            add("ssm_a", -np.tile(np.arange(1, d_state + 1, dtype=np.float32), (D_INNER, 1)))
            add("ssm_d", np.ones(D_INNER, np.float32))
        add("ssm_out.weight", matrix(D_MODEL, D_INNER))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_bench", type=pathlib.Path)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["f32", "f16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for arch, name in (("mamba", "mamba-130m"), ("mamba2", "mamba2-130m")):
            for kind in args.types:
                path = pathlib.Path(folder) / f"{name}.{kind}.gguf"
                write(path, arch, kind)
                command = [args.llama_bench, "-m", path, "-p", args.prompt, "-n", args.generate, "-t", args.threads]
                command += ["-r", args.rounds, "-o", "json"]
                answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if answer.returncode:
                    sys.exit(f"{args.llama_bench} failed on {path.name}:\n{answer.stderr}")
                runs = json.loads(answer.stdout)
                best = lambda key: max(  # noqa: E731
                    (max(run["samples_ts"]) for run in runs if run[key] > 0), default=float("nan"))
                print(json.dumps({
                    "model": name, "weights": kind, "backend": f"llama.cpp {runs[0]['build_number']} {runs[0]['build_commit']}",
                    "prompt": args.prompt, "threads": args.threads,
                    "prefill_tokens_per_s": best("n_prompt"), "decode_tokens_per_s": best("n_gen"),
                }), flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
