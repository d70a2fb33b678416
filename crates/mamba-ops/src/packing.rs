//! Sequences of different lengths behind one another in the rows of one batch.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::device::{Cut, Tables};
use crate::host::uninit;
use crate::reference::{self, part};

/// Neighbouring tokens of one row that are a sequence of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSequence {
    /// The row of the batch.
    pub row: usize,
    /// The first token within the row.
    pub start: usize,
    /// How many tokens it has, perhaps none.
    pub len: usize,
}

/// Where the sequences of a packed batch lie, in the order of their tokens; what belongs to none of them is padding.
///
/// Ops that take one never let a token see another sequence. Where `batch` stands in the shape of a state, a packed call
/// has the number of sequences: each starts from its own initial state, or from zeros, and leaves its own final state;
/// that of an empty one is its initial state. Padding is not read: there, outputs and gradients are 0.
///
/// Boundaries are read from a tensor once, here, wherever it lives (on a GPU that waits for it), and then serve every op
/// of every layer. A GPU gets its tables of them from the first op that needs one: give all layers the same packing, or clones
/// of it, which are cheap.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_ops::{CausalConv1d, Packing, causal_conv1d};
/// # fn main() -> candle_core::Result<()> {
/// let (x, weight) = (Tensor::randn(0f32, 1.0, (1, 3, 9), &Device::Cpu)?, Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu)?);
/// let packing = Packing::from_lengths(&[5, 0, 4]);
/// let packed = causal_conv1d(&CausalConv1d { packing: Some(&packing), ..CausalConv1d::new(&x, &weight) })?;
/// assert_eq!(packed.final_state.dims(), [3, 3, 3]); // one window a sequence
/// let alone = causal_conv1d(&CausalConv1d::new(&x.narrow(2, 5, 4)?, &weight))?;
/// let gap = (packed.y.narrow(2, 5, 4)? - alone.y)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(gap < 1e-6);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Packing {
    batch: usize,
    seqlen: usize,
    sequences: Arc<[PackedSequence]>,
    #[cfg(feature = "cuda")]
    pub(crate) on_gpus: Tables<Cut>,
}

impl PartialEq for Packing {
    fn eq(&self, other: &Self) -> bool {
        (self.batch, self.seqlen, &self.sequences) == (other.batch, other.seqlen, &other.sequences)
    }
}

impl Eq for Packing {}

impl Packing {
    fn new(batch: usize, seqlen: usize, sequences: Vec<PackedSequence>) -> Self {
        Self {
            batch,
            seqlen,
            sequences: sequences.into(),
            #[cfg(feature = "cuda")]
            on_gpus: Tables::default(),
        }
    }

    /// Sequences of these lengths behind one another in a batch of one row, without padding.
    pub fn from_lengths(lengths: &[usize]) -> Self {
        let mut start = 0usize;
        let mut sequence = |&len: &usize| {
            let first = start;
            start = first.saturating_add(len); // more than any tensor has fits none
            PackedSequence { row: 0, start: first, len }
        };
        let sequences = lengths.iter().map(&mut sequence).collect();
        Self::new(1, start, sequences)
    }

    /// The same, from where they begin and the last one ends, `[0, end of the first, …, seqlen]`: `(sequences + 1,)` of any
    /// integer dtype, as varlen attention has it.
    ///
    /// # Errors
    /// If the tensor has another rank or dtype, does not begin with 0, or descends.
    pub fn from_cu_seqlens(cu_seqlens: &Tensor) -> Result<Self> {
        if cu_seqlens.rank() != 1 || cu_seqlens.elem_count() == 0 {
            bail!("packing: `cu_seqlens` has shape {:?}, expected (sequences + 1)", cu_seqlens.dims())
        }
        let ends = integers("packing", "cu_seqlens", cu_seqlens)?;
        if ends[0] != 0 {
            bail!("packing: `cu_seqlens` begins with {}, expected 0", ends[0])
        }
        let mut lengths = Vec::with_capacity(ends.len() - 1);
        for (i, pair) in ends.windows(2).enumerate() {
            match pair[1].checked_sub(pair[0]).and_then(|len| usize::try_from(len).ok()) {
                Some(len) => lengths.push(len),
                None => bail!(
                    "packing: `cu_seqlens` has {} at {} after {}, expected no less",
                    pair[1],
                    i + 1,
                    pair[0]
                ),
            }
        }
        Ok(Self::from_lengths(&lengths))
    }

