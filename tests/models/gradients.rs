//! What a model is trained by: gradients of every parameter, of every kind of mixer.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use mamba_model::{Batch, Model, Recompute};

use crate::support::random::Random;
use crate::support::tolerance::{max_error, relative_rms, values};

/// The model with every parameter a variable.
fn trainable(model: &Model, dtype: DType) -> (Model, HashMap<String, Var>) {
    let vars: HashMap<String, Var> = (model.parameters().iter())
        .map(|(name, x)| (name.clone(), Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()))
        .collect();
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let weights = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
    (Model::new(model.config(), weights).unwrap(), vars)
}

/// A loss of all logits, of rows of which the second is padded on the left.
fn loss(model: &Model) -> Tensor {
    let vocab = model.config().vocab_size as u32;
    let input = Tensor::from_vec(Random::new(6).ids(40, vocab), (2, 20), &Device::Cpu).unwrap();
    let whole = model.forward(&input, None).unwrap().sqr().unwrap().sum_all().unwrap();
    let padded = model.forward(Batch::left_padded(&input, &[20, 7]).unwrap(), None).unwrap();
    (whole + padded.sqr().unwrap().sum_all().unwrap()).unwrap()
}

/// An expert that no token takes has no gradient, and the choice of experts is not differentiable.
fn optional(parameter: &str) -> bool {
    parameter.contains(".experts.") || parameter.ends_with("correction_bias")
}

/// What the model is trained with: every parameter of every kind of mixer has a gradient, the same if layers are computed again,
/// and in `f32`, where kernels compute it, that of `f64`, where references do.
#[test]
fn gradients_reach_every_parameter() {
    for name in crate::laws::MODELS {
        let original = crate::open(name, DType::F32);
        let (fused, fused_vars) = trainable(&original, DType::F32);
        let fused_loss = loss(&fused);
        assert!(max_error(&fused_loss.detach(), &loss(&original)) < 1e-4, "{name}");
        let fused_gradients = fused_loss.backward().unwrap();
        let (model, vars) = trainable(&original, DType::F64);
        let gradients = loss(&model).backward().unwrap();
        let again = loss(&model.with_recompute(Recompute::Layers)).backward().unwrap();
        for (parameter, var) in &vars {
            let Some(gradient) = gradients.get(var) else {
                assert!(optional(parameter), "{name}: `{parameter}` has no gradient");
                assert!(fused_gradients.get(&fused_vars[parameter]).is_none());
                continue;
            };
            let nothing = values(gradient).iter().all(|x| *x == 0.0);
            assert!(!nothing || optional(parameter), "{name}: the gradient of `{parameter}` is 0");
            let gap = relative_rms(again.get(var).unwrap(), gradient);
            assert!(nothing || gap <= 1e-12, "{name}: `{parameter}` is off by {gap:.1e} if recomputed");
            let Some(fused) = fused_gradients.get(&fused_vars[parameter]) else {
                panic!("{name}: `{parameter}` has no gradient in f32")
            };
            let gap = relative_rms(fused, gradient);
            assert!(nothing || gap <= 1e-3, "{name}: `{parameter}` is off by {gap:.1e} in f32");
        }
    }
}

/// Along a random direction in the space of all parameters the loss changes as its gradients say: none is cut on its way.
#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-6;
    for name in crate::laws::MODELS {
        let original = crate::open(name, DType::F32);
        let (model, vars) = trainable(&original, DType::F64);
        let gradients = loss(&model).backward().unwrap();
        let mut random = Random::new(7);
        let directions: HashMap<String, Tensor> = (original.parameters().iter())
            .map(|(parameter, x)| {
                let moves = if optional(parameter) { 0.0 } else { 1.0 };
                (parameter.clone(), (random.normal(x.dims()).to_dtype(DType::F64).unwrap() * moves).unwrap())
            })
            .collect();
        let said: f64 = (vars.iter())
            .filter_map(|(parameter, var)| Some((gradients.get(var)? * &directions[parameter]).unwrap()))
            .map(|product| values(&product).iter().sum::<f64>())
            .sum();
        let moved = |step: f64| {
            let tensors = (vars.iter())
                .map(|(parameter, var)| {
                    let x = (var.as_tensor().detach() + (&directions[parameter] * step).unwrap()).unwrap();
                    (parameter.clone(), x)
                })
                .collect();
            let weights = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
            values(&loss(&Model::new(original.config(), weights).unwrap()))[0]
        };
        // Some losses curve strongly: what is left after two steps is of the fourth order.
        let slope = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
        let found = (4.0 * slope(STEP) - slope(2.0 * STEP)) / 3.0;
        assert!(
            (said - found).abs() <= 1e-5 * found.abs(),
            "{name}: {said} by gradients, {found} by differences"
        );
    }
}
