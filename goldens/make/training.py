"""Makes goldens/train/*.safetensors: 20 optimizer steps of transformers' models, from the tiny checkpoints of models/.

Run: python training.py

Mamba-1, Mamba-2, and a hybrid with attention of each (jamba_dense, bamba).

Each file begins with the weights of the committed checkpoint of the same name. `ids` (20, batch, length) are the batches; each
id predicts the next, but for the last row, of which only the first `short` ids exist. `losses` and `norms` (20,) are the mean
loss before each step and the norm of the gradients, `lrs` the learning rates, `final.<name>` the weights after the last step: all
of PyTorch in float32, with torch.optim.AdamW and clip_grad_norm_, no weight decay on A_log, D, dt_bias, norms and biases.
`grad.<name>` is the gradient of the loss of the first batch in float64. The float32 run must agree with the same run in float64.
"""

import pathlib
import sys
import zlib

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import golden_file  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
VERSION = upstream.version("transformers", "torch")
STEPS, BATCH, LENGTH, SHORT = 20, 3, 20, 9
PEAK, WARMUP, CLIP, DECAY, BETAS, EPS = 3e-3, 4, 1.0, 0.1, (0.9, 0.95), 1e-8
MODELS = ["mamba_tied", "mamba_untied_bias", "mamba2_g1_untied", "mamba2_g2_tied_bias", "jamba_dense", "bamba"]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def loss(model, ids):
    labels = ids[:, 1:].clone()
    labels[-1, SHORT - 1 :] = -100
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def decays(name):
    return not (name.split(".")[-1] in ("A_log", "D", "dt_bias", "bias") or "norm" in name)


def train(model, batches):
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if decays(n)], "weight_decay": DECAY},
              {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)
    losses, norms, lrs, grads = [], [], [], None
    for step, ids in enumerate(batches):
        lr = PEAK * min(1.0, (step + 1) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        value = loss(model, ids)
        value.backward()
        if grads is None:
            grads = {n: p.grad.detach().clone().numpy() for n, p in named}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(value))
        lrs.append(lr)
    return np.array(losses), np.array(norms), np.array(lrs), grads, {n: p.detach().numpy().copy() for n, p in named}


def make(name):
    seed = zlib.crc32(f"train/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))

    def load(dtype):
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / "models" / name, dtype=dtype).train()
        # Some models would leave the row of the padding token without a gradient; here each id is a token.
        model.get_input_embeddings().padding_idx = None
        return model

    model = load(torch.float32)
    # Sequences with a rule, so that there is something to learn: each id is a function of the one before, most of the time.
    vocab = model.config.vocab_size
    ids = rng.integers(0, vocab, (STEPS, BATCH, LENGTH))
    for position in range(1, LENGTH):
        follow = rng.random((STEPS, BATCH)) < 0.8
        ids[:, :, position] = np.where(follow, (ids[:, :, position - 1] * 7 + 3) % vocab, ids[:, :, position])
    batches = torch.tensor(ids)
    losses, norms, lrs, _, final = train(model, batches)
    double = load(torch.float32).double()
    with upstream.float64():
        exact = train(double, batches)
    assert np.abs(losses - exact[0]).max() < 2e-5, np.abs(losses - exact[0]).max()
    gap = max(np.abs(final[key] - exact[4][key]).max() for key in final)
    tensors = {"ids": ids, "losses": losses, "norms": norms, "lrs": lrs}
    tensors |= {f"final.{key}": value for key, value in final.items()}
    tensors |= {f"grad.{key}": value for key, value in exact[3].items()}
    golden_file.write(GOLDENS / "train" / f"{name}.safetensors", tensors, {
        "producer": f"transformers {type(model).__name__} and torch.optim.AdamW, PyTorch path", "producer_version": VERSION,
        "seed": str(seed), "short": str(SHORT), "clip": str(CLIP), "weight_decay": str(DECAY), "beta1": str(BETAS[0]),
        "beta2": str(BETAS[1]), "eps": str(EPS),
    })
    size = (GOLDENS / "train" / f"{name}.safetensors").stat().st_size
    print(f"{name}: {size} bytes, loss {losses[0]:.4f} to {losses[-1]:.4f}, float32 off by "
          f"{np.abs(losses - exact[0]).max():.1e} in losses, {gap:.1e} in weights")


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in MODELS:
        make(name)