    /// From the sequence of each token, `(batch, seqlen)` of any integer dtype: a sequence is a run of equal ids within a
    /// row, so one begins wherever the id changes; a negative id marks padding.
    ///
    /// # Errors
    /// If the tensor has another rank or dtype.
    pub fn from_seq_idx(seq_idx: &Tensor) -> Result<Self> {
        let Ok((batch, seqlen)) = seq_idx.dims2() else {
            bail!("packing: `seq_idx` has shape {:?}, expected (batch, seqlen)", seq_idx.dims())
        };
        let ids = integers("packing", "seq_idx", seq_idx)?;
        let mut sequences = vec![];
        for (row, ids) in ids.chunks_exact(seqlen.max(1)).enumerate() {
            let mut start = 0;
            for run in ids.chunk_by(|a, b| a == b) {
                if run[0] >= 0 {
                    sequences.push(PackedSequence { row, start, len: run.len() });
                }
                start += run.len();
            }
        }
        Ok(Self::new(batch, seqlen, sequences))
    }

    /// Each row one sequence: what a call without packing means.
    pub(crate) fn rows(batch: usize, seqlen: usize) -> Self {
        Self::some_rows(0..batch, batch, seqlen)
    }

    /// Some rows one sequence each, the others padding.
    pub(crate) fn some_rows(rows: impl Iterator<Item = usize>, batch: usize, seqlen: usize) -> Self {
        let sequences = rows.map(|row| PackedSequence { row, start: 0, len: seqlen }).collect();
        Self::new(batch, seqlen, sequences)
    }

    /// The sequences, in the order of their states.
    pub fn sequences(&self) -> &[PackedSequence] {
        &self.sequences
    }

    /// How many sequences there are.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Rows of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of a row, padding included.
    pub fn seqlen(&self) -> usize {
        self.seqlen
    }

    /// Whether some token belongs to no sequence.
    pub fn has_padding(&self) -> bool {
        self.tokens() < self.batch * self.seqlen
    }

    /// Tokens of all sequences.
    pub(crate) fn tokens(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.len).sum()
    }

    /// Whether each row is one sequence, as without a packing.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_of_rows(&self) -> bool {
        let whole = |row| PackedSequence { row, start: 0, len: self.seqlen };
        self.len() == self.batch && self.sequences.iter().enumerate().all(|(i, s)| *s == whole(i))
    }

    /// Tokens of the longest sequence.
    #[cfg(feature = "cuda")]
    pub(crate) fn longest(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0)
    }

    /// Room for an output with an axis of tokens, of which kernels write all but the padding.
    pub(crate) fn room(&self, len: usize) -> Vec<f32> {
        if self.has_padding() { vec![0.0; len] } else { uninit(len) }
    }

    /// What `f` gives for each sequence and its place, its tokens joined along `axis` to the shape of
    /// `like` with zeros for padding, and its states along the first axis; `state` is the shape of one.
    pub(crate) fn one_by_one(
        &self,
        like: &Tensor,
        axis: usize,
        state: (&[usize], DType),
        f: impl Fn(&PackedSequence, usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Tensor)> {
        let zeros = |batch: usize, tokens: usize| {
            let mut dims = like.dims().to_vec();
            (dims[0], dims[axis]) = (batch, tokens);
            reference::zeros(&dims, like.dtype(), like.device())
        };
        let (mut states, mut rows) = (vec![], vec![]);
        let mut sequences = self.sequences.iter().enumerate().peekable();
        for row in 0..self.batch {
            let (mut pieces, mut end) = (vec![], 0);
            while let Some((i, sequence)) = sequences.next_if(|(_, sequence)| sequence.row == row) {
                let (y, state) = f(sequence, i)?;
                states.push(state);
                if sequence.start > end {
                    pieces.push(zeros(1, sequence.start - end)?);
                }
                if sequence.len > 0 {
                    pieces.push(y);
                }
                end = sequence.start + sequence.len;
            }
            if end < self.seqlen || pieces.is_empty() {
                pieces.push(zeros(1, self.seqlen - end)?);
            }
            rows.push(Tensor::cat(&pieces, axis)?);
        }
        if states.len() != self.sequences.len() {
            bail!("packing: the sequences are not in the order of their rows")
        }
        let y = if rows.is_empty() { zeros(0, self.seqlen)? } else { Tensor::cat(&rows, 0)? };
        let states = match states.is_empty() {
            true => reference::zeros(&[&[0], state.0].concat(), state.1, like.device())?,
            false => Tensor::cat(&states, 0)?,
        };
        Ok((y, states))
    }
}

