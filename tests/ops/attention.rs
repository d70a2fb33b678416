//! Cases of `attention`.

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::attention::reference;
use mamba_ops::simd::Isa;
use mamba_ops::{Attention, attention};

use crate::laws::{self, GoldenTensors, Op, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::tolerance::{self, max_error, of_rounding, relative_rms, values};

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    seqlen: usize,
    /// Of queries, and of keys and values.
    heads: (usize, usize),
    headdim: usize,
    /// Lengths of the blocks.
    blocks: Vec<usize>,
    causal: bool,
    window: Option<usize>,
    scale: f64,
}

impl Case {
    fn new(batch: usize, seqlen: usize, heads: (usize, usize), headdim: usize, blocks: &[usize]) -> Self {
        let scale = (headdim as f64).powf(-0.5);
        Self { batch, seqlen, heads, headdim, blocks: blocks.to_vec(), causal: true, window: None, scale }
    }

    fn window(self, window: usize) -> Self {
        Self { window: Some(window), ..self }
    }

    fn not_causal(self) -> Self {
        Self { causal: false, ..self }
    }

    fn scale(self, scale: f64) -> Self {
        Self { scale, ..self }
    }
}

struct Subject;

fn run(case: &Case, inputs: &Tensors, f: impl Fn(&Attention) -> Result<Tensor>) -> Result<Tensors> {
    let blocks = |name: &str| -> Vec<Tensor> {
        (0..case.blocks.len()).map(|i| inputs[&format!("{name}{i}")].clone()).collect()
    };
    let (keys, values) = (blocks("k"), blocks("v"));
    let args = Attention::new(&inputs["q"], &keys, &values);
    let y = f(&Attention { scale: case.scale, causal: case.causal, window: case.window, ..args })?;
    Ok([("y".into(), y)].into())
}

impl Op for Subject {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let Case { batch, seqlen, heads, headdim, .. } = *case;
        let mut inputs: Tensors = [("q".into(), random.normal(&[batch, seqlen, heads.0, headdim]))].into();
        for (i, len) in case.blocks.iter().enumerate() {
            for name in ["k", "v"] {
                inputs.insert(format!("{name}{i}"), random.normal(&[batch, *len, heads.1, headdim]));
            }
        }
        inputs
    }

    fn role(_: &str) -> Role {
        Role::Activation
    }

    fn time_axis(_: &Case, _: &str) -> Option<usize> {
        None
    }

    fn run(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        run(case, inputs, attention)
    }

    fn reference(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        run(case, inputs, reference::forward)
    }

    fn golden(_: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        Err("the models' goldens have attention".into())
    }
}

/// Softmax attention as a loop over pairs, in `f64`.
fn oracle(case: &Case, inputs: &Tensors, rows: &[usize]) -> Vec<f64> {
    let Case { batch, seqlen, heads, headdim, .. } = *case;
    let kv_len: usize = case.blocks.iter().sum();
    let all = |name: &str| {
        let blocks: Vec<_> = (0..case.blocks.len()).map(|i| &inputs[&format!("{name}{i}")]).collect();
        values(&Tensor::cat(&blocks, 1).unwrap())
    };
    let (q, k, v) = (values(&inputs["q"]), all("k"), all("v"));
    let mut out = vec![];
    for b in 0..batch {
        for &i in rows {
            for h in 0..heads.0 {
                let g = h * heads.1 / heads.0;
                let q = &q[((b * seqlen + i) * heads.0 + h) * headdim..][..headdim];
                let at = |j: usize| ((b * kv_len + j) * heads.1 + g) * headdim;
                let position = (kv_len + i).saturating_sub(seqlen);
                let sees = |j: usize| {
                    !case.causal || (j <= position && case.window.is_none_or(|w| j + w > position))
                };
                let keys: Vec<usize> = (0..kv_len).filter(|j| sees(*j)).collect();
                let dot =
                    |j: &usize| q.iter().zip(&k[at(*j)..]).map(|(q, k)| q * k).sum::<f64>() * case.scale;
                let scores: Vec<f64> = keys.iter().map(dot).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..headdim {
                    let y = keys.iter().zip(&weights).map(|(j, w)| w * v[at(*j) + c]).sum::<f64>();
                    out.push(y / sum);
                }
            }
        }
    }
    out
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(2, 9, (4, 2), 8, &[9]),
        Case::new(1, 1, (1, 1), 1, &[1]),
        Case::new(2, 1, (6, 2), 20, &[64, 3]),
        Case::new(1, 5, (3, 1), 7, &[2, 70, 1]),
        Case::new(1, 70, (4, 4), 16, &[70]),
        Case::new(2, 33, (8, 2), 24, &[64, 64, 2]).window(17),
        Case::new(1, 12, (2, 1), 5, &[12]).window(1),
        Case::new(1, 3, (2, 2), 6, &[100]).window(300).scale(2.5),
        Case::new(2, 20, (2, 1), 9, &[5, 6]).not_causal(),
        Case::new(1, 4, (2, 1), 9, &[3, 1]).scale(0.0),
    ]
}

