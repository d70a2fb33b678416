//! Updates of an optimizer, against the same in plain tensor operations in f64.

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::{AdamWUpdate, adamw_update, optimizer, sum_of_squares};

use crate::support::message;
use crate::support::random::Random;
use crate::support::target;
use crate::support::tolerance::{relative_rms, values};

/// Value, moments and the rounded value after three steps.
fn three_steps(
    start: &Tensor,
    grads: &[Tensor; 3],
    rounded: Option<DType>,
    reference: bool,
) -> Result<Vec<Tensor>> {
    let value = start.copy()?;
    let (first, second) = (value.zeros_like()?, value.zeros_like()?);
    let rounded = rounded.map(|dtype| value.to_dtype(dtype)?.zeros_like()).transpose()?;
    for (step, grad) in grads.iter().enumerate() {
        let args = AdamWUpdate {
            rounded: rounded.as_ref(),
            grad_scale: 0.7,
            lr: 0.03,
            weight_decay: 0.1,
            beta2: 0.95,
            ..AdamWUpdate::new(&value, &first, &second, grad, step + 1)
        };
        if reference { optimizer::reference::adamw_update(&args)? } else { adamw_update(&args)? }
    }
    Ok([Some(value), Some(first), Some(second), rounded].into_iter().flatten().collect())
}

#[test]
fn equals_the_reference() {
    for len in [1, 3, 4, 1000, 70_001] {
        let mut random = Random::new(len as u64);
        let mut draw = || random.normal(&[len]).to_dtype(DType::F32).unwrap();
        let start = draw();
        let grads = [draw(), draw(), draw()];
        for (grad, rounded) in [
            (DType::F32, None),
            (DType::F32, Some(DType::BF16)),
            (DType::BF16, Some(DType::F16)),
            (DType::F16, None),
        ] {
            let grads = grads.each_ref().map(|x| x.to_dtype(grad).unwrap());
            let exact = grads.each_ref().map(|x| x.to_dtype(DType::F64).unwrap());
            let want = three_steps(&start.to_dtype(DType::F64).unwrap(), &exact, rounded, true).unwrap();
            let [a, b, c] = &grads;
            let placed = [("start", &start), ("a", a), ("b", b), ("c", c)];
            let placed = placed.map(|(name, x)| (name.to_owned(), x.clone())).into();
            let there = target::place(&format!("{len} {rounded:?}"), &placed).unwrap();
            let grads = ["a", "b", "c"].map(|name| there[name].clone());
            let got = three_steps(&there["start"], &grads, rounded, false).unwrap();
            assert_eq!(got.len(), want.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let got = got.to_device(&Device::Cpu).unwrap();
                assert_eq!(got.dtype(), if i < 3 { DType::F32 } else { rounded.unwrap() });
                let bound = if i < 3 { 1e-6 } else { 1e-3 }; // a sum next to a border rounds to its other side
                let error = relative_rms(&got, want);
                assert!(error < bound, "{len} {grad:?} {rounded:?}: tensor {i} is off by {error:.1e}");
            }
        }
    }
}

#[test]
fn norms() {
    let mut random = Random::new(2);
    let mut sum = 0.0;
    let mut tensors = vec![];
    for shape in [vec![1], vec![0], vec![3, 5], vec![70_001], vec![2, 40, 1000]] {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let x = random.normal(&shape).to_dtype(dtype).unwrap();
            sum += values(&x).iter().map(|x| x * x).sum::<f64>();
            tensors.push(x);
        }
    }
    let named = tensors.iter().filter(|x| x.elem_count() > 0 && x.dtype() != DType::F64);
    let named = named.enumerate().map(|(i, x)| (format!("{i:02}"), x.clone())).collect();
    let there = target::place("norms", &named).unwrap();
    let got = match target::is_cuda() {
        true => {
            let left = tensors.iter().filter(|x| x.dtype() == DType::F64).collect::<Vec<_>>();
            sum_of_squares(&there.values().collect::<Vec<_>>()).unwrap() + sum_of_squares(&left).unwrap()
        }
        false => sum_of_squares(&tensors.iter().collect::<Vec<_>>()).unwrap(),
    };
    assert!((got - sum).abs() < 1e-9 * sum, "{got} {sum}");
    assert_eq!(sum_of_squares(&[]).unwrap(), 0.0);
}

/// The same bits on any number of threads.
#[test]
fn threads() {
    let mut random = Random::new(3);
    let mut draw = || random.normal(&[200_000]).to_dtype(DType::F32).unwrap();
    let (start, grads) = (draw(), [draw(), draw(), draw()]);
    let run = || {
        let all = three_steps(&start, &grads, None, false).unwrap();
        (all.iter().map(values).collect::<Vec<_>>(), sum_of_squares(&grads.each_ref()).unwrap())
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert_eq!(pool.install(run), run());
}

#[test]
fn misuse() {
    let x = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
    let (value, first, second, grad) =
        (x(&[4], DType::F32), x(&[4], DType::F32), x(&[4], DType::F32), x(&[4], DType::F32));
    let good = AdamWUpdate::new(&value, &first, &second, &grad, 1);
    assert!(adamw_update(&good).is_ok());
    let fails = |args: AdamWUpdate, want: &str| {
        let message = message(adamw_update(&args).unwrap_err());
        assert!(message.starts_with("adamw_update: ") && message.contains(want), "{message}");
    };
    fails(AdamWUpdate { second: &first, ..good }, "shares its storage with another argument");
    fails(AdamWUpdate { grad: &value, ..good }, "shares its storage with another argument");
    let half = x(&[4], DType::BF16);
    fails(AdamWUpdate { value: &half, ..good }, "`value` has dtype bf16, expected f32 or f64");
    fails(AdamWUpdate { step: 0, ..good }, "`step` is 0, expected at least 1");
    fails(AdamWUpdate { first: &x(&[3], DType::F32), ..good }, "`first` has shape [3]");
    fails(
        AdamWUpdate { second: &x(&[4], DType::F64), ..good },
        "`second` has dtype f64, expected f32 as `value`",
    );
    fails(AdamWUpdate { grad: &x(&[2, 2], DType::F32), ..good }, "`grad` has shape [2, 2]");
    fails(AdamWUpdate { rounded: Some(&x(&[5], DType::BF16)), ..good }, "`rounded` has shape [5]");
    let strided = x(&[4, 2], DType::F32).narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    fails(AdamWUpdate { value: &strided, ..good }, "must be contiguous");
    let error = message(sum_of_squares(&[&x(&[1], DType::U32)]).unwrap_err());
    assert_eq!(error, "sum_of_squares: a tensor has dtype u32, expected a floating one");
}

crate::on_cuda!(equals_the_reference, norms);
