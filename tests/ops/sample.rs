//! Drawn tokens: what uniform numbers in a row give, against probabilities; kernels against the reference; wrong arguments.

use candle_core::{DType, Device, Tensor};
use mamba_ops::sample::reference;
use mamba_ops::{Draw, NO_TOKEN, Sample, sample};

use crate::support::message;
use crate::support::random::Random;
use crate::support::target;

const ANY: Draw = Draw { temperature: 1.0, ..Draw::GREEDY };

fn draw_on(place: &str, logits: &Tensor, draws: &[Draw]) -> Vec<u32> {
    let there = target::place(place, &[("logits".to_owned(), logits.clone())].into()).unwrap();
    sample(&Sample::new(&there["logits"], draws)).unwrap().to_vec1().unwrap()
}

/// The share of each token that is left, by comparing each with all others.
fn probabilities(row: &[f32], draw: &Draw) -> Vec<f64> {
    let t = f64::from(draw.temperature);
    let largest = row.iter().fold(f64::NEG_INFINITY, |most, x| most.max(f64::from(*x)));
    let mass: Vec<f64> = row.iter().map(|x| ((f64::from(*x) - largest) / t).exp()).collect();
    let before = |i: usize, j: usize| row[j] > row[i] || (row[j] == row[i] && j < i);
    let all = 0..row.len();
    let rank = |i: usize| all.clone().filter(|&j| before(i, j)).count();
    let in_k: Vec<bool> = all.clone().map(|i| draw.top_k.is_none_or(|k| rank(i) < k)).collect();
    let of_k: f64 = all.clone().filter(|&i| in_k[i]).map(|i| mass[i]).sum();
    let mass_before = |i: usize| all.clone().filter(|&j| before(i, j)).map(|j| mass[j]).sum::<f64>();
    let kept = |i: usize| {
        in_k[i]
            && draw.top_p.is_none_or(|p| mass_before(i) < p * of_k)
            && draw.min_p.is_none_or(|p| mass[i] >= p)
    };
    let left: Vec<f64> = all.clone().map(|i| if kept(i) { mass[i] } else { 0.0 }).collect();
    let sum: f64 = left.iter().sum();
    left.iter().map(|mass| mass / sum).collect()
}

/// Numbers in even steps from 0 to 1 give each token as often as it is likely, but for one at each end.
#[test]
fn every_token_has_its_share() {
    const STEPS: usize = 4000;
    let row: Vec<f32> = (0..60).map(|i| ((i * 37) % 23) as f32 * 0.3 - 2.0).collect(); // with equals
    let mut cases = 0;
    for (temperature, top_k, top_p, min_p) in [
        (1.0, None, None, None),
        (0.6, None, None, None),
        (1.0, Some(7), None, None),
        (2.0, Some(1), None, None),
        (1.0, Some(1000), None, None),
        (1.3, None, Some(0.7), None),
        (1.0, None, Some(1.0), Some(0.2)),
        (1.0, Some(20), Some(0.51), None),
        (0.8, Some(30), Some(0.93), Some(0.15)),
        (1.0, None, None, Some(1.0)),
        (5.0, None, Some(1e-9), None),
    ] {
        let draw = Draw { temperature, top_k, top_p, min_p, uniform: 0.0 };
        let want = probabilities(&row, &draw);
        let draws: Vec<Draw> =
            (0..STEPS).map(|i| Draw { uniform: (i as f64 + 0.5) / STEPS as f64, ..draw }).collect();
        let logits = Tensor::new(row.as_slice(), &Device::Cpu).unwrap();
        let logits = logits.broadcast_as((STEPS, row.len())).unwrap().contiguous().unwrap();
        let mut count = vec![0.0; row.len()];
        for id in draw_on(&format!("{draw:?}"), &logits, &draws) {
            count[id as usize] += 1.0;
        }
        for (i, (count, p)) in count.iter().zip(&want).enumerate() {
            let error = (count - p * STEPS as f64).abs();
            assert!(error <= if *p > 0.0 { 1.01 } else { 0.0 }, "token {i}, {draw:?}: {count}, expected {p}");
        }
        cases += 1;
    }
    assert_eq!(cases, 11);
}

fn one(logits: &Tensor, draw: Draw) -> u32 {
    reference::forward(&Sample::new(logits, &[draw])).unwrap().to_vec1().unwrap()[0]
}

/// What the reference gives for numbers beside this one, where rounding decides.
fn possible(logits: &Tensor, draw: Draw) -> Vec<u32> {
    let near = [-1e-5, 0.0, 1e-5];
    let pairs = near.into_iter().flat_map(|u| near.map(|p| (u, p)));
    let beside = pairs.map(|(u, p)| Draw {
        uniform: (draw.uniform + u).clamp(0.0, 1.0 - 1e-12),
        top_p: draw.top_p.map(|top_p| (top_p * (1.0 + p)).min(1.0)),
        ..draw
    });
    beside.map(|draw| one(logits, draw)).collect()
}

