"""Makes goldens/train_peft/*: adapters as PEFT saves them, for tiny checkpoints of models/, and what PEFT's models answer.

Run: python peft_adapters.py

Both factors of each adapter are random. io.safetensors holds `input_ids` (2, l) and `logits`, computed in float64.
"""

import json
import pathlib
import shutil
import sys
import zlib

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import golden_file  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
VERSION = upstream.version("peft", "transformers", "torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make(name, base, **options):
    seed = zlib.crc32(f"train_peft/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "models" / base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    adapted = 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(torch.tensor(rng.uniform(0.5, 1.5, tuple(parameter.shape)), dtype=torch.float32))
            elif "lora_" in key:
                parameter.copy_(torch.tensor(0.3 * rng.standard_normal(tuple(parameter.shape))))
                adapted += 1
    ids = torch.tensor(rng.integers(0, model.config.vocab_size, (2, 17)))
    folder = GOLDENS / "train_peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for extra in folder.iterdir():
        if not extra.name.startswith("adapter_"):
            extra.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base  # no path of the machine
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with torch.no_grad(), upstream.float64():
        logits = model.double()(ids, use_cache=False).logits.numpy()
    assert logits.dtype == np.float64
    golden_file.write(folder / "io.safetensors", {"input_ids": ids.numpy(), "logits": logits.astype(np.float32)}, {
        "producer": "peft, adapters on a checkpoint of models/, float64", "producer_version": VERSION, "seed": str(seed),
        "base": base,
    })
    print(name, adapted, "factors,", sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    make("lora", "mamba_tied", r=3, lora_alpha=6, target_modules=["in_proj", "x_proj", "embeddings"])
    make("rslora_alpha_pattern", "mamba_untied_bias", r=2, lora_alpha=5, use_rslora=True,
         target_modules=["in_proj", "x_proj", "lm_head"], alpha_pattern={"x_proj": 3}, rank_pattern={"in_proj": 4})
    make("dora", "mamba2_g1_untied", r=2, lora_alpha=4, use_dora=True, target_modules=["in_proj"])
