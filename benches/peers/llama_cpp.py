"""Times of llama.cpp on the CPU with our weights, in the cases of `benches/decode.rs`.

Run: python llama_cpp.py LLAMA_BENCH FOLDER [--types f32 f16] [--threads 2] > llama.json

LLAMA_BENCH is the program of llama.cpp's build (`cmake -B build && cmake --build build --target llama-bench`), FOLDER what
`cargo bench -p mamba-benches --bench decode -- --dtypes f32,f16 --save FOLDER` has written. The best of several rounds counts; `peak_mib` is the
most memory that a process for the model had, the mapped file included. `join.py` joins the two.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys


def run(program, model, threads, rounds, prompt, generate):
    """The runs that llama-bench reports, and the most memory that it had, in MiB."""
    command = [program, "-m", model, "-p", prompt, "-n", generate, "-t", threads, "-r", rounds, "-o", "json"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        answer, errors = process.stdout.read(), process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{program} failed on {model}:\n{errors.decode()}")
    return json.loads(answer), used.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_bench", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=["mamba-130m", "mamba2-130m"])
    parser.add_argument("--types", nargs="+", default=["f32", "f16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows, version = [], None
    for model in args.models:
        for kind in args.types:
            path = args.folder / f"{model}.{kind}.gguf"
            runs, peak = run(args.llama_bench, path, args.threads, args.rounds, args.prompt, args.generate)
            version = f"{runs[0]['build_number']} {runs[0]['build_commit']}"
            for what, tokens, key in ((f"prefill {args.prompt}", args.prompt, "n_prompt"), ("decode", 1, "n_gen")):
                speed = max(max(run["samples_ts"]) for run in runs if run[key] > 0)
                rows.append({"case": f"{model} {kind} {what}", "ms": 1000 * tokens / speed, "tokens_per_s": speed, "peak_mib": peak})
    json.dump({"versions": {"llama.cpp": version}, "threads": args.threads, "rows": rows}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
