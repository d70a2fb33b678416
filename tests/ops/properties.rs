//! Random shapes, options, layouts, dtypes and instruction sets: the fused path gives what the reference gives, and
//! shapes that disagree give errors.
//!
//! The draws are the same each time; `MAMBA_PROPERTY_SEED` changes them and `PROPTEST_CASES` says how many.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Result, Tensor};
use mamba_ops::{Activation, NormKind, Packing, SequenceLayout};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::laws::{self, Op, Tensors};
use crate::support::random::Random;
use crate::support::target::Target;
use crate::support::tolerance::{self, of_rounding, values};
use crate::{blocks, causal_conv1d, grid, norm, selective_scan, selective_state_update, ssd};

fn runner() -> TestRunner {
    let seed: u64 = std::env::var("MAMBA_PROPERTY_SEED").map_or(0, |seed| seed.parse().unwrap());
    let cases = std::env::var("PROPTEST_CASES").map_or(60, |cases| cases.parse().unwrap());
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// A view of the same values.
fn view(x: &Tensor, kind: usize) -> Tensor {
    let rank = x.rank();
    let view = || -> Result<Tensor> {
        match kind {
            1 if rank > 1 => x.transpose(rank - 2, rank - 1)?.contiguous()?.transpose(rank - 2, rank - 1),
            2 => {
                let len = x.dim(rank - 1)?;
                Tensor::cat(&[x, x, x], rank - 1)?.narrow(rank - 1, len, len)
            }
            3 => {
                let len = x.dim(0)?;
                Tensor::cat(&[x, x], 0)?.narrow(0, len, len)
            }
            // One value over an axis of one, as a broadcast has it.
            4 if rank > 0 && x.dim(0)? == 1 => x.narrow(0, 0, 1)?.squeeze(0)?.broadcast_as(x.shape()),
            _ => Ok(x.clone()),
        }
    };
    view().unwrap()
}

/// `‖got - want‖` by `‖want‖`, or by what values of size 1 have where those wanted all but cancel.
fn error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes differ");
    let (got, want) = (values(got), values(want));
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w) * (g - w)).sum();
    let scale: f64 = want.iter().map(|w| w * w).sum::<f64>().max(want.len() as f64);
    if error == 0.0 { 0.0 } else { (error / scale).sqrt() }
}

fn compare(got: &Tensors, want: &Tensors, f32_tolerance: f64, context: &str) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{context}");
    for (name, want) in want {
        let got = &got[name];
        let (error, bound) = (error(got, want), of_rounding(want, got.dtype(), f32_tolerance));
        assert!(error <= bound, "{context}: `{name}` is off by {error:.1e}, allowed {bound:.1e}");
    }
}

/// Outputs and gradients in a random dtype, from random views, on a random instruction set.
fn agrees<O: Op>(case: &O::Case, dtypes: &[DType], [seed, dtype, isa, views]: [usize; 4]) {
    let dtype = dtypes[dtype % dtypes.len()];
    let isas = Target::available();
    let isa = isas[isa % isas.len()];
    let inputs = laws::cast::<O>(&O::inputs(case, &mut Random::new(seed as u64)), dtype).unwrap();
    let exact = laws::to_f64(&inputs).unwrap();
    let viewed: Tensors = inputs
        .iter()
        .enumerate()
        .map(|(i, (name, x))| (name.clone(), view(x, (views >> (3 * i % 60)) % 5)))
        .collect();
    let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
    let (forward, backward) = (tolerance::FORWARD * O::slack(dtype), tolerance::BACKWARD * O::slack(dtype));
    isa.scope(|| {
        let outputs = O::fused(case, &viewed).unwrap();
        if laws::is_empty(&outputs) {
            return compare(&outputs, &O::reference(case, &exact).unwrap(), forward, &context);
        }
        let cotangents = laws::cotangents(&outputs, &mut Random::new(seed as u64 + 1)).unwrap();
        let want = laws::differentiate(&|x| O::reference(case, x), &exact, &cotangents).unwrap();
        compare(&outputs, &want.0, forward, &context);
        let got = laws::differentiate(&|x| O::fused(case, x), &inputs, &cotangents).unwrap();
        compare(&got.0, &want.0, forward, &context);
        compare(&got.1, &want.1, backward, &format!("{context} gradient"));
    });
}

