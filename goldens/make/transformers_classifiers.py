"""Makes goldens/models/*_classifier and *_headless with transformers 5.23.0: a model with labels, and one without a head.

Run: python transformers_classifiers.py

As transformers_hybrids.py. `logits` of the classifier are those of the last token that is not padding: `input_ids` is padded on
the right with `pad_token_id`, `lengths` are the tokens of each row. `hidden` of the model without a head is the last hidden state of
the first row. `left_logits` and `left_hidden` are what transformers gives, at once and with an attention mask, for `left_ids`, the same
rows padded on the left.
"""

import shutil
import zlib

import transformers_hybrids as hybrids  # first: it sets the environment
from transformers_hybrids import base

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import golden_file
import upstream


def make(name, kind, config, ask):
    seed = zlib.crc32(f"models/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))
    config._attn_implementation = config._experts_implementation = "eager"
    model = kind.from_config(config).eval()
    hybrids.randomize(model, rng)
    ids = torch.tensor(rng.integers(3, config.vocab_size, (3, 9)))
    lengths = torch.tensor([9, 4, 6])
    ids[torch.arange(9)[None, :] >= lengths[:, None]] = config.pad_token_id
    left = torch.stack([row.roll(9 - int(length)) for row, length in zip(ids, lengths)])
    mask = (torch.arange(9)[None, :] >= 9 - lengths[:, None]).long()
    with torch.no_grad(), upstream.float64():
        answers = ask(model.double(), ids, lengths)
        out = model(left, attention_mask=mask, use_cache=False)
        if "logits" in answers:
            answers["left_logits"] = out.logits
            assert torch.allclose(out.logits, answers["logits"], rtol=0, atol=1e-9), name
        else:
            answers["left_hidden"] = out.last_hidden_state * mask[..., None]
            assert torch.allclose(out.last_hidden_state[:1], answers["hidden"], rtol=0, atol=1e-9), name
    folder = base.MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base.safetensors(model.half(), folder)
    tensors = {"input_ids": ids.numpy(), "lengths": lengths.numpy(), "left_ids": left.numpy()}
    golden_file.write(folder / "io.safetensors", tensors | {k: v.numpy().astype(np.float32) for k, v in answers.items()}, {
        "producer": f"transformers {type(model).__name__}, PyTorch path, float64", "producer_version": base.VERSION, "seed": str(seed),
    })
    print(name, sum(path.stat().st_size for path in folder.iterdir()), {k: tuple(v.shape) for k, v in answers.items()})


def rows(model, ids, lengths):
    """Each row alone, as transformers lets padding on the right through its state space layers."""
    return torch.cat([model(ids[i : i + 1, :n], use_cache=False).logits for i, n in enumerate(lengths.tolist())])


def main():
    make("jamba_classifier", AutoModelForSequenceClassification, hybrids.jamba(num_labels=3, num_experts=1, num_hidden_layers=2),
         lambda model, ids, lengths: {"logits": rows(model, ids, lengths)})
    make("zamba2_classifier", AutoModelForSequenceClassification, hybrids.zamba2(["linear_attention", "hybrid"], num_labels=4),
         lambda model, ids, lengths: {"logits": rows(model, ids, lengths)})
    make("zamba_classifier", AutoModelForSequenceClassification, hybrids.zamba(num_labels=2),
         lambda model, ids, lengths: {"logits": rows(model, ids, lengths)})
    make("mamba2_headless", AutoModel, base.mamba2(num_hidden_layers=1),
         lambda model, ids, lengths: {"hidden": model(ids[:1], use_cache=False).last_hidden_state})
    make("bamba_headless", AutoModel, hybrids.bamba(num_hidden_layers=2),
         lambda model, ids, lengths: {"hidden": model(ids[:1], use_cache=False).last_hidden_state})


if __name__ == "__main__":
    main()
