"""Runs the trained Mamba-2 in float64 with transformers' plain path, on the ids of its io.safetensors.

Run: python shakespeare_f64.py PATH/examples/models/mamba2-shakespeare

Upstream's Triton kernels multiply the chunks of Mamba-2 in TF32, whatever the dtype: the numbers in io.safetensors are
off by up to 6e-3. This file has the same quantities without that error, under the same names, stored in float32. That
transformers loads the folder also shows that `save_pretrained` writes what it reads.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import Mamba2ForCausalLM

import golden_file

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "models" / "mamba2-shakespeare"


def main():
    model = Mamba2ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).double().eval()
    upstream = load_file(FOLDER / "io.safetensors")
    prompt, greedy, held_out = (upstream[f"{name}_ids"].long() for name in ("prompt", "greedy", "val"))
    start = prompt.shape[1]
    with torch.inference_mode():
        logits = model(greedy).logits
        if not torch.equal(logits[:, start - 1 : -1].argmax(-1), greedy[:, start:]):
            sys.exit("the greedy ids of upstream are not those of float64")
        losses = torch.nn.functional.cross_entropy(model(held_out).logits[0, :-1], held_out[0, 1:], reduction="none")
    tensors = {
        "prompt_logits": logits[:, :start],
        "greedy_logits": logits[:, start - 1 : -1],
        "val_nll": losses,
    }
    tensors = {name: value.numpy().astype(np.float32) for name, value in tensors.items()}
    metadata = {
        "producer": "transformers, float64, plain path",
        "producer_version": transformers.__version__,
        "seed": "none",
        "off_upstream_by": "%.1e" % float((upstream["prompt_logits"].double() - logits[:, :start]).abs().max()),
    }
    golden_file.write(FOLDER / "f64.safetensors", tensors, metadata)


if __name__ == "__main__":
    main()
