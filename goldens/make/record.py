"""Keeps in goldens/checks what the checks of our own files by others found."""

import hashlib
import importlib.metadata
import json
import pathlib

GOLDENS = pathlib.Path(__file__).resolve().parent.parent


def sha256(*paths):
    """Of one file, or of several in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(map(pathlib.Path, paths)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def model(folder):
    """Of all that a model of goldens/models is made of, and what it answers."""
    return sha256(*(path for path in pathlib.Path(folder).iterdir() if path.is_file()))


def head_of_gguf(path):
    """Of a GGUF file without the numbers of its tensors, which computers may round otherwise."""
    import gguf

    reader = gguf.GGUFReader(path)
    start = min(int(tensor.data_offset) for tensor in reader.tensors)
    return hashlib.sha256(pathlib.Path(path).read_bytes()[:start]).hexdigest()


def versions(*packages):
    return {package: importlib.metadata.version(package) for package in packages}


def write(name, *, by, what, limit, found, **more):
    """`found`: by the name of a model, what was compared; differences stand under `largest_difference`, wherever they are."""

    def differences(value):
        if isinstance(value, dict):
            own = [value["largest_difference"]] if "largest_difference" in value else []
            return own + [x for part in value.values() for x in differences(part)]
        return []

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.1e}")
        return {key: short(part) for key, part in value.items()} if isinstance(value, dict) else value

    gaps = differences(found)
    record = {
        "script": f"make/{name}.py", "by": by, "what": what, "limit": limit, "models": len(found), "comparisons": len(gaps),
        "largest_difference": max(gaps), **more, "found": found,
    }
    path = GOLDENS / "checks" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(short(record), indent=1) + "\n")
    print(f"{path.name}: {len(found)} models, {len(gaps)} comparisons, off by {max(gaps):.0e} at most")
