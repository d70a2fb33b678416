//! What each op costs, per instruction set, beside its plain reference and the floor that the machine sets:
//! `cargo bench -p mamba-benches --bench ops -- --case prefill --mode backward`.
//!
//! Each case is first checked against the reference on few tokens, and not timed where they disagree. The floor is the
//! larger of bytes that must move over the rate of a copy, and vector operations over the rate of a matrix product, both
//! rates measured at the start; an exponential counts as 13 operations, which is what ours takes on AVX2. On a machine that
//! others use, `busy` tells more than `best`: processor time over threads, what the best case would be with nobody else and
//! all threads at work (on Linux; elsewhere it is the median). Rates are those of `busy`.
//!
//! `backward` is forward and backward of the sum of `y`, as in SSM Core's harness, whose cases stand here under their names:
//! `seed` inputs are drawn as there (and overflow as there), `stable` ones have `A = -exp(·)`. What candle alone takes for
//! the sum and its gradient is the column `loss`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use candle_core::{DType, Device, Tensor, Var};
use clap::{Parser, ValueEnum};
use mamba_ops::simd::Isa;
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, Norm, NormKind, Packing, SelectiveScan, SelectiveStateUpdate,
    SequenceLayout, SsdChunkScan, causal_conv1d, causal_conv1d_update, norm, selective_scan,
    selective_state_update, ssd_chunk_scan,
};
use rayon::prelude::*;
use serde_json::json;

/// Measures ops.
#[derive(Debug, Parser)]
struct Args {
    /// Only cases whose `op/name` contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// Only this mode.
    #[arg(long)]
    mode: Option<Mode>,
    /// Only these instruction sets.
    #[arg(long, value_delimiter = ',')]
    isa: Vec<String>,
    /// Timed runs of a row, after one that is not timed.
    #[arg(long, default_value_t = 10)]
    iters: usize,
    /// Leave the reference and the matrix products out.
    #[arg(long)]
    alone: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Forward,
    Backward,
}

/// A reference that takes longer is left out.
const REFERENCE_LIMIT: f64 = 5.0;

/// Vector operations of one exponential.
const EXP: f64 = 13.0;

/// Counts the bytes alive, and the most there were.
struct Counting;

static ALIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(ALIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: by the contract of this method.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(ALIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: by the contract of this method.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: by the contract of this method.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Random inputs, the same in every run.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn tensor(&mut self, shape: &[usize], mut draw: impl FnMut(&mut Self) -> f64) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw(self) as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn between(&mut self, shape: &[usize], low: f64, high: f64) -> Result<Tensor> {
        self.tensor(shape, |random| low + (high - low) * random.uniform())
    }

    fn normal(&mut self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, |random| {
            let (u, v) = (random.uniform().max(1e-12), random.uniform() * std::f64::consts::TAU);
            (-2.0 * u.ln()).sqrt() * v.cos()
        })
    }

    /// `A`: normal, or `-exp(normal)`.
    fn a(&mut self, shape: &[usize], stable: bool) -> Result<Tensor> {
        let a = self.normal(shape)?;
        Ok(if stable { a.exp()?.neg()? } else { a })
    }
}

/// What one run must do at least.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    exps: f64,
    /// Vector operations beside those of the exponentials, times lanes: a multiplication with addition is one.
    operations: f64,
    bytes: f64,
}

type Inputs = Box<dyn Fn(usize) -> Result<Vec<Tensor>>>;
type Run = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>>;

struct Case {
    op: &'static str,
    name: String,
    /// Tokens or rows: of the case, and few for the check.
    len: usize,
    few: usize,
    inputs: Inputs,
    /// From the inputs to `y` and what else comes out.
    fused: Run,
    reference: Run,
    forward: Cost,
    /// Forward and backward; `None` for ops that have none.
    backward: Option<Cost>,
    /// Matrix products `(count, rows, inner, columns)` of the forward and of the backward pass.
    products: [Vec<[usize; 4]>; 2],
}

/// Sequences of one length, and the rest of the tokens at the last; none packed if it is one.
fn packing(seqlen: usize, sequences: usize) -> Option<Packing> {
    let mut lengths = vec![seqlen / sequences; sequences];
    *lengths.last_mut()? += seqlen % sequences;
    (sequences > 1).then(|| Packing::from_lengths(&lengths))
}

