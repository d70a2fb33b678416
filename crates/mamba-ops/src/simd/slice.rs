//! Loops over slices that several kernels share: whole vectors first, the rest by masked loads and stores.

use pulp::Simd;

use super::math;

/// `y[i] = f(y[i])`.
#[inline(always)]
pub(crate) fn map<S: Simd>(simd: S, y: &mut [f32], mut f: impl FnMut(S::f32s) -> S::f32s) {
    let (head, tail) = S::as_mut_simd_f32s(y);
    for y in head {
        *y = f(*y);
    }
    if !tail.is_empty() {
        let value = f(simd.partial_load_f32s(tail));
        simd.partial_store_f32s(tail, value);
    }
}

/// `y[i] = f(y[i], a[i])` for slices of one length.
#[inline(always)]
pub(crate) fn map2<S: Simd>(
    simd: S,
    y: &mut [f32],
    a: &[f32],
    mut f: impl FnMut(S::f32s, S::f32s) -> S::f32s,
) {
    let a = &a[..y.len()];
    let (head, tail) = S::as_mut_simd_f32s(y);
    let (a_head, a_tail) = S::as_simd_f32s(a);
    for (y, a) in head.iter_mut().zip(a_head) {
        *y = f(*y, *a);
    }
    if !tail.is_empty() {
        let value = f(simd.partial_load_f32s(tail), simd.partial_load_f32s(a_tail));
        simd.partial_store_f32s(tail, value);
    }
}

/// `y[i] = f(y[i], a[i], b[i])` for slices of one length.
#[inline(always)]
pub(crate) fn map3<S: Simd>(
    simd: S,
    y: &mut [f32],
    a: &[f32],
    b: &[f32],
    mut f: impl FnMut(S::f32s, S::f32s, S::f32s) -> S::f32s,
) {
    let (a, b) = (&a[..y.len()], &b[..y.len()]);
    let (head, tail) = S::as_mut_simd_f32s(y);
    let (a_head, a_tail) = S::as_simd_f32s(a);
    let (b_head, b_tail) = S::as_simd_f32s(b);
    for ((y, a), b) in head.iter_mut().zip(a_head).zip(b_head) {
        *y = f(*y, *a, *b);
    }
    if !tail.is_empty() {
        let value =
            f(simd.partial_load_f32s(tail), simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail));
        simd.partial_store_f32s(tail, value);
    }
}

/// What [`map_all`] reads at each place: a slice, a number that stands for a slice full of it, or several of these side by side.
pub(crate) trait Source<S: Simd>: Copy {
    /// Whole vectors.
    type Heads: Copy;
    /// What is read at one place.
    type Vectors: Copy;

    /// The first whole vectors, so many.
    fn heads(self, simd: S, vectors: usize) -> Self::Heads;

    fn vectors(heads: &Self::Heads, index: usize) -> Self::Vectors;

    /// The elements from `start` to `end`, fewer than a vector has, by masked loads.
    fn rest(self, simd: S, start: usize, end: usize) -> Self::Vectors;
}

impl<'a, S: Simd> Source<S> for &'a [f32] {
    type Heads = &'a [S::f32s];
    type Vectors = S::f32s;

    #[inline(always)]
    fn heads(self, _: S, vectors: usize) -> Self::Heads {
        &S::as_simd_f32s(self).0[..vectors]
    }

    #[inline(always)]
    fn vectors(heads: &Self::Heads, index: usize) -> S::f32s {
        heads[index]
    }

    #[inline(always)]
    fn rest(self, simd: S, start: usize, end: usize) -> S::f32s {
        simd.partial_load_f32s(&self[start..end])
    }
}

impl<S: Simd> Source<S> for f32 {
    type Heads = S::f32s;
    type Vectors = S::f32s;

    #[inline(always)]
    fn heads(self, simd: S, _: usize) -> S::f32s {
        simd.splat_f32s(self)
    }

