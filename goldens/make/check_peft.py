"""Has PEFT read the adapters that the example `finetune` writes.

Run: python check_peft.py ../../target/release/examples/finetune

The default model is trained for some steps with adapters of each kind. PEFT must load what is in `final/adapter` onto the model that
was trained, leave nothing out, and give the logits of the merged model in `final`, which transformers loads by itself. Not with `out_proj` and `conv1d`: PEFT refuses to adapt these in models of type `mamba`, whoever made the adapter.
"""

import pathlib
import subprocess
import sys
import tempfile
import warnings

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import peft  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "examples/models/mamba-tinyshakespeare"
KINDS = {
    "projections": ["--targets", "in_proj,x_proj"],
    "rank-stabilised": ["--targets", "in_proj", "--rslora", "--rank", "4"],
    "DoRA": ["--targets", "in_proj,x_proj", "--dora"],
}
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids, use_cache=False).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    before = logits(load(BASE), ids)
    for kind, options in KINDS.items():
        with tempfile.TemporaryDirectory() as place:
            command = [program, "--model", BASE, "--data", ROOT / "README.md", "--steps", "8", "--batch", "4", "--seqlen", "64",
                       "--lr", "0.01", "--eval-every", "100", "--device", "cpu", "--out", place, *options]
            subprocess.run(command, check=True, capture_output=True)
            final = pathlib.Path(place) / "final"
            merged = logits(load(final), ids)
            model = peft.PeftModel.from_pretrained(load(BASE), final / "adapter")
            stored = safetensors.torch.load_file(final / "adapter/adapter_model.safetensors")
            read = peft.get_peft_model_state_dict(model)
            assert read.keys() == stored.keys(), read.keys() ^ stored.keys()
            gap, moved = ((merged - other).abs().max().item() for other in (logits(model, ids), before))
            assert gap <= 1e-4 < moved / 100, (kind, gap, moved)
            print(f"{kind}: {len(stored)} tensors, logits within {gap:.1e} of the merged model, {moved:.2f} from the one before")
    print(f"{len(KINDS)} kinds of adapters are read by PEFT {peft.__version__}, transformers {transformers.__version__}")


main()
