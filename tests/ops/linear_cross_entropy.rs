//! Cases of `linear_cross_entropy`.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::simd::Isa;
use mamba_ops::{LinearCrossEntropy, linear_cross_entropy};

use crate::support::message;
use crate::support::random::Random;
use crate::support::tolerance::{self, max_error, relative_rms, values};

/// Loss and gradients of `x` and `weight`, of a loss that is weighted by 0.3.
fn run(
    x: &Tensor,
    weight: &Tensor,
    f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> (Tensor, Tensor, Tensor) {
    let (x, weight) = (Var::from_tensor(x).unwrap(), Var::from_tensor(weight).unwrap());
    let loss = (f(&x, &weight).unwrap() * 0.3).unwrap();
    let grads = loss.backward().unwrap();
    (loss.detach(), grads.get(&x).unwrap().clone(), grads.get(&weight).unwrap().clone())
}

fn targets(random: &mut Random, rows: usize, classes: usize) -> Tensor {
    let mut targets: Vec<i64> = random.ids(rows, classes as u32).into_iter().map(i64::from).collect();
    targets.iter_mut().step_by(4).skip(1).for_each(|t| *t = -1);
    Tensor::new(targets, &Device::Cpu).unwrap()
}

fn args<'a>(
    x: &'a Tensor,
    weight: &'a Tensor,
    targets: &'a Tensor,
    logit_scale: f64,
    chunk_rows: Option<usize>,
) -> LinearCrossEntropy<'a> {
    LinearCrossEntropy {
        ignore_index: -1,
        logit_scale,
        chunk_rows,
        ..LinearCrossEntropy::new(x, weight, targets)
    }
}

