//! The product on slices, by sums over `d_in`: the weight is not packed or copied, but read as it is stored.
//!
//! For few rows the time is that of reading the weight. A task has neighbouring outputs, whose weights it reads in
//! [`STREAMS`] places at once: the sums hide the latency of each other, every vector of `x` that is loaded serves all of them,
//! and what the processor fetches ahead is not cut off at the end of each row. A tile of `R` streams by `M` rows of `x` stays
//! in registers over a block of `d_in`. More rows come in bands, during which the weights of a task stay in cache.
//! Each sum is in one order, whatever the tile: a row of `x` gives the same bits alone as among others.
//!
//! Two `bf16` in a word of 32 bits are two `f32` after a shift and a mask. So a vector of words gives the even elements
//! and the odd ones, and `x` is arranged likewise beforehand. `f16` likewise, or by
//! an instruction (`simd/half.rs`).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd, bytemuck};

use super::Sizes;
use crate::host::{SharedMut, Values, parallel, uninit};
use crate::simd::half::{in_order, widen_vector};
use crate::simd::{Isa, prefetch_ahead};

/// The most rows of `x` for which this is faster than a general product, which packs the weight: with AVX2 they meet at
/// about 40, with AVX-512 at about 120.
pub(super) const FEW_ROWS: usize = 64;

/// Rows of `x` that go through the weights of a task at once.
const BAND: usize = 16;

/// How many rows of the weight are read at once.
const STREAMS: usize = 4;

/// About how many elements of the weight one task reads for one band.
const ELEMENTS: usize = 1 << 16;

/// How many tasks there are at least of a weight with as many groups of columns.
const FEWEST_TASKS: usize = 8;

/// Elements of a row that are read before the next group of rows of `x` has its turn: the block of `x` stays in cache.
const BLOCK: usize = 512;

/// How many bytes further on each stream is asked for: what processors foresee ends with every page.
const AHEAD: usize = 2048;

/// The inputs as slices.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub sizes: Sizes,
    /// As [`arrange`] leaves it.
    pub x: &'a [f32],
    pub weight: Values<'a>,
}

/// `x Wᵀ + bias`, `(rows, d_out)`, where none of the three extents is 0.
pub(super) fn forward(sizes: Sizes, x: &[f32], weight: Values, bias: Option<&[f32]>, isa: Isa) -> Vec<f32> {
    let Sizes { rows, d_in, d_out } = sizes;
    let mut arranged = vec![];
    arrange(sizes, x, d_in, weight, &mut arranged, isa);
    let mut y = uninit(rows * d_out);
    let shared = SharedMut::new(&mut y);
    let to = Columns { y: &shared, stride: d_out, begin: 0 };
    multiply(&Product { sizes, x: &arranged, weight }, to, isa, |first, count| {
        let Some(bias) = bias.map(|bias| &bias[first..first + count]) else { return };
        for row in 0..rows {
            // SAFETY: each task has its own columns.
            let y = unsafe { shared.get(row * d_out + first, count) };
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    });
    y
}

/// Where a product goes: columns from `begin` on, of rows that are `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub y: &'a SharedMut<'a>,
    pub stride: usize,
    pub begin: usize,
}

/// Writes `x Wᵀ`; `finish` is called with the first of some neighbouring columns and how many they are when they are there for all rows,
/// on the thread that has just written them.
pub(crate) fn multiply(
    product: &Product,
    to: Columns,
    isa: Isa,
    finish: impl Fn(usize, usize) + Sync + Send,
) {
    let Sizes { rows, d_in, d_out } = product.sizes;
    let bands = rows.div_ceil(BAND);
    let columns =
        (ELEMENTS / (d_in * bands)).min(d_out / FEWEST_TASKS).next_multiple_of(STREAMS).max(STREAMS);
    parallel(d_out.div_ceil(columns), rows * d_in * d_out, |task| {
        let first = task * columns;
        let columns = (first, columns.min(d_out - first));
        for band in 0..bands {
            let rows = (band * BAND, BAND.min(rows - band * BAND));
            isa.dispatch(Piece { product, to, rows, columns });
        }
        finish(columns.0, columns.1);
    });
}

/// `x`, rows that are `stride` apart, as pairs of vectors, in the order in which the weight is widened, with zeros past the end: band by
/// band, and in each one [`BLOCK`] of all rows, then the next, so that what is read over and over lies together.
pub(crate) fn arrange(sizes: Sizes, x: &[f32], stride: usize, weight: Values, out: &mut Vec<f32>, isa: Isa) {
    isa.dispatch(Arrange { sizes, x, stride, weight, out });
}

/// An element of the weight as it is stored, which is widened in registers.
trait Widen: Copy + 'static {
    /// As many elements as are widened at once.
    type Vector<S: Simd>: Copy;

    const ZERO: Self;

    /// Whole vectors.
    fn vectors<S: Simd>(row: &[Self]) -> &[Self::Vector<S>];

    fn widen<S: Simd>(simd: S, vector: Self::Vector<S>) -> [S::f32s; 2];

    /// Where in the two vectors an element goes.
    fn place(index: usize, lanes: usize) -> usize;

    /// How many elements are widened at once, a power of two of at most 32.
    #[inline(always)]
    fn per_vector<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }
}

