"""Makes goldens/gguf with the `gguf` package of llama.cpp: models in GGUF, and a tensor of every type with its values.

Run: python gguf_files.py, after transformers_models.py

`<name>.gguf` holds the checkpoint of goldens/models/<name> in f32, with the names of the package's own table and with
what llama.cpp's converter does to tensors: A = -exp(A_log), the convolution without its middle axis, A and D of Mamba-2
with an axis more, the gated norm in groups. Its logits are those of goldens/models/<name>/io.safetensors.

`<arch>_quantized.gguf` is a new small model with matrices of several quantized types, and `<arch>_quantized.safetensors`
what transformers answers with the values that the package dequantizes them to: `input_ids` and `logits`, in float64.

`types.gguf` has a tensor of random blocks for each type, `types.safetensors` the package's values of them.
"""

import pathlib
import sys
import zlib

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import upstream  # noqa: E402  before torch: it sets the environment

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gguf import GGMLQuantizationType as Type  # noqa: E402
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig  # noqa: E402

import golden_file  # noqa: E402
from transformers_models import relative  # noqa: E402
import transformers_models  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
VERSION = upstream.version("gguf", "transformers", "torch")
ARCHES = {"mamba": gguf.MODEL_ARCH.MAMBA, "mamba2": gguf.MODEL_ARCH.MAMBA2}


def describe(writer, config):
    """The keys that llama.cpp's converter writes."""
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(int(config.expand * config.hidden_size))
    writer.add_ssm_state_size(config.state_size)
    if config.model_type == "mamba":
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_dt_b_c_rms(False)
    else:
        writer.add_ssm_time_step_rank(config.num_heads)
        writer.add_ssm_group_count(config.n_groups)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def stored(name, tensor, config):
    """A tensor as the converter stores it, in f32."""
    values = tensor.float().numpy()
    if name.endswith(".A_log"):
        values = (-torch.exp(tensor.float())).numpy()
    if name.endswith("conv1d.weight"):
        values = values.squeeze()
    if config.model_type == "mamba2":
        if name.endswith((".A_log", ".D")):
            values = values.reshape(-1, 1)
        if name.endswith("mixer.norm.weight"):
            values = values.reshape(config.n_groups, -1)
    return np.ascontiguousarray(values)


def write_model(path, model, types=lambda name: Type.F32):
    """Writes a model; returns the values that its quantized tensors dequantize to, by name."""
    config, changed = model.config, {}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHES[config.model_type]])
    describe(writer, config)
    names = gguf.get_tensor_name_map(ARCHES[config.model_type], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        asked = name.removesuffix(".dt_bias") + ".dt_proj.bias" if name.endswith(".dt_bias") else name
        target = names.get_name(asked, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        values, kind = stored(name, tensor, config), types(name)
        if kind != Type.F32:
            data = gguf.quantize(values, kind)
            changed[name] = gguf.dequantize(data, kind).reshape(values.shape)
            writer.add_tensor(target, data, raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changed


def models():
    for name in ["mamba_tied", "mamba_untied_bias", "mamba_no_conv_bias", "mamba2_g1_untied", "mamba2_g2_tied_bias", "mamba2_g8"]:
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / "models" / name, dtype=torch.float32).eval()
        path = GOLDENS / "gguf" / f"{name}.gguf"
        write_model(path, model)
        print(f"{path.name}: {path.stat().st_size} bytes")


def quantized(name, config, types):
    seed = zlib.crc32(f"gguf/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    transformers_models.randomize(model, rng)
    ids = torch.tensor(rng.integers(0, config.vocab_size, (2, 17)))
    before = model(ids, use_cache=False).logits
    used = set()

    def kind(tensor):
        for suffix, value in types.items():
            if tensor.endswith(suffix):
                used.add(suffix)
                return value
        return Type.F32

    path = GOLDENS / "gguf" / f"{name}.gguf"
    changed = write_model(path, model, kind)
    assert used == set(types), (name, set(types) - used)
    with torch.no_grad():
        for tensor, values in changed.items():
            model.state_dict()[tensor].copy_(torch.tensor(values))
        with upstream.float64():
            logits = model.double()(ids, use_cache=False).logits.numpy()
    off = relative(before.detach().numpy(), logits)
    assert 1e-3 < off < 1, (name, off)
    golden_file.write(path.with_suffix(".safetensors"), {"input_ids": ids.numpy(), "logits": logits.astype(np.float32)}, {
        "producer": "gguf; transformers, float64", "producer_version": VERSION, "seed": str(seed),
    })
    print(f"{path.name}: {path.stat().st_size} bytes, logits moved by {off:.1e}")


def blocks(kind, count, rng):
    """Random blocks whose scales are of moderate size, some negative, one tiny."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (count, width), dtype=np.uint8)
    halves = {Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
              Type.Q4_1: [0, 2], Type.Q5_1: [0, 2]}.get(kind, [0])
    if kind == Type.MXFP4:
        data[:, 0] = rng.integers(100, 150, count)
        data[:4, 0] = [0, 1, 2, 251]
        return data
    for at in halves:
        scales = rng.standard_normal(count).astype(np.float16)
        scales[0] = np.float16(6e-8)  # the smallest there is
        data[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    return data


def types():
    seed = zlib.crc32(b"gguf/types")
    rng = np.random.Generator(np.random.PCG64(seed))
    path = GOLDENS / "gguf" / "types.gguf"
    writer, values = gguf.GGUFWriter(path, "test"), {}
    for kind in [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
                 Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4]:
        size, width = gguf.GGML_QUANT_SIZES[kind]
        data = blocks(kind, 1024 // size, rng).reshape(2, -1)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        values[kind.name] = gguf.dequantize(data, kind)
        assert values[kind.name].shape == (2, 512) and np.isfinite(values[kind.name]).all(), kind
    plain = rng.standard_normal((2, 512)).astype(np.float32)
    for kind in [Type.F32, Type.F16, Type.BF16]:
        data = gguf.quantize(plain, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        values[kind.name] = gguf.dequantize(data, kind)
    writer.add_tensor("F64", plain.astype(np.float64))
    values["F64"] = plain
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    golden_file.write(path.with_suffix(".safetensors"), values, {
        "producer": "gguf", "producer_version": VERSION, "seed": str(seed),
    })
    print(f"{path.name}: {path.stat().st_size} bytes, {len(values)} types")


def main():
    (GOLDENS / "gguf").mkdir(exist_ok=True)
    models()
    quantized("mamba_quantized", MambaConfig(
        vocab_size=61, hidden_size=32, state_size=6, num_hidden_layers=2, expand=2, conv_kernel=4, time_step_rank=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=0), {
        "embeddings.weight": Type.Q8_0, "in_proj.weight": Type.Q5_0, "x_proj.weight": Type.Q4_1, "dt_proj.weight": Type.BF16,
        "out_proj.weight": Type.F16})
    quantized("mamba2_quantized", Mamba2Config(
        vocab_size=61, hidden_size=32, state_size=6, num_hidden_layers=2, expand=2, num_heads=8, head_dim=8, n_groups=2,
        conv_kernel=4, chunk_size=8, pad_token_id=1, bos_token_id=0, eos_token_id=2, tie_word_embeddings=False), {
        "embeddings.weight": Type.Q4_0, "layers.0.mixer.in_proj.weight": Type.Q5_1, "layers.1.mixer.in_proj.weight": Type.MXFP4,
        "out_proj.weight": Type.Q8_0, "lm_head.weight": Type.F16})
    types()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
