"""What transformers makes of files that contradict their configuration, or of words that it passes over: what ours does, or refuses to.

Run: python check_readings.py

Each case is a model of goldens/models with another `config.json` or other tensors. What was found is written to goldens/checks; the tests
`tied_heads` and `bad_checkpoints_say_what_is_wrong` hold ours to it.
"""

import json
import pathlib
import shutil
import sys
import tempfile

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import record  # noqa: E402

LIMIT = 1e-4
MODELS = record.GOLDENS / "models"


@torch.no_grad()
def answer(name, words={}, change=lambda tensors: None):
    """Logits, and which tensors transformers missed."""
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / name
        shutil.copytree(MODELS / name, folder)
        config = json.loads((folder / "config.json").read_text()) | words
        (folder / "config.json").write_text(json.dumps(config))
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                           experts_implementation="eager", output_loading_info=True)
        ids = safetensors.torch.load_file(folder / "io.safetensors")["input_ids"]
        return model.eval()(ids, use_cache=False).logits, sorted(info["missing_keys"])


def off(got, want):
    gap = (got - want).abs().max().item()
    assert gap <= LIMIT, gap
    return gap


def main():
    found = {}
    for name, embedding in [("mamba_tied", "backbone.embeddings.weight"), ("bamba_options", "model.embed_tokens.weight")]:
        def both(tensors):
            tensors["lm_head.weight"] = tensors[embedding] * 0.5

        def alone(tensors):
            tensors["lm_head.weight"] = tensors.pop(embedding)

        want, _ = answer(name)
        _, missing = answer(name, {"tie_word_embeddings": False})
        assert missing == ["lm_head.weight"], missing
        found[name] = {
            "model": record.model(MODELS / name),
            "said to be tied, with both and the head half the embedding: its logits are half":
                {"largest_difference": off(answer(name, change=both)[0], want / 2)},
            "said to be tied, with the head alone: its logits are the same":
                {"largest_difference": off(answer(name, change=alone)[0], want)},
            "said not to be tied, without a head: made up at random, which ours refuses": {"missing": missing},
        }
    for name, word, value in [("nemotron_h", "sliding_window", 2), ("zamba2", "use_long_context", True)]:
        gap = off(answer(name, {word: value})[0], answer(name)[0])
        found[name] = {"model": record.model(MODELS / name),
                       f"{word} {json.dumps(value)}: passed over, which ours refuses": {"largest_difference": gap}}
    record.write("check_readings", by=record.versions("transformers", "torch", "safetensors"), limit=LIMIT, found=found,
                 what="logits of transformers' models from files that contradict their configuration or have words that it passes over")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
