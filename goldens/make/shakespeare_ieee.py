"""Runs the trained Mamba-2 through mamba_ssm's own Triton kernels on a GPU with IEEE float32 products.

Run, on a machine with an NVIDIA GPU: python shakespeare_ieee.py FOLDER [--output FILE]

FOLDER is the checkpoint in state-spaces format (config.json, pytorch_model.bin). Triton multiplies float32 matrices in TF32
unless told otherwise, which is why io.safetensors is off by up to 6e-3; TRITON_F32_DEFAULT=ieee is all that differs here.
The plain path of the block is taken (a convolution of torch, then `mamba_chunk_scan_combined`), since causal_conv1d is not
needed for it. Same quantities, under the same names, for the ids of io.safetensors.
"""

import argparse
import json
import os
import pathlib
import sys
import types

os.environ["TRITON_F32_DEFAULT"] = "ieee"
os.environ["MAMBA_DETERMINISTIC"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

try:
    import selective_scan_cuda  # noqa: E402, F401
except ImportError:
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # Mamba-1 only

import mamba_ssm  # noqa: E402
from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402

import golden_file  # noqa: E402

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "models" / "mamba2-shakespeare"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=FOLDER / "ieee.safetensors")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    config = MambaConfig(**json.loads((args.folder / "config.json").read_text()))
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.float32)
    weights = torch.load(args.folder / "pytorch_model.bin", map_location="cuda", weights_only=True)
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    model.eval()
    for layer in model.backbone.layers:
        layer.mixer.use_mem_eff_path = False
    upstream = load_file(FOLDER / "io.safetensors")
    prompt, greedy, held_out = (upstream[f"{name}_ids"].long().cuda() for name in ("prompt", "greedy", "val"))
    start = prompt.shape[1]
    with torch.inference_mode():
        # One forward over prompt and greedy ids: the state is never rounded in between.
        logits = model(greedy).logits
        if not torch.equal(logits[:, start - 1 : -1].argmax(-1), greedy[:, start:]):
            sys.exit("the greedy ids of io.safetensors are not those of this run")
        scored = model(held_out).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(scored, held_out[0, 1:], reduction="none")
    tensors = {"prompt_logits": logits[:, :start], "greedy_logits": logits[:, start - 1 : -1], "val_nll": losses}
    tensors = {name: value.cpu().numpy().astype(np.float32) for name, value in tensors.items()}
    metadata = {
        "producer": f"mamba_ssm on {torch.cuda.get_device_name()}, float32, TRITON_F32_DEFAULT=ieee",
        "producer_version": f"{mamba_ssm.__version__}, triton {triton.__version__}, torch {torch.__version__}",
        "seed": "none",
    }
    golden_file.write(args.output, tensors, metadata)
    for name, reference in (("io", upstream), ("f64", load_file(FOLDER / "f64.safetensors"))):
        for key, value in tensors.items():
            print(f"{key}: off {name}.safetensors by {abs(value - reference[key].numpy()).max():.1e}")


if __name__ == "__main__":
    main()