/// The reference means what the equation says.
#[test]
fn oracle_agrees() {
    for (seed, case) in cases().into_iter().enumerate() {
        let inputs = Subject::inputs(&case, &mut Random::new(seed as u64));
        let got = values(&Subject::reference(&case, &inputs).unwrap()["y"]);
        let rows: Vec<usize> = (0..case.seqlen).collect();
        let want = oracle(&case, &inputs, &rows);
        assert_eq!(got.len(), want.len());
        let gap = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(gap < 1e-12, "{case:?}: off by {gap:.1e}");
    }
}

#[test]
fn reference_agrees() {
    laws::reference::<Subject>(&cases());
}

#[test]
fn partial_gradients() {
    laws::partial_gradients::<Subject>(&cases()[3]);
}

#[test]
fn finite_differences() {
    laws::finite_differences::<Subject>(&[
        Case::new(1, 3, (2, 1), 4, &[2, 3]),
        Case::new(2, 4, (2, 2), 3, &[4]).window(2),
    ]);
}

#[test]
fn layout() {
    laws::layout::<Subject>(&Case::new(2, 9, (4, 2), 8, &[9]));
}

#[test]
fn threads() {
    laws::threads::<Subject>(&Case::new(2, 120, (4, 2), 16, &[100, 60]));
}

/// How keys are cut into blocks does not matter, nor how queries are cut into calls.
#[test]
fn blocks_and_pieces() {
    let inputs = Subject::inputs(&Case::new(2, 150, (4, 2), 12, &[150]), &mut Random::new(3));
    let inputs = laws::cast::<Subject>(&inputs, DType::F32).unwrap();
    let (q, k, v) = (&inputs["q"], &inputs["k0"], &inputs["v0"]);
    for window in [None, Some(40)] {
        let whole =
            Attention { window, ..Attention::new(q, std::slice::from_ref(k), std::slice::from_ref(v)) };
        let want = attention(&whole).unwrap();
        for lengths in [&[64, 64, 22][..], &[1; 150], &[149, 1], &[0, 7, 0, 143]] {
            let cut = |x: &Tensor| {
                let mut start = 0;
                let piece = |len: &usize| {
                    start += len;
                    x.narrow(1, start - len, *len).unwrap().contiguous().unwrap()
                };
                lengths.iter().map(piece).collect::<Vec<_>>()
            };
            let (keys, values) = (cut(k), cut(v));
            let got = attention(&Attention { window, ..Attention::new(q, &keys, &values) }).unwrap();
            assert!(max_error(&got, &want) < 2e-6);
            let mut pieces = vec![];
            for i in 0..lengths.len() {
                let q = q.narrow(1, lengths[..i].iter().sum(), lengths[i]).unwrap();
                let args = Attention::new(&q, &keys[..=i], &values[..=i]);
                pieces.push(attention(&Attention { window, ..args }).unwrap());
            }
            assert!(max_error(&Tensor::cat(&pieces, 1).unwrap(), &want) < 2e-6);
        }
    }
}

