"""Makes goldens/generate/token_rules.safetensors with the processors of transformers 5.23.0 that allow and forbid tokens.

Run: python token_rules.py

`logits` (rows, vocab) float32 and `history` (rows, ids) int64 go in; the first 4 ids of a history are the prompt. Each other
tensor is what one processor makes of the logits, -inf where it forbids; its parameter is in the metadata under its name,
as JSON. Histories are random ids from an alphabet of 4, so that n-grams repeat.
"""

import json
import pathlib
import sys

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import golden_file  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent.parent / "generate" / "token_rules.safetensors"
SEED, ROWS, VOCAB, LENGTH, PROMPT = 20261122, 6, 12, 14, 4
BANNED = [[7], [0, 5], [1, 5], [2, 6], [3, 6], [0, 1, 8], [2, 3, 9], [1, 1, 10]]
BIAS = [[3, 1.5], [0, -2.25], [11, 4.0]]


def cases():
    for n in (1, 2, 3, 4):
        yield f"no_repeat_ngram.{n}", n, NoRepeatNGramLogitsProcessor(n)
    yield "banned_tokens", BANNED, NoBadWordsLogitsProcessor(BANNED, eos_token_id=[VOCAB + 1])
    yield "suppressed", [1, 4, 9], SuppressTokensLogitsProcessor([1, 4, 9], device="cpu")
    yield "logit_bias", BIAS, SequenceBiasLogitsProcessor([[[id], bias] for id, bias in BIAS])
    for least in (10, 11):
        processor = MinNewTokensLengthLogitsProcessor(PROMPT, least, [2, 8], device="cpu")
        yield f"min_new_tokens.{least}", [least, [2, 8]], processor
    # Forced when one token was read, or as the last: our places count from the end of the prompt.
    yield "forced_last", [[LENGTH - PROMPT, 6]], ForcedEOSTokenLogitsProcessor(LENGTH + 1, 6, device="cpu")
    yield "forced_first", [[0, 6]], ForcedBOSTokenLogitsProcessor(6)


def main():
    rng = np.random.Generator(np.random.PCG64(SEED))
    logits = torch.tensor((2.5 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32))
    history = torch.tensor(rng.integers(0, 4, (ROWS, LENGTH)))
    tensors = {"logits": logits.numpy(), "history": history.numpy()}
    metadata = {"producer": "transformers logits processors", "producer_version": upstream.version("transformers", "torch"),
                "seed": str(SEED), "prompt": str(PROMPT)}
    for name, parameter, processor in cases():
        ids = history[:, :1] if name == "forced_first" else history
        tensors[name] = processor(ids, logits.clone()).numpy()
        metadata[name] = json.dumps(parameter)
        print(f"{name}: kept {np.isfinite(tensors[name]).sum(-1)}")
    golden_file.write(OUT, tensors, metadata, 64 * 1024)


if __name__ == "__main__":
    main()
