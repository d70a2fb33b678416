//! From the blocks of quantized tensors, and from plain numbers, to numbers of another type: the arithmetic of ggml, operation by
//! operation, so that results are the same to the bit.
//!
//! Of Candle's own types only some are in files and MXFP4 is missing, and it takes a copy of the blocks and an `f32` of
//! every element on the way to other types. Here each block goes straight from the mapped file to its place.

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::GgmlType;
use crate::Result;

/// Blocks that are one piece of work for a thread.
const PIECE: usize = 256;

/// The same of plain numbers.
const NUMBERS: usize = 1 << 14;

/// A number that an `f32` can be rounded to.
trait FromF32: WithDType {
    fn from_f32(x: f32) -> Self;
}

impl FromF32 for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl FromF32 for f64 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x.into()
    }
}

impl FromF32 for f16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl FromF32 for bf16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// The elements of a quantized tensor on the CPU in a floating-point type; `bytes` are all its blocks.
pub(in crate::checkpoint) fn dequantize(
    kind: GgmlType,
    bytes: &[u8],
    shape: &[usize],
    dtype: DType,
) -> Result<Tensor> {
    match dtype {
        DType::F16 => tensor::<f16>(kind, bytes, shape),
        DType::BF16 => tensor::<bf16>(kind, bytes, shape),
        DType::F64 => tensor::<f64>(kind, bytes, shape),
        DType::F32 => tensor::<f32>(kind, bytes, shape),
        other => Ok(tensor::<f32>(kind, bytes, shape)?.to_dtype(other)?),
    }
}

fn tensor<T: FromF32>(kind: GgmlType, bytes: &[u8], shape: &[usize]) -> Result<Tensor> {
    let mut values = vec![T::zero(); bytes.len() / kind.block_bytes() * kind.block_size()];
    decode(kind, bytes, &mut values);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn decode<T: FromF32>(kind: GgmlType, bytes: &[u8], out: &mut [T]) {
    match kind {
        GgmlType::Q4_0 => blocks(bytes, out, q4_0),
        GgmlType::Q4_1 => blocks(bytes, out, q4_1),
        GgmlType::Q5_0 => blocks(bytes, out, q5_0),
        GgmlType::Q5_1 => blocks(bytes, out, q5_1),
        GgmlType::Q8_0 => blocks(bytes, out, q8_0),
        GgmlType::Q2_K => blocks(bytes, out, q2_k),
        GgmlType::Q3_K => blocks(bytes, out, q3_k),
        GgmlType::Q4_K => blocks(bytes, out, q4_k),
        GgmlType::Q5_K => blocks(bytes, out, q5_k),
        GgmlType::Q6_K => blocks(bytes, out, q6_k),
        GgmlType::IQ4_NL => blocks(bytes, out, iq4_nl),
        GgmlType::IQ4_XS => blocks(bytes, out, iq4_xs),
        GgmlType::MXFP4 => blocks(bytes, out, mxfp4),
        GgmlType::F32 => numbers(bytes, out, f32::from_le_bytes),
        GgmlType::F16 => numbers(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        GgmlType::BF16 => numbers(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        GgmlType::F64 => numbers(bytes, out, |b| f64::from_le_bytes(b) as f32),
        GgmlType::I16 => numbers(bytes, out, |b| i16::from_le_bytes(b).into()),
        GgmlType::I32 => numbers(bytes, out, |b| i32::from_le_bytes(b) as f32),
        GgmlType::I64 => numbers(bytes, out, |b| i64::from_le_bytes(b) as f32),
    }
}

/// Converts numbers of `B` bytes, in parallel.
fn numbers<T: FromF32, const B: usize>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; B]) -> f32 + Sync) {
    out.par_chunks_mut(NUMBERS).zip(bytes.par_chunks(NUMBERS * B)).for_each(|(places, bytes)| {
        for (place, bytes) in places.iter_mut().zip(bytes.as_chunks::<B>().0) {
            *place = T::from_f32(number(*bytes));
        }
    });
}