    #[inline(always)]
    fn vectors(heads: &S::f32s, _: usize) -> S::f32s {
        *heads
    }

    #[inline(always)]
    fn rest(self, simd: S, _: usize, _: usize) -> S::f32s {
        simd.splat_f32s(self)
    }
}

impl<S: Simd> Source<S> for () {
    type Heads = ();
    type Vectors = ();

    #[inline(always)]
    fn heads(self, _: S, _: usize) {}

    #[inline(always)]
    fn vectors(_: &(), _: usize) {}

    #[inline(always)]
    fn rest(self, _: S, _: usize, _: usize) {}
}

impl<S: Simd, T: Source<S>, const N: usize> Source<S> for [T; N] {
    type Heads = [T::Heads; N];
    type Vectors = [T::Vectors; N];

    #[inline(always)]
    fn heads(self, simd: S, vectors: usize) -> Self::Heads {
        std::array::from_fn(
            #[inline(always)]
            |i| self[i].heads(simd, vectors),
        )
    }

    #[inline(always)]
    fn vectors(heads: &Self::Heads, index: usize) -> Self::Vectors {
        std::array::from_fn(
            #[inline(always)]
            |i| T::vectors(&heads[i], index),
        )
    }

    #[inline(always)]
    fn rest(self, simd: S, start: usize, end: usize) -> Self::Vectors {
        std::array::from_fn(
            #[inline(always)]
            |i| self[i].rest(simd, start, end),
        )
    }
}

macro_rules! tuples {
    ($(($($T:ident $i:tt),+))+) => { $(
        impl<S: Simd, $($T: Source<S>),+> Source<S> for ($($T,)+) {
            type Heads = ($($T::Heads,)+);
            type Vectors = ($($T::Vectors,)+);

            #[inline(always)]
            fn heads(self, simd: S, vectors: usize) -> Self::Heads {
                ($(self.$i.heads(simd, vectors),)+)
            }

            #[inline(always)]
            fn vectors(heads: &Self::Heads, index: usize) -> Self::Vectors {
                ($($T::vectors(&heads.$i, index),)+)
            }

            #[inline(always)]
            fn rest(self, simd: S, start: usize, end: usize) -> Self::Vectors {
                ($(self.$i.rest(simd, start, end),)+)
            }
        }
    )+ };
}
tuples! { (A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3) }

/// `(y[0][i], y[1][i], …) = f((y[0][i], y[1][i], …), x[i])` for `len` elements of each: every one is read and written once. Past the end
/// `f` sees zeros in place of slices, so that sums it keeps must take nothing from them.
#[inline(always)]
pub(crate) fn map_all<S: Simd, X: Source<S>, const N: usize>(
    simd: S,
    len: usize,
    y: [&mut [f32]; N],
    x: X,
    mut f: impl FnMut([S::f32s; N], X::Vectors) -> [S::f32s; N],
) {
    let vectors = len / S::F32_LANES;
    let mut y = y.map(
        #[inline(always)]
        |y| {
            let (head, tail) = S::as_mut_simd_f32s(&mut y[..len]);
            (&mut head[..vectors], tail)
        },
    );
    let heads = x.heads(simd, vectors);
    for i in 0..vectors {
        let mut values = [simd.splat_f32s(0.0); N];
        for (value, (head, _)) in values.iter_mut().zip(&y) {
            *value = head[i];
        }
        values = f(values, X::vectors(&heads, i));
        for (value, (head, _)) in values.iter().zip(&mut y) {
            head[i] = *value;
        }
    }
    let start = vectors * S::F32_LANES;
    if start < len {
        let mut values = [simd.splat_f32s(0.0); N];
        for (value, (_, tail)) in values.iter_mut().zip(&y) {
            *value = simd.partial_load_f32s(tail);
        }
        values = f(values, x.rest(simd, start, len));
        for (value, (_, tail)) in values.iter().zip(&mut y) {
            simd.partial_store_f32s(tail, *value);
        }
    }
}