/// One extent or the rank of one input changes: an error that names the op and an argument; or, if it fits after all, what
/// the reference says too. Never a panic.
fn disagrees<O: Op>(op: &str, case: &O::Case, [seed, which, axis, how]: [usize; 4]) {
    let mut inputs = laws::cast::<O>(&O::inputs(case, &mut Random::new(seed as u64)), DType::F32).unwrap();
    let name = inputs.keys().nth(which % inputs.len()).unwrap().clone();
    let x = &inputs[&name];
    let axis = axis % x.rank();
    let mut dims = x.dims().to_vec();
    match how % 5 {
        0 => dims[axis] += 1,
        1 => dims[axis] = dims[axis].saturating_sub(1),
        2 => dims[axis] = 0,
        3 => dims.insert(axis, 1),
        _ => drop(dims.remove(axis)),
    }
    let changed = Random::new(seed as u64 + 2).tensor(&dims, -1.0, -0.1).to_dtype(x.dtype()).unwrap();
    if changed.dims() == x.dims() {
        return;
    }
    inputs.insert(name.clone(), changed);
    let context = format!("{case:?}: `{name}` of {dims:?}");
    let result = catch_unwind(AssertUnwindSafe(|| O::fused(case, &inputs)));
    match result.unwrap_or_else(|_| panic!("{context} panics")) {
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with(&format!("{op}: ")) && message.contains('`'), "{context}: {message}");
        }
        Ok(got) => {
            let exact = laws::to_f64(&inputs).unwrap();
            let want = O::reference(case, &exact).unwrap_or_else(|e| panic!("{context} passes, but {e}"));
            compare(&got, &want, tolerance::FORWARD, &context);
        }
    }
}

const DTYPES: &[DType] = &[DType::F32, DType::F64, DType::F32, DType::BF16, DType::F16];
/// Of functions that round in between, where those of their reference do not.
const WIDE: &[DType] = &[DType::F32, DType::F64];

