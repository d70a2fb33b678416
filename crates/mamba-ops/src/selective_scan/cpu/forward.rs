//! The forward scan of one block.

use std::f32::consts::LOG2_E;

use pulp::{Simd, WithSimd};

use super::{BLOCK, Block, Coefficients, Scan, Sizes, TILE, gather, gather_channels, scatter};
use crate::host::{SharedMut, parallel, uninit};
use crate::simd::Isa;
use crate::simd::math::exp2;
use crate::simd::slice::{map2, mul_silu, softplus};

/// What the forward scan leaves.
pub(in super::super) struct Forward {
    pub y: Vec<f32>,
    pub final_state: Vec<f32>,
    /// The state before each tile of each block, `(d_state, BLOCK)`; empty unless asked for.
    pub checkpoints: Vec<f32>,
}

pub(in super::super) fn forward(scan: &Scan, isa: Isa, keep: bool) -> Forward {
    let Sizes { dim, d_state, sequences, .. } = scan.sizes;
    let blocks: Vec<Block> = scan.blocks().concat();
    let mut y = scan.packing.room(scan.u.len());
    let mut final_state = uninit(sequences * dim * d_state);
    let tiles = blocks.last().map_or(0, |last| last.tiles_before + last.tiles());
    let kept = if keep { tiles * d_state * BLOCK } else { 0 };
    let mut checkpoints = uninit(kept);
    {
        let outputs = Outputs {
            y: SharedMut::new(&mut y),
            final_state: SharedMut::new(&mut final_state),
            checkpoints: keep.then(|| SharedMut::new(&mut checkpoints)),
        };
        parallel(blocks.len(), scan.operations(), |i| {
            isa.dispatch(ScanBlock { scan, block: blocks[i], outputs: &outputs })
        });
    }
    Forward { y, final_state, checkpoints }
}

struct Outputs<'a> {
    y: SharedMut<'a>,
    final_state: SharedMut<'a>,
    checkpoints: Option<SharedMut<'a>>,
}

struct ScanBlock<'a> {
    scan: &'a Scan<'a>,
    block: Block,
    outputs: &'a Outputs<'a>,
}

impl WithSimd for ScanBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.scan.b.is_varying(), self.scan.c.is_varying()) {
            (true, true) => self.run::<S, true, true>(simd),
            (true, false) => self.run::<S, true, false>(simd),
            (false, true) => self.run::<S, false, true>(simd),
            (false, false) => self.run::<S, false, false>(simd),
        }
    }
}

impl ScanBlock<'_> {
    #[inline(always)]
    fn run<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(self, simd: S) {
        let Self { scan, block, outputs } = self;
        let Sizes { dim, d_state, .. } = scan.sizes;
        let row = block.sequence * dim + block.first;
        let mut steps = Steps::new::<S>(scan, block);
        let mut h = gather(scan.initial_state, S::F32_LANES, d_state, block, row, 1.0);
        let (mut y, mut z) = ([0.0; TILE * BLOCK], [0.0; TILE * BLOCK]);
        for tile in 0..block.tiles() {
            let (first, tokens) = block.tile(tile);
            if let Some(checkpoints) = &outputs.checkpoints {
                let len = d_state * BLOCK;
                // SAFETY: each block keeps its own states.
                let kept = unsafe { checkpoints.get((block.tiles_before + tile) * len, len) };
                kept.copy_from_slice(&h);
            }
            if tile + 1 < block.tiles() {
                scan.prefetch(&[Some(scan.u), Some(scan.delta), scan.z], block, tile + 1);
            }
            steps.load(simd, scan, first, tokens);
            let y = &mut y[..tokens * BLOCK];
            steps.scan::<S, B_VARIES, C_VARIES>(simd, scan, &mut h, y);
            if let Some(gate) = scan.z {
                let z = &mut z[..tokens * BLOCK];
                scan.load(gate, block, first, z);
                mul_silu(simd, y, z);
            }
            // SAFETY: each block writes its own channels.
            unsafe { scan.store(&outputs.y, block, first, y) };
        }
        // SAFETY: each block writes its own channels.
        let state = unsafe { outputs.final_state.get(row * d_state, block.channels * d_state) };
        scatter(&h, S::F32_LANES, d_state, 1.0, state);
    }
}

