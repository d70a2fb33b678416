//! What a model reads at once: rows of one length, padded rows, or sequences one after another.

use candle_core::{D, DType, Device, Tensor};
use mamba_ops::Packing;

use crate::{Error, Result};

/// Token ids, and which of them there really are.
///
/// A tensor of ids alone, `(batch, seqlen)`, is a batch of rows of one length, and is taken wherever a batch is. Padding is
/// never computed: every sequence gives what it would give alone, whatever the ids in the padding are.
///
/// In the place of ids may stand embeddings of any floating dtype, with one axis more, `(.., d_model)`: what the model otherwise looks up
/// by the ids, before the multiplier that some families have for it. So a model reads what is no text, a time series or the patches
/// of an image, and gradients go on into whatever made the embeddings.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_model::{Batch, Model};
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let ids = Tensor::new(&[[0u32, 0, 3], [1, 4, 1]], &Device::Cpu)?;
/// let logits = model.forward(Batch::left_padded(&ids, &[1, 3])?, None)?;
/// assert_eq!(logits.dims(), [2, 3, 50]);
/// let alone = model.forward(&Tensor::new(&[[3u32]], &Device::Cpu)?, None)?;
/// let gap = (logits.narrow(0, 0, 1)?.narrow(1, 2, 1)? - alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(gap < 1e-5);
///
/// // Three numbers at each of 20 times, read by a projection of one's own.
/// let series = Tensor::rand(0f32, 1.0, (2, 20, 3), &Device::Cpu)?;
/// let projection = Tensor::rand(-1f32, 1.0, (3, 16), &Device::Cpu)?;
/// let hidden = model.hidden_states(&series.broadcast_matmul(&projection)?, None)?;
/// assert_eq!(hidden.dims(), [2, 20, 16]);
/// # Ok::<_, mamba_model::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    ids: &'a Tensor,
    rows: Rows,
}

#[derive(Debug, Clone)]
enum Rows {
    /// `(batch, seqlen)`, all of it.
    Even,
    /// `(batch, seqlen)`, of each row the last tokens.
    LeftPadded(Vec<usize>),
    /// `(batch, seqlen)`, of each row the first tokens.
    RightPadded(Vec<usize>),
    /// `(1, total)`, sequences of these lengths one after another.
    Packed(Vec<usize>),
}

impl<'a> From<&'a Tensor> for Batch<'a> {
    /// Rows of one length.
    fn from(ids: &'a Tensor) -> Self {
        Self { ids, rows: Rows::Even }
    }
}

impl<'a> Batch<'a> {
    /// Rows of `(batch, seqlen)` of which the last `lengths` are tokens.
    ///
    /// # Errors
    /// If there is not a length for each row, or one is larger than `seqlen`.
    pub fn left_padded(ids: &'a Tensor, lengths: &[usize]) -> Result<Self> {
        check_lengths(ids, lengths)?;
        Ok(Self { ids, rows: Rows::LeftPadded(lengths.to_vec()) })
    }

    /// Rows of `(batch, seqlen)` of which the first `lengths` are tokens.
    ///
    /// # Errors
    /// As [`left_padded`](Self::left_padded).
    pub fn right_padded(ids: &'a Tensor, lengths: &[usize]) -> Result<Self> {
        check_lengths(ids, lengths)?;
        Ok(Self { ids, rows: Rows::RightPadded(lengths.to_vec()) })
    }