fn scan(name: &str, [dim, seqlen, n]: [usize; 3], style: Style) -> Case {
    let layout =
        if style.channels_last { SequenceLayout::ChannelsLast } else { SequenceLayout::ChannelsFirst };
    let Style { stable, varying, sequences, .. } = style;
    let inputs = move |l: usize| {
        let mut random = Random(0);
        let activation = if style.channels_last { [1, l, dim] } else { [1, dim, l] };
        let coefficient: &[usize] = match (varying, style.channels_last) {
            (false, _) => &[dim, n],
            (true, false) => &[1, n, l],
            (true, true) => &[1, l, n],
        };
        let bias = if stable { random.between(&[dim], 0.0, 0.1)? } else { random.normal(&[dim])? };
        Ok(vec![
            random.normal(&activation)?,
            random.between(&activation, 0.0, 1.0)?,
            random.a(&[dim, n], stable)?,
            random.normal(coefficient)?,
            random.normal(coefficient)?,
            random.normal(&[dim])?,
            random.normal(&activation)?,
            bias,
        ])
    };
    // Upstream's harness has no softplus; models have.
    let args = move |x: &[Tensor], run: fn(&SelectiveScan) -> candle_core::Result<_>| {
        let (d, z, delta_bias) = (Some(&x[5]), Some(&x[6]), Some(&x[7]));
        let base = SelectiveScan::new(&x[0], &x[1], &x[2], &x[3], &x[4]);
        let packing = packing(layout_seqlen(&x[0], layout)?, sequences);
        let packing = packing.as_ref();
        let out: mamba_ops::SelectiveScanOutput =
            run(&SelectiveScan { d, z, delta_bias, delta_softplus: varying, layout, packing, ..base })?;
        Ok(vec![out.y, out.final_state])
    };
    let (channels, states) = ((dim * seqlen) as f64, (dim * seqlen * n) as f64);
    let gates = channels * if varying { 2.0 } else { 1.0 };
    Case {
        op: "selective_scan",
        name: name.into(),
        len: seqlen,
        few: if stable { 96 } else { 3 },
        inputs: Box::new(inputs),
        fused: Box::new(move |x| args(x, selective_scan)),
        reference: Box::new(move |x| args(x, mamba_ops::selective_scan::reference::forward)),
        forward: Cost { exps: states + gates, operations: states * 4.0, bytes: channels * 16.0 },
        backward: Some(Cost {
            exps: 2.0 * (states + gates),
            operations: states * (4.0 + 4.0 + 9.0),
            bytes: channels * (16.0 + 16.0 + 12.0),
        }),
        products: [vec![], vec![]],
    }
}

#[derive(Debug, Clone, Copy)]
struct Style {
    stable: bool,
    /// `b` and `c` vary and `delta` goes through a softplus, as in models.
    varying: bool,
    channels_last: bool,
    sequences: usize,
}

fn layout_seqlen(x: &Tensor, layout: SequenceLayout) -> candle_core::Result<usize> {
    x.dim(if layout == SequenceLayout::ChannelsLast { 1 } else { 2 })
}

fn ssd(name: &str, [seqlen, h, p, n, chunk_size]: [usize; 5], stable: bool, sequences: usize) -> Case {
    let inputs = move |l: usize| {
        let mut random = Random(2);
        Ok(vec![
            random.normal(&[1, l, h, p])?,
            random.between(&[1, l, h], 0.0, 1.0)?,
            random.a(&[h], stable)?,
            random.normal(&[1, l, 1, n])?,
            random.normal(&[1, l, 1, n])?,
            random.normal(&[h])?,
            random.normal(&[1, l, h, p])?,
        ])
    };
    let args = move |x: &[Tensor], run: fn(&SsdChunkScan) -> candle_core::Result<_>| {
        let base = SsdChunkScan::new(&x[0], &x[1], &x[2], &x[3], &x[4]);
        let packing = packing(x[0].dim(1)?, sequences);
        let packing = packing.as_ref();
        let out: mamba_ops::SsdChunkScanOutput =
            run(&SsdChunkScan { d: Some(&x[5]), z: Some(&x[6]), chunk_size, packing, ..base })?;
        Ok(vec![out.y, out.final_state])
    };
    // Chunks of 64: what the kernel takes at most.
    let q = chunk_size.min(64);
    let chunks = seqlen / q;
    let forward =
        vec![[chunks, q, n, q], [chunks * h, q, n, p], [chunks * h, q, q, p], [chunks * h, n, q, p]];
    let mut both = [forward.clone(), forward.clone()].concat(); // the forward pass is computed again
    both.truncate(7); // but for the states at the borders
    both.extend([
        [2 * chunks, n, q, q],
        [2 * chunks * h, q, p, q], // pairs, inputs
        [chunks * h, q, n, p],
        [2 * chunks * h, n, p, q],
        [chunks * h, n, q, p],
    ]);
    let operations = |x: &[[usize; 4]]| x.iter().map(|x| x.iter().product::<usize>() as f64).sum::<f64>();
    let channels = (seqlen * h * p) as f64;
    let pairs = (chunks * h * q * q / 2) as f64;
    let gates = channels + pairs;
    Case {
        op: "ssd_chunk_scan",
        name: name.into(),
        len: seqlen,
        few: if stable { 150 } else { 3 },
        inputs: Box::new(inputs),
        fused: Box::new(move |x| args(x, ssd_chunk_scan)),
        reference: Box::new(move |x| args(x, mamba_ops::ssd::reference::forward)),
        forward: Cost { exps: gates, operations: operations(&forward), bytes: channels * 12.0 },
        backward: Some(Cost { exps: 2.0 * gates, operations: operations(&both), bytes: channels * 32.0 }),
        products: [forward, both],
    }
}

