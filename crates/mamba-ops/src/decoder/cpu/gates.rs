//! Multilayer perceptrons and short convolutions: products with something elementwise between them.

use candle_core::Result;
use candle_core::cpu::erf::erf_f32;
use pulp::{Simd, WithSimd};

use super::products::{Rows, Run};
use super::scratch::Work;
use super::shared::adapt;
use crate::decoder::{LowRank, Mlp, MlpActivation, MlpLayout, ShortConv, State};
use crate::host::{SharedMut, parallel};
use crate::simd::slice::{map2, silu};

/// Channels of one task.
const CHANNELS: usize = 512;

/// `work.inner ← f(scale · gate) · up`.
pub(super) fn mlp(run: Run, m: &Mlp, adapter: Option<&LowRank>, x: Rows, work: &mut Work) -> Result<()> {
    let (outputs, hidden) = (m.up.outputs()?, m.down.inputs()?);
    let shared = SharedMut::new(&mut work.projected);
    run.product(&m.up, x, &mut work.arranged, (&shared, outputs), |_, _| {})?;
    if let Some(adapter) = adapter {
        adapt(run, adapter, x, work, outputs, 0)?;
    }
    let projected = Rows::new(&work.projected, outputs);
    let [gate, up] = match m.layout {
        MlpLayout::Plain => [Some(0), None],
        MlpLayout::GateUp => [Some(0), Some(hidden)],
        MlpLayout::UpGate => [Some(hidden), Some(0)],
    };
    let gated = Gated { activation: m.activation, scale: m.gate_scale as f32 };
    run.gate(gated, projected, [gate.unwrap_or(0)], up, (&mut work.inner, hidden, 0), hidden);
    Ok(())
}

/// `f`, and what its argument is multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Gated {
    pub activation: MlpActivation,
    pub scale: f32,
}

impl Run {
    /// `y ← f(scale · gate) · up`, with gate and up from the given columns of `x` on, to columns of `y` from the given one on.
    pub(super) fn gate(
        self,
        gated: Gated,
        x: Rows,
        [gate]: [usize; 1],
        up: Option<usize>,
        (y, stride, begin): (&mut [f32], usize, usize),
        count: usize,
    ) {
        let y = SharedMut::new(y);
        self.pieces(count, |row, first, len| {
            // SAFETY: each task has its own channels.
            let y = unsafe { y.get(row * stride + begin + first, len) };
            let part = |begin: usize| x.part(row, begin + first..begin + first + len);
            self.isa.dispatch(Piece { gated, gate: part(gate), up: up.map(part), y });
        });
    }

    /// Neighbouring channels of each row.
    fn pieces(self, channels: usize, f: impl Fn(usize, usize, usize) + Sync + Send) {
        let pieces = channels.div_ceil(CHANNELS);
        parallel(self.batch * pieces, 20 * self.batch * channels, |task| {
            let first = task % pieces * CHANNELS;
            f(task / pieces, first, CHANNELS.min(channels - first));
        });
    }
}

struct Piece<'a> {
    gated: Gated,
    gate: &'a [f32],
    up: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { gated: Gated { activation, scale }, gate, up, y } = self;
        y.iter_mut().zip(gate).for_each(|(y, gate)| *y = scale * gate);
        match activation {
            MlpActivation::Silu => silu(simd, y),
            MlpActivation::Gelu => y.iter_mut().for_each(|x| *x *= 0.5 * (1.0 + erf_f32(*x / 2f32.sqrt()))),
            MlpActivation::GeluTanh => y.iter_mut().for_each(|x| {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * *x * (1.0 + 0.044715 * *x * *x);
                *x *= 0.5 * (1.0 + inner.tanh());
            }),
            MlpActivation::Relu2 => y.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x * *x }),
        }
        if let Some(up) = up {
            map2(simd, y, up, |y, up| simd.mul_f32s(y, up));
        }
    }
}

/// `work.inner ← C · conv(B · x)`, with `[B | C | x]` from the first product.
pub(super) fn short_conv(run: Run, m: &ShortConv, x: Rows, work: &mut Work, state: &State) -> Result<()> {
    let channels = m.out_proj.inputs()?;
    let Work { arranged, projected, inner, .. } = work;
    run.product(&m.in_proj, x, arranged, (&SharedMut::new(projected), 3 * channels), |_, _| {})?;
    let (bcx, inner) = (Rows::new(projected, 3 * channels), SharedMut::new(inner));
    run.step_of(&m.conv, state.conv, |step| {
        run.pieces(channels, |row, first, len| {
            // SAFETY: each task has its own channels.
            let y = unsafe { inner.get(row * channels + first, len) };
            let part = |i: usize| bcx.part(row, i * channels + first..i * channels + first + len);
            y.copy_from_slice(part(0));
            y.iter_mut().zip(part(2)).for_each(|(y, x)| *y *= x);
            step(row, first, y);
            y.iter_mut().zip(part(1)).for_each(|(y, c)| *y *= c);
        });
        Ok(())
    })
}
