//! The largest logit, against a walk over the numbers.

use candle_core::{DType, Device, Tensor};
use mamba_ops::argmax;

use crate::support::message;
use crate::support::random::Random;
use crate::support::target;

/// What is larger than all before it, NaN never.
fn expected(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if *x > row[best] || (row[best].is_nan() && !x.is_nan()) {
            best = i;
        }
    }
    best as u32
}

fn check(rows: usize, len: usize, dtype: DType, change: impl Fn(&mut Vec<f32>)) {
    let mut values =
        Random::new(len as u64).normal(&[rows * len]).to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    change(&mut values);
    let x = Tensor::from_vec(values, (rows, len), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let rounded = x.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    let want: Vec<u32> = rounded.iter().map(|row| expected(row)).collect();
    let there = target::place(&format!("{rows} {len}"), &[("x".to_owned(), x)].into()).unwrap();
    let got = argmax(&there["x"]).unwrap();
    assert_eq!(got.to_vec1::<u32>().unwrap(), want, "{rows} x {len} {}", dtype.as_str());
    // Views: every other row, and rows that begin where no 16 bytes do.
    if rows > 1 && len > 3 {
        let view = there["x"].narrow(0, 1, rows - 1).unwrap().narrow(1, 3, len - 3).unwrap();
        let want: Vec<u32> = rounded[1..].iter().map(|row| expected(&row[3..])).collect();
        assert_eq!(argmax(&view).unwrap().to_vec1::<u32>().unwrap(), want);
    }
}

#[test]
fn largest() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (rows, len) in [(1, 1), (3, 7), (2, 8), (2, 9), (1, 1000), (5, 1023), (3, 50_283)] {
            check(rows, len, dtype, |_| ()); // 16-bit numbers are often equal
            check(rows, len, dtype, |values| values.fill(f32::NEG_INFINITY));
            check(rows, len, dtype, |values| values.iter_mut().step_by(2).for_each(|x| *x = f32::NAN));
            check(rows, len, dtype, |values| values[len / 2..].fill(9.0));
            check(rows, len, dtype, |values| values.fill(f32::NAN));
            check(rows, len, dtype, |values| {
                values.fill(f32::NEG_INFINITY);
                values[0] = f32::NAN;
            });
        }
    }
}

#[test]
fn shapes() {
    let x = Tensor::new(&[[[1f64, 2.0], [4.0, 3.0]]], &Device::Cpu).unwrap();
    assert_eq!(argmax(&x).unwrap().to_vec2::<u32>().unwrap(), [[1, 0]]);
    assert_eq!(argmax(&x.narrow(1, 0, 0).unwrap()).unwrap().dims(), [1, 0]);
    let nothing = message(argmax(&x.narrow(2, 0, 0).unwrap()).unwrap_err());
    assert_eq!(nothing, "argmax: `x` has shape [1, 2, 0], expected something along the last axis");
    let scalar = message(argmax(&Tensor::new(1f32, &Device::Cpu).unwrap()).unwrap_err());
    assert_eq!(scalar, "argmax: `x` has no axis, expected (.., n)");
}

crate::on_cuda!(largest);