impl PackedSequence {
    /// The tokens of this sequence of an activation whose axis of time is `axis`, as a batch of one row.
    pub(crate) fn of(&self, x: &Tensor, axis: usize) -> Result<Tensor> {
        part(&part(x, 0, self.row, 1)?, axis, self.start, self.len)
    }
}

/// The state of sequence `i`, as a batch of one.
pub(crate) fn state_of(states: Option<&Tensor>, i: usize) -> Result<Option<Tensor>> {
    states.map(|states| part(states, 0, i, 1)).transpose()
}

/// The elements of an integer tensor on any device, in order.
pub(crate) fn integers(of: &'static str, name: &'static str, x: &Tensor) -> Result<Vec<i64>> {
    if !x.dtype().is_int() {
        bail!("{of}: `{name}` has dtype {}, expected an integer one", x.dtype().as_str())
    }
    if x.elem_count() == 0 {
        return Ok(vec![]);
    }
    x.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(row: usize, start: usize, len: usize) -> PackedSequence {
        PackedSequence { row, start, len }
    }

    #[test]
    fn lengths_beyond_all_numbers() -> Result<()> {
        assert_eq!(Packing::from_lengths(&[usize::MAX, 1]).seqlen(), usize::MAX);
        let ends = Tensor::new(&[0i64, i64::MAX, i64::MIN], &Device::Cpu)?;
        assert!(Packing::from_cu_seqlens(&ends).is_err());
        Ok(())
    }

    #[test]
    fn boundaries() -> Result<()> {
        let want = Packing::from_lengths(&[3, 0, 2]);
        assert_eq!(want.sequences(), [sequence(0, 0, 3), sequence(0, 3, 0), sequence(0, 3, 2)]);
        assert_eq!((want.batch(), want.seqlen(), want.len(), want.has_padding()), (1, 5, 3, false));
        for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
            let ends = Tensor::new(&[0i64, 3, 3, 5], &Device::Cpu)?.to_dtype(dtype)?;
            assert_eq!(Packing::from_cu_seqlens(&ends)?, want);
        }
        // A view of every other element.
        let ends =
            Tensor::new(&[[0i64, 9], [3, 9], [3, 9], [5, 9]], &Device::Cpu)?.narrow(1, 0, 1)?.squeeze(1)?;
        assert_eq!(Packing::from_cu_seqlens(&ends)?, want);
        assert!(Packing::from_cu_seqlens(&Tensor::new(&[0u32], &Device::Cpu)?)?.is_empty());
        Ok(())
    }

    #[test]
    fn ids() -> Result<()> {
        let ids = Tensor::new(&[[7i64, 7, -1, 7, 0], [-3, -4, 2, 2, 2]], &Device::Cpu)?;
        let packing = Packing::from_seq_idx(&ids)?;
        let want = [sequence(0, 0, 2), sequence(0, 3, 1), sequence(0, 4, 1), sequence(1, 2, 3)];
        assert_eq!(packing.sequences(), want);
        assert!(packing.has_padding());
        let empty = Packing::from_seq_idx(&Tensor::zeros((3, 0), DType::I64, &Device::Cpu)?)?;
        assert_eq!((empty.batch(), empty.seqlen(), empty.len(), empty.has_padding()), (3, 0, 0, false));
        Ok(())
    }

    #[test]
    fn misuse() -> Result<()> {
        let fails = |result: Result<Packing>, want: &str| {
            let message = result.map(drop).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(want), "{message:?} is not {want:?}");
        };
        let tensor = |values: &[i64]| Tensor::new(values, &Device::Cpu);
        fails(Packing::from_cu_seqlens(&tensor(&[])?), "packing: `cu_seqlens` has shape [0]");
        fails(Packing::from_cu_seqlens(&tensor(&[1, 2])?), "`cu_seqlens` begins with 1, expected 0");
        fails(
            Packing::from_cu_seqlens(&tensor(&[0, 4, 3])?),
            "`cu_seqlens` has 3 at 2 after 4, expected no less",
        );
        let float = tensor(&[0, 4])?.to_dtype(DType::F32)?;
        fails(Packing::from_cu_seqlens(&float), "`cu_seqlens` has dtype f32, expected an integer one");
        fails(Packing::from_cu_seqlens(&tensor(&[0, 4])?.unsqueeze(0)?), "`cu_seqlens` has shape [1, 2]");
        fails(Packing::from_seq_idx(&tensor(&[0, 4])?), "`seq_idx` has shape [2], expected (batch, seqlen)");
        fails(Packing::from_seq_idx(&float.unsqueeze(0)?), "`seq_idx` has dtype f32");
        Ok(())
    }
}
