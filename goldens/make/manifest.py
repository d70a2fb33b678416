"""Writes goldens/MANIFEST.toml: for each file its producer, the producer's version, the seed, the size and the sha256.

Run: python manifest.py [--check]

Producer, version and seed are read from the file's own metadata; a file without any (config.json, weights) goes by the
io.safetensors beside it, a GGUF file by the safetensors of its name or by types.safetensors, with the seed of the model that it holds, a tokenizer by its JSON, a
check by what it says of itself. With --check nothing is written, and the exit status says whether the manifest holds.
"""

import argparse
import hashlib
import json
import pathlib
import struct
import sys

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
HEAD = """# Made by make/manifest.py: every golden file, who made it, and its sha256. Not edited by hand.
"""


def metadata(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__", {})


def entry(path):
    known = metadata(path) if path.suffix == ".safetensors" else {}
    if path.parent.name == "checks":
        by = json.loads(path.read_text())["by"]
        version = ", ".join(f"{package} {version}" for package, version in by.items())
        known = {"producer": f"make/{path.stem}.py", "producer_version": version, "seed": "none: nothing is random"}
    elif path.parent.name == "tokenizers":
        known = json.loads(path.with_suffix(".json").read_text())
    elif path.suffix == ".gguf":
        answers = path.with_suffix(".safetensors")
        known = metadata(answers if answers.exists() else path.parent / "types.safetensors")
        original = GOLDENS / "models" / path.stem / "io.safetensors"
        if original.exists():
            known["seed"] = metadata(original)["seed"]
    if "producer" not in known:
        known = metadata(path.parent / "io.safetensors")
    data = path.read_bytes()
    fields = {
        "path": path.relative_to(GOLDENS).as_posix(),
        "producer": known["producer"],
        # The two trained checkpoints name their version within the producer and no seed.
        "version": known.get("producer_version", "see producer"),
        "seed": known.get("seed", "not recorded"),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return "[[file]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())


def main():
    parser = argparse.ArgumentParser(description="Writes or checks goldens/MANIFEST.toml.")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    folders = [GOLDENS / name for name in ("ops", "models", "generate", "gguf", "train", "train_peft", "checks")]
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    text = HEAD + "".join("\n" + entry(path) for path in paths)
    manifest = GOLDENS / "MANIFEST.toml"
    if check:
        if manifest.read_text() != text:
            sys.exit("MANIFEST.toml does not describe the files here")
    else:
        manifest.write_text(text)
    print(f"{len(paths)} files, {sum(path.stat().st_size for path in paths)} bytes")


if __name__ == "__main__":
    main()
