"""Has llama.cpp itself read the GGUF files that the example `convert` writes, and compares its logits with those of goldens/models.

Run: python check_llama_cpp.py ../../target/release/examples/convert [FOLDER ...], for folders beside those of goldens/models

In an environment with numpy, safetensors, gguf, cffi, xllamacpp 2026.10.11549, whose library has llama.cpp b11549 and its C interface, and
llama-cpp-py-sync 0.11548, which has the declarations of that interface. Files are read as they are; since the tiny models have no
tokenizer, that there is none is said beside them, as is the size of the vocabulary. What was found, and of which bytes, is written to
goldens/checks.
"""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import cffi
import numpy as np
import safetensors.numpy
import xllamacpp

import record

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = GOLDENS.parent / "examples" / "models"
LIMIT = 1e-4
# How far each type may move the logits of the trained models.
TYPES = {"f32": LIMIT, "f16": 1e-2, "bf16": 0.1, "q8_0": 0.3, "q6_k": 0.3, "q5_k": 1, "q5_1": 1, "q5_0": 1, "q4_k": 2, "q4_1": 2,
         "q4_0": 2, "q3_k": 3, "q2_k": 3}
# What llama.cpp cannot run, by what it says.
BIASES, CONVOLUTION, EXPANSION = "wrong number of tensors", "ssm_conv1d.bias' not found", "only an expansion factor of 2"
REFUSED = {
    "falcon_h1_gate_norm": BIASES,  # of the projections of Mamba-2, as in the others
    "jamba_dense": CONVOLUTION,  # without a bias
    "lfm2_bias": BIASES,  # of the convolution and its projections
    "mamba2_g2_tied_bias": BIASES,
    "mamba2_g8": CONVOLUTION,
    "mamba_bin": BIASES,
    "mamba_no_conv_bias": EXPANSION,
    "mamba_untied_bias": BIASES,
    "nemotron_h_latent_moe": BIASES,  # of the experts
    "nemotron_h_moe": BIASES,
    "ss_mamba1_options": EXPANSION,
}
# llama.cpp has one epsilon for all norms; FalconMamba has another one for those of dt, B and C.
ONE_EPSILON = {"falcon_mamba_tied": 1e-2}