impl Widen for f32 {
    type Vector<S: Simd> = [S::f32s; 2];

    const ZERO: Self = 0.0;

    #[inline(always)]
    fn vectors<S: Simd>(row: &[Self]) -> &[Self::Vector<S>] {
        S::as_simd_f32s(row).0.as_chunks().0
    }

    #[inline(always)]
    fn widen<S: Simd>(_: S, vector: Self::Vector<S>) -> [S::f32s; 2] {
        vector
    }

    #[inline(always)]
    fn place(index: usize, _: usize) -> usize {
        index
    }
}

impl Widen for bf16 {
    /// One element if the vectors are scalars: the second `f32` is 0 then.
    type Vector<S: Simd> = S::u16s;

    const ZERO: Self = bf16::ZERO;

    #[inline(always)]
    fn vectors<S: Simd>(row: &[Self]) -> &[Self::Vector<S>] {
        S::as_simd_u16s(row.reinterpret_cast()).0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, vector: Self::Vector<S>) -> [S::f32s; 2] {
        if S::IS_SCALAR {
            let bits: u16 = bytemuck::cast(vector);
            return [simd.splat_f32s(bf16::from_bits(bits).to_f32()), simd.splat_f32s(0.0)];
        }
        let words: S::u32s = bytemuck::cast(vector);
        let low = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let high = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        let (even, odd) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
        [simd.transmute_f32s_u32s(even), simd.transmute_f32s_u32s(odd)]
    }

    #[inline(always)]
    fn place(index: usize, lanes: usize) -> usize {
        index % 2 * lanes + index / 2
    }
}

impl Widen for f16 {
    /// One element if the vectors are scalars: the second `f32` is 0 then.
    type Vector<S: Simd> = S::u16s;

    const ZERO: Self = f16::ZERO;

    #[inline(always)]
    fn vectors<S: Simd>(row: &[Self]) -> &[Self::Vector<S>] {
        S::as_simd_u16s(row.reinterpret_cast()).0
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, vector: Self::Vector<S>) -> [S::f32s; 2] {
        if S::IS_SCALAR {
            let bits: u16 = bytemuck::cast(vector);
            return [simd.splat_f32s(f16::from_bits(bits).to_f32()), simd.splat_f32s(0.0)];
        }
        widen_vector(simd, vector)
    }

    #[inline(always)]
    fn place(index: usize, lanes: usize) -> usize {
        if in_order(lanes) { index } else { index % 2 * lanes + index / 2 }
    }
}

struct Arrange<'a> {
    sizes: Sizes,
    x: &'a [f32],
    stride: usize,
    weight: Values<'a>,
    out: &'a mut Vec<f32>,
}

impl WithSimd for Arrange<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.weight {
            Values::F32(_) => self.arrange::<S, f32>(),
            Values::F16(_) => self.arrange::<S, f16>(),
            Values::BF16(_) => self.arrange::<S, bf16>(),
        }
    }
}

impl Arrange<'_> {
    #[inline(always)]
    fn arrange<S: Simd, E: Widen>(self) {
        let Sizes { rows, d_in, .. } = self.sizes;
        let (pair, in_order) = (2 * S::F32_LANES, E::place(1, S::F32_LANES) == 1);
        self.out.resize(rows * arranged::<S, E>(d_in), 0.0);
        let mut out = self.out.as_mut_slice();
        for band in (0..rows).step_by(BAND) {
            for at in (0..d_in).step_by(BLOCK) {
                for row in band..rows.min(band + BAND) {
                    let block = &self.x[row * self.stride..][..d_in][at..d_in.min(at + BLOCK)];
                    let (to, rest) = out.split_at_mut(arranged::<S, E>(block.len()));
                    out = rest;
                    if in_order && E::per_vector::<S>() == pair {
                        to[..block.len()].copy_from_slice(block);
                        to[block.len()..].fill(0.0);
                        continue;
                    }
                    for (x, pair) in block.chunks(E::per_vector::<S>()).zip(to.chunks_exact_mut(pair)) {
                        if x.len() < pair.len() {
                            pair.fill(0.0);
                        }
                        for (i, x) in x.iter().enumerate() {
                            pair[E::place(i, S::F32_LANES)] = *x;
                        }
                    }
                }
            }
        }
    }
}

/// How many `f32` as many elements of `x` are when arranged.
#[inline(always)]
fn arranged<S: Simd, E: Widen>(elements: usize) -> usize {
    elements.div_ceil(E::per_vector::<S>()) * 2 * S::F32_LANES
}

/// A part of `y`: some rows of one band, some columns.
struct Piece<'a> {
    product: &'a Product<'a>,
    to: Columns<'a>,
    /// The first, and how many.
    rows: (usize, usize),
    /// The first, and how many.
    columns: (usize, usize),
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d_in = self.product.sizes.d_in;
        let (first, count) = self.columns;
        let range = first * d_in..(first + count) * d_in;
        match self.product.weight {
            Values::F32(weight) => self.multiply(simd, &weight[range]),
            Values::F16(weight) => self.multiply(simd, &weight[range]),
            Values::BF16(weight) => self.multiply(simd, &weight[range]),
        }
    }
}

