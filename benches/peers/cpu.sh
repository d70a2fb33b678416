#!/usr/bin/env bash
# Whole models on the CPU: ours, llama.cpp with the same weights and transformers, one after the other on this machine, and tables of ratios.
#
# Run: benches/peers/cpu.sh LLAMA_BENCH PYTHON OUT [THREADS]      (PYTHON has torch and transformers)
set -euo pipefail
llama_bench=$1 python=$2 out=$3 threads=${4:-2}
peers=$(dirname "$0")
export RAYON_NUM_THREADS=$threads
mkdir -p "$out"
cargo build --release --workspace --bench decode
ours() { cargo bench -q --workspace --bench decode -- "$@"; }
ours --dtypes f32,f16 --save "$out/weights"
ours --dtypes f32,f16 --load "$out/weights" --alone --json >"$out/ours.json"
"$python" "$peers/llama_cpp.py" "$llama_bench" "$out/weights" --threads "$threads" >"$out/llama.json"
"$python" "$peers/transformers_models.py" --threads "$threads" >"$out/transformers.json"
rm -r "$out/weights"
for peer in llama transformers; do
    "$python" "$peers/join.py" "$out/ours.json" "$out/$peer.json"
    echo
done
