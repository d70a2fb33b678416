"""Makes goldens/generate/upstream_generate.safetensors with `decode` of mamba_ssm 2.3.2.post1, which is `generate` of its models.

Run: python upstream_generate.py

The file mamba_ssm/utils/generation.py runs as it is, on a model of two tables: the logits that follow tokens a, b are
`first[a] + second[b]`, multiples of 1/8, so that whoever adds them has the same bits. Each case is greedy; its options are in the
metadata under its name, as JSON. `<case>.input_ids` (rows, ids) goes in, and `<case>.teacher` (rows, ids) where there is one;
`<case>.sequences` (rows, ids) and `<case>.scores` (steps, rows, vocab) come out.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import types

import numpy as np
import torch

import golden_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "generate" / "upstream_generate.safetensors"
SEED, VOCAB, PROMPT, LENGTH = 20261201, 14, 3, 12
EOS = 5


def upstream():
    """The module alone: its package wants CUDA extensions when it is imported."""
    path = importlib.metadata.distribution("mamba_ssm").locate_file("mamba_ssm/utils/generation.py")
    spec = importlib.util.spec_from_file_location("generation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tables:
    """Takes the last two tokens into account."""

    def __init__(self, first, second):
        self.first, self.second, self.last = first, second, None

    def __call__(self, input_ids, position_ids, inference_params, num_last_tokens):
        seen = input_ids if self.last is None else torch.cat([self.last, input_ids], 1)
        self.last = input_ids[:, -1:]
        logits = self.first[seen[:, -2]] + self.second[seen[:, -1]]
        return types.SimpleNamespace(logits=logits.unsqueeze(1))


def main():
    rng = np.random.Generator(np.random.PCG64(SEED))
    first, second = (torch.tensor(rng.integers(-32, 33, (VOCAB, VOCAB)) / 8, dtype=torch.float32) for _ in range(2))
    ids = lambda rows, length: torch.tensor(rng.integers(0, VOCAB, (rows, length)))
    taught = ids(2, LENGTH)
    taught[0, 6] = EOS  # which the teacher goes on after
    cases = {
        "plain": (ids(3, PROMPT), None, {}),
        "penalty": (ids(3, PROMPT), None, {"repetition_penalty": 1.5}),
        "vocab_size": (ids(2, PROMPT) % 9, None, {"vocab_size": 9, "repetition_penalty": 1.25}),
        "eos": (ids(1, PROMPT), None, {"eos_token_id": None}),
        "teacher": (taught[:, :PROMPT], taught[:, :8], {"repetition_penalty": 1.5}),
        "teacher_and_eos": (taught[:, :PROMPT], taught, {"eos_token_id": EOS}),
    }
    decode = upstream().decode
    run = lambda input_ids, **options: decode(
        input_ids, Tables(first, second), LENGTH, vocab_size=options.pop("vocab_size", None), output_scores=True, **options
    )
    # A token that this row comes to by itself.
    cases["eos"][2]["eos_token_id"] = int(run(cases["eos"][0]).sequences[0, 7])
    tensors = {"first": first.numpy(), "second": second.numpy()}
    metadata = {
        "producer": "make/upstream_generate.py",
        "producer_version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mamba_ssm", "torch")),
        "seed": str(SEED),
        "max_length": str(LENGTH),
    }
    for name, (input_ids, teacher, options) in cases.items():
        if teacher is not None:
            tensors[f"{name}.teacher"] = teacher.numpy()
        output = run(input_ids, teacher_outputs=teacher, **options)
        tensors[f"{name}.input_ids"] = input_ids.numpy()
        tensors[f"{name}.sequences"] = output.sequences.numpy()
        tensors[f"{name}.scores"] = torch.stack(output.scores).numpy()
        metadata[name] = json.dumps(options)
        print(name, options, output.sequences.tolist())
    golden_file.write(OUT, tensors, metadata, 64 * 1024)


if __name__ == "__main__":
    main()
