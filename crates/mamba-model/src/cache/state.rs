//! What one mixer remembers.

use candle_core::{DType, Device, Tensor};

use super::KvCache;
use crate::Result;
use crate::batch::Sequences;
use crate::config::{AttentionConfig, MixerSpec};

/// The extents of what a mixer remembers of one sequence; whatever it does not have is absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct StateShape {
    /// `(conv_dim, d_conv - 1)`.
    pub(super) conv: Option<(usize, usize)>,
    /// `(d_inner, d_state)` or `(nheads, headdim, d_state)`.
    pub(super) ssm: Option<Vec<usize>>,
    /// `(nheads_kv, headdim, window)`.
    pub(super) kv: Option<(usize, usize, Option<usize>)>,
}

impl StateShape {
    pub(super) fn of(mixer: &MixerSpec, d_model: usize) -> Self {
        match mixer {
            MixerSpec::Mamba1(c) => Self {
                conv: Some((c.d_inner, c.d_conv - 1)),
                ssm: Some(vec![c.d_inner, c.d_state]),
                kv: None,
            },
            MixerSpec::Mamba2(c) => Self {
                conv: Some((c.conv_dim(), c.d_conv - 1)),
                ssm: Some(vec![c.nheads(), c.headdim, c.d_state]),
                kv: None,
            },
            MixerSpec::Attention(c) => Self::of_attention(c),
            MixerSpec::ShortConv(c) => Self { conv: Some((d_model, c.d_conv - 1)), ..Self::default() },
            MixerSpec::Mlp(_) | MixerSpec::Moe(_) => Self::default(),
        }
    }

    pub(super) fn of_attention(c: &AttentionConfig) -> Self {
        let conv = (c.d_conv() > 0).then(|| (c.qkv_dim(), c.d_conv() - 1));
        Self { conv, ssm: None, kv: Some((c.nheads_kv, c.headdim, c.window)) }
    }
}

/// What a mixer remembers of a batch of sequences.
#[derive(Debug, Default)]
pub(crate) struct MixerState {
    /// The last inputs of the convolution, `(batch, conv_dim, d_conv - 1)`.
    pub(crate) conv: Option<Tensor>,
    /// `(batch, d_inner, d_state)` or `(batch, nheads, headdim, d_state)`.
    pub(crate) ssm: Option<Tensor>,
    /// One for each sequence.
    pub(crate) kv: Option<Vec<KvCache>>,
}

impl MixerState {
    pub(super) fn new(shape: &StateShape, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let zeros = |shape: Vec<usize>| Tensor::zeros(shape, dtype, device);
        let conv = shape.conv.map(|(dim, window)| zeros(vec![batch, dim, window])).transpose()?;
        let ssm = shape.ssm.as_ref().map(|shape| zeros([&[batch], shape.as_slice()].concat())).transpose()?;
        let empty =
            |(heads, headdim, window)| (0..batch).map(|_| KvCache::new(heads, headdim, window)).collect();
        let kv = shape.kv.map(empty);
        Ok(Self { conv, ssm, kv })
    }

    pub(super) fn bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        let states: usize = self.conv.iter().chain(&self.ssm).map(bytes).sum();
        states + self.kv.iter().flatten().map(KvCache::bytes).sum::<usize>()
    }

    pub(super) fn reset(&mut self) -> Result<()> {
        for x in self.conv.iter().chain(&self.ssm) {
            x.zero_set()?;
        }
        self.kv.iter_mut().flatten().for_each(KvCache::clear);
        Ok(())
    }

    pub(super) fn fork(&self) -> Result<Self> {
        let copy = |x: &Option<Tensor>| x.as_ref().map(Tensor::copy).transpose();
        let kv = self.kv.as_ref().map(|rows| rows.iter().map(KvCache::fork).collect());
        Ok(Self { conv: copy(&self.conv)?, ssm: copy(&self.ssm)?, kv })
    }

    /// What it remembers of one sequence, taken out.
    fn take_row(&mut self, i: usize) -> Result<Self> {
        let row = |x: &Option<Tensor>| x.as_ref().map(|x| x.narrow(0, i, 1)?.copy()).transpose();
        let kv = self.kv.as_mut().and_then(|rows| rows.get_mut(i)).map(|row| vec![row.take()]);
        Ok(Self { conv: row(&self.conv)?, ssm: row(&self.ssm)?, kv })
    }

    /// Puts sequences back, all of them in order.
    fn put_rows(&mut self, rows: Vec<Self>) -> Result<()> {
        let join = |rows: Vec<Option<Tensor>>| -> Result<Option<Tensor>> {
            let rows: Vec<Tensor> = rows.into_iter().flatten().collect();
            if rows.is_empty() { Ok(None) } else { Ok(Some(Tensor::cat(&rows, 0)?)) }
        };
        let (mut conv, mut ssm, mut kv) = (vec![], vec![], vec![]);
        for row in rows {
            conv.push(row.conv);
            ssm.push(row.ssm);
            kv.extend(row.kv.into_iter().flatten());
        }
        (self.conv, self.ssm) = (join(conv)?, join(ssm)?);
        self.kv = self.kv.is_some().then_some(kv);
        Ok(())
    }
}

impl Sequences {
    /// Applies `f` to `(batch, seqlen, channels)` if that is how the tokens lie, else to each sequence alone.
    pub(crate) fn each(
        &self,
        x: &Tensor,
        state: Option<&mut MixerState>,
        f: impl Fn(&Tensor, &Sequences, Option<&mut MixerState>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if self.even {
            return f(x, self, state);
        }
        let (mut start, mut outputs, mut rows, mut state) = (0, vec![], vec![], state);
        for (i, len) in self.lengths.iter().enumerate() {
            let mut row = state.as_deref_mut().map(|state| state.take_row(i)).transpose()?;
            if *len > 0 {
                outputs.push(f(&x.narrow(1, start, *len)?, &self.row(i), row.as_mut())?);
            }
            rows.extend(row);
            start += len;
        }
        if let Some(state) = state {
            state.put_rows(rows)?;
        }
        Ok(Tensor::cat(&outputs, 1)?) // a forward of no tokens at all ends before any mixer
    }
}
