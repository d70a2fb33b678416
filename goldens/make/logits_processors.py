"""Makes goldens/generate/logits_processors.safetensors with the logits processors of transformers 5.23.0.

Run: python logits_processors.py

`logits` (rows, vocab) float32 and `history` (rows, ids) int64 go in. Each other tensor is named `<processor>.<parameter>` and
is the processed logits, -inf where an id was removed; `chain.*` is what `generate` would apply, in its order, with the
parameters in the metadata. Rows: 0 and 1 random; 2 random with ties at many places; 3 peaked, one id far above the rest;
4 all equal but a few. Where equal logits straddle the border of top_p, the kept one among them depends on the sort: such
rows are listed in the metadata under `ties.<name>`, and there only the number of kept ids is defined.
"""

import pathlib
import sys

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import golden_file  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent.parent / "generate" / "logits_processors.safetensors"
SEED, ROWS, VOCAB = 20240521, 5, 50

CASES = [
    (TemperatureLogitsWarper, "temperature", (0.5, 0.7, 1.0, 1.5)),
    (TopKLogitsWarper, "top_k", (1, 2, 5, 20, 50, 100)),
    (TopPLogitsWarper, "top_p", (0.0, 0.1, 0.5, 0.9, 0.95, 1.0)),
    (MinPLogitsWarper, "min_p", (0.0, 0.02, 0.1, 0.5, 1.0)),
    (TypicalLogitsWarper, "typical", (0.1, 0.2, 0.5, 0.9, 0.95)),
    (RepetitionPenaltyLogitsProcessor, "repetition_penalty", (0.8, 1.0, 1.2, 1.5)),
]
CHAINS = {  # in the order of generate: repetition_penalty, temperature, top_k, top_p, min_p, typical
    "chat": {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "min_p": {"repetition_penalty": 1.1, "temperature": 1.3, "min_p": 0.05},
    "all": {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    "typical": {"repetition_penalty": 1.1, "temperature": 1.5, "top_k": 40, "typical": 0.8},
}


def inputs():
    rng = np.random.Generator(np.random.PCG64(SEED))
    logits = (2.5 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    logits[2] = np.round(logits[2] * 2) / 2  # many ties, at the border of top_k 5 and 20 as well
    logits[3, 17] = 40.0
    logits[4] = 0.25
    logits[4, [3, 30]] = (1.5, -1.5)
    history = rng.integers(0, VOCAB, (ROWS, 12))
    history[:, 5] = history[:, 2]  # ids that repeat are penalised once
    history[:, 9] = history[:, 2]
    history[0, :2] = (int(logits[0].argmax()), int(logits[0].argmin()))  # one positive, one negative logit for certain
    return torch.tensor(logits), torch.tensor(history)


def straddled(before, after):
    """Rows in which one of several equal logits was removed and another kept."""
    rows = []
    for row in range(ROWS):
        kept = torch.isfinite(after[row])
        values = before[row]
        if set(values[kept].tolist()) & set(values[~kept].tolist()):
            rows.append(str(row))
    return rows


def main():
    logits, history = inputs()
    processors = {name: kind for kind, name, _ in CASES}
    tensors = {"logits": logits.numpy(), "history": history.numpy()}
    metadata = {"producer": "transformers logits processors", "producer_version": upstream.version("transformers", "torch"),
                "seed": str(SEED), "rows": "random, random, many ties, peaked, nearly all equal"}

    def apply(label, steps):
        scores, wide, rows = logits.clone(), logits.double(), []
        for name, value in steps.items():
            processor, before = processors[name](value), scores
            scores, wide = processor(history, scores), processor(history, wide)
            if name in ("top_k", "top_p", "min_p", "typical"):
                rows += [row for row in straddled(before, scores) if row not in rows]
            # What is removed must not hang on the last bit: float64 agrees, but for ties on the border.
            clear = [row for row in range(ROWS) if str(row) not in rows]
            assert torch.equal(torch.isfinite(scores)[clear], torch.isfinite(wide)[clear]), label
            assert torch.equal(torch.isfinite(scores).sum(-1), torch.isfinite(wide).sum(-1)), label
        tensors[label] = scores.numpy()
        if rows:
            metadata[f"ties.{label}"] = ",".join(rows)

    for _, name, values in CASES:
        for value in values:
            apply(f"{name}.{value}", {name: value})
    for label, steps in CHAINS.items():
        apply(f"chain.{label}", steps)
        metadata[f"chain.{label}"] = " ".join(f"{name}={value}" for name, value in steps.items())
    golden_file.write(OUT, tensors, metadata, 64 * 1024)
    for label in tensors:
        kept = np.isfinite(tensors[label]).sum(-1)
        print(f"{label}: kept {kept}", "ties in rows " + metadata[f"ties.{label}"] if f"ties.{label}" in metadata else "")


if __name__ == "__main__":
    main()
