"""Makes goldens/models/{mamba,mamba2}_* with transformers 5.23.0: tiny random checkpoints and what the models answer.

Run: python transformers_models.py

Every parameter is random, norms, biases, A_log, D and dt_bias too, so that no mistake hides behind a one or a zero. The
plain PyTorch path of transformers is the one that runs: mamba_ssm, causal_conv1d and mambapy are made unimportable first.

io.safetensors holds `input_ids` (2, l) int64, `logits` (2, l, vocab) of one forward, and `step_logits` (2, l - k, vocab):
the first k = `prefill` ids at once, then one id at a time with the cache. Numbers are computed in float64, where the casts
to float32 inside the models are made casts to float64, and stored in float32. The float32 model must agree to 1e-4 of the
largest logit, and so must the steps with the one forward. Where they do not, the steps are left out and `step_logits` in
the metadata says why: transformers, like state-spaces, does not apply `time_step_limit` to single steps.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import zlib

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import upstream  # noqa: E402  before torch: it sets the environment

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM  # noqa: E402

import bfloat16  # noqa: E402
import golden_file  # noqa: E402

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
VERSION = upstream.version("transformers", "torch")
LENGTH = 23
LIMIT = 300 * 1024
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def randomize(model, rng):
    """Fills every parameter; the scale goes by the name."""
    filled = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape, leaf = tuple(parameter.shape), name.split(".")[-1]
            normal = rng.standard_normal(shape)
            if leaf == "A_log":
                values = np.log(rng.uniform(0.5, 8, shape))
            elif leaf == "D":
                values = 1 + 0.5 * normal
            elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
                dt = np.exp(rng.uniform(np.log(0.01), np.log(0.5), shape))
                values = np.log(np.expm1(dt))
            elif "norm" in name:
                values = 1 + 0.3 * normal
            elif name.endswith("conv1d.weight"):
                values = 0.5 * normal
            elif leaf == "bias":
                values = 0.3 * normal
            elif "embeddings" in name:
                values = normal
            else:
                values = normal / np.sqrt(shape[-1])
            parameter.copy_(torch.tensor(values))
            filled.add(name)
    assert filled == {name for name, _ in model.named_parameters()}


@torch.no_grad()
def answers(model, ids, prefill):
    logits = model(ids, use_cache=False).logits
    first = model(ids[:, :prefill], use_cache=True)
    cache, steps = first.cache_params, []
    for position in range(prefill, ids.shape[1]):
        out = model(ids[:, position : position + 1], cache_params=cache, use_cache=True)
        cache = out.cache_params
        steps.append(out.logits)
    return tuple(bfloat16.numpy(values) for values in (logits, first.logits, torch.cat(steps, dim=1)))


def relative(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


def make(name, config, prefill, save, *, steps=None):
    """Builds, asks, checks and saves one model; `steps`: why its cached steps are not to be trusted."""
    seed = zlib.crc32(f"models/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))
    kind = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[config.model_type]
    model = kind(config).eval()
    randomize(model, rng)
    ids = torch.tensor(rng.integers(0, config.vocab_size, (2, LENGTH)))

    single = answers(model, ids, prefill)
    with upstream.float64():
        double = answers(model.double(), ids, prefill)
    assert all(values.dtype == np.float64 for values in double)
    model.float()
    for got, want in zip(single, double):
        assert relative(got, want) < 1e-4, (name, relative(got, want))
    logits, prefix, stepped = double
    assert relative(prefix, logits[:, :prefill]) < 1e-12, name
    off = relative(stepped, logits[:, prefill:])
    assert (off < 1e-10) if steps is None else (off > 1e-2), (name, off)

    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(model, folder)
    tensors = {"input_ids": ids.numpy(), "logits": logits.astype(np.float32)}
    if steps is None:
        tensors["step_logits"] = stepped.astype(np.float32)
    metadata = {
        "producer": f"transformers {kind.__name__}, PyTorch path, float64", "producer_version": VERSION, "seed": str(seed),
        "prefill": str(prefill), "step_logits": "after prefill, one id at a time with the cache" if steps is None else steps,
    }
    golden_file.write(folder / "io.safetensors", tensors, metadata)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want), name
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rounding = bfloat16.record(folder, again, half, lambda *ask: answers(*ask)[::2], metadata, stepped=steps is None)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= LIMIT, (name, size)
    print(f"{name}: {size} bytes, {rounding}, float32 off by {relative(single[0], logits):.1e}, steps by {off:.1e}, "
          f"largest logit {np.abs(logits).max():.1f}, files {sorted(path.name for path in folder.iterdir())}")


def safetensors(model, folder, shard="1GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)


def sharded(model, folder):
    safetensors(model, folder, "24KB")
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("model-*.safetensors"))) >= 2


def pickled(model, folder):
    with tempfile.TemporaryDirectory() as scratch:
        safetensors(model, pathlib.Path(scratch))
        shutil.copy(pathlib.Path(scratch) / "config.json", folder)
    # The state dictionary as it is: a tied head is there twice, on one storage.
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def pickled_in_shards(model, folder):
    """The layout transformers 4 wrote, with its `Infinity` (no valid JSON) in the config; transformers 5 still reads it."""
    pickled(model, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    config["time_step_limit"] = [0.0, float("inf")]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "pytorch_model.bin").unlink()
    state = model.state_dict()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    place = {key: files[0] if "layers.0" in key or "embeddings" in key else files[1] for key in state}
    for file in files:
        torch.save({key: state[key].clone() for key in state if place[key] == file}, folder / file)
    index = {"metadata": {"total_size": sum(v.numel() * v.element_size() for v in state.values())}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def mamba(**changes):
    return MambaConfig(**dict(vocab_size=61, hidden_size=24, state_size=6, num_hidden_layers=2, expand=2, conv_kernel=4,
                              pad_token_id=0, bos_token_id=0, eos_token_id=0) | changes)


def mamba2(**changes):
    return Mamba2Config(**dict(vocab_size=61, hidden_size=24, state_size=6, num_hidden_layers=2, expand=2, num_heads=8,
                               head_dim=6, n_groups=1, conv_kernel=4, chunk_size=8, pad_token_id=1, bos_token_id=0,
                               eos_token_id=2) | changes)


def main():
    make("mamba_tied", mamba(), 7, safetensors)
    make("mamba_untied_bias", mamba(tie_word_embeddings=False, use_bias=True, time_step_rank=3, num_hidden_layers=3), 2,
         safetensors)
    make("mamba_no_conv_bias", mamba(use_conv_bias=False, conv_kernel=3, layer_norm_epsilon=1e-2, residual_in_fp32=False,
                                     expand=3, state_size=5), 1, safetensors)
    make("mamba_bin", mamba(use_bias=True), 9, pickled)
    make("mamba2_g1_untied", mamba2(), 7, safetensors)
    make("mamba2_g2_tied_bias", mamba2(n_groups=2, tie_word_embeddings=True, use_bias=True, num_heads=4, head_dim=12), 2,
         safetensors)
    make("mamba2_g8", mamba2(n_groups=8, use_conv_bias=False, conv_kernel=3, layer_norm_epsilon=1e-2, chunk_size=5,
                             residual_in_fp32=False), 1, safetensors)
    make("mamba2_time_step_limit", mamba2(n_groups=2, time_step_limit=(0.02, 0.08)), 7, safetensors,
         steps="left out: transformers does not apply time_step_limit to single steps")
    make("mamba2_sharded", mamba2(num_hidden_layers=3), 9, sharded)
    make("mamba2_bin_sharded", mamba2(n_groups=4, chunk_size=256), 12, pickled_in_shards)


if __name__ == "__main__":
    main()
