//! Long sequences and extreme decays against loops in `f64`: values, gradients, and no infinities.

use candle_core::{DType, Device, Tensor};
use mamba_ops::SequenceLayout;

use crate::grid::{Oracle, all_values, check, scan_oracle, shaped, ssd_oracle};
use crate::laws::{self, Op, Tensors};
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, of_rounding, relative_rms, values};
use crate::{selective_scan, ssd};

const LONG: usize = 65_536;

/// From -1e-30 to -1e3, evenly in the exponent.
fn decays(count: usize) -> Vec<f64> {
    (0..count).map(|i| -(10f64.powf(-30.0 + 33.0 * i as f64 / (count - 1) as f64))).collect()
}

/// Before a softplus that gives from 1e-6 to 1e3.
fn steps(shape: &[usize], random: &mut Random) -> Tensor {
    let step = |random: &mut Random| {
        let delta = 10f64.powf(random.uniform(-6.0, 3.0));
        if delta > 30.0 { delta } else { delta.exp_m1().ln() }
    };
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| step(random)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn ssd_case(seqlen: usize) -> ssd::Case {
    ssd::Case {
        d: Some(1),
        dt_softplus: true,
        state: true,
        chunk_size: 64,
        ..ssd::Case::bare([1, seqlen, 12, 2, 2, 4])
    }
}

fn scan_case(seqlen: usize, layout: SequenceLayout) -> selective_scan::Case {
    selective_scan::Case {
        delta_bias: false,
        z: false,
        ..selective_scan::Case::new([1, 6, seqlen, 4], layout)
    }
}

fn ssd_extremes(case: &ssd::Case) -> Tensors {
    let mut random = Random::new(31);
    let mut inputs = ssd::Ssd::inputs(case, &mut random);
    inputs.insert("a".into(), Tensor::from_vec(decays(12), 12, &Device::Cpu).unwrap());
    inputs.insert("dt".into(), steps(&[1, case.seqlen, 12], &mut random));
    inputs
}

fn scan_extremes(case: &selective_scan::Case) -> Tensors {
    let mut random = Random::new(32);
    let mut inputs = selective_scan::Scan::inputs(case, &mut random);
    inputs.insert("a".into(), Tensor::from_vec(decays(24), (6, 4), &Device::Cpu).unwrap());
    let delta = steps(inputs["delta"].dims(), &mut random);
    inputs.insert("delta".into(), delta);
    inputs
}

/// 65,536 tokens, values and gradients.
#[test]
fn long_sequences() {
    let case = ssd::Case { chunk_size: 64, ..ssd::Case::new([1, LONG, 4, 2, 2, 4]) };
    check::<ssd::Ssd>(&case, &ssd::Ssd::inputs(&case, &mut Random::new(33)), ssd_oracle);
    let case = selective_scan::Case::new([1, 4, LONG, 4], SequenceLayout::ChannelsLast);
    let inputs = selective_scan::Scan::inputs(&case, &mut Random::new(34));
    check::<selective_scan::Scan>(&case, &inputs, scan_oracle);
}

/// A state that hardly decays, moved on token by token in `f32`, is a product and a sum of as many factors and terms as
/// there are tokens, each rounded: its error is a random walk. (`ssd_chunk_scan` adds up exponents, chunk by chunk.)
fn of_random_walk(seqlen: usize) -> f64 {
    tolerance::FORWARD.max(2.0 * f64::from(f32::EPSILON) * (seqlen as f64).sqrt())
}

/// Tensor cores do not round what they add to but cut it off, by up to 2⁻²⁴ of it for each 16 tokens: where a state does not decay, all of
/// that is there in the end. (Beside f32 inputs each chunk has a sum of its own, which is added by rounding.)
fn of_tensor_cores(dtype: DType, tokens: usize) -> f64 {
    if target::is_cuda() && dtype != DType::F32 { (tokens / 16) as f64 * 2f64.powi(-24) } else { 0.0 }
}

/// Values by `axis` of the outputs against the oracle, each part by itself lest large ones hide small ones; gradients as
/// they are in `f64`, all of them finite. (Not in `f16`, whose largest number is 65,504; and the longest in 16 bits on a GPU
/// alone, whose kernels compute with 16 bits.)
fn extremes<O: Op>(
    case: &O::Case,
    inputs: &Tensors,
    oracle: Oracle<O::Case>,
    axis: fn(&str) -> usize,
    allowed: f64,
) {
    let long = inputs.values().any(|x| x.dims().contains(&LONG)) && !target::is_cuda();
    let tokens = inputs.values().flat_map(Tensor::dims).max().copied().unwrap_or(0);
    for dtype in [DType::F32, DType::BF16].into_iter().take(if long { 1 } else { 2 }) {
        let inputs = laws::cast::<O>(inputs, dtype).unwrap();
        let allowed = (allowed * O::slack(dtype)).max(of_tensor_cores(dtype, tokens));
        extremes_in::<O>(case, &inputs, oracle, axis, allowed);
    }
}

fn extremes_in<O: Op>(
    case: &O::Case,
    inputs: &Tensors,
    oracle: Oracle<O::Case>,
    axis: fn(&str) -> usize,
    allowed: f64,
) {
    let outputs = O::fused(case, inputs).unwrap();
    let cotangents = laws::cotangents(&outputs, &mut Random::new(35)).unwrap();
    let exact = laws::to_f64(inputs).unwrap();
    let (want, gradients) = oracle(case, &exact, &cotangents);
    assert!(gradients.values().chain(want.values()).flatten().all(|v| v.is_finite()));
    let (want, gradients) = (shaped(&outputs, want), shaped(inputs, gradients));
    assert_eq!(all_values(&want).len(), 2);
    for isa in Target::available() {
        let got = isa.scope(|| laws::differentiate(&|x| O::fused(case, x), inputs, &cotangents)).unwrap();
        for (name, want) in &want {
            for i in 0..want.dim(axis(name)).unwrap() {
                let part = |x: &Tensor| x.narrow(axis(name), i, 1).unwrap();
                let (got, want) = (part(&got.0[name]), part(want));
                assert!(values(&got).iter().all(|v| v.is_finite()), "{} `{name}` {i}", isa.name());
                let error = relative_rms(&got, &want);
                let allowed = of_rounding(&want, got.dtype(), allowed);
                assert!(error <= allowed, "{case:?} {}: `{name}` {i} is off by {error:.1e}", isa.name());
            }
        }
        for (name, want) in &gradients {
            let got = &got.1[name];
            assert!(values(got).iter().all(|v| v.is_finite()), "{}: d`{name}` is not finite", isa.name());
            let error = relative_rms(got, want);
            let allowed = of_rounding(want, got.dtype(), allowed.max(tolerance::BACKWARD));
            assert!(error <= allowed, "{case:?} {}: d`{name}` is off by {error:.1e}", isa.name());
        }
    }
}

#[test]
fn extremes_of_ssd() {
    for seqlen in [4097, LONG] {
        let case = ssd_case(seqlen);
        let axis = |name: &str| if name == "y" { 2 } else { 1 };
        extremes::<ssd::Ssd>(&case, &ssd_extremes(&case), ssd_oracle, axis, tolerance::FORWARD);
    }
}

#[test]
fn extremes_of_selective_scan() {
    for (seqlen, layout) in [
        (4097, SequenceLayout::ChannelsFirst),
        (4097, SequenceLayout::ChannelsLast),
        (LONG, SequenceLayout::ChannelsLast),
    ] {
        let case = scan_case(seqlen, layout);
        let axis = match layout {
            SequenceLayout::ChannelsFirst => |_: &str| 1,
            SequenceLayout::ChannelsLast => |name: &str| if name == "y" { 2 } else { 1 },
        };
        extremes::<selective_scan::Scan>(
            &case,
            &scan_extremes(&case),
            scan_oracle,
            axis,
            of_random_walk(seqlen),
        );
    }
}

crate::on_cuda!(long_sequences, extremes_of_ssd, extremes_of_selective_scan);
