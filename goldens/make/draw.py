"""Random inputs of golden cases, on a grid of numbers that lose nothing when a test casts them."""

import zlib

import numpy as np


class Draw:
    """Random inputs of one case, seeded by its name."""

    def __init__(self, op, case, grid):
        self.seed = zlib.crc32(f"{op}/{case}".encode())
        self.rng = np.random.Generator(np.random.PCG64(self.seed))
        self.grid = grid

    def normal(self, *shape, scale=1.0, mean=0.0):
        return self.round(mean + scale * self.rng.standard_normal(shape))

    def uniform(self, low, high, *shape):
        return self.round(self.rng.uniform(low, high, shape))

    def round(self, x):
        x = x.astype(np.float32)
        if self.grid == "half":
            bits = x.view(np.uint32)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            x = bits.astype(np.uint32).view(np.float32)
            x = np.where(np.abs(x) < 2.0**-13, np.float32(0), x)
        return x.astype(np.float64)
