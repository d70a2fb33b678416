//! One tensor as it lies in the bytes of a file.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::DType;

use super::gguf::GgmlType;

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Encoding {
    /// Numbers, one after another.
    Plain(DType),
    /// Blocks of quantized numbers, row by row.
    Blocks(GgmlType),
}

impl Encoding {
    /// The type in which the elements come out of the file.
    pub fn dtype(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Blocks(_) => DType::F32,
        }
    }

    /// The distance between neighbours that strides count.
    fn bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size_in_bytes(),
            Self::Blocks(kind) => kind.block_bytes(),
        }
    }
}

/// Where a tensor lies in a file and how its bytes are to be read; checked against the file when it was opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    /// How elements are stored, or how the file calls it if we have no such type.
    pub encoding: std::result::Result<Encoding, String>,
    pub shape: Vec<usize>,
    /// The bytes from the first element to the last.
    pub bytes: Range<usize>,
    /// The distance between neighbours along each axis, in elements, if it is not that of a contiguous tensor.
    pub strides: Option<Vec<usize>>,
}

/// The number of elements of a shape, if that and all partial products are numbers that a program can work with.
pub(crate) fn elem_count(shape: &[usize]) -> Option<usize> {
    // Candle multiplies the axes up in an order of its own: zeros must not hide an overflow.
    let bound = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1)))?;
    let fits = bound <= isize::MAX as usize / 16;
    fits.then(|| if shape.contains(&0) { 0 } else { bound })
}

/// The number of elements between the first and the last element of a strided tensor, both included.
pub(crate) fn span(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().zip(strides).try_fold(1usize, |end, (&dim, &stride)| {
        (dim - 1).checked_mul(stride).and_then(|step| end.checked_add(step))
    })
}

/// Whether strides describe the usual layout, the last axis running fastest; axes of length 1 may have any stride.
pub(crate) fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    for (&dim, &stride) in shape.iter().zip(strides).rev() {
        if dim == 0 {
            return true;
        }
        if dim > 1 && stride != expected {
            return false;
        }
        expected *= dim;
    }
    true
}

impl Stored {
    /// The bytes of the elements in the usual order, copied if they lie in another one.
    ///
    /// `None` if the bytes are not there, which opening the file has ruled out.
    pub fn elements<'a>(&self, file: &'a [u8], encoding: Encoding) -> Option<Cow<'a, [u8]>> {
        let bytes = file.get(self.bytes.clone())?;
        match &self.strides {
            None => Some(Cow::Borrowed(bytes)),
            Some(strides) => gather(bytes, &self.shape, strides, encoding.bytes()).map(Cow::Owned),
        }
    }
}

fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], elem_size: usize) -> Option<Vec<u8>> {
    let count = elem_count(shape)?;
    let mut out = Vec::with_capacity(count.checked_mul(elem_size)?);
    let mut index = vec![0usize; shape.len()];
    let mut at = 0usize;
    for _ in 0..count {
        let start = at.checked_mul(elem_size)?;
        out.extend_from_slice(bytes.get(start..start.checked_add(elem_size)?)?);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_counts_do_not_overflow_behind_a_zero() {
        assert_eq!(elem_count(&[2, 3, 4]), Some(24));
        assert_eq!(elem_count(&[]), Some(1));
        assert_eq!(elem_count(&[0, 3]), Some(0));
        assert_eq!(elem_count(&[0, usize::MAX, 4]), None);
        assert_eq!(elem_count(&[usize::MAX / 2, 3]), None);
    }

    #[test]
    fn spans_and_contiguity() {
        assert_eq!(span(&[2, 3], &[3, 1]), Some(6));
        assert_eq!(span(&[2, 3], &[1, 2]), Some(6));
        assert_eq!(span(&[], &[]), Some(1));
        assert_eq!(span(&[3, 0], &[1, 1]), Some(0));
        assert_eq!(span(&[2], &[usize::MAX]), None);
        assert!(is_contiguous(&[2, 1, 3], &[3, 77, 1]) && is_contiguous(&[], &[]));
        assert!(!is_contiguous(&[2, 3], &[1, 2]) && !is_contiguous(&[2], &[0]));
    }

    #[test]
    fn a_transposed_tensor_is_put_in_order() {
        let file: Vec<u8> = (0..14).collect();
        let encoding = Encoding::Plain(DType::I16);
        let strides = Some(vec![1, 3]);
        let tensor = Stored { encoding: Ok(encoding), shape: vec![3, 2], bytes: 2..14, strides };
        let elements = tensor.elements(&file, encoding).unwrap();
        assert_eq!(*elements, [2, 3, 8, 9, 4, 5, 10, 11, 6, 7, 12, 13]);
        assert!(tensor.elements(&file[..13], encoding).is_none());
    }
}
