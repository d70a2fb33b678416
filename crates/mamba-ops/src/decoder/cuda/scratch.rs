//! What stands between kernels.

use candle_core::{DType, Result};

use super::attention::Joining;
use super::products::{Rows, is_wide};
use crate::decoder::states::attentions;
use crate::decoder::{Mixer, Shared, Stack};
use crate::device::{Buffer, Gpu, Pointer};

/// Buffers, `f32` if nothing else is said; rows are a multiple of four elements apart.
pub(super) struct Scratch {
    pub(super) batch: usize,
    pub(super) dtype: DType,
    /// `[stream]`, or `[stream | embedding]` where blocks are shared.
    residual: Buffer,
    residual_stride: usize,
    /// How many tokens each sequence has read, `u32`.
    pub(super) positions: Buffer,
    /// Of mixers side by side.
    pub(super) slots: Vec<Slot>,
    /// `[Δ | B | C]`.
    pub(super) dbc: Buffer,
    /// Inputs of products that are norms, in the dtype of the weights, where those are for batches.
    pub(super) normed: Option<Buffer>,
    pub(super) shared: Option<SharedScratch>,
    pub(super) joining: Option<Joining>,
}

/// Of one mixer.
pub(super) struct Slot {
    /// What the first projection gives.
    pub(super) projected: Buffer,
    /// What is before the last one.
    y: Buffer,
    /// The same as an input of a product for batches, in the dtype of the weights.
    inner: Option<Buffer>,
}

/// Of shared blocks.
pub(super) struct SharedScratch {
    /// Stream and what the block gives, as the stream lies.
    pub(super) sum: Buffer,
    /// What attention gives.
    pub(super) attended: Buffer,
    /// Between the matrices of adapters, and before the last product: inputs of products.
    pub(super) low: Buffer,
    pub(super) last: Buffer,
}

/// The next multiple of four.
pub(super) fn stride(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// The most of each extent that the layers need.
#[derive(Default)]
struct Extents {
    projected: [usize; 2],
    inner: [usize; 2],
    dbc: usize,
    normed: usize,
    low: usize,
    has_shared: bool,
}

impl Extents {
    fn of(stack: &Stack) -> Result<Self> {
        let mut most = Self { normed: stack.embedding.dim(1)?, ..Self::default() };
        for layer in &stack.layers {
            if let Some(shared) = &layer.shared {
                most.see_shared(shared)?;
            }
            for (slot, (_, mixer)) in layer.mixers.iter().enumerate() {
                let (into, out) = match mixer {
                    Mixer::Mamba1(m) => {
                        most.dbc = most.dbc.max(m.x_proj.outputs()?);
                        (&m.in_proj, &m.out_proj)
                    }
                    Mixer::Mamba2(m) => (&m.in_proj, &m.out_proj),
                    Mixer::Attention(m) => (&m.qkv, &m.out_proj),
                    Mixer::Mlp(m) => (&m.up, &m.down),
                    Mixer::ShortConv(m) => (&m.in_proj, &m.out_proj),
                };
                most.see(slot, into.outputs()?, out.inputs()?);
            }
        }
        Ok(most)
    }

    fn see(&mut self, slot: usize, projected: usize, inner: usize) {
        self.projected[slot] = self.projected[slot].max(projected);
        self.inner[slot] = self.inner[slot].max(inner);
        self.normed = self.normed.max(inner);
    }

    fn see_shared(&mut self, shared: &Shared) -> Result<()> {
        let Shared { attention, mlp, qkv_adapters, mlp_adapter, .. } = shared;
        self.has_shared = true;
        self.see(0, attention.qkv.outputs()?, attention.out_proj.inputs()?);
        self.see(0, mlp.up.outputs()?, mlp.down.inputs()?);
        self.normed = self.normed.max(attention.qkv.inputs()?);
        for adapter in qkv_adapters.iter().flatten().chain(mlp_adapter) {
            self.low = self.low.max(3 * adapter.down.dim(0)?);
        }
        Ok(())
    }
}

impl Scratch {
    pub(super) fn new(gpu: &Gpu, stack: &Stack, batch: usize) -> Result<Self> {
        let (d_model, dtype, most) = (stack.embedding.dim(1)?, stack.embedding.dtype(), Extents::of(stack)?);
        let wide = is_wide(batch, dtype);
        let buffer = |len: usize| gpu.buffer(DType::F32, batch * stride(len));
        // An input of a product.
        let input = |len: usize| gpu.buffer(if wide { dtype } else { DType::F32 }, batch * stride(len));
        let residual_stride = if most.has_shared { 2 * d_model } else { d_model };
        let slots = most.projected.iter().zip(most.inner).take_while(|(_, inner)| *inner > 0);
        let slots = slots.map(|(&projected, inner)| {
            let rounded = wide.then(|| gpu.buffer(dtype, batch * inner)).transpose()?;
            Ok(Slot { projected: buffer(projected)?, y: buffer(inner)?, inner: rounded })
        });
        let shared = match most.has_shared {
            true => Some(SharedScratch {
                sum: buffer(residual_stride)?,
                attended: buffer(d_model)?,
                low: input(most.low)?,
                last: input(d_model)?,
            }),
            false => None,
        };
        Ok(Self {
            batch,
            dtype,
            residual: buffer(residual_stride)?,
            residual_stride,
            positions: gpu.buffer(DType::U32, batch)?,
            slots: slots.collect::<Result<_>>()?,
            dbc: buffer(most.dbc)?,
            normed: wide.then(|| gpu.buffer(dtype, batch * most.normed)).transpose()?,
            shared,
            joining: Joining::new(gpu, &attentions(stack), dtype, batch)?,
        })
    }

    /// The residual stream.
    pub(super) fn stream(&self) -> Rows {
        Rows::new(self.residual.pointer(), self.residual_stride)
    }

    /// `[stream | embedding]` if there are shared blocks, whose copies of the embedding are two.
    pub(super) fn copies(&self) -> usize {
        if self.shared.is_some() { 2 } else { 1 }
    }
}

impl Slot {
    /// What is before the last projection, to be read by it: rounded if it is for batches, and if nothing reads it first.
    pub(super) fn inner(&self) -> Pointer {
        self.inner.as_ref().map_or(self.y.pointer(), Buffer::pointer)
    }

    /// The same in f32, to be read through a norm.
    pub(super) fn y(&self) -> Pointer {
        self.y.pointer()
    }

    pub(super) fn rounded(&self) -> u64 {
        self.inner.as_ref().map_or(0, |inner| inner.pointer().address)
    }
}