/// Decodes blocks of `B` bytes to `N` elements each, in parallel.
fn blocks<T: FromF32, const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [T],
    block: impl Fn(&[u8; B], &mut [f32; N]) + Sync,
) {
    let (blocks, places) = (bytes.as_chunks::<B>().0, out.as_chunks_mut::<N>().0);
    places.par_chunks_mut(PIECE).zip(blocks.par_chunks(PIECE)).for_each(|(places, blocks)| {
        let mut values = [0.0; N];
        for (place, bytes) in places.iter_mut().zip(blocks) {
            block(bytes, &mut values);
            for (x, value) in place.iter_mut().zip(values) {
                *x = T::from_f32(value);
            }
        }
    });
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn bits(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Low halves of the bytes are the first 16 elements, high halves the others.
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for (j, q) in b[2..].iter().enumerate() {
        y[j] = d * f32::from((q & 15) as i8 - 8);
        y[j + 16] = d * f32::from((q >> 4) as i8 - 8);
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (j, q) in b[4..].iter().enumerate() {
        y[j] = d * f32::from(q & 15) + m;
        y[j + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Bit `j` of the word is the fifth bit of element `j`.
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half(b, 0), bits(b, 2));
    for (j, q) in b[6..].iter().enumerate() {
        let (low, up) = ((high >> j & 1) << 4, (high >> (j + 16) & 1) << 4);
        y[j] = d * f32::from((q & 15 | low as u8) as i8 - 16);
        y[j + 16] = d * f32::from((q >> 4 | up as u8) as i8 - 16);
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half(b, 0), half(b, 2), bits(b, 4));
    for (j, q) in b[8..].iter().enumerate() {
        let (low, up) = ((high >> j & 1) << 4, (high >> (j + 16) & 1) << 4);
        y[j] = d * f32::from(q & 15 | low as u8) + m;
        y[j + 16] = d * f32::from(q >> 4 | up as u8) + m;
    }
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for (x, q) in y.iter_mut().zip(&b[2..]) {
        *x = f32::from(*q as i8) * d;
    }
}

/// 16 scales with minima of 4 bits each, then 2 bits an element; the shift goes on every 32 elements.
fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, min) = (half(b, 80), half(b, 82));
    for (i, (x, scale)) in y.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
        let (dl, ml) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
        let (start, shift) = (i / 8 * 32 + i % 2 * 16, i / 2 % 4 * 2);
        for (x, q) in x.iter_mut().zip(&qs[start..]) {
            *x = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

/// The third bit of each element stands apart, inverted: a clear bit subtracts 4. Scales have 6 bits in two places.
fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let (mask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half(b, 108);
    for (i, x) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = scales[i % 8] >> (i / 8 * 4) & 15;
        let high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
        let dl = d * f32::from((low | high << 4) as i8 - 32);
        let (start, shift) = (i / 8 * 32 + i % 2 * 16, i / 2 % 4 * 2);
        for ((x, q), m) in x.iter_mut().zip(&qs[start..]).zip(&mask[i % 2 * 16..]) {
            let below = if m >> (i / 2) & 1 == 0 { 4 } else { 0 };
            *x = dl * f32::from((q >> shift & 3) as i8 - below);
        }
    }
}

/// Scale and minimum `i` of eight, 6 bits each in 12 bytes.
fn scale_min(scales: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (scales[i] & 63, scales[i + 4] & 63)
    } else {
        (scales[i + 4] & 15 | scales[i - 4] >> 2 & 48, scales[i + 4] >> 4 | scales[i] >> 2 & 48)
    };
    (scale.into(), min.into())
}

fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, min, scales, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..]);
    for (i, x) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_min(scales, i);
        let (dl, ml) = (d * scale, min * m);
        for (x, q) in x.iter_mut().zip(&qs[i / 2 * 32..]) {
            *x = dl * f32::from(q >> (i % 2 * 4) & 15) - ml;
        }
    }
}

/// As `q4_k`, with bit `i` of byte `j` the fifth bit of element `j` of part `i`.
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, min, scales, high, qs) = (half(b, 0), half(b, 2), &b[4..16], &b[16..48], &b[48..]);
    for (i, x) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_min(scales, i);
        let (dl, ml) = (d * scale, min * m);
        for ((x, q), h) in x.iter_mut().zip(&qs[i / 2 * 32..]).zip(high) {
            *x = dl * f32::from(q >> (i % 2 * 4) & 15 | (h >> i & 1) << 4) - ml;
        }
    }
}

/// 4 low bits, 2 high bits, and a scale of 8 bits for each 16 elements.
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
    for (i, x) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Four parts of 32 share 64 bytes of low bits and 32 bytes of high bits.
        let (half, part) = (i / 4, i % 4);
        let (low, high) = (&low[half * 64 + part % 2 * 32..], &high[half * 32..]);
        for (j, x) in x.iter_mut().enumerate() {
            let q = low[j] >> (part / 2 * 4) & 15 | (high[j] >> (part * 2) & 3) << 4;
            *x = d * f32::from(scales[i * 2 + j / 16] as i8) * f32::from(q as i8 - 32);
        }
    }
}

/// The sixteen values of the types IQ4.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn iq4_nl(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(b, 0);
    for (j, q) in b[2..].iter().enumerate() {
        y[j] = d * f32::from(IQ4[usize::from(q & 15)]);
        y[j + 16] = d * f32::from(IQ4[usize::from(q >> 4)]);
    }
}

/// Eight scales of 6 bits: 4 low ones in four bytes, 2 high ones in a word.
fn iq4_xs(b: &[u8; 136], y: &mut [f32; 256]) {
    let (d, high, low, qs) = (half(b, 0), u16::from_le_bytes([b[2], b[3]]), &b[4..8], &b[8..]);
    for (i, x) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = low[i / 2] >> (i % 2 * 4) & 15 | ((high >> (i * 2) & 3) as u8) << 4;
        let dl = d * f32::from(scale as i8 - 32);
        for (j, q) in qs[i * 16..][..16].iter().enumerate() {
            x[j] = dl * f32::from(IQ4[usize::from(q & 15)]);
            x[j + 16] = dl * f32::from(IQ4[usize::from(q >> 4)]);
        }
    }
}

/// The values of FP4 E2M1, doubled.
const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The scale is a power of two, of which the first byte has the exponent; half of it, since values are doubled.
fn mxfp4(b: &[u8; 17], y: &mut [f32; 32]) {
    let exponent = u32::from(b[0]);
    let d = f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 });
    for (j, q) in b[1..].iter().enumerate() {
        y[j] = d * f32::from(FP4[usize::from(q & 15)]);
        y[j + 16] = d * f32::from(FP4[usize::from(q >> 4)]);
    }
}