fn state_update(name: &str, [batch, h, p, n]: [usize; 4], per_channel: bool) -> Case {
    let mamba2 = p > 1;
    let inputs = move |batch: usize| {
        let mut random = Random(1);
        let x: &[usize] = if mamba2 { &[batch, h, p] } else { &[batch, h] };
        let state = [x, &[n]].concat();
        let a = if mamba2 { vec![h] } else { vec![h, n] };
        let coefficient: &[usize] = if per_channel { &[batch, h, n] } else { &[batch, n] };
        Ok(vec![
            random.normal(&state)?,
            random.normal(x)?,
            random.between(&[batch, h], 0.0, 1.0)?,
            random.a(&a, true)?,
            random.normal(coefficient)?,
            random.normal(coefficient)?,
            random.normal(&[h])?,
            random.normal(x)?,
            random.normal(&[h])?,
        ])
    };
    fn args<R>(x: &[Tensor], run: impl FnOnce(&SelectiveStateUpdate) -> R) -> R {
        let base = SelectiveStateUpdate::new(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5]);
        let (d, z, dt_bias) = (Some(&x[6]), Some(&x[7]), Some(&x[8]));
        run(&SelectiveStateUpdate { d, z, dt_bias, dt_softplus: true, ..base })
    }
    let (channels, states) = ((batch * h * p) as f64, (batch * h * p * n) as f64);
    let a = if mamba2 { 0.0 } else { (h * n) as f64 };
    let exps = if mamba2 { channels + 2.0 * (batch * h) as f64 } else { states + 2.0 * channels };
    let operations = states * if mamba2 { 3.0 } else { 4.0 };
    Case {
        op: "selective_state_update",
        name: name.into(),
        len: batch,
        few: 1,
        inputs: Box::new(inputs),
        fused: Box::new(|x| Ok(vec![args(x, selective_state_update)?, x[0].clone()])),
        reference: Box::new(|x| {
            let (y, state) = args(x, mamba_ops::selective_state_update::reference::forward)?;
            Ok(vec![y, state])
        }),
        forward: Cost { exps, operations, bytes: 4.0 * (2.0 * states + a + 4.0 * channels) },
        backward: None,
        products: [vec![], vec![]],
    }
}

fn conv(name: &str, [dim, seqlen, width]: [usize; 3], layout: SequenceLayout) -> Case {
    let inputs = move |l: usize| {
        let mut random = Random(3);
        let x = if layout == SequenceLayout::ChannelsLast { [1, l, dim] } else { [1, dim, l] };
        Ok(vec![random.normal(&x)?, random.normal(&[dim, width])?, random.normal(&[dim])?])
    };
    let args = move |x: &[Tensor], run: fn(&CausalConv1d) -> candle_core::Result<_>| {
        let out: mamba_ops::CausalConv1dOutput =
            run(&CausalConv1d { bias: Some(&x[2]), layout, ..CausalConv1d::new(&x[0], &x[1]) })?;
        Ok(vec![out.y, out.final_state])
    };
    let len = (dim * seqlen) as f64;
    let (exps, operations) = (len, len * (width as f64 + 4.0));
    Case {
        op: "causal_conv1d",
        name: name.into(),
        len: seqlen,
        few: 100,
        inputs: Box::new(inputs),
        fused: Box::new(move |x| args(x, causal_conv1d)),
        reference: Box::new(move |x| args(x, mamba_ops::causal_conv1d::reference::forward)),
        forward: Cost { exps, operations, bytes: len * 8.0 },
        backward: Some(Cost { exps: 2.0 * exps, operations: 4.0 * operations, bytes: len * 20.0 }),
        products: [vec![], vec![]],
    }
}

