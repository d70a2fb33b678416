//! Norms and products of a batch of rows.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use crate::decoder::{Conv, Norm, OP, Product};
use crate::host::{HostSlice, SharedMut, modify, parallel, read, stored};
use crate::layout::Activation;
use crate::linear::{self, cpu as matrix};
use crate::norm::{self, cpu as rows};
use crate::simd::Isa;

/// Rows in a buffer, so many elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new(values: &'a [f32], stride: usize) -> Self {
        Self { values, stride }
    }

    /// Some elements of a row.
    pub(super) fn part(self, row: usize, range: Range<usize>) -> &'a [f32] {
        &self.values[row * self.stride..][range]
    }
}

/// A norm of the product of rows with a gate, or the norm times the gate.
#[derive(Clone, Copy)]
pub(super) struct Gate<'a> {
    pub z: Rows<'a>,
    pub norm_before_gate: bool,
    pub groups: usize,
}

/// With which instructions, for how many sequences.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub isa: Isa,
    pub batch: usize,
}

impl Run {
    /// `y ← norm(x)`, rows of `len` channels.
    pub(super) fn norm(self, norm: &Norm, x: Rows, len: usize, y: &mut [f32]) -> Result<()> {
        self.norm_with(norm, x, len, None, y)
    }

    pub(super) fn gated_norm(self, norm: &Norm, x: Rows, gate: Gate, y: &mut [f32]) -> Result<()> {
        self.norm_with(norm, x, x.stride, Some(gate), y)
    }

    fn norm_with(self, norm: &Norm, x: Rows, len: usize, gate: Option<Gate>, y: &mut [f32]) -> Result<()> {
        let (weight, bias) = (read(OP, &norm.weight)?, optional(norm.bias.as_ref())?);
        let y = SharedMut::new(y);
        let operations = self.batch * len * if gate.is_some() { 24 } else { 8 };
        parallel(self.batch, operations, |row| {
            let rows = rows::Rows {
                sizes: norm::Sizes {
                    rows: 1,
                    dim: len,
                    group_size: len / gate.map_or(1, |gate| gate.groups),
                },
                kind: norm.kind,
                eps: norm.eps as f32,
                norm_before_gate: gate.is_some_and(|gate| gate.norm_before_gate),
                x: x.part(row, 0..len),
                weight: Some(&weight),
                bias: bias.as_deref(),
                residual: None,
                z: gate.map(|gate| gate.z.part(row, 0..len)),
            };
            // SAFETY: each task has its own row.
            rows::forward_to(&rows, self.isa, unsafe { y.get(row * len, len) });
        });
        Ok(())
    }

