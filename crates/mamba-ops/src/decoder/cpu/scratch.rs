//! What stands between products.

use candle_core::Result;

use crate::decoder::{Mixer, Shared, Stack};

/// Buffers, `(batch, …)`, as wide as the widest that is in them.
pub(super) struct Scratch {
    pub ids: Vec<usize>,
    pub stream: Vec<f32>,
    pub normed: Vec<f32>,
    pub work: Work,
    pub shared: Option<SharedScratch>,
    pub logits: Vec<f32>,
}

/// Of a mixer.
pub(super) struct Work {
    /// Inputs of a product, in the order in which it reads them.
    pub arranged: Vec<f32>,
    /// What the first product gives.
    pub projected: Vec<f32>,
    /// What is before the last one.
    pub inner: Vec<f32>,
    /// Step sizes, or what is before a gated norm.
    pub steps: Vec<f32>,
    /// `[Δ | B | C]`, or what is between the matrices of an adapter.
    pub low: Vec<f32>,
    /// What the last product gives, or an adapter.
    pub out: Vec<f32>,
}

/// Of shared blocks.
pub(super) struct SharedScratch {
    pub embedding: Vec<f32>,
    /// `[stream | embedding]`.
    pub both: Vec<f32>,
    /// What attention gives, then the MLP.
    pub given: Vec<f32>,
    /// Stream and what the block gives.
    pub sum: Vec<f32>,
}

/// The most that the layers need, for one sequence.
struct Extents {
    normed: usize,
    projected: usize,
    inner: usize,
    low: usize,
    out: usize,
}

impl Extents {
    fn of(stack: &Stack) -> Result<Self> {
        let d_model = stack.embedding.dim(1)?;
        let mut most = Self { normed: d_model, projected: 0, inner: 0, low: 0, out: d_model };
        for layer in &stack.layers {
            if let Some(shared) = &layer.shared {
                most.see_shared(shared)?;
            }
            for (_, mixer) in &layer.mixers {
                let (into, out) = match mixer {
                    Mixer::Mamba1(m) => {
                        most.low = most.low.max(m.x_proj.outputs()?);
                        (&m.in_proj, &m.out_proj)
                    }
                    Mixer::Mamba2(m) => (&m.in_proj, &m.out_proj),
                    Mixer::Attention(m) => (&m.qkv, &m.out_proj),
                    Mixer::Mlp(m) => (&m.up, &m.down),
                    Mixer::ShortConv(m) => (&m.in_proj, &m.out_proj),
                };
                most.see(into.outputs()?, out.inputs()?);
            }
        }
        Ok(most)
    }

    fn see(&mut self, projected: usize, inner: usize) {
        self.projected = self.projected.max(projected);
        self.inner = self.inner.max(inner);
    }

    fn see_shared(&mut self, shared: &Shared) -> Result<()> {
        let Shared { attention, mlp, qkv_adapters, mlp_adapter, .. } = shared;
        self.see(attention.qkv.outputs()?, attention.out_proj.inputs()?);
        self.see(mlp.up.outputs()?, mlp.down.inputs()?);
        self.normed = self.normed.max(attention.qkv.inputs()?);
        for adapter in qkv_adapters.iter().flatten().chain(mlp_adapter) {
            self.low = self.low.max(adapter.down.dim(0)?);
            self.out = self.out.max(adapter.up.dim(0)?);
        }
        Ok(())
    }
}

impl Scratch {
    pub(super) fn new(stack: &Stack, batch: usize) -> Result<Self> {
        let (most, d_model) = (Extents::of(stack)?, stack.embedding.dim(1)?);
        let buffer = |len: usize| vec![0.0; batch * len];
        let shared = stack.layers.iter().any(|layer| layer.shared.is_some());
        Ok(Self {
            ids: vec![0; batch],
            stream: buffer(d_model),
            normed: buffer(most.normed),
            work: Work {
                arranged: vec![],
                projected: buffer(most.projected),
                inner: buffer(most.inner),
                steps: buffer(most.inner.max(most.low)),
                low: buffer(most.low),
                out: buffer(most.out),
            },
            shared: shared.then(|| SharedScratch {
                embedding: buffer(d_model),
                both: buffer(2 * d_model),
                given: buffer(d_model),
                sum: buffer(d_model),
            }),
            logits: buffer(stack.head.outputs()?),
        })
    }
}