/// Longer than any matrix of scores should be, against loops over some rows, on every instruction set.
#[test]
fn long_sequences() {
    let case = Case::new(1, 4500, (2, 1), 8, &[4500]);
    let inputs = Subject::inputs(&case, &mut Random::new(1));
    for case in [case.clone(), case.window(1000)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let rounded = laws::cast::<Subject>(&inputs, dtype).unwrap();
            let rows = [0, 1, 63, 64, 2047, 4096, 4497, 4499];
            let want = oracle(&case, &laws::to_f64(&rounded).unwrap(), &rows);
            let want = Tensor::from_vec(want, (1, rows.len(), 2, 8), &Device::Cpu).unwrap();
            for isa in Isa::available() {
                let y = isa.scope(|| Subject::fused(&case, &rounded)).unwrap().remove("y").unwrap();
                let at = Tensor::from_vec(rows.map(|i| i as u32).to_vec(), rows.len(), &Device::Cpu).unwrap();
                let got = y.index_select(&at, 1).unwrap();
                let (error, bound) =
                    (relative_rms(&got, &want), of_rounding(&want, dtype, tolerance::FORWARD));
                assert!(error <= bound, "{case:?} {}: off by {error:.1e}", isa.name());
            }
        }
    }
}

/// Scores far apart neither overflow nor vanish.
#[test]
fn extreme_scores() {
    let case = Case::new(1, 80, (2, 1), 8, &[80]).scale(300.0);
    let inputs = Subject::inputs(&case, &mut Random::new(9));
    let rounded = laws::cast::<Subject>(&inputs, DType::F32).unwrap();
    let want = Subject::reference(&case, &laws::to_f64(&rounded).unwrap()).unwrap();
    let got = Subject::fused(&case, &rounded).unwrap();
    // A score of a thousand has an error of 1e-4 before the exponential.
    assert!(max_error(&got["y"], &want["y"]) < 1e-3);
}

#[test]
fn nothing() {
    for (batch, seqlen, heads, headdim, blocks) in [
        (0, 3, (2, 1), 4, vec![3]),
        (2, 0, (2, 1), 4, vec![5]),
        (2, 0, (2, 1), 4, vec![]),
        (1, 3, (2, 1), 0, vec![3]),
    ] {
        let case = Case::new(batch, seqlen, heads, headdim, &blocks).scale(1.0);
        let inputs = laws::cast::<Subject>(&Subject::inputs(&case, &mut Random::new(0)), DType::F32).unwrap();
        let y = Subject::fused(&case, &inputs).unwrap().remove("y").unwrap();
        assert_eq!((y.dims(), y.elem_count()), ([batch, seqlen, 2, headdim].as_slice(), 0));
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (q, k) = (zeros(&[2, 3, 4, 8]), [zeros(&[2, 3, 2, 8])]);
    let good = Attention::new(&q, &k, &k);
    let fails = |args: Attention, want: &str| {
        let message = attention(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    assert!(attention(&good).is_ok());
    fails(Attention { q: &zeros(&[3, 4, 8]), ..good }, "attention: `q` has shape [3, 4, 8]");
    fails(Attention { values: &[], ..good }, "`values` has 0 blocks, expected 1 as `keys`");
    let three = [zeros(&[2, 3, 3, 8])];
    fails(
        Attention { keys: &three, values: &three, ..good },
        "`keys` has 3 heads, expected a divisor of nheads 4",
    );
    let short = [zeros(&[2, 2, 2, 8])];
    fails(
        Attention { keys: &short, values: &short, ..good },
        "`keys` has 2 positions, expected at least seqlen 3",
    );
    fails(
        Attention { values: &short, ..good },
        "`values` has shape [2, 2, 2, 8], expected (batch 2, block 3",
    );
    fails(Attention { window: Some(0), ..good }, "`window` is 0, expected at least 1");
    fails(Attention { window: Some(2), causal: false, ..good }, "`window` is given without `causal`");
    fails(Attention { scale: f64::NAN, ..good }, "`scale` is NaN, expected a finite number");
    let half = [k[0].to_dtype(DType::F16).unwrap()];
    fails(Attention { keys: &half, ..good }, "`keys` has dtype f16, expected f32 as `q`");
}

crate::on_cuda!(reference_agrees, partial_gradients);
