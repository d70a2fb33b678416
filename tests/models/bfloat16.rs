//! In bfloat16 a model is no further off float64 than the published implementation of it in bfloat16.

use candle_core::{DType, Tensor};

use crate::parity::tiny_checkpoints;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::relative_rms;
use crate::{in_pieces, open};

/// How many times their error one of ours may be: over the thousand logits of a file the error of rounding alone varies by 2 to 3 %
/// from run to run.
const CHANCE: f64 = 1.05;

/// The same on average over all files, where chance evens out: ours round less often.
const ON_AVERAGE: f64 = 0.95;

/// Of the logits of all ids those of the ids that come next, from the position `first` on.
fn following(logits: &Tensor, ids: &Tensor, first: usize) -> Tensor {
    let count = ids.dim(1).unwrap() - 1 - first;
    let next = ids.narrow(1, first + 1, count).unwrap().unsqueeze(2).unwrap().contiguous().unwrap();
    logits
        .narrow(1, first, count)
        .unwrap()
        .contiguous()
        .unwrap()
        .gather(&next, 2)
        .unwrap()
        .squeeze(2)
        .unwrap()
}

#[test]
fn errors_are_those_of_a_plain_run() {
    let (mut ratios, mut stepped) = (vec![], vec![]);
    for name in &tiny_checkpoints() {
        let golden = Golden::read(&path("models").join(name).join("bf16.safetensors"));
        let ids = golden.tensors["input_ids"].to_dtype(DType::U32).unwrap();
        let (rows, seqlen) = ids.dims2().unwrap();
        let exact = &golden.tensors["exact_logits"];
        assert_eq!(exact.dims(), [rows, seqlen - 1], "{name}");
        let single = open(name, DType::F32).forward(&ids, None).unwrap();
        let error = relative_rms(&following(&single, &ids, 0), exact);
        assert!(error <= 1e-5, "{name} in f32: off by {error:.1e}");

        let model = open(name, DType::BF16);
        let compare = |ours: &Tensor, theirs: &Tensor, exact: &Tensor, how: &str| {
            let (ours, theirs) = (relative_rms(ours, exact), relative_rms(theirs, exact));
            assert!(ours <= CHANCE * theirs, "{name} {how}: off by {ours:.2e}, a plain run by {theirs:.2e}");
            ours / theirs
        };
        let forward = following(&model.forward(&ids, None).unwrap(), &ids, 0);
        ratios.push(compare(&forward, &golden.tensors["logits"], exact, "in one forward"));

        let prefill = golden.number("prefill").unwrap() as usize;
        let lengths: Vec<usize> = [prefill].into_iter().chain(vec![1; seqlen - prefill]).collect();
        let steps = following(&in_pieces(&model, &ids, &lengths), &ids, prefill);
        let after = |x: &Tensor| x.narrow(1, prefill, seqlen - 1 - prefill).unwrap();
        // Where the published steps are no measure, the published forward is.
        let theirs = golden.tensors.get("step_logits").cloned();
        stepped.push(theirs.is_some());
        let theirs = theirs.unwrap_or_else(|| after(&golden.tensors["logits"]));
        ratios.push(compare(&steps, &theirs, &after(exact), "in steps"));
    }
    assert_eq!(
        (stepped.len(), stepped.iter().filter(|own| **own).count()),
        (41, 30),
        "files, and with steps"
    );
    let (least, most) = ratios.iter().fold((f64::MAX, 0.0f64), |(a, b), x| (a.min(*x), b.max(*x)));
    println!("{} comparisons: {least:.2} to {most:.2} times the error of a plain run", ratios.len());
    let average = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(average <= ON_AVERAGE, "on average {average:.3} times the error of a plain run");
}
