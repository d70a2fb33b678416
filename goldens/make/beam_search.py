"""Makes goldens/generate/beam_search.safetensors with `generate(num_beams=...)` of transformers 5.23.0, in float64.

Run: python beam_search.py

`prompt` int64 is the prompt of every case, cut to its length. `cases`, in the metadata, is a JSON list; `<i>.<rank>` are the
tokens that case i found, the one that ended the text included, and `<i>.scores` their scores, best first. A case is left out
where two texts are so close that rounding decides.
"""

import itertools
import json
import pathlib
import sys

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import golden_file  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
SEED, CLOSE = 20261123, 2e-4


def found(model, prompt, case):
    eos = case["eos"] or None
    output = model.generate(
        prompt[:, : case["prompt"]],
        num_beams=case["beams"],
        num_return_sequences=case["beams"],
        max_new_tokens=case["max_new_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping={"true": True, "false": False, "never": "never"}[case["early_stopping"]],
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for row in output.sequences[:, case["prompt"] :].tolist():
        ends = [i for i, id in enumerate(row) if id in case["eos"]]
        texts.append(row[: ends[0] + 1] if ends else row[: case["max_new_tokens"]])
    return texts, output.sequences_scores.double().numpy()


def main():
    rng = np.random.Generator(np.random.PCG64(SEED))
    prompt = torch.tensor(rng.integers(0, 40, (1, 8)))
    cases, tensors = [], {"prompt": prompt[0].numpy()}
    for name in ("mamba_untied_bias", "mamba2_g8"):
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / "models" / name, dtype=torch.float64).eval()
        model.generation_config.eos_token_id = None
        for beams, penalty, early in itertools.product((2, 4), (0.0, 1.0, 2.0), ("true", "false", "never")):
            first, _ = found(model, prompt, {"prompt": 8, "beams": beams, "max_new_tokens": 8, "length_penalty": 1.0, "early_stopping": "false", "eos": []})
            # Tokens that beams do come to, so that texts end.
            eos = sorted({text[at] for text, at in zip(first * 2, (2, 4, 3, 6, 5, 7))})
            case = {"model": name, "prompt": 5 + beams % 3, "beams": beams, "max_new_tokens": 12, "length_penalty": penalty,
                    "early_stopping": early, "eos": eos}
            texts, scores = found(model, prompt, case)
            if np.min(np.abs(np.diff(scores))) < CLOSE or len({tuple(text) for text in texts}) < beams:
                continue
            for rank, text in enumerate(texts):
                tensors[f"{len(cases)}.{rank}"] = np.array(text)
            tensors[f"{len(cases)}.scores"] = scores
            cases.append(case)
            print(case, [len(text) for text in texts], scores)
    metadata = {"producer": "transformers beam search", "producer_version": upstream.version("transformers", "torch"),
                "seed": str(SEED), "cases": json.dumps(cases)}
    golden_file.write(GOLDENS / "generate" / "beam_search.safetensors", tensors, metadata, 64 * 1024)


if __name__ == "__main__":
    main()
