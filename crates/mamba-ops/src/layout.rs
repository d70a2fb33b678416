//! The two conventions that every op over a sequence shares.

/// Where the sequence axis of an activation stands.
///
/// # Example
/// ```
/// use mamba_ops::SequenceLayout;
/// assert_eq!(SequenceLayout::default(), SequenceLayout::ChannelsFirst);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SequenceLayout {
    /// `(batch, dim, seqlen)`, as the published Mamba-1 code has it.
    #[default]
    ChannelsFirst,
    /// `(batch, seqlen, dim)`, as matrix products give and take it: no transposition around them.
    ChannelsLast,
}

impl SequenceLayout {
    /// Splits the two last extents of an activation into `(dim, seqlen)`.
    pub(crate) fn dim_and_seqlen(self, [a, b]: [usize; 2]) -> (usize, usize) {
        match self {
            Self::ChannelsFirst => (a, b),
            Self::ChannelsLast => (b, a),
        }
    }

    /// The axis of time of an activation.
    pub(crate) fn time_axis(self) -> usize {
        match self {
            Self::ChannelsFirst => 2,
            Self::ChannelsLast => 1,
        }
    }

    /// The inverse of [`dim_and_seqlen`](Self::dim_and_seqlen), for any pair.
    pub(crate) fn order<T>(self, dim: T, seqlen: T) -> [T; 2] {
        match self {
            Self::ChannelsFirst => [dim, seqlen],
            Self::ChannelsLast => [seqlen, dim],
        }
    }
}

/// What is applied to the result of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `x · sigmoid(x)`, which every published Mamba uses.
    #[default]
    Silu,
}
