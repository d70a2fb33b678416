"""Has mamba_ssm load what the example `convert` writes in the layout of state-spaces, and compares its logits with those of goldens/models.

Run: python check_mamba_ssm.py ../../target/release/examples/convert

Nothing is written to goldens.
"""

import pathlib
import subprocess
import sys
import tempfile

import mamba_ssm_models as goldens  # before torch: it sets the environment

import safetensors.torch
import torch

LIMIT = 1e-4
# Their norms have an epsilon that state-spaces has no field for.
NO_WORDS = ("mamba2_g8", "mamba_no_conv_bias")


def main():
    program, agree = pathlib.Path(sys.argv[1]).resolve(), 0
    for source in sorted(goldens.MODELS.iterdir()):
        if not source.name.startswith(("ss_", "mamba_", "mamba2_")) or source.name.endswith("_headless"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [program, "--quiet", "--model", source, "--to", folder, "--save-as", "f32", "--layout", "state-spaces"]
            if subprocess.run(command, capture_output=True).returncode != 0:
                assert source.name in NO_WORDS, source
                print(f"{source.name}: no words in the layout of state-spaces")
                continue
            model = goldens.mixer_seq_simple.MambaLMHeadModel.from_pretrained(folder, device="cpu", dtype=torch.float32).eval()
        for layer in model.backbone.layers:
            layer.mixer.use_mem_eff_path = layer.mixer.use_fast_path = False
        io = safetensors.torch.load_file(source / "io.safetensors")
        vocabulary = io["logits"].shape[2]
        with torch.no_grad(), goldens.references():
            gap = (model(io["input_ids"]).logits[..., :vocabulary] - io["logits"]).abs().max().item()
        assert gap <= LIMIT, (source.name, gap)
        agree += 1
        print(f"{source.name}: mamba_ssm off by {gap:.0e}", flush=True)
    print(f"{agree} agree")
    assert agree >= 19


if __name__ == "__main__":
    main()
