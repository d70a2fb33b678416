"""Has others read what the example `convert` writes of every model in goldens/models.

Run: python check_saved.py ../../target/release/examples/convert

Each model is written as a folder, as a GGUF file where that has words for it, and from that file as a folder again. transformers
must load both folders, miss and leave nothing, and give the logits of `io.safetensors`; the `gguf` package must find in each file the
tensors and keys of goldens/gguf. What was found, and of which bytes, is written to goldens/checks: a test asks whether what is written
today is what was read then.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import record  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 1e-4


def convert(program, source, target):
    command = [program, "--quiet", "--model", source, "--to", target, "--save-as", "f32"]
    return subprocess.run(command, capture_output=True).returncode == 0


@torch.no_grad()
def largest_gap(folder, io):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                       experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), (folder, info)
    gap = (model.eval()(io["input_ids"], use_cache=False).logits - io["logits"]).abs().max().item()
    assert gap <= LIMIT, (folder, gap)
    return {"largest_difference": gap, "weights": record.sha256(folder / "model.safetensors"),
            "config": record.sha256(folder / "config.json")}


def compare(ours, theirs):
    """Tensors and keys of a file against those of the package's; keys of ours that it lacks do not matter."""
    ours, theirs = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors, expected = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    expected_tensors = expected
    for name, tensor in expected.items():
        assert tuple(tensors[name].shape) == tuple(tensor.shape) and tensors[name].tensor_type == tensor.tensor_type, name
        assert np.allclose(tensors[name].data, tensor.data, rtol=3e-7, atol=0), name
    keys, expected = ({key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
                      for reader in (ours, theirs))
    for key, value in expected.items():
        assert keys.get(key) == value, (key, keys.get(key), value)
    return {"tensors_of_the_package": len(expected_tensors), "keys_of_the_package": len(expected)}


def main():
    program, found = pathlib.Path(sys.argv[1]).resolve(), {}
    for source in sorted((GOLDENS / "models").iterdir()):
        if not (source / "io.safetensors").exists() or "shakespeare" in source.name or source.name.endswith(("_classifier", "_headless")):
            continue
        io, report = safetensors.torch.load_file(source / "io.safetensors"), {}
        with tempfile.TemporaryDirectory() as place:
            folder, file, again = (pathlib.Path(place) / name for name in ("folder", "model.gguf", "again"))
            assert convert(program, source, folder), source
            if "model_type" in json.loads((folder / "config.json").read_text()):
                report["folder"] = largest_gap(folder, io)
            if convert(program, source, file):
                theirs = GOLDENS / "gguf" / f"{source.name}.gguf"
                report["gguf"] = {"head": record.head_of_gguf(file)} | (compare(file, theirs) if theirs.exists() else {})
                assert convert(program, file, again), source
                report["folder_from_gguf"] = largest_gap(again, io)
                # Through logarithms, which computers may round otherwise.
                del report["folder_from_gguf"]["weights"]
        if report:
            found[source.name] = {"model": record.model(source)} | report
        print(f"{source.name}: {report or 'in the layout of state-spaces alone'}", flush=True)
    assert len(found) >= 30, len(found)
    record.write("check_saved", by=record.versions("transformers", "torch", "gguf", "safetensors"), limit=LIMIT, found=found,
                 what="logits of transformers' models, loaded from folders that `convert` wrote in float32, and from folders made of the GGUF "
                      "files that it wrote; names, shapes, types, values and keys of those files where the gguf package wrote them too")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