impl Piece<'_> {
    #[inline(always)]
    fn multiply<S: Simd, E: Widen>(&self, simd: S, weight: &[E]) {
        // What a tile keeps in registers must fit.
        let done = if S::REGISTER_COUNT >= 32 || self.rows.1 <= 2 {
            self.streams::<S, E, STREAMS>(simd, weight, 0)
        } else {
            self.streams::<S, E, 2>(simd, weight, 0)
        };
        self.streams::<S, E, 1>(simd, weight, done);
    }

    /// The columns from `start` in `R` streams, as many as come out even; returns where the rest starts.
    #[inline(always)]
    fn streams<S: Simd, E: Widen, const R: usize>(&self, simd: S, weight: &[E], start: usize) -> usize {
        let d_in = self.product.sizes.d_in;
        let ((first_row, rows), (first, count)) = (self.rows, self.columns);
        let each = (count - start) / R;
        let mut sums = [[simd.splat_f32s(0.0); R]; BAND];
        for i in start..start + each {
            let mut at = 0;
            while at < d_in {
                let len = BLOCK.min(d_in - at);
                let mut blocks: [&[E]; R] = [&[]; R];
                for (r, block) in blocks.iter_mut().enumerate() {
                    *block = &weight[(i + r * each) * d_in + at..][..len];
                }
                let mut row = 0;
                while row < rows {
                    // Groups of nearly one size.
                    let left = rows - row;
                    let taken = left.div_ceil(left.div_ceil(4));
                    match taken {
                        1 => self.tile::<S, E, R, 1>(simd, blocks, at, row, &mut sums),
                        2 => self.tile::<S, E, R, 2>(simd, blocks, at, row, &mut sums),
                        3 => self.tile::<S, E, R, 3>(simd, blocks, at, row, &mut sums),
                        _ => self.tile::<S, E, R, 4>(simd, blocks, at, row, &mut sums),
                    }
                    row += taken;
                }
                at += len;
            }
            for (row, sums) in sums[..rows].iter_mut().enumerate() {
                for (r, sum) in sums.iter_mut().enumerate() {
                    let Columns { y, stride, begin } = self.to;
                    let at = (first_row + row) * stride + begin + first + i + r * each;
                    // SAFETY: each task has its own rows and columns.
                    let y = unsafe { y.get(at, 1) };
                    y[0] = simd.reduce_sum_f32s(*sum);
                    *sum = simd.splat_f32s(0.0);
                }
            }
        }
        start + each * R
    }

    /// Adds the products of blocks of `R` rows of the weight, which start at `at`, with `M` rows of `x`.
    #[inline(always)]
    fn tile<S: Simd, E: Widen, const R: usize, const M: usize>(
        &self,
        simd: S,
        blocks: [&[E]; R],
        at: usize,
        row: usize,
        sums: &mut [[S::f32s; R]; BAND],
    ) {
        let len = blocks[0].len();
        let count = len / E::per_vector::<S>();
        let mut weights: [&[E::Vector<S>]; R] = [&[]; R];
        for r in 0..R {
            weights[r] = &E::vectors::<S>(blocks[r])[..count];
        }
        let mut x: [&[[S::f32s; 2]]; M] = [&[]; M];
        let (first, rows) = self.rows;
        let start = first * arranged::<S, E>(self.product.sizes.d_in) + rows * arranged::<S, E>(at);
        let stride = arranged::<S, E>(len);
        for (m, x) in x.iter_mut().enumerate() {
            *x = S::as_simd_f32s(&self.product.x[start + (row + m) * stride..][..stride]).0.as_chunks().0;
        }
        let mut tile = [[simd.splat_f32s(0.0); R]; M];
        tile.copy_from_slice(&sums[row..][..M]);
        {
            let x = x.map(|x| &x[..count]);
            for i in 0..count {
                let mut wide = [[simd.splat_f32s(0.0); 2]; R];
                for r in 0..R {
                    let vector = &weights[r][i];
                    if row == 0 {
                        prefetch_ahead(vector, AHEAD);
                    }
                    wide[r] = E::widen(simd, *vector);
                }
                for half in 0..2 {
                    for m in 0..M {
                        let x = x[m][i][half];
                        for r in 0..R {
                            tile[m][r] = simd.mul_add_f32s(wide[r][half], x, tile[m][r]);
                        }
                    }
                }
            }
        }
        let done = count * E::per_vector::<S>();
        if done < len {
            for r in 0..R {
                let mut last = [E::ZERO; 32];
                last[..len - done].copy_from_slice(&blocks[r][done..]);
                let wide = E::widen(simd, E::vectors::<S>(&last)[0]);
                for m in 0..M {
                    let x = x[m][count];
                    tile[m][r] = simd.mul_add_f32s(wide[0], x[0], tile[m][r]);
                    tile[m][r] = simd.mul_add_f32s(wide[1], x[1], tile[m][r]);
                }
            }
        }
        sums[row..][..M].copy_from_slice(&tile);
    }
}