fn conv_update(name: &str, [batch, dim, width]: [usize; 3]) -> Case {
    let inputs = move |batch: usize| {
        let mut random = Random(4);
        Ok(vec![
            random.normal(&[batch, dim, 1])?,
            random.normal(&[dim, width])?,
            random.normal(&[dim])?,
            random.normal(&[batch, dim, width - 1])?,
        ])
    };
    let len = (batch * dim) as f64;
    Case {
        op: "causal_conv1d_update",
        name: name.into(),
        len: batch,
        few: 1,
        inputs: Box::new(inputs),
        fused: Box::new(|x| {
            let (bias, CausalConv1d { activation, layout, .. }) =
                (Some(&x[2]), CausalConv1d::new(&x[0], &x[1]));
            let step = CausalConv1dUpdate::new(&x[0], &x[3], &x[1]);
            let args = CausalConv1dUpdate { bias, activation, layout, ..step };
            Ok(vec![causal_conv1d_update(&args)?, x[3].clone()])
        }),
        reference: Box::new(|x| {
            let (bias, initial_state) = (Some(&x[2]), Some(&x[3]));
            let args = CausalConv1d { bias, initial_state, ..CausalConv1d::new(&x[0], &x[1]) };
            let out = mamba_ops::causal_conv1d::reference::forward(&args)?;
            Ok(vec![out.y, out.final_state])
        }),
        forward: Cost {
            exps: len,
            operations: len * (width + 4) as f64,
            bytes: len * 4.0 * (2.0 + 2.0 * (width - 1) as f64 + width as f64),
        },
        backward: None,
        products: [vec![], vec![]],
    }
}

/// RMSNorm with a gate after it, or of the sum with a residual.
fn rms_norm(name: &str, [rows, dim]: [usize; 2], gated: bool) -> Case {
    let inputs = move |rows: usize| {
        let mut random = Random(5);
        Ok(vec![random.normal(&[rows, dim])?, random.normal(&[dim])?, random.normal(&[rows, dim])?])
    };
    let args = move |x: &[Tensor], run: fn(&Norm) -> candle_core::Result<_>| {
        let base = Norm::new(&x[0], NormKind::Rms, 1e-5);
        let (residual, z) = if gated { (None, Some(&x[2])) } else { (Some(&x[2]), None) };
        let out: mamba_ops::NormOutput = run(&Norm { weight: Some(&x[1]), residual, z, ..base })?;
        Ok(if gated { vec![out.y] } else { vec![out.y, out.residual] })
    };
    let len = (rows * dim) as f64;
    let exps = if gated { len } else { 0.0 };
    Case {
        op: "norm",
        name: name.into(),
        len: rows,
        few: 16,
        inputs: Box::new(inputs),
        fused: Box::new(move |x| args(x, norm)),
        reference: Box::new(move |x| args(x, mamba_ops::norm::reference::forward)),
        forward: Cost { exps, operations: len * 4.0, bytes: len * if gated { 12.0 } else { 16.0 } },
        backward: Some(Cost { exps: 2.0 * exps, operations: len * 12.0, bytes: len * 32.0 }),
        products: [vec![], vec![]],
    }
}

