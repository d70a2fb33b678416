//! Products of small matrices, vectorised along the columns of the result.

use pulp::{Simd, WithSimd};

/// Row strides of scratch matrices are multiples of this many columns, which every vector divides.
const COLUMNS: usize = 16;

/// Rows of a tile of the result, which is kept in registers.
const ROWS: usize = 6;

/// The stride of rows of `columns` columns.
pub(crate) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(COLUMNS)
}

/// A matrix that is read one element at a time, with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub column: usize,
}

impl<'a> Strided<'a> {
    /// Rows side by side.
    pub(crate) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: stride, column: 1 }
    }

    /// The transposition of [`rows`](Self::rows).
    pub(crate) fn columns(values: &'a [f32], stride: usize) -> Self {
        Self { values, row: 1, column: stride }
    }
}

/// Which tiles of a product need no work.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Zeros {
    Nowhere,
    /// `a` is lower triangular.
    AboveDiagonalOfA,
    /// `a` is upper triangular.
    BelowDiagonalOfA,
    /// Nobody reads the result above its diagonal, where it stays as it is or gets any values.
    AboveDiagonalOfResult,
}

/// `out ← keep · out + a · b`, where `keep` 0 does not read `out`.
///
/// Each element is a sum in the order of `inner`, whatever the extents. Columns come in whole [`COLUMNS`]: what is
/// read past the last of `b` lands past the last of `out`.
pub(crate) struct Product<'a> {
    /// `(rows, inner)`.
    pub a: Strided<'a>,
    /// `(inner, columns)`, rows of the given stride.
    pub b: (&'a [f32], usize),
    /// `(rows, columns)`, rows of the given stride.
    pub out: (&'a mut [f32], usize),
    pub keep: f32,
    pub rows: usize,
    pub inner: usize,
    pub columns: usize,
    pub zeros: Zeros,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Self { rows, inner, columns, .. } = self;
        let columns = padded(columns);
        if rows == 0 || columns == 0 {
            return;
        }
        if inner > 0 {
            assert!((rows - 1) * self.a.row + (inner - 1) * self.a.column < self.a.values.len());
            assert!((inner - 1) * self.b.1 + columns <= self.b.0.len());
        }
        assert!((rows - 1) * self.out.1 + columns <= self.out.0.len());
        let mut column = 0;
        // A panel of columns of b stays in cache while all rows of a go by.
        while column < columns {
            let vectors = match (columns - column) / S::F32_LANES {
                4.. if S::REGISTER_COUNT >= 32 => 4,
                2.. => 2,
                _ => 1,
            };
            // SAFETY: extents are checked above.
            unsafe {
                match vectors {
                    4 => self.panel::<S, 4>(simd, column),
                    2 => self.panel::<S, 2>(simd, column),
                    _ => self.panel::<S, 1>(simd, column),
                }
            }
            column += vectors * S::F32_LANES;
        }
    }
}

impl Product<'_> {
    /// All rows of `VECTORS` vectors of columns.
    ///
    /// # Safety
    /// Extents and strides lie within the slices.
    #[inline(always)]
    unsafe fn panel<S: Simd, const VECTORS: usize>(&mut self, simd: S, column: usize) {
        let mut row = 0;
        while row < self.rows {
            let rows = ROWS.min(self.rows - row);
            // SAFETY: by the contract; rows lie within the result.
            unsafe {
                match rows {
                    6 => self.tile::<S, 6, VECTORS>(simd, row, column),
                    5 => self.tile::<S, 5, VECTORS>(simd, row, column),
                    4 => self.tile::<S, 4, VECTORS>(simd, row, column),
                    3 => self.tile::<S, 3, VECTORS>(simd, row, column),
                    2 => self.tile::<S, 2, VECTORS>(simd, row, column),
                    _ => self.tile::<S, 1, VECTORS>(simd, row, column),
                }
            }
            row += rows;
        }
    }

    /// # Safety
    /// Extents and strides lie within the slices, and the tile within the result.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, column: usize) {
        let (start, end) = match self.zeros {
            Zeros::Nowhere => (0, self.inner),
            Zeros::AboveDiagonalOfA => (0, self.inner.min(row + R)),
            Zeros::BelowDiagonalOfA => (row.min(self.inner), self.inner),
            Zeros::AboveDiagonalOfResult if column >= row + R => return,
            Zeros::AboveDiagonalOfResult => (0, self.inner),
        };
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        // SAFETY: by the contract all offsets below lie within the slices.
        unsafe {
            // One pointer a row, moved by one offset: few enough registers for nothing to spill.
            let mut a = [self.a.values.as_ptr(); R];
            for (r, a) in a.iter_mut().enumerate() {
                *a = a.add((row + r) * self.a.row);
            }
            let mut at = start * self.a.column;
            let mut b = self.b.0.as_ptr().wrapping_add(start * self.b.1 + column);
            for _ in start..end {
                let mut values = [simd.splat_f32s(0.0); V];
                for (v, value) in values.iter_mut().enumerate() {
                    *value = b.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                }
                for r in 0..R {
                    let a = simd.splat_f32s(*a[r].add(at));
                    for v in 0..V {
                        sums[r][v] = simd.mul_add_e_f32s(a, values[v], sums[r][v]);
                    }
                }
                at = at.wrapping_add(self.a.column);
                b = b.wrapping_add(self.b.1);
            }
            let keep = simd.splat_f32s(self.keep);
            for (r, sums) in sums.iter().enumerate() {
                let out = self.out.0.as_mut_ptr().add((row + r) * self.out.1 + column);
                for (v, &sum) in sums.iter().enumerate() {
                    let out = out.add(v * S::F32_LANES).cast::<S::f32s>();
                    let kept = self.keep != 0.0;
                    let value = if kept { simd.mul_add_e_f32s(keep, out.read_unaligned(), sum) } else { sum };
                    out.write_unaligned(value);
                }
            }
        }
    }
}

