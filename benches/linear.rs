//! Gigabytes of weight per second of `linear` for few rows, beside candle's matmul, in one run:
//! `cargo bench -p mamba-benches --bench linear`.
//!
//! They run by turns through copies of the weight, of `--megabytes` in all, as a model goes through its layers: what one finds in
//! cache is what a model would. The best call of all counts, since machines are noisy.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use mamba_ops::simd::Isa;
use mamba_ops::{Linear, linear};

/// Measures products with few rows.
#[derive(Debug, Parser)]
struct Args {
    /// Numbers of rows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16])]
    rows: Vec<usize>,
    /// Shapes of the weight, `in:out`.
    #[arg(long, value_delimiter = ',', default_values_t = ["768:3072".to_owned(), "2048:8192".into(), "768:50280".into()])]
    shapes: Vec<String>,
    /// Dtypes of weight and input.
    #[arg(long, value_delimiter = ',', default_values_t = ["f32".to_owned(), "bf16".into(), "f16".into()])]
    dtypes: Vec<String>,
    /// Megabytes of weights to go through.
    #[arg(long, default_value_t = 256)]
    megabytes: usize,
    /// Rounds; the best counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave candle out.
    #[arg(long)]
    alone: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Seconds of the fastest product with one of the weights.
fn measure(weights: &[Tensor], product: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for weight in weights {
        let start = Instant::now();
        std::hint::black_box(product(weight)?);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet. Idle threads of candle would spin and starve the busy ones, ours and theirs.
    unsafe { std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0") };
    let args = Args::parse();
    println!("instruction set {}", Isa::best().name());
    println!("| in → out | dtype | rows | ms | GB/s of weight | GFLOP/s | candle's ms | ratio |");
    println!("|---|---|---|---|---|---|---|---|");
    for shape in &args.shapes {
        let Some((d_in, d_out)) = shape.split_once(':') else { anyhow::bail!("{shape} is not in:out") };
        let (d_in, d_out): (usize, usize) = (d_in.parse()?, d_out.parse()?);
        for name in &args.dtypes {
            let dtype: DType = name.parse()?;
            let bytes = d_in * d_out * dtype.size_in_bytes();
            let one = Tensor::randn(0f32, 1.0, (d_out, d_in), &Device::Cpu)?.to_dtype(dtype)?;
            let count = (args.megabytes << 20).div_ceil(bytes);
            let weights = (0..count).map(|_| one.copy()).collect::<candle_core::Result<Vec<_>>>()?;
            for &rows in &args.rows {
                let x = Tensor::randn(0f32, 1.0, (rows, d_in), &Device::Cpu)?.to_dtype(dtype)?;
                let (mut ours, mut theirs) = (f64::INFINITY, f64::INFINITY);
                for _ in 0..args.rounds {
                    ours = ours.min(measure(&weights, |w| linear(&Linear::new(&x, w)))?);
                    if !args.alone {
                        let few = &weights[..weights.len().min(4)]; // candle may take 100 ms for one
                        theirs = theirs.min(measure(few, |w| x.matmul(&w.t()?))?);
                    }
                }
                println!(
                    "| {d_in} → {d_out} | {name} | {rows} | {:.3} | {:.1} | {:.1} | {:.3} | {:.2} |",
                    ours * 1e3,
                    bytes as f64 / ours * 1e-9,
                    2.0 * (rows * d_in * d_out) as f64 / ours * 1e-9,
                    theirs * 1e3,
                    theirs / ours,
                );
            }
        }
    }
    Ok(())
}