fn cases() -> Vec<Case> {
    let seed = Style { stable: false, varying: false, channels_last: false, sequences: 1 };
    let stable = Style { stable: true, ..seed };
    let model = Style { varying: true, ..stable };
    let model_last = Style { channels_last: true, ..model };
    vec![
        scan("prefill_2k_d512 seed", [512, 2048, 16], seed),
        scan("prefill_2k_d512 stable", [512, 2048, 16], stable),
        scan("prefill_4k_d768 seed", [768, 4096, 16], seed),
        scan("prefill_4k_d768 stable", [768, 4096, 16], stable),
        scan("B1 D2048 L2048 N16", [2048, 2048, 16], model),
        scan("B1 D2048 L2048 N16 channels last", [2048, 2048, 16], model_last),
        scan("B1 D5120 L2048 N16", [5120, 2048, 16], model),
        scan("32 packed D2048 L2048 N16", [2048, 2048, 16], Style { sequences: 32, ..model_last }),
        ssd("chunk_scan_l2k_h16_c128 seed", [2048, 16, 64, 128, 128], false, 1),
        ssd("chunk_scan_l2k_h16_c128 stable", [2048, 16, 64, 128, 128], true, 1),
        ssd("chunk_scan_l4k_h32_c256 seed", [4096, 32, 64, 128, 256], false, 1),
        ssd("chunk_scan_l4k_h32_c256 stable", [4096, 32, 64, 128, 256], true, 1),
        ssd("B1 L2048 H24 P64 N128", [2048, 24, 64, 128, 64], true, 1),
        ssd("32 packed L2048 H24 P64 N128", [2048, 24, 64, 128, 64], true, 32),
        ssd("B1 L2048 H80 P64 N128", [2048, 80, 64, 128, 64], true, 1),
        state_update("decode_step_d512", [4, 512, 1, 16], true),
        state_update("decode_step_d1024", [4, 1024, 1, 16], true),
        state_update("Mamba-1 B1 D5120 N16", [1, 5120, 1, 16], false),
        state_update("Mamba-1 B64 D5120 N16", [64, 5120, 1, 16], false),
        state_update("Mamba-2 B1 H80 P64 N128", [1, 80, 64, 128], false),
        conv("B1 D4096 L2048 W4 silu", [4096, 2048, 4], SequenceLayout::ChannelsFirst),
        conv("B1 D4096 L2048 W4 silu channels last", [4096, 2048, 4], SequenceLayout::ChannelsLast),
        conv_update("B1 D5376 W4", [1, 5376, 4]),
        conv_update("B64 D5376 W4", [64, 5376, 4]),
        rms_norm("add + RMSNorm 4096x2560", [4096, 2560], false),
        rms_norm("add + RMSNorm 64x2560", [64, 2560], false),
        rms_norm("RMSNorm gated 4096x5120", [4096, 5120], true),
        rms_norm("RMSNorm gated 64x5120", [64, 5120], true),
    ]
}

/// Inputs that track gradients if the mode has any.
fn tracked(inputs: Vec<Tensor>, mode: Mode) -> Result<Vec<Tensor>> {
    let track = |x: &Tensor| match mode {
        Mode::Forward => Ok(x.clone()),
        Mode::Backward => Ok(Var::from_tensor(x)?.as_tensor().clone()),
    };
    inputs.iter().map(track).collect()
}

/// Runs the case: its outputs, or the gradients of the sum of the first.
fn run(run: &Run, inputs: &[Tensor], mode: Mode) -> Result<Vec<Tensor>> {
    let outputs = run(inputs)?;
    if mode == Mode::Forward {
        return Ok(outputs);
    }
    let grads = outputs[0].sum_all()?.backward()?;
    inputs.iter().map(|x| Ok(grads.get(x).ok_or_else(|| anyhow!("no gradient"))?.clone())).collect()
}

/// Fails unless the fused op agrees with the reference on few tokens; seconds that the reference took.
fn check(case: &Case, mode: Mode, isa: Isa) -> Result<f64> {
    let inputs = || tracked((case.inputs)(case.few.min(case.len))?, mode); // anew: some are changed in place
    let start = Instant::now();
    let want = run(&case.reference, &inputs()?, mode)?;
    let seconds = start.elapsed().as_secs_f64();
    let got = isa.scope(|| run(&case.fused, &inputs()?, mode))?;
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let gap = (got - want)?.sqr()?.mean_all()?.sqrt()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let scale = want.sqr()?.mean_all()?.sqrt()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let error = gap / scale.max(1e-30);
        ensure!(
            error < 2e-5,
            "{} {} {mode:?} {}: output {i} is wrong by {error:.1e}",
            case.op,
            case.name,
            isa.name()
        );
    }
    Ok(seconds)
}

/// Seconds.
#[derive(Debug, Clone, Copy)]
struct Times {
    best: f64,
    median: f64,
    busy: f64,
}

/// Processor time of all threads so far.
fn processor_time() -> Option<f64> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let line = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        line.split(' ').next()?.parse::<f64>().ok()
    });
    Some(1e-9 * nanoseconds.sum::<f64>())
}

