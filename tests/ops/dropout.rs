//! Cases of `dropout`.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use mamba_ops::{Dropout, checkpoint, dropout};

use crate::support::message;
use crate::support::random::Random;
use crate::support::target;
use crate::support::tolerance::values;

const SEED: u64 = 0x1234_5678_9abc_def0;

fn args(x: &Tensor, rate: f64, stream: u64) -> Dropout<'_> {
    Dropout { stream, ..Dropout::new(x, rate, SEED) }
}

/// Value and gradient to the bit, for every dtype, in a view too, and on any number of threads.
#[test]
fn equals_the_reference() {
    let mut random = Random::new(4);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for (shape, rate) in
        [(vec![1], 0.5), (vec![7], 0.9), (vec![3, 5], 0.1), (vec![2, 3, 64], 0.25), (vec![5, 9973], 0.3)]
    {
        let (x, cotangent) = (random.normal(&shape), random.normal(&shape));
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let run = |fused: bool| -> Result<(Vec<f64>, Vec<f64>)> {
                let tensors =
                    [("x".to_owned(), x.to_dtype(dtype)?), ("dy".to_owned(), cotangent.to_dtype(dtype)?)];
                let there = match fused {
                    true => target::place(&format!("{shape:?} {rate}"), &tensors.into())?,
                    false => tensors.into(),
                };
                let x = Var::from_tensor(&there["x"])?;
                let args = args(&x, rate, (3 << 40) + 17);
                let y = if fused { dropout(&args)? } else { mamba_ops::dropout::reference::forward(&args)? };
                let grads = (&y * &there["dy"])?.sum_all()?.backward()?;
                let on_cpu = |x: &Tensor| Ok::<_, candle_core::Error>(values(&x.to_device(&Device::Cpu)?));
                Ok((on_cpu(&y)?, on_cpu(grads.get(&x).unwrap())?))
            };
            let want = run(false).unwrap();
            assert_eq!(run(true).unwrap(), want, "{shape:?} {dtype:?}");
            assert_eq!(pool.install(|| run(true)).unwrap(), want, "{shape:?} {dtype:?}");
        }
        // A view that begins where no 16 bytes do.
        let long = Tensor::cat(&[x.flatten_all().unwrap(), x.flatten_all().unwrap()], 0).unwrap();
        let long = [("x".to_owned(), long.to_dtype(DType::F32).unwrap())].into();
        let long = target::place(&format!("view {shape:?}"), &long).unwrap();
        let view = long["x"].narrow(0, 1, x.elem_count()).unwrap();
        let got = dropout(&args(&view, rate, 5)).unwrap().to_device(&Device::Cpu).unwrap();
        let host = view.to_device(&Device::Cpu).unwrap();
        let want = mamba_ops::dropout::reference::forward(&args(&host, rate, 5)).unwrap();
        assert_eq!(values(&got), values(&want));
    }
}

/// As often as they should be, elements are left out, whatever their places; others are scaled.
#[test]
fn leaves_out_what_it_should() -> Result<()> {
    let (rows, columns) = (400, 500);
    let x = Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?;
    let mut masks = vec![];
    for rate in [0.1, 0.5, 0.8] {
        let y = dropout(&args(&x, rate, 1))?;
        let kept = y.ne(0f64)?.to_dtype(DType::F64)?;
        assert!(values(&y).iter().all(|y| *y == 0.0 || *y == f64::from((1.0 / (1.0 - rate)) as f32)));
        // Five deviations of a binomial, for all, and six for each of the rows and columns.
        let deviation = |count: usize| (rate * (1.0 - rate) / count as f64).sqrt();
        let mean = |x: &Tensor| values(&x.mean_all().unwrap())[0];
        assert!((mean(&kept) - (1.0 - rate)).abs() < 5.0 * deviation(rows * columns), "{rate}");
        for (axis, count) in [(0, rows), (1, columns)] {
            let share = values(&kept.mean(axis)?);
            assert!(share.iter().all(|share| (share - (1.0 - rate)).abs() < 6.0 * deviation(count)));
        }
        // Neighbours do not know of each other.
        for axis in [0, 1] {
            let count = kept.dim(axis)? - 1;
            let pairs = (kept.narrow(axis, 0, count)? * kept.narrow(axis, 1, count)?)?;
            let want = (1.0 - rate) * (1.0 - rate);
            assert!((mean(&pairs) - want).abs() < 6.0 * (want * (1.0 - want) / 2e5).sqrt() * 2.0, "{rate}");
        }
        masks.push(kept);
    }
    // Another stream or seed is another mask.
    let rate = 0.5;
    let kept = |args: Dropout| dropout(&args).unwrap().ne(0f64).unwrap().to_dtype(DType::F64).unwrap();
    let one = kept(args(&x, rate, 1));
    for other in [args(&x, rate, 2), args(&x, rate, 1 + (1 << 32)), Dropout { seed: 3, ..args(&x, rate, 1) }]
    {
        let same = values(&one.eq(&kept(other))?.to_dtype(DType::F64)?.mean_all()?)[0];
        assert!((same - 0.5).abs() < 0.01, "{same}");
    }
    assert_eq!(values(&dropout(&args(&x, 0.0, 1))?), values(&x));
    Ok(())
}

/// A layer that is computed again draws its mask again.
#[test]
fn checkpoints_draw_the_same_mask() -> Result<()> {
    let x = Var::from_tensor(&Random::new(1).normal(&[4, 33]).to_dtype(DType::F32)?)?;
    let layer = |x: &Tensor| dropout(&args(&x.sqr()?, 0.4, 9));
    let plain = layer(&x)?;
    let again = checkpoint("layer", &[&x], move |inputs| Ok(vec![layer(&inputs[0])?]))?.remove(0);
    assert_eq!(values(&plain), values(&again));
    let grad = |y: &Tensor| values(y.sum_all().unwrap().backward().unwrap().get(&x).unwrap());
    assert_eq!(grad(&plain), grad(&again));
    Ok(())
}

#[test]
fn what_cannot_be_is_refused() -> Result<()> {
    let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
    for rate in [-0.1, 1.0, f64::NAN] {
        let error = message(dropout(&args(&x, rate, 0)).unwrap_err());
        assert_eq!(error, format!("dropout: `rate` is {rate}, expected at least 0 and less than 1"));
    }
    let error = message(dropout(&args(&x.to_dtype(DType::U32)?, 0.5, 0)).unwrap_err());
    assert_eq!(error, "dropout: `x` has dtype u32, expected f32, f16, bf16 or f64");
    assert_eq!(dropout(&args(&x.narrow(D::Minus1, 0, 0)?, 0.5, 0))?.dims(), [2, 0]);
    Ok(())
}

crate::on_cuda!(equals_the_reference);
