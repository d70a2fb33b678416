"""Makes the published packages importable, and runnable in float64, on a machine without a GPU.

`mamba_ssm`, `causal_conv1d` and `flash_attn` import compiled CUDA extensions when they are loaded. Empty modules stand in for these;
the reference functions, which are plain PyTorch, never touch them. Triton runs in its interpreter, so that the published
Triton kernels too can run on the CPU (in float32 and slowly), which we use to check what the references cannot say.
"""

import contextlib
import importlib.metadata
import os
import sys
import types
import unittest.mock
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"  # one configuration per kernel: autotuning would want a GPU to time

import torch  # noqa: E402

warnings.filterwarnings("ignore", message="Deterministic mode")
warnings.filterwarnings("ignore", message=".*NumPy array is not writable.*")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for name in ("selective_scan_cuda", "causal_conv1d_cuda", "flash_attn_2_cuda"):
    sys.modules[name] = types.ModuleType(name)


def version(*packages):
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


@contextlib.contextmanager
def float64():
    """Within it, upstream code that casts to float32 (`x.float()`, `x.to(torch.float32)`) casts to float64 instead."""
    double = lambda tensor, *_, **__: tensor.double()  # noqa: E731
    with (
        unittest.mock.patch.object(torch.Tensor, "float", double),
        unittest.mock.patch.object(torch, "float32", torch.float64),
    ):
        yield


@contextlib.contextmanager
def interpreted():
    """Within it, Triton kernels launched on CPU tensors find the few facts about a GPU that they ask for."""
    with (
        unittest.mock.patch.object(torch.cuda, "device", lambda *_, **__: contextlib.nullcontext()),
        unittest.mock.patch.object(
            torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=2)
        ),
    ):
        yield