fn time(iters: usize, mut f: impl FnMut() -> Result<()>) -> Result<Times> {
    f()?;
    let (mut seconds, before) = (vec![], processor_time());
    for _ in 0..iters.max(1) {
        let start = Instant::now();
        f()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let used = processor_time().zip(before).map(|(after, before)| after - before);
    seconds.sort_by(f64::total_cmp);
    let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
    let busy = used.map(|used| used / (seconds.len() * rayon::current_num_threads()) as f64);
    Ok(Times { best, median, busy: busy.filter(|busy| *busy > 0.0).unwrap_or(median) })
}

/// Matrix products of the given shapes alone, on all threads.
fn multiply(products: &[[usize; 4]]) {
    for &[count, m, k, n] in products {
        (0..count).into_par_iter().with_min_len(8).for_each_init(
            || (vec![0.1f32; m * k], vec![0.1f32; k * n], vec![0.0f32; m * n]),
            |(a, b, out), _| multiply_one([m, k, n], a, b, out, gemm::Parallelism::None),
        );
    }
}

fn multiply_one([m, k, n]: [usize; 3], a: &[f32], b: &[f32], out: &mut [f32], how: gemm::Parallelism) {
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n);
    let (out, a, b) = (out.as_mut_ptr(), a.as_ptr(), b.as_ptr());
    let (k_stride, n_stride) = (k as isize, n as isize);
    // SAFETY: the extents are those of the slices, by the assertion.
    unsafe {
        gemm::gemm(
            m, n, k, out, 1, n_stride, false, a, 1, k_stride, b, 1, n_stride, 0.0, 1.0, false, false, false,
            how,
        );
    }
}

/// What the machine can do, measured: vector operations times lanes and bytes, per second.
struct Machine {
    operations: f64,
    bytes: f64,
}

impl Machine {
    fn measure() -> Result<Self> {
        let n = 768;
        let (a, b, mut out) = (vec![0.1f32; n * n], vec![0.1f32; n * n], vec![0.0f32; n * n]);
        let product = time(10, || {
            multiply_one([n, n, n], &a, &b, &mut out, gemm::Parallelism::Rayon(0));
            Ok(())
        })?;
        let len = 1usize << 25;
        let (from, mut to) = (vec![1.0f32; len], vec![0.0f32; len]);
        let copy = time(5, || {
            to.par_chunks_mut(1 << 18)
                .zip(from.par_chunks(1 << 18))
                .for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        })?;
        Ok(Self { operations: (n * n * n) as f64 / product.busy, bytes: (8 * len) as f64 / copy.busy })
    }

    /// Seconds, and what sets them.
    fn floor(&self, cost: Cost) -> (f64, &'static str) {
        let operations = (cost.operations + EXP * cost.exps) / self.operations;
        let bytes = cost.bytes / self.bytes;
        let what = if EXP * cost.exps > cost.operations { "exp" } else { "operations" };
        if bytes > operations { (bytes, "bytes") } else { (operations, what) }
    }
}

