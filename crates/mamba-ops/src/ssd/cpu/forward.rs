//! The forward pass of one block of heads.

use pulp::{Simd, WithSimd};

use super::{Block, Piece, Scan, Sizes, Steps, load_inputs, outputs, scale, scores};
use crate::host::{SharedMut, parallel, uninit};
use crate::simd::Isa;
use crate::simd::matrix::{Product, Strided, Zeros, copy, padded, transpose};
use crate::simd::slice::mul_silu;

/// What the forward pass leaves.
pub(in super::super) struct Forward {
    pub y: Vec<f32>,
    pub final_state: Vec<f32>,
    /// The state before each chunk, by sequence and head, `(d_state, headdim)`; empty unless asked for.
    pub checkpoints: Vec<f32>,
}

pub(in super::super) fn forward(scan: &Scan, isa: Isa, keep: bool) -> Forward {
    let Sizes { nheads, headdim, d_state, sequences, .. } = scan.sizes;
    let state = nheads * headdim * d_state;
    let blocks = scan.blocks();
    let chunks: usize = scan.packing.sequences().iter().map(|s| s.len.div_ceil(scan.chunk)).sum();
    let mut y = scan.packing.room(scan.x.len());
    let mut final_state = uninit(sequences * state);
    let mut checkpoints = uninit(if keep { chunks * state } else { 0 });
    {
        let outputs = Outputs {
            y: SharedMut::new(&mut y),
            final_state: SharedMut::new(&mut final_state),
            checkpoints: keep.then(|| SharedMut::new(&mut checkpoints)),
        };
        parallel(blocks.len(), scan.operations(), |i| {
            isa.dispatch(ForwardBlock { scan, block: blocks[i], outputs: &outputs })
        });
    }
    Forward { y, final_state, checkpoints }
}

struct Outputs<'a> {
    y: SharedMut<'a>,
    final_state: SharedMut<'a>,
    checkpoints: Option<SharedMut<'a>>,
}

struct ForwardBlock<'a> {
    scan: &'a Scan<'a>,
    block: Block,
    outputs: &'a Outputs<'a>,
}

/// Room for one chunk.
struct Scratch {
    steps: Steps,
    /// `Bᵀ`, `(d_state, q)`.
    b_columns: Vec<f32>,
    /// `C·Bᵀ`, `(q, q)`.
    scores: Vec<f32>,
    /// The same with the decays of one head.
    decayed: Vec<f32>,
    /// `Δ·x`, `(q, headdim)`.
    inputs: Vec<f32>,
    y: Vec<f32>,
}

impl WithSimd for ForwardBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scan, block, outputs } = self;
        let Sizes { nheads, headdim, d_state, .. } = scan.sizes;
        let (p, q) = (padded(headdim), padded(scan.chunk));
        let mut scratch = Scratch {
            steps: Steps::new(scan.chunk),
            b_columns: vec![0.0; d_state * q],
            scores: vec![0.0; scan.chunk * q],
            decayed: vec![0.0; scan.chunk * q],
            inputs: vec![0.0; scan.chunk * p],
            y: vec![0.0; scan.chunk * p],
        };
        let mut states = vec![0.0; block.heads * scan.state_len()];
        let state_of = |head: usize| head * scan.state_len()..(head + 1) * scan.state_len();
        if let Some(initial) = scan.initial_state {
            for i in 0..block.heads {
                scan.load_state(initial, block.sequence, block.first + i, &mut states[state_of(i)]);
            }
        }
        for chunk in scan.chunks(block) {
            let b = scan.of_group(scan.b, block, chunk);
            transpose((b, scan.group_stride()), [chunk.tokens, d_state], (&mut scratch.b_columns, q));
            scores(simd, scan, block, chunk, &scratch.b_columns, &mut scratch.scores);
            for i in 0..block.heads {
                let (head, state) = (block.first + i, &mut states[state_of(i)]);
                let piece = Piece { block, chunk, head };
                if let Some(checkpoints) = &outputs.checkpoints {
                    // SAFETY: each head keeps its own states.
                    let kept = unsafe { checkpoints.get(scan.checkpoint(piece), d_state * headdim) };
                    copy((state, p), [d_state, headdim], (kept, headdim));
                }
                scratch.head(simd, scan, piece, state, &outputs.y);
            }
        }
        for i in 0..block.heads {
            let len = headdim * d_state;
            let row = block.sequence * nheads + block.first + i;
            // SAFETY: each head has its own state.
            let out = unsafe { outputs.final_state.get(row * len, len) };
            transpose((&states[state_of(i)], p), [d_state, headdim], (out, d_state));
        }
    }
}

impl Scratch {
    /// One chunk of one head: writes `y` and moves the state on.
    #[inline(always)]
    fn head<S: Simd>(&mut self, simd: S, scan: &Scan, piece: Piece, state: &mut [f32], out: &SharedMut) {
        let Piece { block, chunk, head } = piece;
        let (headdim, tokens) = (scan.sizes.headdim, chunk.tokens);
        let (p, q) = (padded(headdim), padded(scan.chunk));
        self.steps.load(simd, scan, piece);
        load_inputs(simd, scan, piece, &self.steps, &mut self.inputs);
        for (i, row) in self.decayed.chunks_exact_mut(q).take(tokens).enumerate() {
            self.steps.decay_row(simd, i, &self.scores[i * q..], row);
        }
        let before = (chunk.index > 0 || scan.initial_state.is_some()).then_some(&*state);
        outputs(simd, scan, piece, &self.steps, before, [&self.decayed, &self.inputs], &mut self.y);
        for (i, y) in self.y.chunks_exact(p).take(tokens).enumerate() {
            let at = scan.at(piece, i);
            // SAFETY: each head writes its own channels.
            let out = unsafe { out.get(at, headdim) };
            out.copy_from_slice(&y[..headdim]);
            scan.add_skip(simd, head, &scan.x[at..][..headdim], out);
            if let Some(z) = scan.z {
                mul_silu(simd, out, &z[at..][..headdim]);
            }
        }
        for (input, &decay) in self.inputs.chunks_exact_mut(p).zip(&self.steps.to_end).take(tokens) {
            scale(simd, decay, input);
        }
        simd.vectorize(Product {
            a: Strided::columns(scan.of_group(scan.b, block, chunk), scan.group_stride()),
            b: (&self.inputs, p),
            out: (state, p),
            keep: self.steps.total,
            rows: scan.sizes.d_state,
            inner: tokens,
            columns: headdim,
            zeros: Zeros::Nowhere,
        });
    }
}