fn hold<O: Op>(op: &str, dtypes: &[DType], cases: impl Strategy<Value = O::Case>) {
    let draws = || [0usize..1 << 20, 0usize..1 << 20, 0usize..1 << 20, 0usize..1 << 60];
    runner()
        .run(&(cases, draws(), draws()), |(case, draw, change)| {
            agrees::<O>(&case, dtypes, draw);
            disagrees::<O>(op, &case, change);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
}

/// No packing, or a random one for a batch of these sizes.
fn packed([batch, seqlen]: [usize; 2], seed: Option<u8>) -> Option<Packing> {
    seed.map(|seed| grid::cut([batch, seqlen], &mut Random::new(seed.into())))
}

fn layouts() -> impl Strategy<Value = SequenceLayout> {
    prop_oneof![Just(SequenceLayout::ChannelsFirst), Just(SequenceLayout::ChannelsLast)]
}

#[test]
fn causal_conv1d() {
    let sizes = (0usize..4, 0usize..40, 0usize..90, 1usize..9);
    let options = (any::<[bool; 3]>(), layouts(), any::<Option<u8>>());
    let cases = (sizes, options).prop_map(|(sizes, ([bias, state, silu], layout, packing))| {
        let (batch, dim, seqlen, width) = sizes;
        let activation = if silu { Activation::Silu } else { Activation::Identity };
        let packing = packed([batch, seqlen], packing);
        causal_conv1d::Case { batch, dim, seqlen, width, bias, state, activation, layout, packing }
    });
    hold::<causal_conv1d::Conv>("causal_conv1d", DTYPES, cases);
}

#[test]
fn selective_scan() {
    let sizes = (0usize..4, 1usize..9, 0usize..6, 0usize..80, 0usize..40);
    let groups = prop_oneof![Just(None), Just(Some(false)), Just(Some(true))];
    let options = (any::<[bool; 5]>(), layouts(), any::<Option<u8>>());
    let cases = (sizes, groups.clone(), groups, options).prop_map(
        |((batch, g, share, seqlen, d_state), b, c, (flags, layout, packing))| {
            let [d, z, delta_bias, delta_softplus, state] = flags;
            let groups = |many: bool| if many { g } else { 1 };
            selective_scan::Case {
                batch,
                dim: g * share,
                seqlen,
                d_state,
                b: b.map(groups),
                c: c.map(groups),
                d,
                z,
                delta_bias,
                delta_softplus,
                state,
                layout,
                packing: packed([batch, seqlen], packing),
            }
        },
    );
    hold::<selective_scan::Scan>("selective_scan", DTYPES, cases);
}

#[test]
fn ssd_chunk_scan() {
    let sizes = (0usize..4, 0usize..80, 1usize..5, 0usize..4, 0usize..36, 0usize..36);
    let cases = (sizes, 0usize..3, any::<[bool; 5]>(), 1usize..100, any::<Option<u8>>()).prop_map(
        |(
            (batch, seqlen, ngroups, share, headdim, d_state),
            d,
            [z, dt_bias, dt_softplus, state, limit],
            chunk_size,
            packing,
        )| {
            ssd::Case {
                batch,
                seqlen,
                nheads: ngroups * share,
                headdim,
                ngroups,
                d_state,
                d: [None, Some(1), Some(2)][d],
                z,
                dt_bias,
                dt_softplus,
                dt_limit: if limit { (0.05, 0.5) } else { (0.0, f64::INFINITY) },
                chunk_size,
                state,
                packing: packed([batch, seqlen], packing),
            }
        },
    );
    hold::<ssd::Ssd>("ssd_chunk_scan", DTYPES, cases);
}

#[test]
fn norms() {
    let shapes = (prop::collection::vec(0usize..7, 0..3), 1usize..9, 2usize..20);
    let gates = 0usize..3;
    let cases = (shapes, gates, any::<[bool; 5]>(), 0usize..3).prop_map(
        |((leading, groups, share), gate, [layer, weight, bias, residual, grouped], eps)| norm::Case {
            kind: if layer { NormKind::Layer } else { NormKind::Rms },
            shape: leading.into_iter().chain([groups * share]).collect(),
            group_size: grouped.then_some(share),
            weight,
            bias,
            residual,
            gate: [norm::Gate::Without, norm::Gate::BeforeNorm, norm::Gate::AfterNorm][gate],
            eps: [1e-5, 1e-3, 0.1][eps],
            residual_in_f32: false,
            prenorm: false,
        },
    );
    hold::<norm::InDtypeOfX>("norm", DTYPES, cases);
}

#[test]
fn mamba2_split_conv1d_scan() {
    let sizes = (0usize..3, 0usize..40, 1usize..4, 1usize..4, 1usize..9, 1usize..9, 2usize..6);
    let norm = prop_oneof![Just(None), Just(Some((false, false))), Just(Some((true, true)))];
    let cases = (sizes, norm, any::<[bool; 4]>(), any::<bool>(), any::<Option<u8>>()).prop_map(
        |((batch, seqlen, ngroups, share, headdim, d_state, width), norm, flags, limit, packing)| {
            let [options, d_has_headdim, out_proj, states] = flags;
            blocks::Mamba2 {
                width,
                // Groups of one channel leave RMSNorm little but the sign.
                norm: norm.map(|(grouped, before)| {
                    let group_size = share * headdim;
                    ((grouped && group_size > 1).then_some(group_size), before)
                }),
                options,
                d_has_headdim,
                out_proj,
                states,
                packing: packed([batch, seqlen], packing),
                dt_limit: if limit { (0.2, 0.7) } else { (0.0, f64::INFINITY) },
                ..blocks::Mamba2::new([batch, seqlen, ngroups * share, headdim, ngroups, d_state])
            }
        },
    );
    hold::<blocks::Subject<blocks::Mamba2, false>>("mamba2_split_conv1d_scan", WIDE, cases);
}

#[test]
fn mamba1_inner() {
    let sizes = (0usize..3, 0usize..40, 1usize..20, 1usize..12, 1usize..5, 2usize..6);
    let cases = (sizes, any::<[bool; 3]>(), any::<Option<u8>>()).prop_map(
        |((batch, seqlen, dim, d_state, dt_rank, width), [options, out_proj, states], packing)| {
            blocks::Mamba1 {
                width,
                options,
                out_proj,
                states,
                packing: packed([batch, seqlen], packing),
                ..blocks::Mamba1::new([batch, seqlen, dim, d_state, dt_rank])
            }
        },
    );
    hold::<blocks::Subject<blocks::Mamba1, false>>("mamba1_inner", WIDE, cases);
}

/// The update has no gradient: values and the state in place, against the reference.
#[test]
fn selective_state_update() {
    use selective_state_update::Form::{Channels, Heads, Tied};
    let sizes = (0usize..4, 1usize..5, 0usize..5, 0usize..20, 0usize..40);
    let tokens = prop_oneof![Just(None), (0usize..4).prop_map(Some)];
    let cases = (sizes, 0usize..3, any::<[bool; 4]>(), 0usize..1 << 20, 0usize..4, 0usize..8, tokens);
    runner()
        .run(&cases, |((batch, g, share, headdim, d_state), form, flags, seed, dtype, isa, tokens)| {
            let [options, grouped, softplus, limit] = flags;
            let form = [Channels, Heads, Tied][form];
            let case = selective_state_update::Case {
                tokens,
                options,
                dt_limit: if limit { (0.2, 0.7) } else { selective_state_update::FREE },
                ..selective_state_update::Case::new(
                    form,
                    [batch, g * share, if form == Channels { 1 } else { headdim }, d_state],
                    grouped.then_some(g),
                )
            };
            let dtype = [DType::F32, DType::F32, DType::BF16, DType::F16][dtype];
            let inputs = case.inputs(&mut Random::new(seed as u64));
            let inputs = selective_state_update::cast(&inputs, dtype, DType::F32);
            let exact = selective_state_update::cast(&inputs, DType::F64, DType::F64);
            let isas = Target::available();
            let got = isas[isa % isas.len()]
                .scope(|| selective_state_update::update(&inputs, softplus, case.dt_limit));
            let want = selective_state_update::update(&exact, softplus, case.dt_limit);
            for (name, got, want) in [("y", &got.0, &want.0), ("state", &got.1, &want.1)] {
                let (error, bound) = (error(got, want), of_rounding(want, got.dtype(), tolerance::FORWARD));
                assert!(error <= bound, "{case:?}: `{name}` is off by {error:.1e}, allowed {bound:.1e}");
            }
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
}

crate::on_cuda!(
    causal_conv1d,
    mamba1_inner,
    mamba2_split_conv1d_scan,
    norms,
    selective_scan,
    selective_state_update,
    ssd_chunk_scan,
);