fn non_finite(outputs: &[Tensor]) -> Result<f64> {
    let (mut bad, mut all) = (0, 0);
    for x in outputs {
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        bad += values.iter().filter(|x| !x.is_finite()).count();
        all += values.len();
    }
    Ok(bad as f64 / all.max(1) as f64)
}

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet. Idle threads of candle would spin and starve the busy ones.
    unsafe { std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0") };
    let args = Args::parse();
    let machine = Machine::measure()?;
    let isas: Vec<Isa> = Isa::available();
    let isas: Vec<Isa> = isas
        .into_iter()
        .filter(|x| args.isa.is_empty() || args.isa.iter().any(|name| name == x.name()))
        .collect();
    if !args.json {
        println!(
            "{} threads · matrix product {:.0} GFLOP/s · copy {:.1} GB/s (read + written)\n",
            rayon::current_num_threads(),
            2e-9 * machine.operations,
            1e-9 * machine.bytes
        );
        println!(
            "| op | case | mode | backend | best (ms) | median (ms) | busy (ms) | loss (ms) | floor (ms) | busy / floor | Gop/s | GB/s | ns/exp | reference / it | non-finite | peak (MiB; inputs) |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    }
    let mut rows = vec![];
    for case in cases().iter().filter(|x| format!("{}/{}", x.op, x.name).contains(&args.case)) {
        let inputs = (case.inputs)(case.len)?;
        let input_mib = inputs.iter().map(|x| x.elem_count() * 4).sum::<usize>() as f64 / f64::from(1 << 20);
        for (mode, cost) in [(Mode::Forward, Some(case.forward)), (Mode::Backward, case.backward)] {
            let Some(cost) = cost.filter(|_| args.mode.is_none_or(|x| x == mode)) else { continue };
            let few_seconds = isas
                .iter()
                .map(|&isa| check(case, mode, isa))
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .fold(f64::MAX, f64::min);
            let (floor, binds) = machine.floor(cost);
            let inputs = tracked(inputs.clone(), mode)?;
            let loss = match mode {
                Mode::Forward => 0.0,
                Mode::Backward => {
                    let y = Var::from_tensor(&(case.fused)(&inputs)?[0].detach())?;
                    time(args.iters, || {
                        drop(y.sum_all()?.backward()?);
                        Ok(())
                    })?
                    .busy
                }
            };
            let mut row = |backend: &str, times: Times, reference: Option<f64>, bad: f64, peak: f64| {
                let Times { best, median, busy } = times;
                let operations = cost.operations + EXP * cost.exps;
                let speedup = reference.map(|x| x / median);
                if !args.json {
                    println!(
                        "| {} | {} | {mode:?} | {backend} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} {binds} | {:.1} | {:.1} | {:.1} | {:.2} | {} | {:.0} % | {peak:.1}; {input_mib:.1} |",
                        case.op,
                        case.name,
                        1e3 * best,
                        1e3 * median,
                        1e3 * busy,
                        1e3 * loss,
                        1e3 * floor,
                        busy / floor,
                        1e-9 * operations / busy,
                        1e-9 * cost.bytes / busy,
                        if cost.exps > 0.0 { 1e9 * busy / cost.exps } else { f64::NAN },
                        speedup.map_or("n/a".into(), |x| format!("{x:.0}")),
                        100.0 * bad,
                    );
                }
                rows.push(json!({
                    "op": case.op, "case": case.name, "mode": format!("{mode:?}").to_lowercase(), "backend": backend,
                    "best_ms": 1e3 * best, "time_ms": 1e3 * median, "busy_ms": 1e3 * busy, "loss_ms": 1e3 * loss, "floor_ms": 1e3 * floor, "binds": binds,
                    "exps": cost.exps, "operations": cost.operations, "bytes": cost.bytes,
                    "speedup_vs_reference": speedup, "non_finite": bad, "peak_mib": peak, "inputs_mib": input_mib,
                }));
            };
            // candle's backward walks an unrolled loop, whose every `narrow` costs a whole gradient.
            let scale =
                (case.len as f64 / case.few.min(case.len) as f64).powi(1 + i32::from(mode == Mode::Backward));
            let recursion =
                mode == Mode::Backward && case.len > 512 && case.op != "causal_conv1d" && case.op != "norm";
            let mut reference = None;
            if !args.alone && few_seconds * scale < REFERENCE_LIMIT && !recursion {
                let seconds = time(1, || run(&case.reference, &inputs, mode).map(drop))?;
                let bad = non_finite(&run(&case.reference, &inputs, mode)?)?;
                reference = Some(seconds.median);
                row("reference", seconds, reference, bad, f64::NAN);
            }
            let products = &case.products[usize::from(mode == Mode::Backward)];
            if !args.alone && !products.is_empty() {
                let seconds = time(args.iters, || {
                    multiply(products);
                    Ok(())
                })?;
                row("its products (gemm)", seconds, None, 0.0, f64::NAN);
            }
            for isa in &isas {
                let (seconds, bad, peak) = isa.scope(|| {
                    let alive = ALIVE.load(Relaxed);
                    PEAK.store(alive, Relaxed);
                    let outputs = run(&case.fused, &inputs, mode)?;
                    let peak = (PEAK.load(Relaxed) - alive) as f64 / f64::from(1 << 20);
                    let bad = non_finite(&outputs)?;
                    drop(outputs);
                    let iters = if isa.name() == "scalar" { args.iters.min(3) } else { args.iters };
                    let iters = if cost.operations < 1e7 { iters * 20 } else { iters };
                    let seconds = time(iters, || run(&case.fused, &inputs, mode).map(drop))?;
                    anyhow::Ok((seconds, bad, peak))
                })?;
                row(isa.name(), seconds, reference, bad, peak);
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}
