"""Has mamba_ssm load what the example `convert` writes in the layout of state-spaces, and compares its logits with those of goldens/models.

Run: python check_mamba_ssm.py ../../target/release/examples/convert

Models that have words in GGUF go through such a file too. What was found, and of which bytes, is written to goldens/checks.
"""

import pathlib
import subprocess
import sys
import tempfile

import mamba_ssm_models as goldens  # before torch: it sets the environment
import record

import safetensors.torch
import torch

LIMIT = 1e-4
# Their norms have an epsilon that state-spaces has no field for.
NO_WORDS = ("mamba2_g8", "mamba_no_conv_bias")


def convert(program, source, target, *more):
    command = [program, "--quiet", "--model", source, "--to", target, "--save-as", "f32", *more]
    return subprocess.run(command, capture_output=True).returncode == 0


def compare(name, folder):
    model = goldens.mixer_seq_simple.MambaLMHeadModel.from_pretrained(folder, device="cpu", dtype=torch.float32).eval()
    for layer in model.backbone.layers:
        layer.mixer.use_mem_eff_path = layer.mixer.use_fast_path = False
    io = safetensors.torch.load_file(goldens.MODELS / name / "io.safetensors")
    vocabulary = io["logits"].shape[2]
    with torch.no_grad(), goldens.references():
        gap = (model(io["input_ids"]).logits[..., :vocabulary] - io["logits"]).abs().max().item()
    assert gap <= LIMIT, (name, gap)
    return {"largest_difference": gap, "config": record.sha256(folder / "config.json")}


def main():
    program, found = pathlib.Path(sys.argv[1]).resolve(), {}
    for source in sorted(goldens.MODELS.iterdir()):
        if not source.name.startswith(("ss_", "mamba_", "mamba2_")) or source.name.endswith("_headless"):
            continue
        with tempfile.TemporaryDirectory() as place, goldens.classes(source):
            folder, file, again = (pathlib.Path(place) / name for name in ("folder", "model.gguf", "again"))
            if not convert(program, source, folder, "--layout", "state-spaces"):
                assert source.name in NO_WORDS, source
                print(f"{source.name}: no words in the layout of state-spaces")
                continue
            weights = {"weights": record.sha256(folder / "pytorch_model.bin")}
            report = {"model": record.model(source), "folder": compare(source.name, folder) | weights}
            if convert(program, source, file):
                assert convert(program, file, again, "--layout", "state-spaces"), source
                report["folder_from_gguf"] = compare(source.name, again)
        found[source.name] = report
        print(f"{source.name}: {report}", flush=True)
    assert len(found) >= 20, len(found)
    assert sum("folder_from_gguf" in report for report in found.values()) >= 7
    by = record.versions("mamba_ssm", "causal_conv1d", "flash_attn", "torch")
    record.write("check_mamba_ssm", by=by, limit=LIMIT, found=found,
                 what="logits of mamba_ssm's models over its reference functions, loaded from folders that `convert` wrote in the layout of "
                      "state-spaces in float32, and from folders made of GGUF files that it wrote")


if __name__ == "__main__":
    main()