/// Writes the transposition of `(rows, columns)`, both with the given strides.
#[inline(always)]
pub(crate) fn transpose(from: (&[f32], usize), [rows, columns]: [usize; 2], to: (&mut [f32], usize)) {
    // Square pieces, of which both sides stay in cache.
    const PIECE: usize = 16;
    for first in (0..rows).step_by(PIECE) {
        let last = rows.min(first + PIECE);
        for column in 0..columns {
            let out = &mut to.0[column * to.1 + first..column * to.1 + last];
            for (out, value) in out.iter_mut().zip(from.0[first * from.1 + column..].iter().step_by(from.1)) {
                *out = *value;
            }
        }
    }
}

/// Copies the first columns of each row.
#[inline(always)]
pub(crate) fn copy(from: (&[f32], usize), [rows, columns]: [usize; 2], to: (&mut [f32], usize)) {
    for i in 0..rows {
        to.0[i * to.1..][..columns].copy_from_slice(&from.0[i * from.1..][..columns]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    struct Vectorized<'a>(Product<'a>);
    impl WithSimd for Vectorized<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            self.0.with_simd(simd);
        }
    }

    #[test]
    fn products_of_all_shapes() {
        let value = |i: usize| ((i * 7919 % 31) as f32 - 15.0) / 8.0;
        for isa in Isa::available() {
            for (rows, inner, columns) in
                [(1, 1, 1), (6, 5, 16), (13, 7, 33), (5, 0, 3), (64, 20, 70), (3, 9, 100)]
            {
                for zeros in [Zeros::Nowhere, Zeros::AboveDiagonalOfA, Zeros::BelowDiagonalOfA] {
                    let stride = padded(columns);
                    let zero = |i: usize, k: usize| match zeros {
                        Zeros::AboveDiagonalOfA => k > i,
                        Zeros::BelowDiagonalOfA => k < i,
                        _ => false,
                    };
                    let mut a = vec![0.0; rows * inner];
                    for i in 0..rows {
                        for k in 0..inner {
                            a[k * rows + i] = if zero(i, k) { 0.0 } else { value(i * inner + k) };
                        }
                    }
                    let b: Vec<f32> = (0..inner * stride).map(value).collect();
                    let mut out: Vec<f32> = (0..rows * stride).map(value).collect();
                    let old = out.clone();
                    isa.dispatch(Vectorized(Product {
                        a: Strided::columns(&a, rows),
                        b: (&b, stride),
                        out: (&mut out, stride),
                        keep: 0.5,
                        rows,
                        inner,
                        columns,
                        zeros,
                    }));
                    for i in 0..rows {
                        for j in 0..columns {
                            // All values are dyadic and small: sums are exact.
                            let sum: f32 = (0..inner).map(|k| a[k * rows + i] * b[k * stride + j]).sum();
                            assert_eq!(out[i * stride + j], 0.5 * old[i * stride + j] + sum);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn transposes_with_strides() {
        let from: Vec<f32> = (0..40 * 23).map(|i| i as f32).collect();
        let mut to = vec![-1.0; 21 * 48];
        transpose((&from, 23), [40, 21], (&mut to, 48));
        for i in 0..40 {
            for j in 0..21 {
                assert_eq!(to[j * 48 + i], from[i * 23 + j]);
            }
        }
    }
}
