//! Softmax attention over keys and values that lie in blocks, as a cache that grows keeps them.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Result, Tensor, bail};

use crate::args::{self, Checker, Dim};
use crate::simd::Isa;
use crate::{checkpoint, host};

const OP: &str = "attention";

/// Arguments of [`attention`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// The queries of the last `seqlen` positions, `(batch, seqlen, nheads, headdim)`.
    pub q: &'a Tensor,
    /// Blocks along time, the oldest first, each `(batch, block, nheads_kv, headdim)`.
    pub keys: &'a [Tensor],
    /// One block for each of `keys`, of the same shape.
    pub values: &'a [Tensor],
    /// What scores are multiplied by before the softmax.
    pub scale: f64,
    /// Whether a query sees no key after its own position.
    pub causal: bool,
    /// How many keys, up to its own, a query sees; all if absent.
    pub window: Option<usize>,
}

impl<'a> Attention<'a> {
    /// Causal, over everything, with a scale of `1 / √headdim`.
    pub fn new(q: &'a Tensor, keys: &'a [Tensor], values: &'a [Tensor]) -> Self {
        let headdim = q.dims().last().copied().unwrap_or(1).max(1);
        Self { q, keys, values, scale: (headdim as f64).powf(-0.5), causal: true, window: None }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "q", self.q)?;
        let [batch, seqlen, nheads, headdim] = check.main_dims(["batch", "seqlen", "nheads", "headdim"])?;
        let nheads_kv = self.keys.first().and_then(|k| k.dims().get(2)).copied().unwrap_or(1);
        check.require(nheads_kv > 0 && nheads.is_multiple_of(nheads_kv), || {
            format!("`keys` has {nheads_kv} heads, expected a divisor of nheads {nheads}")
        })?;
        check.require(self.keys.len() == self.values.len(), || {
            format!("`values` has {} blocks, expected {} as `keys`", self.values.len(), self.keys.len())
        })?;
        let mut kv_len = 0;
        for (k, v) in self.keys.iter().zip(self.values) {
            let block = k.dims().get(1).copied().unwrap_or(0);
            let expected: [Dim; 4] =
                [("batch", batch), ("block", block), ("nheads_kv", nheads_kv), ("headdim", headdim)];
            check.activation("keys", k, &expected)?;
            check.activation("values", v, &expected)?;
            kv_len += block;
        }
        check.require(!self.causal || kv_len >= seqlen, || {
            format!("`keys` has {kv_len} positions, expected at least seqlen {seqlen}")
        })?;
        check.require(self.window != Some(0), || "`window` is 0, expected at least 1".into())?;
        check.require(self.window.is_none() || self.causal, || {
            "`window` is given without `causal`, expected both".into()
        })?;
        check.require(self.scale.is_finite(), || {
            format!("`scale` is {}, expected a finite number", self.scale)
        })?;
        Ok(Sizes { batch, seqlen, nheads, headdim, nheads_kv, kv_len })
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
    pub nheads_kv: usize,
    pub kv_len: usize,
}

/// What does not change between forward and backward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub scale: f64,
    pub causal: bool,
    pub window: Option<usize>,
}

impl Options {
    /// The keys that a query at a position of `kv_len` sees.
    #[inline(always)]
    fn visible(&self, position: usize, kv_len: usize) -> std::ops::Range<usize> {
        let start = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        start..if self.causal { position + 1 } else { kv_len }
    }
}