    /// Rows of `(batch, seqlen)` of which those ids are tokens where `mask`, of the same shape, is not 0: the
    /// `attention_mask` of a tokenizer, padded on the left or on the right.
    ///
    /// # Errors
    /// If the shapes differ, or padding stands between tokens, or on the left of one row and on the right of another.
    pub fn masked(ids: &'a Tensor, mask: &Tensor) -> Result<Self> {
        if positions(ids) != mask.dims() || mask.rank() != 2 {
            let (mask, ids) = (mask.dims(), positions(ids));
            return Err(Error::Input(format!("mask has shape {mask:?}, expected (batch, seqlen) {ids:?}")));
        }
        let rows = mask.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let rows: Vec<Vec<bool>> = rows.iter().map(|row| row.iter().map(|m| *m != 0.0).collect()).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| row.iter().filter(|m| **m).count()).collect();
        let tokens = |i: usize, left: bool| match left {
            true => rows[i][rows[i].len() - lengths[i]..].iter().all(|m| *m),
            false => rows[i][..lengths[i]].iter().all(|m| *m),
        };
        for left in [false, true] {
            if (0..rows.len()).all(|i| tokens(i, left)) {
                let padded = if left { Rows::LeftPadded(lengths) } else { Rows::RightPadded(lengths) };
                return Ok(Self { ids, rows: padded });
            }
        }
        Err(Error::Input("mask has padding between tokens, or on both sides, expected it on one side".into()))
    }

    /// Sequences one after another in `(total,)` or `(1, total)`, where `cu_seqlens` are the places where they begin, and
    /// `total` at last: `[0, 3, 5]` are sequences of 3 and 2 tokens.
    ///
    /// # Errors
    /// If `cu_seqlens` does not rise from 0 to `total`.
    pub fn packed(ids: &'a Tensor, cu_seqlens: &[usize]) -> Result<Self> {
        let total = positions(ids).iter().product();
        let rises = cu_seqlens.windows(2).all(|pair| pair[0] <= pair[1]);
        if cu_seqlens.first() != Some(&0) || cu_seqlens.last() != Some(&total) || !rises {
            let message = format!("cu_seqlens is {cu_seqlens:?}, expected to rise from 0 to {total}");
            return Err(Error::Input(message));
        }
        if !matches!(positions(ids), [_] | [1, _]) {
            let message = match ids.dtype().is_float() {
                true => {
                    let dims = ids.dims();
                    format!(
                        "packed embeddings have shape {dims:?}, expected (total, d_model) or (1, total, d_model)"
                    )
                }
                false => format!("packed ids have shape {:?}, expected (total,) or (1, total)", ids.dims()),
            };
            return Err(Error::Input(message));
        }
        Ok(Self { ids, rows: Rows::Packed(cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]).collect()) })
    }

    /// The ids, or the embeddings in their place, with their padding.
    pub fn ids(&self) -> &'a Tensor {
        self.ids
    }

    /// The tokens without padding, `(total,)` or as embeddings `(total, d_model)`, and how they lie.
    pub(crate) fn tokens(&self) -> Result<(Tensor, Sequences)> {
        let (batch, seqlen) = match &self.rows {
            Rows::Packed(_) => (1, positions(self.ids).iter().product()),
            _ => rows_of(self.ids)?,
        };
        if !matches!(self.ids.dtype(), DType::U32 | DType::I64 | DType::U8) && !self.ids.dtype().is_float() {
            let dtype = self.ids.dtype().as_str();
            return Err(Error::Input(format!("ids have dtype {dtype}, expected u32 or i64")));
        }
        let flat = match self.ids.dtype().is_float() {
            true => self.ids.reshape((batch * seqlen, self.ids.dim(D::Minus1)?))?,
            false => self.ids.flatten_all()?,
        };
        match &self.rows {
            Rows::Even => Ok((flat, Sequences::even(batch, seqlen))),
            Rows::Packed(lengths) => Ok((flat, Sequences::packed(lengths.clone()))),
            Rows::LeftPadded(lengths) | Rows::RightPadded(lengths) => {
                let indices = self.places(lengths, seqlen);
                let count = indices.len();
                let indices = Tensor::from_vec(indices, count, self.ids.device())?;
                Ok((flat.index_select(&indices, 0)?, Sequences::packed(lengths.clone())))
            }
        }
    }

    /// Where the tokens of padded rows stand in `(batch · seqlen)`.
    fn places(&self, lengths: &[usize], seqlen: usize) -> Vec<u32> {
        let left = matches!(self.rows, Rows::LeftPadded(_));
        let row = |(i, len): (usize, &usize)| {
            let first = i * seqlen + if left { seqlen - len } else { 0 };
            first as u32..(first + len) as u32
        };
        lengths.iter().enumerate().flat_map(row).collect()
    }

    /// Brings what belongs to the tokens, `(.., .., channels)` as [`tokens`](Self::tokens) gave them, into the layout of
    /// the ids, with zeros in the padding.
    pub(crate) fn restore(&self, x: &Tensor) -> Result<Tensor> {
        let lengths = match &self.rows {
            Rows::Even => return Ok(x.clone()),
            Rows::Packed(_) => return Ok(x.flatten(0, 1)?.unsqueeze(0)?),
            Rows::LeftPadded(lengths) | Rows::RightPadded(lengths) => lengths,
        };
        let (batch, seqlen) = rows_of(self.ids)?;
        let channels = x.dim(2)?;
        let places = self.places(lengths, seqlen);
        // Everything else reads the row of zeros behind the last token.
        let mut sources = vec![places.len() as u32; batch * seqlen];
        for (token, place) in places.iter().enumerate() {
            sources[*place as usize] = token as u32;
        }
        let zeros = Tensor::zeros((1, channels), x.dtype(), x.device())?;
        let rows = match places.len() {
            0 => zeros,
            count => Tensor::cat(&[x.reshape((count, channels))?, zeros], 0)?,
        };
        let sources = Tensor::from_vec(sources, batch * seqlen, x.device())?;
        Ok(rows.index_select(&sources, 0)?.reshape((batch, seqlen, channels))?)
    }
}