/// Logits of every kind: flat, steep, of few values, with tokens that cannot be; every option; more rows than a launch takes.
#[test]
fn as_the_reference() {
    let mut random = Random::new(5);
    let (mut cases, mut exact) = (0, 0);
    for (vocab_size, rows) in [(1, 3), (2, 5), (100, 130), (3000, 70), (50_283, 67)] {
        for (scale, dtype) in [
            (0.0, DType::F32),
            (1e-3, DType::F32),
            (3.0, DType::F32),
            (3.0, DType::BF16),
            (1.0, DType::F16),
            (60.0, DType::F32),
            (1e38, DType::F32),
        ] {
            let values = (random.normal(&[rows, vocab_size]) * scale).unwrap().to_dtype(DType::F32).unwrap();
            let mut values = values.clamp(-3e38, 3e38).unwrap().to_vec2::<f32>().unwrap();
            for (r, row) in values.iter_mut().enumerate().filter(|(r, _)| r % 3 == 1) {
                row.iter_mut().skip(1).step_by(1 + r % 4).for_each(|x| *x = f32::NEG_INFINITY);
            }
            let logits = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let uniforms = random.normal(&[rows]).to_vec1::<f64>().unwrap();
            let pick = |i: usize, n: usize| i * 7 / 3 % n;
            let draws: Vec<Draw> = (0..rows)
                .map(|r| Draw {
                    temperature: [1.0, 0.7, 0.05, 4.0, 0.0, 1e-3][pick(r, 6)],
                    top_k: [None, Some(1), Some(40), None, Some(2000), Some(60_000)][pick(r + 1, 6)],
                    top_p: [None, Some(0.9), Some(1.0), Some(0.2), Some(0.999)][r % 5],
                    min_p: [None, None, Some(0.05), Some(1.0)][pick(r, 4)],
                    uniform: uniforms[r].abs().fract(),
                })
                .collect();
            let place = format!("{vocab_size} {scale} {}", dtype.as_str());
            let got = draw_on(&place, &logits, &draws);
            assert_eq!(got, draw_on(&place, &logits, &draws), "the same draws, other tokens");
            for (r, (id, draw)) in got.iter().zip(&draws).enumerate() {
                cases += 1;
                let row = logits.narrow(0, r, 1).unwrap();
                if one(&row, *draw) == *id {
                    exact += 1;
                    continue;
                }
                let possible = possible(&row, *draw);
                assert!(possible.contains(id), "{place}, row {r}, {draw:?}: {id}, expected {possible:?}");
            }
        }
    }
    assert_eq!(cases, 7 * 275);
    assert!(exact * 1000 > cases * 995, "{exact} of {cases}");
}

#[test]
fn nothing_to_choose_from() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [[1.0, nan, 2.0], [1.0, inf, 2.0], [-inf, -inf, -inf], [-inf, 3.0, -inf], [-0.0, 0.0, -1.0]];
    let logits = Tensor::new(&rows, &Device::Cpu).unwrap();
    for draw in [Draw::GREEDY, ANY, Draw { top_k: Some(2), top_p: Some(0.5), min_p: Some(0.1), ..ANY }] {
        let got = draw_on(&format!("{draw:?}"), &logits, &[draw; 5]);
        assert_eq!(got, [NO_TOKEN, NO_TOKEN, NO_TOKEN, 1, 0], "{draw:?}");
    }
}

#[test]
fn wrong_arguments() {
    let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let refused = |logits: &Tensor, draws: &[Draw]| message(sample(&Sample::new(logits, draws)).unwrap_err());
    let of = |draw: Draw| refused(&logits, &[ANY, draw]);
    for (got, want) in [
        (refused(&logits, &[ANY]), "sample: `draws` are 1, expected one for each of 2 rows"),
        (
            refused(&logits.narrow(1, 0, 0).unwrap(), &[ANY; 2]),
            "sample: `logits` has no tokens, expected vocab_size of at least 1",
        ),
        (
            refused(&logits.get(0).unwrap(), &[ANY]),
            "sample: `logits` has shape [3], expected (rows, vocab_size)",
        ),
        (
            refused(&logits.to_dtype(DType::U32).unwrap(), &[ANY; 2]),
            "sample: `logits` has dtype u32, expected f32, f16, bf16 or f64",
        ),
        (
            of(Draw { temperature: -1.0, ..ANY }),
            "sample: `temperature` is -1, expected a finite number of at least 0",
        ),
        (
            of(Draw { temperature: f32::NAN, ..ANY }),
            "sample: `temperature` is NaN, expected a finite number of at least 0",
        ),
        (of(Draw { top_k: Some(0), ..ANY }), "sample: `top_k` is 0, expected at least 1"),
        (of(Draw { top_p: Some(0.0), ..ANY }), "sample: `top_p` is 0, expected above 0 and at most 1"),
        (of(Draw { min_p: Some(2.0), ..ANY }), "sample: `min_p` is 2, expected above 0 and at most 1"),
        (of(Draw { uniform: 1.0, ..ANY }), "sample: `uniform` is 1, expected at least 0 and less than 1"),
    ] {
        assert_eq!(got, want);
    }
    let none = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(sample(&Sample::new(&none, &[])).unwrap().dims(), [0]);
}

crate::on_cuda!(every_token_has_its_share, as_the_reference, nothing_to_choose_from);