    /// `y ← (scale · x Wᵀ) ⊙ scales + bias`, rows of `y` being `stride` apart; then `finish` of neighbouring columns, the first and how
    /// many, as soon as they are there.
    pub(super) fn product(
        self,
        product: &Product,
        x: Rows,
        arranged: &mut Vec<f32>,
        (y, stride): (&SharedMut, usize),
        finish: impl Fn(usize, usize) + Sync + Send,
    ) -> Result<()> {
        let (bias, scales) = (optional(product.bias.as_ref())?, optional(product.scales.as_ref())?);
        let scale = product.scale as f32;
        let mut begin = 0;
        for weight in &product.weights {
            self.matrix(weight, x, arranged, (y, stride, begin), begin == 0, |first, count| {
                let columns = first..first + count;
                for row in 0..self.batch {
                    // SAFETY: these columns are this task's.
                    let y = unsafe { y.get(row * stride + first, count) };
                    if scale != 1.0 {
                        y.iter_mut().for_each(|y| *y *= scale);
                    }
                    if let Some(scales) = &scales {
                        y.iter_mut().zip(&scales[columns.clone()]).for_each(|(y, scale)| *y *= scale);
                    }
                    if let Some(bias) = &bias {
                        y.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, bias)| *y += bias);
                    }
                }
                finish(first, count);
            })?;
            begin += weight.dim(0)?;
        }
        Ok(())
    }

    /// `y ← x Wᵀ`, to columns of `y` from `begin` on, which `finish` counts too. Unless it `arranges`, the input is that of the
    /// product before.
    pub(super) fn matrix(
        self,
        weight: &Tensor,
        x: Rows,
        arranged: &mut Vec<f32>,
        (y, stride, begin): (&SharedMut, usize, usize),
        arranges: bool,
        finish: impl Fn(usize, usize) + Sync + Send,
    ) -> Result<()> {
        let (d_out, d_in) = weight.dims2()?;
        let sizes = linear::Sizes { rows: self.batch, d_in, d_out };
        let weight = stored(weight);
        let Some(weight) = weight.as_ref().and_then(|weight| weight.values()) else {
            bail!("{OP}: a matrix cannot be read")
        };
        if arranges {
            matrix::arrange(sizes, x.values, x.stride, weight, arranged, self.isa);
        }
        let product = matrix::Product { sizes, x: arranged, weight };
        let to = matrix::Columns { y, stride, begin };
        matrix::multiply(&product, to, self.isa, |first, count| finish(begin + first, count));
        Ok(())
    }

    /// A product whose outputs from `begin` on go through a step of a convolution, which changes `window`.
    #[expect(clippy::too_many_arguments, reason = "a product, a convolution, and where they stand")]
    pub(super) fn convolved(
        self,
        product: &Product,
        x: Rows,
        arranged: &mut Vec<f32>,
        y: &mut [f32],
        conv: &Conv,
        begin: usize,
        window: Option<&Tensor>,
    ) -> Result<()> {
        let (channels, stride) = (conv.weight.dim(0)?, product.outputs()?);
        let y = SharedMut::new(y);
        self.step_of(conv, window, |step| {
            self.product(product, x, arranged, (&y, stride), |first, count| {
                let (from, to) = (first.max(begin), (first + count).min(begin + channels));
                if from >= to {
                    return;
                }
                for row in 0..self.batch {
                    // SAFETY: these columns are this task's.
                    let y = unsafe { y.get(row * stride + from, to - from) };
                    step(row, from - begin, y);
                }
            })
        })
    }

    /// Lets `f` move the convolution on, of a row and neighbouring channels from the given one: from their inputs, in place.
    pub(super) fn step_of(
        self,
        conv: &Conv,
        window: Option<&Tensor>,
        f: impl FnOnce(&(dyn Fn(usize, usize, &mut [f32]) + Sync)) -> Result<()>,
    ) -> Result<()> {
        let (channels, width) = conv.weight.dims2()?;
        let (weight, bias) = (read(OP, &conv.weight)?, optional(conv.bias.as_ref())?);
        let activation = if conv.silu { Activation::Silu } else { Activation::Identity };
        let Some(window) = window else { bail!("{OP}: a window is missing") };
        modify(OP, window, |window| {
            let window = SharedMut::new(window);
            f(&|row, first, y| {
                let past = width - 1;
                // SAFETY: whoever has these channels of `y` alone, has their windows.
                let state = unsafe { window.get((row * channels + first) * past, y.len() * past) };
                self.isa.dispatch(crate::causal_conv1d::cpu::StepRows {
                    weight: &weight[first * width..][..y.len() * width],
                    bias: bias.as_ref().map(|bias| &bias[first..first + y.len()]),
                    activation,
                    y,
                    state,
                });
            })
        })
    }

    /// `sum ← sum + product(x)`.
    pub(super) fn add(
        self,
        product: &Product,
        x: Rows,
        arranged: &mut Vec<f32>,
        y: &mut [f32],
        sum: &mut [f32],
    ) -> Result<()> {
        let stride = product.outputs()?;
        let (y, sum) = (SharedMut::new(y), SharedMut::new(sum));
        self.product(product, x, arranged, (&y, stride), |first, count| {
            for row in 0..self.batch {
                // SAFETY: these columns are this task's.
                let [y, sum] = unsafe { [&y, &sum].map(|x| x.get(row * stride + first, count)) };
                sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += *y);
            }
        })
    }
}

/// What is there of an optional vector.
pub(super) fn optional(x: Option<&Tensor>) -> Result<Option<HostSlice<'_>>> {
    x.map(|x| read(OP, x)).transpose()
}