/// Every dtype and instruction set, every size of chunk, with and without ignored rows and a scale.
#[test]
fn equals_the_reference() {
    let mut random = Random::new(1);
    let mut cases = 0;
    for (rows, dim, classes) in [(1, 1, 1), (5, 3, 2), (70, 17, 33), (130, 16, 300)] {
        let (x, weight) = (random.normal(&[rows, dim]), random.normal(&[classes, dim]));
        let targets = targets(&mut random, rows, classes);
        for (dtype, scale) in [(DType::F64, 0.7), (DType::F32, 1.0), (DType::F32, 0.7), (DType::BF16, 1.0)] {
            let (x, weight) = (x.to_dtype(dtype).unwrap(), weight.to_dtype(dtype).unwrap());
            let exact = [&x, &weight].map(|t| t.to_dtype(DType::F64).unwrap());
            let want = run(&exact[0], &exact[1], |x, w| {
                mamba_ops::linear_cross_entropy::reference::forward(&args(x, w, &targets, scale, None))
            });
            for (isa, chunk) in Isa::available()
                .into_iter()
                .flat_map(|isa| [None, Some(1), Some(7), Some(1000)].map(|chunk| (isa, chunk)))
            {
                let got = isa.scope(|| {
                    run(&x, &weight, |x, w| linear_cross_entropy(&args(x, w, &targets, scale, chunk)))
                });
                let error = relative_rms(&got.0, &want.0);
                assert!(error < tolerance::FORWARD, "{rows} {dim} {classes} {dtype:?}: {error}");
                for (name, got, want) in [("x", got.1, &want.1), ("weight", got.2, &want.2)] {
                    // The gradient is rounded before and after it is scaled.
                    let limit = 2.0 * tolerance::of_rounding(want, dtype, tolerance::BACKWARD);
                    let error = if classes == 1 { max_error(&got, want) } else { relative_rms(&got, want) };
                    assert!(error < limit, "{name} {rows} {dim} {classes} {dtype:?} {chunk:?}: {error}");
                }
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 4 * 4 * 4 * Isa::available().len());
}

#[test]
fn gradients_are_finite_differences() {
    let mut random = Random::new(2);
    let (x, weight) = (random.normal(&[5, 3]), random.normal(&[4, 3]));
    let targets = Tensor::new(&[1i64, 3, -100, 0, 2], &Device::Cpu).unwrap();
    let loss = |x: &Tensor, w: &Tensor| {
        let args = LinearCrossEntropy { chunk_rows: Some(2), ..LinearCrossEntropy::new(x, w, &targets) };
        linear_cross_entropy(&args)
    };
    let (_, of_x, of_weight) = run(&x, &weight, loss);
    let value = |x: &Tensor, w: &Tensor| 0.3 * loss(x, w).unwrap().to_scalar::<f64>().unwrap();
    for (grad, which) in [(of_x, 0), (of_weight, 1)] {
        let base = if which == 0 { &x } else { &weight };
        for (i, got) in values(&grad).into_iter().enumerate() {
            let moved = |by: f64| {
                let mut v = values(base);
                v[i] += by;
                let moved = Tensor::from_vec(v, base.shape(), &Device::Cpu).unwrap();
                if which == 0 { value(&moved, &weight) } else { value(&x, &moved) }
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((got - want).abs() < tolerance::FINITE_DIFFERENCES, "{which} {i}: {got} {want}");
        }
    }
}

/// Frozen factors cost no gradient, large logits are no trouble, and nothing to count is a loss of 0.
#[test]
fn corners() -> Result<()> {
    let mut random = Random::new(3);
    let (x, weight) = (random.normal(&[6, 4]), random.normal(&[5, 4]));
    let (x, weight) = (x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
    let var = Var::from_tensor(&x)?;
    let targets = Tensor::new(&[0u32, 1, 2, 3, 4, 0], &Device::Cpu)?;
    let loss = linear_cross_entropy(&LinearCrossEntropy::new(&var, &weight, &targets))?;
    let grads = loss.backward()?;
    assert!(grads.get(&var).is_some() && grads.get(&weight).is_none());
    assert!(!linear_cross_entropy(&LinearCrossEntropy::new(&x, &weight, &targets))?.track_op());

    let huge = (&x * 1e4)?;
    let (loss, of_x, _) =
        run(&huge, &weight, |x, w| linear_cross_entropy(&LinearCrossEntropy::new(x, w, &targets)));
    assert!(values(&loss)[0].is_finite() && values(&of_x).iter().all(|v| v.is_finite()));

    let none = Tensor::full(-100i64, 6, &Device::Cpu)?;
    let (loss, of_x, of_weight) =
        run(&x, &weight, |x, w| linear_cross_entropy(&LinearCrossEntropy::new(x, w, &none)));
    assert_eq!(values(&loss), [0.0]);
    assert!(values(&of_x).iter().chain(&values(&of_weight)).all(|v| *v == 0.0));

    let bad = Tensor::new(&[0u32, 1, 2, 3, 5, 0], &Device::Cpu)?;
    let error = linear_cross_entropy(&LinearCrossEntropy::new(&x, &weight, &bad)).unwrap_err();
    assert_eq!(
        message(error),
        "linear_cross_entropy: `targets` has 5, expected 0 to 4, or -100 to ignore the row"
    );
    let short = targets.narrow(0, 0, 5)?;
    let error = linear_cross_entropy(&LinearCrossEntropy::new(&x, &weight, &short)).unwrap_err();
    assert_eq!(message(error), "linear_cross_entropy: `targets` has shape [5], expected (rows 6)");
    Ok(())
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    /// A GPU against the reference in f64, whatever the chunk; the same bits twice; a target that is no class is no number.
    #[test]
    fn equals_the_reference() {
        with_gpu(|device| {
            let mut random = Random::new(8);
            let mut cases = 0;
            for (rows, dim, classes) in [(1, 1, 1), (5, 3, 2), (70, 17, 33), (130, 16, 300), (40, 64, 5003)] {
                let (x, weight) = (random.normal(&[rows, dim]), (random.normal(&[classes, dim]) * 0.2)?);
                let targets = targets(&mut random, rows, classes);
                for (dtype, scale) in
                    [(DType::F32, 1.0), (DType::F32, 0.7), (DType::F16, 1.0), (DType::BF16, 0.7)]
                {
                    let (x, weight) = (x.to_dtype(dtype)?, weight.to_dtype(dtype)?);
                    let exact = [&x, &weight].map(|t| t.to_dtype(DType::F64).unwrap());
                    let want = run(&exact[0], &exact[1], |x, w| {
                        mamba_ops::linear_cross_entropy::reference::forward(&args(
                            x, w, &targets, scale, None,
                        ))
                    });
                    let (x, weight, targets) =
                        (x.to_device(device)?, weight.to_device(device)?, targets.to_device(device)?);
                    for chunk in [None, Some(1), Some(7), Some(1000)] {
                        let once = || {
                            run(&x, &weight, |x, w| linear_cross_entropy(&args(x, w, &targets, scale, chunk)))
                        };
                        let (got, again) = (once(), once());
                        let error = relative_rms(&got.0, &want.0);
                        assert!(error < tolerance::FORWARD, "{rows} {dim} {classes} {dtype:?}: {error}");
                        let both = [("x", &got.1, &want.1, &again.1), ("weight", &got.2, &want.2, &again.2)];
                        for (name, got, want, again) in both {
                            // Rounded as the gradient of the logits, as a product, and after it is scaled.
                            let limit = 3.0 * tolerance::of_rounding(want, dtype, tolerance::BACKWARD);
                            let error =
                                if classes == 1 { max_error(got, want) } else { relative_rms(got, want) };
                            assert!(
                                error < limit,
                                "{name} {rows} {dim} {classes} {dtype:?} {chunk:?}: {error}"
                            );
                            assert_eq!(values(got), values(again));
                        }
                        cases += 1;
                    }
                }
            }
            let x = Tensor::ones((2, 3), DType::F32, device)?;
            let targets = Tensor::new(&[0i64, 3], device)?;
            let loss = linear_cross_entropy(&LinearCrossEntropy::new(
                &x,
                &Tensor::ones((3, 3), DType::F32, device)?,
                &targets,
            ))?;
            assert!(loss.to_scalar::<f32>()?.is_nan());
            Ok(cases)
        });
    }
}
