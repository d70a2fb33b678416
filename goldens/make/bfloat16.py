"""What published models answer in bfloat16: how far rounding moves logits.

`record` is called by the scripts that make the checkpoints. It writes `bf16.safetensors`: `input_ids` (64, 17), and of each
position but the last of a row the logit of the id that follows, (64, 16), so that many logits of many tokens take little space:
`exact_logits` in float64, stored in float32; `logits` of one forward in bfloat16, by the model as its package loads it in that
dtype; and `step_logits` of a prefill of k = `prefill` ids and then id by id, (64, 16 - k), where the published steps are the
published forward.

Where there are experts, a router takes another one in bfloat16 when two are about equally good, and then errors say nothing
about rounding. Such models are asked for rows of ids whose experts stay the same in bfloat16, and also while all weights are moved
by more than rounding moves them.
"""

import numpy as np
import torch

import golden_file
import upstream

ROWS, LENGTH = 64, 17
CANDIDATES = 8192
# Rounding to bfloat16 moves a number by at most 2^-9 of it, on average by half of that; this is four times the average.
NOISE = 2**-8
RUNS = 24


def numpy(logits):
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


@torch.no_grad()
def record(folder, exact, half, answers, metadata, *, first_id=0, stepped=True):
    """`answers(model, ids, prefill)` are the logits of one forward and of the steps; `exact` is changed while this runs."""
    prefill, vocabulary = int(metadata["prefill"]), exact.config.vocab_size
    rng = np.random.Generator(np.random.PCG64(int(metadata["seed"]) + 1))
    ids = torch.tensor(rng.integers(first_id, vocabulary, (CANDIDATES if routers(exact) else ROWS, LENGTH)))
    if routers(exact):
        ids = firmly_routed(exact, half, rng, ids)
        print(f"{folder.name}: {len(ids)} of {CANDIDATES} rows keep their experts")
        assert len(ids) >= ROWS
        ids = ids[:ROWS]
    with upstream.float64():
        want, _ = following(answers(exact.double(), ids, prefill), ids)
    got, steps = following(answers(half, ids, prefill), ids)
    assert want.dtype == np.float64
    tensors = {"logits": golden_file.BFloat16(got)} | ({"step_logits": golden_file.BFloat16(steps)} if stepped else {})
    errors = [relative_rms(got, want)] + ([relative_rms(steps, want[:, prefill:])] if stepped else [])
    golden_file.write(folder / "bf16.safetensors", tensors | {
        "input_ids": ids.numpy().astype(np.uint8), "exact_logits": want.astype(np.float32),
    }, metadata | {"producer": metadata["producer"].replace("float64", "bfloat16")})
    return "bfloat16 off by " + ", ".join(f"{error:.1e}" for error in errors)


def following(answers, ids):
    """Of all logits those of the ids that come next."""
    forward, steps = answers
    targets = ids.numpy()[:, 1:, None]
    pick = lambda logits: np.take_along_axis(logits[:, :-1], targets[:, LENGTH - logits.shape[1]:], axis=2)[:, :, 0]  # noqa: E731
    return pick(forward), None if isinstance(steps, Exception) else pick(steps)


def relative_rms(got, want):
    return np.sqrt(np.square(got - want).sum() / np.square(want).sum())


def routers(model):
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def choices(model, ids):
    """The experts that each token takes, (rows, layers * seqlen * top_k)."""
    seen = []
    note = lambda _module, _input, output: seen.append(output[2].sort(dim=-1).values.reshape(len(ids), -1))  # noqa: E731
    hooks = [router.register_forward_hook(note) for router in routers(model)]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks)
    return torch.cat(seen, dim=1)


def firmly_routed(exact, half, rng, ids):
    """The rows that take the same experts in both models, and in the exact one also with noise on its weights."""
    ids = ids[(choices(half, ids) == choices(exact, ids)).all(dim=1)]
    want = choices(exact, ids)
    weights = {name: value.clone() for name, value in exact.state_dict().items()}
    for _ in range(RUNS):
        for parameter in exact.parameters():
            parameter.mul_(1 + NOISE * torch.tensor(rng.standard_normal(tuple(parameter.shape))))
        firm = (choices(exact, ids) == want).all(dim=1)
        ids, want = ids[firm], want[firm]
        exact.load_state_dict(weights)
    return ids