/// What one block needs to step through a tile; the backward pass steps again with the same.
pub(super) struct Steps {
    pub block: Block,
    /// The first token of the loaded tile.
    pub first: usize,
    /// `A · log2 e`, in the order of [`place`](super::place).
    pub a: Vec<f32>,
    /// Constant `b` and `c`, in the order of [`place`](super::place).
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: [f32; BLOCK],
    pub delta_bias: [f32; BLOCK],
    /// `delta + delta_bias` of the tile, before the softplus.
    pub raw_delta: [f32; TILE * BLOCK],
    pub delta: [f32; TILE * BLOCK],
    pub u: [f32; TILE * BLOCK],
}

impl Steps {
    #[inline(always)]
    pub(super) fn new<S: Simd>(scan: &Scan, block: Block) -> Self {
        let constant = |x: &Coefficients| match x {
            Coefficients::Constant(x) => {
                gather(Some(x), S::F32_LANES, scan.sizes.d_state, block, block.first, 1.0)
            }
            Coefficients::Varying { .. } => vec![],
        };
        Self {
            block,
            first: 0,
            a: gather(Some(scan.a), S::F32_LANES, scan.sizes.d_state, block, block.first, LOG2_E),
            b: constant(&scan.b),
            c: constant(&scan.c),
            d: gather_channels(scan.d, block),
            delta_bias: gather_channels(scan.delta_bias, block),
            raw_delta: [0.0; TILE * BLOCK],
            delta: [0.0; TILE * BLOCK],
            u: [0.0; TILE * BLOCK],
        }
    }

    /// Loads a tile of `delta` and `u`.
    #[inline(always)]
    pub(super) fn load<S: Simd>(&mut self, simd: S, scan: &Scan, first: usize, tokens: usize) {
        let block = self.block;
        self.first = first;
        let len = tokens * BLOCK;
        scan.load(scan.u, block, first, &mut self.u[..len]);
        scan.load(scan.delta, block, first, &mut self.raw_delta[..len]);
        for row in self.raw_delta[..len].chunks_exact_mut(BLOCK) {
            map2(simd, row, &self.delta_bias, |x, bias| simd.add_f32s(x, bias));
        }
        self.delta[..len].copy_from_slice(&self.raw_delta[..len]);
        if scan.delta_softplus {
            softplus(simd, &mut self.delta[..len]);
        }
    }

    /// Steps through the loaded tile: updates `h` and writes `y` before the gate.
    #[inline(always)]
    pub(super) fn scan<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(
        &self,
        simd: S,
        scan: &Scan,
        h: &mut [f32],
        y: &mut [f32],
    ) {
        let Self { block, first, .. } = *self;
        let (n, vectors) = (scan.sizes.d_state, BLOCK / S::F32_LANES);
        let h = S::as_mut_simd_f32s(h).0;
        let y = S::as_mut_simd_f32s(y).0;
        let [a, b, c] = [&self.a, &self.b, &self.c].map(|x| S::as_simd_f32s(x).0);
        let [delta, u] = [&self.delta, &self.u].map(|x| S::as_simd_f32s(x).0);
        let d = S::as_simd_f32s(&self.d).0;
        for v in 0..vectors {
            let h = &mut h[v * n..][..n];
            let a = &a[v * n..][..n];
            let b_constant = if B_VARIES { &[] } else { &b[v * n..][..n] };
            let c_constant = if C_VARIES { &[] } else { &c[v * n..][..n] };
            for (t, y) in y.chunks_exact_mut(vectors).enumerate() {
                let (delta, u) = (delta[t * vectors + v], u[t * vectors + v]);
                let input = simd.mul_f32s(delta, u);
                let b_row = scan.b.row(&scan.sizes, &block, first + t);
                let c_row = scan.c.row(&scan.sizes, &block, first + t);
                let b_values = if B_VARIES { &scan.b.varying()[b_row..][..n] } else { &[] };
                let c_values = if C_VARIES { &scan.c.varying()[c_row..][..n] } else { &[] };
                let mut sum = simd.mul_f32s(d[v], u);
                for i in 0..n {
                    let decay = exp2(simd, simd.mul_f32s(delta, a[i]));
                    let b = if B_VARIES { simd.splat_f32s(b_values[i]) } else { b_constant[i] };
                    let c = if C_VARIES { simd.splat_f32s(c_values[i]) } else { c_constant[i] };
                    h[i] = simd.mul_add_e_f32s(decay, h[i], simd.mul_f32s(input, b));
                    sum = simd.mul_add_e_f32s(h[i], c, sum);
                }
                y[v] = sum;
            }
        }
    }
}