/// The extents of the places where there is an id, or an embedding.
fn positions(ids: &Tensor) -> &[usize] {
    match ids.dims() {
        [positions @ .., _] if ids.dtype().is_float() => positions,
        dims => dims,
    }
}

/// `(batch, seqlen)`.
fn rows_of(ids: &Tensor) -> Result<(usize, usize)> {
    match (positions(ids), ids.dtype().is_float()) {
        (&[batch, seqlen], _) => Ok((batch, seqlen)),
        (_, true) => {
            let dims = ids.dims();
            Err(Error::Input(format!("embeddings have shape {dims:?}, expected (batch, seqlen, d_model)")))
        }
        (_, false) => Err(Error::Input(format!("ids have shape {:?}, expected (batch, seqlen)", ids.dims()))),
    }
}

fn check_lengths(ids: &Tensor, lengths: &[usize]) -> Result<()> {
    let (batch, seqlen) = rows_of(ids)?;
    if lengths.len() != batch {
        let message = format!("there are {} lengths, expected one for each of {batch} rows", lengths.len());
        return Err(Error::Input(message));
    }
    match lengths.iter().find(|len| **len > seqlen) {
        Some(len) => Err(Error::Input(format!("a length is {len}, expected at most seqlen {seqlen}"))),
        None => Ok(()),
    }
}

/// How the tokens of a forward lie, and how many were read before them.
#[derive(Debug, Clone)]
pub(crate) struct Sequences {
    /// Tokens of each sequence.
    pub(crate) lengths: Vec<usize>,
    /// Tokens that each sequence has read before.
    pub(crate) positions: Vec<usize>,
    /// `(batch, seqlen)`; else `(1, total)`.
    pub(crate) even: bool,
    /// Where they lie in the one row, if they are not even: one for all layers, which share what it has on a GPU.
    packing: Option<Packing>,
}

impl Sequences {
    fn even(batch: usize, seqlen: usize) -> Self {
        Self { lengths: vec![seqlen; batch], positions: vec![0; batch], even: true, packing: None }
    }

    fn packed(lengths: Vec<usize>) -> Self {
        let even = lengths.windows(2).all(|pair| pair[0] == pair[1]) && !lengths.is_empty();
        let packing = (!even).then(|| Packing::from_lengths(&lengths));
        Self { positions: vec![0; lengths.len()], lengths, even, packing }
    }

    /// Sequences.
    pub(crate) fn count(&self) -> usize {
        self.lengths.len()
    }

    /// The shape of one value a token.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self.even {
            true => (self.count(), self.lengths.first().copied().unwrap_or(0)),
            false => (1, self.lengths.iter().sum()),
        }
    }

    /// Where each sequence lies in the one row of all of them; none if they are rows of one length.
    pub(crate) fn packing(&self) -> Option<&Packing> {
        self.packing.as_ref()
    }

    /// Where the last token of each sequence stands among all tokens.
    pub(crate) fn last_tokens(&self) -> Result<Vec<u32>> {
        let mut end = 0;
        let last = |(i, len): (usize, &usize)| {
            end += *len;
            match len {
                0 if self.count() == 1 => Err(Error::Input("the prompt is empty".into())),
                0 => Err(Error::Input(format!("the prompt of row {i} is empty"))),
                _ => Ok((end - 1) as u32),
            }
        };
        self.lengths.iter().enumerate().map(last).collect()
    }

    /// One of them alone.
    pub(crate) fn row(&self, i: usize) -> Self {
        let (lengths, positions) = (vec![self.lengths[i]], vec![self.positions[i]]);
        Self { lengths, positions, even: true, packing: None }
    }
}
