//! The element types of GGUF files: their numbers, names and blocks.

use std::fmt;
use std::str::FromStr;

use candle_core::DType;

/// How the elements of a tensor are stored in a GGUF file.
///
/// A quantized type stores the elements of a row in blocks of [`block_size`](Self::block_size), each of
/// [`block_bytes`](Self::block_bytes). Types of ggml that are not listed here cannot be read.
///
/// ```
/// use mamba_model::checkpoint::gguf::GgmlType;
///
/// let q4_k: GgmlType = "q4_k".parse()?;
/// assert_eq!((q4_k.block_size(), q4_k.block_bytes()), (256, 144));
/// assert_eq!(q4_k.to_string(), "Q4_K");
/// # Ok::<_, String>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names of ggml
#[allow(non_camel_case_types)] // likewise
#[non_exhaustive]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    F64,
    I16,
    I32,
    I64,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Type, number in files, name, elements a block, bytes a block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 20] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::F64, 28, "F64", 1, 8),
    (GgmlType::I16, 25, "I16", 1, 2),
    (GgmlType::I32, 26, "I32", 1, 4),
    (GgmlType::I64, 27, "I64", 1, 8),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q2_K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3_K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (GgmlType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (GgmlType::MXFP4, 39, "MXFP4", 32, 17),
];

/// Numbers that ggml gives to types that cannot be read here, so that errors can say which one it is.
const OTHERS: [(u32, &str); 18] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// Every type that can be read.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.into_iter().map(|(kind, ..)| kind)
    }

    /// The type of this number, or what can be said about the number.
    pub(super) fn from_number(number: u32) -> Result<Self, String> {
        let known = TABLE.iter().find(|row| row.1 == number).map(|row| row.0);
        known.ok_or_else(|| match OTHERS.iter().find(|(other, _)| *other == number) {
            Some((_, name)) => format!("has type {name}, which is not supported"),
            None => format!("has type {number}, which is unknown"),
        })
    }

    /// The types that [`Model::save_gguf`](crate::Model::save_gguf) writes matrices in: those for which llama.cpp has a name
    /// for a whole file.
    ///
    /// ```
    /// use mamba_model::checkpoint::gguf::GgmlType;
    ///
    /// assert!(GgmlType::of_weights().any(|kind| kind == GgmlType::Q4_K));
    /// assert!(GgmlType::of_weights().all(|kind| kind != GgmlType::I32)); // would cut off all fractions
    /// ```
    pub fn of_weights() -> impl Iterator<Item = Self> {
        Self::all().filter(|kind| kind.file_type().is_some())
    }

    /// llama.cpp's number for a file whose matrices are mostly of the type.
    pub(crate) fn file_type(self) -> Option<u32> {
        Some(match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 14,
            Self::Q5_K => 16,
            Self::Q6_K => 18,
            Self::BF16 => 32,
            _ => return None,
        })
    }

    fn row(self) -> (Self, u32, &'static str, usize, usize) {
        // Every variant is in the table; a test walks through them.
        TABLE.into_iter().find(|row| row.0 == self).unwrap_or(TABLE[0])
    }

    /// The number of the type in files.
    pub(super) fn number(self) -> u32 {
        self.row().1
    }

    /// The name that ggml gives to the type.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Elements of a row that are stored together; 1 for plain numbers.
    pub fn block_size(self) -> usize {
        self.row().3
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Candle's type of the same numbers, unless they are quantized.
    pub fn dtype(self) -> Option<DType> {
        Some(match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F64 => DType::F64,
            Self::I16 => DType::I16,
            Self::I32 => DType::I32,
            Self::I64 => DType::I64,
            _ => return None,
        })
    }

    /// The type of the same numbers as Candle's, if an `f32` holds each of them.
    pub(in crate::checkpoint) fn of_plain(dtype: DType) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|kind| kind.dtype() == Some(dtype))
    }

    /// The bytes of a tensor with `count` elements in rows of `row`, if such a tensor can be.
    pub(super) fn bytes(self, row: usize, count: usize) -> Option<usize> {
        let block = self.block_size();
        row.is_multiple_of(block).then(|| (count / block).checked_mul(self.block_bytes())).flatten()
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// From a name such as `q4_k`, in any case.
impl FromStr for GgmlType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::all().find(|kind| kind.name().eq_ignore_ascii_case(name));
        known.ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            format!("`{name}` is no type of GGUF, expected one of {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_come_back_from_their_numbers_and_names() {
        for kind in GgmlType::all() {
            assert_eq!(kind.row().0, kind);
            assert_eq!(GgmlType::from_number(kind.number()), Ok(kind));
            assert_eq!(kind.name().to_lowercase().parse(), Ok(kind));
            assert_eq!(kind.dtype().is_some(), kind.block_size() == 1);
            assert!(kind.dtype().is_none_or(|dtype| dtype.size_in_bytes() == kind.block_bytes()));
            assert!(OTHERS.iter().all(|(other, _)| *other != kind.number()));
        }
        assert_eq!(GgmlType::from_number(19).unwrap_err(), "has type IQ1_S, which is not supported");
        assert_eq!(GgmlType::from_number(u32::MAX).unwrap_err(), "has type 4294967295, which is unknown");
    }

    #[test]
    fn only_whole_blocks_have_a_size() {
        assert_eq!(GgmlType::Q8_0.bytes(64, 128), Some(136));
        assert_eq!(GgmlType::Q8_0.bytes(33, 66), None);
        assert_eq!(GgmlType::F32.bytes(3, usize::MAX / 2), None);
        assert_eq!(GgmlType::Q6_K.bytes(0, 0), Some(0));
    }
}