/// Lets each query read the values of the keys that it resembles.
///
/// `y_i = Σ_j softmax_j(scale · q_i · k_j) v_j` over the `j` that `i` sees: the queries are those of the last `seqlen` of
/// all `kv_len` positions, and the query at `p` sees the keys `p - window < j ≤ p`. Heads of queries share keys and
/// values in neighbouring groups of `nheads / nheads_kv`. On the CPU, and on a GPU in 16 bits with heads of a multiple of 8 up to 256
/// channels, no matrix of `seqlen × kv_len` is ever held.
///
/// # Shapes
/// `q`, `y`: `(batch, seqlen, nheads, headdim)` · `keys`, `values`: blocks of `(batch, block, nheads_kv, headdim)` whose
/// lengths add up to `kv_len`. All are f32, f16, bf16 or f64 alike; sums and the softmax are `f32` (`f64` for `f64`).
/// # Gradients
/// For `q` and for every block of `keys` and `values`; the backward pass runs the reference on the same inputs.
/// # Errors
/// If a shape, dtype or device disagrees with `q`, there are fewer keys than queries, or an option makes no sense.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_ops::{Attention, attention};
/// # fn main() -> candle_core::Result<()> {
/// let (batch, seqlen, nheads, nheads_kv, headdim) = (2, 10, 4, 2, 8);
/// let q = Tensor::randn(0f32, 1.0, (batch, seqlen, nheads, headdim), &Device::Cpu)?;
/// let block = |len| Tensor::randn(0f32, 1.0, (batch, len, nheads_kv, headdim), &Device::Cpu);
/// // 32 tokens were read before these 10.
/// let (keys, values) = ([block(32)?, block(10)?], [block(32)?, block(10)?]);
/// let y = attention(&Attention { window: Some(16), ..Attention::new(&q, &keys, &values) })?;
/// assert_eq!(y.dims(), [batch, seqlen, nheads, headdim]);
/// # Ok(()) }
/// ```
/// # Source
/// Vaswani et al., 2017; Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax"; Dao et al., 2022.
pub fn attention(args: &Attention) -> Result<Tensor> {
    let sizes = args.sizes()?;
    let options = Options { scale: args.scale, causal: args.causal, window: args.window };
    let blocks = args.keys.len();
    let inputs: Vec<Option<&Tensor>> =
        std::iter::once(args.q).chain(args.keys).chain(args.values).map(Some).collect();
    let outputs = checkpoint::with_slots(OP, &inputs, move |inputs| {
        let inputs: Vec<Tensor> = inputs.iter().flatten().cloned().collect();
        let Some((q, (keys, values))) = inputs.split_first().map(|(q, kv)| (q, kv.split_at(blocks))) else {
            bail!("{OP}: `q` is missing")
        };
        forward(&Attention { q, keys, values, ..Attention::with(options, q) }, sizes).map(|y| vec![y])
    })?;
    match outputs.into_iter().next() {
        Some(y) => Ok(y),
        None => bail!("{OP}: no output"),
    }
}

impl<'a> Attention<'a> {
    /// Nothing but options.
    fn with(Options { scale, causal, window }: Options, q: &'a Tensor) -> Self {
        Self { scale, causal, window, ..Self::new(q, &[], &[]) }
    }

    fn options(&self) -> Options {
        Options { scale: self.scale, causal: self.causal, window: self.window }
    }
}

/// The kernel without a graph, the reference with one.
fn forward(args: &Attention, sizes: Sizes) -> Result<Tensor> {
    let tracked = std::iter::once(args.q).chain(args.keys).chain(args.values).any(Tensor::track_op);
    #[cfg(feature = "cuda")]
    if !tracked && cuda::fits(args.q, sizes) {
        return cuda::forward(args, sizes);
    }
    if tracked || !args::fused_on_cpu(args.q) {
        return reference::forward(args);
    }
    let q = host::read("q", args.q)?;
    let contiguous = |blocks: &[Tensor]| blocks.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>();
    let (keys, values) = (contiguous(args.keys)?, contiguous(args.values)?);
    let (keys, values): (Vec<_>, Vec<_>) =
        (keys.iter().map(host::stored).collect(), values.iter().map(host::stored).collect());
    let mut blocks = vec![];
    for ((k, v), tensor) in keys.iter().flatten().zip(values.iter().flatten()).zip(args.keys) {
        let (Some(keys), Some(values)) = (k.values(), v.values()) else {
            bail!("{OP}: `keys` or `values` cannot be read")
        };
        blocks.push(cpu::Block { keys, values, len: tensor.dim(1)? });
    }
    if blocks.len() != args.keys.len() {
        bail!("{OP}: `keys` or `values` cannot be read")
    }
    let inputs = cpu::Inputs { sizes, options: args.options(), q: &q, blocks };
    host::tensor(cpu::forward(&inputs, Isa::current()), args.q.shape(), args.q.dtype())
}