/// `y += scale · x`.
#[inline(always)]
pub(crate) fn axpy<S: Simd>(simd: S, y: &mut [f32], scale: f32, x: &[f32]) {
    let scale = simd.splat_f32s(scale);
    map2(simd, y, x, |y, x| simd.mul_add_e_f32s(scale, x, y));
}

/// `Σ f(a[i], b[i])`, with lanes past the end reading 0 on both sides, for which `f` must give 0.
#[inline(always)]
pub(crate) fn sum2<S: Simd>(
    simd: S,
    a: &[f32],
    b: &[f32],
    mut f: impl FnMut(S::f32s, S::f32s) -> S::f32s,
) -> f32 {
    let b = &b[..a.len()];
    let (a_head, a_tail) = S::as_simd_f32s(a);
    let (b_head, b_tail) = S::as_simd_f32s(b);
    // Four sums hide the latency of the additions.
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (a4, a_rest) = a_head.as_chunks::<4>();
    let (b4, b_rest) = b_head.as_chunks::<4>();
    for (a, b) in a4.iter().zip(b4) {
        for i in 0..4 {
            sums[i] = simd.add_f32s(sums[i], f(a[i], b[i]));
        }
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        sums[0] = simd.add_f32s(sums[0], f(*a, *b));
    }
    if !a_tail.is_empty() {
        let last = f(simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail));
        sums[1] = simd.add_f32s(sums[1], last);
    }
    let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    simd.reduce_sum_f32s(sum)
}

/// `Σ a[i] · b[i]`.
#[inline(always)]
pub(crate) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    sum2(simd, a, b, |a, b| simd.mul_f32s(a, b))
}

/// `Σ a[i]`.
#[inline(always)]
pub(crate) fn sum<S: Simd>(simd: S, a: &[f32]) -> f32 {
    sum2(simd, a, a, |a, _| a)
}

// A closure that calls into `math` is too large to be inlined unasked, and outside of the function that is compiled for an
// instruction set its vectors would go through memory: fifty times slower. So these stand here, once.

/// `y[i] = silu(y[i])`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, y: &mut [f32]) {
    map(
        simd,
        y,
        #[inline(always)]
        |y| math::silu(simd, y),
    );
}

/// `y[i] = softplus(y[i])`.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(simd: S, y: &mut [f32]) {
    map(
        simd,
        y,
        #[inline(always)]
        |y| math::softplus(simd, y),
    );
}

/// `y[i] *= silu(z[i])`.
#[inline(always)]
pub(crate) fn mul_silu<S: Simd>(simd: S, y: &mut [f32], z: &[f32]) {
    map2(
        simd,
        y,
        z,
        #[inline(always)]
        |y, z| simd.mul_f32s(y, math::silu(simd, z)),
    );
}

/// `y[i] *= silu'(z[i])`.
#[inline(always)]
pub(crate) fn mul_silu_derivative<S: Simd>(simd: S, y: &mut [f32], z: &[f32]) {
    map2(
        simd,
        y,
        z,
        #[inline(always)]
        |y, z| simd.mul_f32s(y, math::silu_with_derivative(simd, z).1),
    );
}

/// `y[i] *= sigmoid(x[i])`.
#[inline(always)]
pub(crate) fn mul_sigmoid<S: Simd>(simd: S, y: &mut [f32], x: &[f32]) {
    map2(
        simd,
        y,
        x,
        #[inline(always)]
        |y, x| simd.mul_f32s(y, math::sigmoid(simd, x)),
    );
}

/// `y[i] = e^(y[i] - shift)`.
#[inline(always)]
pub(crate) fn exp_minus<S: Simd>(simd: S, y: &mut [f32], shift: f32) {
    let shift = simd.splat_f32s(shift);
    map(
        simd,
        y,
        #[inline(always)]
        |y| math::exp(simd, simd.sub_f32s(y, shift)),
    );
}
