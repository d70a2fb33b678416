"""Writes safetensors files that are the same, byte for byte, every time.

The `safetensors` package keeps `__metadata__` in a hash map, so the order of its keys, and with it the sha256 of the
file, changes from run to run. Here keys are sorted. Every file written is read back with the package as a check.
"""

import json
import pathlib
import struct

import numpy as np
from safetensors import safe_open

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


class BFloat16:
    """A bfloat16 array, kept as the upper halves of its float32 values, since numpy has no such type."""

    def __init__(self, values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        if np.any(bits & 0xFFFF):
            raise ValueError("values are not representable in bfloat16")
        self.bits = (bits >> 16).astype(np.uint16)


def write(path, tensors, metadata, limit=None):
    """Writes `tensors` (name to array) and `metadata` (name to string); at most `limit` bytes if given."""
    entries = []
    for name, value in tensors.items():
        if isinstance(value, BFloat16):
            entries.append((name, "BF16", value.bits))
        else:
            value = np.asarray(value)
            entries.append((name, NAMES[value.dtype.name], value))
    entries.sort(key=lambda entry: (-entry[2].dtype.itemsize, entry[0]))

    header, blobs, offset = {}, [], 0
    header["__metadata__"] = {key: _string(key, metadata[key]) for key in sorted(metadata)}
    for name, dtype, value in entries:
        blob = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    data = struct.pack("<Q", len(head)) + head + b"".join(blobs)
    if limit is not None and len(data) > limit:
        raise ValueError(f"{path}: {len(data)} bytes, the limit is {limit}")

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    with safe_open(path, framework="np") as file:
        if set(file.keys()) != set(tensors) or file.metadata() != header["__metadata__"]:
            raise ValueError(f"{path}: does not read back")


def _string(key, value):
    if not isinstance(value, str):
        raise TypeError(f"metadata `{key}` is {value!r}, expected a string")
    return value
