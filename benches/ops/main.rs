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
//! `seed` inputs are drawn as there (and overflow as there), `stable` ones have `A = -exp(·)`. Part of that is none of the op's:
//! candle forms the sum and its gradient, and adds each gradient to zeros that it makes for that. The column `candle` has the processor
//! time over threads of this alone, with a function in place of the op that hands out gradients it has; `own / floor` is what is
//! left of `busy`, over the floor.
//!
//! The process keeps the memory that it frees, as a training does (`keep_freed_memory`); `--return-memory` leaves that as the C library has
//! it, where pages are cleared anew for every output.

mod cases;
mod memory;

use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var, bail};
use clap::{Parser, ValueEnum};
use mamba_ops::autograd::{Forward, FusedFn, apply};
use mamba_ops::simd::Isa;
use rayon::prelude::*;
use serde_json::json;

use crate::cases::{Case, Cost, Run, cases};
use crate::memory::peak_of;

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
    /// Do not keep the memory that is freed.
    #[arg(long)]
    return_memory: bool,
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

/// A function of the inputs of a case that computes nothing.
struct Nothing(Vec<Tensor>);

/// Inputs that cases have at most.
const INPUTS: usize = 9;

impl FusedFn<INPUTS, 1> for Nothing {
    const NAME: &'static str = "nothing";

    /// Zeros, shaped as the first input.
    fn forward(&self, inputs: &[Option<Tensor>; INPUTS], _: bool) -> candle_core::Result<Forward<1>> {
        let [Some(x), ..] = inputs else { bail!("nothing: no input") };
        let zeros = Storage::Cpu(CpuStorage::F32(vec![0.0; x.elem_count()]));
        Ok(Forward { outputs: [(zeros, x.shape().clone())], saved: vec![] })
    }

    /// The gradients that it has, as they are.
    fn backward(
        &self,
        _: &[Option<Tensor>; INPUTS],
        _: &[bool; INPUTS],
        _: &[Tensor],
        _: &[Option<Tensor>; 1],
    ) -> candle_core::Result<[Option<Tensor>; INPUTS]> {
        let mut grads = self.0.iter().cloned();
        Ok(std::array::from_fn(|_| grads.next()))
    }
}

/// What candle itself takes for the gradients of the sum of a function that is shaped as its first input.
fn candle_alone(inputs: &[Tensor], iters: usize) -> Result<f64> {
    let grads = inputs.iter().map(|x| x.detach().copy()).collect::<candle_core::Result<_>>()?;
    let slots: [Option<&Tensor>; INPUTS] = std::array::from_fn(|i| inputs.get(i));
    let [y] = apply(Nothing(grads), &slots)?;
    let times = time(iters, || {
        drop(y.sum_all()?.backward()?);
        Ok(())
    })?;
    Ok(times.busy)
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
    if !args.return_memory {
        mamba_ops::keep_freed_memory(&Device::Cpu)?;
    }
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
            "| op | case | mode | backend | best (ms) | median (ms) | busy (ms) | candle (ms) | floor (ms) | own / floor | Gop/s | GB/s | ns/exp | reference / it | non-finite | peak (MiB; inputs) |"
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
            let candle = match mode {
                Mode::Forward => 0.0,
                Mode::Backward => candle_alone(&inputs, args.iters)?,
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
                        1e3 * candle,
                        1e3 * floor,
                        (busy - candle) / floor,
                        1e-9 * operations / busy,
                        1e-9 * cost.bytes / busy,
                        if cost.exps > 0.0 { 1e9 * busy / cost.exps } else { f64::NAN },
                        speedup.map_or("n/a".into(), |x| format!("{x:.0}")),
                        100.0 * bad,
                    );
                }
                rows.push(json!({
                    "op": case.op, "case": case.name, "mode": format!("{mode:?}").to_lowercase(), "backend": backend,
                    "best_ms": 1e3 * best, "time_ms": 1e3 * median, "busy_ms": 1e3 * busy, "candle_ms": 1e3 * candle, "floor_ms": 1e3 * floor, "binds": binds,
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
                    let (outputs, peak) = peak_of(|| run(&case.fused, &inputs, mode));
                    let (outputs, peak) = (outputs?, peak as f64 / f64::from(1 << 20));
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
