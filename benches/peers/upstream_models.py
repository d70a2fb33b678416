"""Times whole models of mamba_ssm on a GPU: prompts, and generation with its CUDA graphs; random weights.

Run: python upstream_models.py OUTPUT.json [--models mamba-130m …] [--dtypes f16 bf16] [--case PART]
     (needs torch, triton, transformers, mamba_ssm and causal-conv1d, with their CUDA extensions)

`prefill B1 L2048`: median time of one call that keeps the states and gives the last logits. `decode B1`: per step, from
`generate(cg=True)` with a prompt of 100 tokens: what 100 new tokens take longer than 1, by 99, the best of several runs; argmax
and upstream's loop in Python are part of it. Upstream keeps its states in the dtype of the weights, that is in 16 bits.
Times are of the wall clock between synchronisations, in milliseconds.
"""

import argparse
import gc
import itertools
import json
import statistics
import time

import torch
import triton
from mamba_ssm import __version__ as version
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import InferenceParams

VOCAB, PROMPT, NEW = 50277, 100, 100
MODELS = {
    "mamba-130m": dict(d_model=768, n_layer=24, ssm_cfg={"layer": "Mamba1"}),
    "mamba2-130m": dict(d_model=768, n_layer=24, ssm_cfg={"layer": "Mamba2"}),
    "mamba-2.8b": dict(d_model=2560, n_layer=64, ssm_cfg={"layer": "Mamba1"}),
    "mamba2-2.7b": dict(d_model=2560, n_layer=64, ssm_cfg={"layer": "Mamba2"}),
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def clock(run):
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def prefill(model, batch, length):
    ids = torch.randint(0, VOCAB, (batch, length), device="cuda")
    # As `generate` has it: the cache is there before the first prompt.
    params = InferenceParams(length, batch, key_value_memory_dict=model.allocate_inference_cache(batch, length))

    def run():
        params.seqlen_offset = 0
        return model(ids, inference_params=params, num_last_tokens=1).logits

    warm = [clock(run) for _ in range(3)][-1]
    times = [clock(run) for _ in range(max(5, min(30, int(1000 / warm))))]
    return {"ms": statistics.median(times), "tokens_per_s": batch * length / statistics.median(times) * 1e3}


def decode(model, batch):
    ids = torch.randint(0, VOCAB, (batch, PROMPT), device="cuda")
    # The cache of the longer run is kept for the shorter ones.
    generate = lambda new: clock(lambda: model.generate(ids, max_length=PROMPT + new, cg=True, top_k=1))  # noqa: E731
    generate(NEW)
    generate(1)
    long = min(generate(NEW) for _ in range(5))
    short = min(generate(1) for _ in range(5))
    step = (long - short) / (NEW - 1)
    model._decoding_cache = None
    return {"ms": step, "generate_ms": long, "tokens_per_s": batch / step * 1e3}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["f16"])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    cases = [(f"decode B{batch}", decode, (batch,)) for batch in (1, 8, 64)]
    cases += [(f"prefill B{batch} L2048", prefill, (batch, 2048)) for batch in (1, 8)]
    versions = {"torch": torch.__version__, "triton": triton.__version__, "mamba_ssm": version,
                "gpu": torch.cuda.get_device_name(0)}
    rows = []
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, dtype in itertools.product(args.models, args.dtypes):
            model = None
            for label, measure, sizes in cases:
                row = {"case": f"{name} {dtype} {label}"}
                if args.case not in row["case"]:
                    continue
                try:
                    if model is None:
                        config = MambaConfig(vocab_size=VOCAB, **MODELS[name])
                        model = MambaLMHeadModel(config, device="cuda", dtype=DTYPES[dtype]).eval()
                    row |= measure(model, *sizes)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"
                print(row, flush=True)
                rows.append(row)
                with open(args.output, "w") as out:  # what there is, should the rest take too long
                    json.dump({"versions": versions, "rows": rows}, out, indent=1)
            del model
            gc.collect()
            torch.cuda.empty_cache()


main()