bindings = pathlib.Path(importlib.util.find_spec("llama_cpp_py_sync").submodule_search_locations[0]) / "_cffi_bindings.py"
ffi = cffi.FFI()
ffi.cdef(re.search(r'_LLAMA_H_CDEF = """(.*?)"""', bindings.read_text(), re.DOTALL).group(1))
lib = ffi.dlopen(str(pathlib.Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
said = []


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def note(level, text, _):
    if level == lib.GGML_LOG_LEVEL_ERROR:
        said.append(ffi.string(text).decode(errors="replace"))


def load(path, vocabulary=None):
    """Of a file without a tokenizer if a vocabulary is given."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    said.clear()
    if vocabulary is None:
        return lib.llama_model_load_from_file(str(path).encode(), params)
    architecture = re.search(rb"general\.architecture.{12}([a-z0-9_-]+?)(?=.\0{7}|\0)", path.read_bytes(), re.DOTALL)
    keys = {"tokenizer.ggml.model": "none", f"{architecture.group(1).decode()}.vocab_size": vocabulary}
    overrides = ffi.new("struct llama_model_kv_override[]", len(keys) + 1)
    for override, (key, value) in zip(overrides, keys.items()):
        override.key = key.encode()
        if isinstance(value, str):
            override.tag, override.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            override.tag, override.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
    params.kv_overrides = overrides
    return lib.llama_model_load_from_file(str(path).encode(), params)


def logits(model, ids, prefill, vocabulary):
    """Of one sequence: the first `prefill` ids at once, then id by id."""
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context, out = lib.llama_init_from_model(model, params), []
    assert context != ffi.NULL, said
    for start, end in [(0, prefill)] + [(i, i + 1) for i in range(prefill, len(ids))]:
        batch = lib.llama_batch_init(end - start, 0, 1)
        batch.n_tokens = end - start
        for i, token in enumerate(ids[start:end]):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        assert lib.llama_decode(context, batch) == 0, said
        for i in range(end - start):
            out.append(np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, i), 4 * vocabulary), np.float32).copy())
        lib.llama_batch_free(batch)
    lib.llama_free(context)
    return np.stack(out)


def retold(model, ids):
    """The ids that llama.cpp's tokenizer makes of the text that it makes of ids."""
    vocabulary, text, out = lib.llama_model_get_vocab(model), ffi.new("char[]", 4096), ffi.new("int32_t[]", 4096)
    length = lib.llama_detokenize(vocabulary, ffi.new("int32_t[]", ids), len(ids), text, 4096, False, True)
    return list(out[0 : lib.llama_tokenize(vocabulary, text, length, out, 4096, False, False)])


def trained(program):
    """The trained models, with their tokenizer, in every type: ids, the logits of the prompt, and the greedy tokens."""
    found = {}
    for name, folder, answers in [("mamba-shakespeare", GOLDENS / "models", "io"), ("mamba2-shakespeare", EXAMPLES, "ieee")]:
        golden = GOLDENS / "models" / name
        ids = safetensors.numpy.load_file(golden / "io.safetensors")["greedy_ids"].ravel().tolist()[:64]
        want = safetensors.numpy.load_file(golden / f"{answers}.safetensors")["prompt_logits"][0]
        for kind, limit in TYPES.items():
            with tempfile.TemporaryDirectory() as place:
                path = pathlib.Path(place) / "model.gguf"
                subprocess.run([program, "--quiet", "--model", folder / name, "--to", path, "--save-as", kind], check=True, capture_output=True)
                model = load(path)
                assert model != ffi.NULL, (name, kind, said)
            got = logits(model, ids, len(ids), want.shape[1])
            gap = float(np.abs(got[: len(want)] - want).max())
            greedy = [int(got[i].argmax()) == ids[i + 1] for i in range(len(want) - 1, len(ids) - 1)]
            print(f"{name} {kind}: llama.cpp off by {gap:.0e}, {sum(greedy)} of {len(greedy)} greedy tokens", flush=True)
            assert retold(model, ids) == ids and gap <= limit and sum(greedy) >= len(greedy) - 4, (name, kind)
            lib.llama_model_free(model)
            found.setdefault(name, {"model": record.model(folder / name)})[kind] = {
                "off_by": gap, "limit": limit, "greedy_tokens": sum(greedy), "of": len(greedy)}
    return found


def main():
    lib.llama_log_set(note, ffi.NULL)
    lib.llama_backend_init()
    program, found, wrong, refused, wordless = pathlib.Path(sys.argv[1]).resolve(), {}, [], {}, []
    for source in [*sorted((GOLDENS / "models").iterdir()), *map(pathlib.Path, sys.argv[2:])]:
        if "shakespeare" in source.name or source.name.endswith(("_classifier", "_headless")):
            continue
        io = safetensors.numpy.load_file(source / "io.safetensors")
        ids, want = io["input_ids"], io["logits"]
        with safetensors.safe_open(source / "io.safetensors", "np") as file:
            prefill = int(file.metadata()["prefill"])
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        with tempfile.TemporaryDirectory() as place:
            path = pathlib.Path(place) / "model.gguf"
            command = [program, "--quiet", "--model", source, "--to", path, "--save-as", "f32"]
            if subprocess.run(command, capture_output=True).returncode != 0:
                print(f"{source.name}: no words in GGUF")
                wordless.append(source.name)
                continue
            head = record.head_of_gguf(path)
            model = load(path, want.shape[2])
            if model == ffi.NULL:
                message = "".join(said)
                expected = source.name in REFUSED and REFUSED[source.name] in message
                wrong += [] if expected else [source.name]
                refused[source.name] = message.strip().splitlines()[0].replace(place, "")
                print(f"{source.name}: refused: {refused[source.name]}")
                continue
        gap = 0.0
        for split in (ids.shape[1], prefill):
            got = np.stack([logits(model, row.tolist(), split, want.shape[2]) for row in ids])
            gap = max(gap, float(np.abs(got - want)[..., :vocabulary].max()))
        lib.llama_model_free(model)
        limit = ONE_EPSILON.get(source.name, LIMIT)
        wrong += [] if gap <= limit else [source.name]
        gap = {"largest_difference": gap} if limit == LIMIT else {"off_by": gap, "limit": limit}
        found[source.name] = {"model": record.model(source), "gguf": {"head": head} | gap}
        print(f"{source.name}: llama.cpp {gap}", flush=True)
    in_every_type = trained(program)
    assert not wrong, wrong
    assert len(found) >= 11, len(found)
    record.write("check_llama_cpp", by={"llama.cpp": "b11549"} | record.versions("xllamacpp", "llama-cpp-py-sync"), limit=LIMIT, found=found,
                 refused=refused, without_words=wordless, trained=in_every_type,
                 what="logits of llama.cpp, all ids at once and after a prefill one by one, of GGUF files that `convert` wrote in float32; of the "
                      "trained models in every type, with the ids that its tokenizer makes of their text")


if __name__ == "__main__":
    main()
