//! What each op costs on a GPU, beside what the hardware allows: `cargo bench --features cuda --bench cuda`.
//!
//! Times are of CUDA events around one call, the median of many; between calls a buffer larger than the L2 cache is overwritten,
//! so that inputs come from memory and the host is ahead of the GPU, as triton's `do_bench` has it. `fwd+bwd` is forward and
//! backward of the sum of the outputs through candle's autograd, whose own work (the sum, its gradient, a zeroed buffer and an
//! addition for each gradient) is timed with a function that launches nothing, as `candle`; `net` is without it. `host` is what
//! a call takes on the host: steps shorter than that are bound by launches unless a CUDA graph replays them. The floor is bytes
//! moved once over what a copy reaches in this run. `benches/peers/upstream_ops.py` times upstream on the same shapes and
//! `benches/peers/join.py` joins the two.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor, Var};
use clap::Parser;
use mamba_ops::autograd::{self, Forward, FusedFn};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, Norm, NormOutput, SelectiveScan, SelectiveStateUpdate, SequenceLayout,
    SsdChunkScan, causal_conv1d, causal_conv1d_update, norm, selective_scan, selective_state_update,
    ssd_chunk_scan,
};
use serde_json::{Value, json};

/// Measures ops on a GPU.
#[derive(Debug, Parser)]
struct Args {
    /// Only cases whose name contains one of these.
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Leave the backward out.
    #[arg(long)]
    forward: bool,
    /// Milliseconds that a row is repeated for.
    #[arg(long, default_value_t = 60.0)]
    budget: f64,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Where to write the rows as JSON.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// An op on given inputs: its outputs.
type Call = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>>;

struct Case {
    name: String,
    inputs: Vec<Tensor>,
    call: Call,
    /// Bytes that a forward moves at least.
    bytes: usize,
    differentiable: bool,
}

fn bytes(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

struct Gpu {
    device: Device,
    cuda: CudaDevice,
    stream: std::sync::Arc<CudaStream>,
    flush: CudaSlice<u8>,
}

impl Gpu {
    fn new(ordinal: usize) -> Result<Self> {
        let device = Device::new_cuda(ordinal).context("no CUDA device")?;
        let cuda = device.as_cuda_device()?.clone();
        let stream = cuda.cuda_stream();
        let flush = stream.alloc_zeros(512 << 20)?;
        Ok(Self { device, cuda, stream, flush })
    }

    fn normal(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, shape, &self.device)?.to_dtype(dtype)?)
    }

    fn uniform(&self, shape: &[usize], low: f32, high: f32, dtype: DType) -> Result<Tensor> {
        Ok(Tensor::rand(low, high, shape, &self.device)?.to_dtype(dtype)?)
    }

    /// The median over calls, in milliseconds.
    fn time(&mut self, budget: f64, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        for _ in 0..3 {
            f()?;
        }
        self.stream.synchronize()?;
        let start = Instant::now();
        f()?;
        self.stream.synchronize()?;
        let once = start.elapsed().as_secs_f64() * 1e3 + 0.3;
        let count = ((budget / once) as usize).clamp(7, 100);
        let mut events = Vec::with_capacity(count);
        for _ in 0..count {
            self.stream.memset_zeros(&mut self.flush)?;
            let start = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            f()?;
            let end = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            events.push((start, end));
        }
        self.stream.synchronize()?;
        let times = events.iter().map(|(start, end)| Ok(f64::from(start.elapsed_ms(end)?)));
        let mut times = times.collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// What a call takes on the host, in microseconds, when the GPU is not waited for.
    fn host(&self, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        const CALLS: usize = 50;
        self.stream.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            f()?;
        }
        let took = start.elapsed().as_secs_f64() * 1e6 / CALLS as f64;
        self.stream.synchronize()?;
        Ok(took)
    }

    /// Bytes read and written by a large copy, per second.
    fn copy_rate(&mut self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        let from: CudaSlice<u8> = self.stream.alloc_zeros(BYTES)?;
        let mut to: CudaSlice<u8> = self.stream.alloc_zeros(BYTES)?;
        let stream = self.stream.clone();
        let time = self.time(30.0, || Ok(stream.memcpy_dtod(&from, &mut to)?))?;
        Ok(2.0 * BYTES as f64 / (time * 1e-3))
    }
}

/// A function with the inputs and outputs of an op, and gradients that are there already: what remains is candle's work.
struct Nothing {
    device: CudaDevice,
    outputs: Vec<(Shape, DType)>,
}

const SLOTS: usize = 9;

impl<const O: usize> FusedFn<SLOTS, O> for Nothing {
    const NAME: &'static str = "nothing";

    fn forward(&self, _: &[Option<Tensor>; SLOTS], _: bool) -> candle_core::Result<Forward<O>> {
        let make = |(shape, dtype): &(Shape, DType)| {
            // SAFETY: what is in there is added up and thrown away; every bit pattern is a number.
            Ok((Storage::Cuda(unsafe { self.device.alloc_uninit(shape, *dtype) }?), shape.clone()))
        };
        let outputs = self.outputs.iter().map(make).collect::<candle_core::Result<Vec<_>>>()?;
        let Ok(outputs) = outputs.try_into() else { candle_core::bail!("other outputs than expected") };
        Ok(Forward { outputs, saved: vec![] })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        _: &[bool; SLOTS],
        _: &[Tensor],
        _: &[Option<Tensor>; O],
    ) -> candle_core::Result<[Option<Tensor>; SLOTS]> {
        Ok(inputs.clone())
    }
}

fn nothing(gpu: &Gpu, inputs: &[Tensor], like: &[(Shape, DType)]) -> candle_core::Result<Vec<Tensor>> {
    let slots: [Option<&Tensor>; SLOTS] = std::array::from_fn(|i| inputs.get(i));
    let nothing = Nothing { device: gpu.cuda.clone(), outputs: like.to_vec() };
    match like.len() {
        1 => Ok(autograd::apply::<_, SLOTS, 1>(nothing, &slots)?.into()),
        _ => Ok(autograd::apply::<_, SLOTS, 2>(nothing, &slots)?.into()),
    }
}

/// The backward of the sum of all outputs.
fn backward(outputs: &[Tensor]) -> Result<()> {
    let mut loss: Option<Tensor> = None;
    for output in outputs {
        let sum = output.sum_all()?.to_dtype(DType::F32)?;
        loss = Some(match loss {
            Some(loss) => (loss + sum)?,
            None => sum,
        });
    }
    if let Some(loss) = loss {
        loss.backward()?;
    }
    Ok(())
}

/// The cases of a group of rows, made when their turn comes, since they do not fit into memory together.
type Make = Box<dyn Fn(&Gpu) -> Result<Case>>;

fn scan(dtype: DType, [b, d, l, n]: [usize; 4]) -> (String, Make) {
    let name = format!("selective_scan {} B{b} D{d} L{l} N{n}", dtype.as_str());
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let wide = |gpu: &Gpu| gpu.normal(&[b, d, l], dtype);
        let inputs = vec![
            wide(gpu)?,
            gpu.uniform(&[b, d, l], -5.0, -2.0, dtype)?,
            gpu.uniform(&[d, n], -8.0, -0.5, DType::F32)?,
            gpu.normal(&[b, n, l], dtype)?,
            gpu.normal(&[b, n, l], dtype)?,
            gpu.normal(&[d], DType::F32)?,
            wide(gpu)?,
            gpu.normal(&[d], DType::F32)?,
        ];
        let call: Call = Box::new(|x| {
            let output = selective_scan(&SelectiveScan {
                d: Some(&x[5]),
                z: Some(&x[6]),
                delta_bias: Some(&x[7]),
                delta_softplus: true,
                ..SelectiveScan::new(&x[0], &x[1], &x[2], &x[3], &x[4])
            })?;
            Ok(vec![output.y])
        });
        let bytes = inputs.iter().map(bytes).sum::<usize>() + bytes(&inputs[0]) + b * d * n * 4;
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: true })
    };
    (name, Box::new(make))
}

fn ssd([b, l, h, p, n, g]: [usize; 6]) -> (String, Make) {
    let name = format!("ssd_chunk_scan bf16 B{b} L{l} H{h} P{p} N{n} G{g}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let dtype = DType::BF16;
        let inputs = vec![
            gpu.normal(&[b, l, h, p], dtype)?,
            gpu.uniform(&[b, l, h], -5.0, -2.0, dtype)?,
            gpu.uniform(&[h], -8.0, -0.5, DType::F32)?,
            gpu.normal(&[b, l, g, n], dtype)?,
            gpu.normal(&[b, l, g, n], dtype)?,
            gpu.normal(&[h], DType::F32)?,
            gpu.normal(&[h], DType::F32)?,
        ];
        let call: Call = Box::new(|x| {
            let output = ssd_chunk_scan(&SsdChunkScan {
                d: Some(&x[5]),
                dt_bias: Some(&x[6]),
                dt_softplus: true,
                chunk_size: 256,
                ..SsdChunkScan::new(&x[0], &x[1], &x[2], &x[3], &x[4])
            })?;
            Ok(vec![output.y])
        });
        let bytes = inputs.iter().map(bytes).sum::<usize>() + bytes(&inputs[0]) + b * h * p * n * 4;
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: true })
    };
    (name, Box::new(make))
}

fn conv(layout: SequenceLayout, [b, d, l, w]: [usize; 4]) -> (String, Make) {
    let (axes, shape) = match layout {
        SequenceLayout::ChannelsFirst => ("BDL", [b, d, l]),
        SequenceLayout::ChannelsLast => ("BLD", [b, l, d]),
    };
    let name = format!("causal_conv1d bf16 {axes} B{b} D{d} L{l} W{w}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&shape, DType::BF16)?,
            gpu.normal(&[d, w], DType::BF16)?,
            gpu.normal(&[d], DType::BF16)?,
        ];
        let call: Call = Box::new(move |x| {
            let args = CausalConv1d { bias: Some(&x[2]), layout, ..CausalConv1d::new(&x[0], &x[1]) };
            Ok(vec![causal_conv1d(&args)?.y])
        });
        let bytes = 2 * bytes(&inputs[0]);
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: true })
    };
    (name, Box::new(make))
}

fn add_norm([rows, dim]: [usize; 2]) -> (String, Make) {
    let name = format!("add_rms_norm bf16 {rows}x{dim}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&[rows, dim], DType::BF16)?,
            gpu.normal(&[rows, dim], DType::F32)?,
            gpu.normal(&[dim], DType::F32)?,
        ];
        let call: Call = Box::new(|x| {
            let NormOutput { y, residual } =
                norm(&Norm { residual: Some(&x[1]), ..Norm::rms(&x[0], &x[2], 1e-5) })?;
            Ok(vec![y, residual])
        });
        let bytes = 2 * (bytes(&inputs[0]) + bytes(&inputs[1]));
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: true })
    };
    (name, Box::new(make))
}

fn gated_norm([rows, dim]: [usize; 2]) -> (String, Make) {
    let name = format!("gated_rms_norm bf16 {rows}x{dim}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&[rows, dim], DType::BF16)?,
            gpu.normal(&[rows, dim], DType::BF16)?,
            gpu.normal(&[dim], DType::F32)?,
        ];
        let call: Call =
            Box::new(|x| Ok(vec![norm(&Norm { z: Some(&x[1]), ..Norm::rms(&x[0], &x[2], 1e-5) })?.y]));
        let bytes = 3 * bytes(&inputs[0]);
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: true })
    };
    (name, Box::new(make))
}

fn mamba1_step(b: usize) -> (String, Make) {
    let (d, n) = (5120, 16);
    let name = format!("selective_state_update bf16 D{d} N{n} B{b}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&[b, d, n], DType::F32)?,
            gpu.normal(&[b, d], DType::BF16)?,
            gpu.uniform(&[b, d], -5.0, -2.0, DType::BF16)?,
            gpu.uniform(&[d, n], -8.0, -0.5, DType::F32)?,
            gpu.normal(&[b, n], DType::BF16)?,
            gpu.normal(&[b, n], DType::BF16)?,
            gpu.normal(&[d], DType::F32)?,
            gpu.normal(&[b, d], DType::BF16)?,
            gpu.normal(&[d], DType::F32)?,
        ];
        step_case(label.clone(), inputs)
    };
    (name, Box::new(make))
}

fn mamba2_step(b: usize) -> (String, Make) {
    let (h, p, n) = (80, 64, 128);
    let name = format!("selective_state_update bf16 H{h} P{p} N{n} B{b}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&[b, h, p, n], DType::F32)?,
            gpu.normal(&[b, h, p], DType::BF16)?,
            gpu.uniform(&[b, h], -5.0, -2.0, DType::BF16)?,
            gpu.uniform(&[h], -8.0, -0.5, DType::F32)?,
            gpu.normal(&[b, 1, n], DType::BF16)?,
            gpu.normal(&[b, 1, n], DType::BF16)?,
            gpu.normal(&[h], DType::F32)?,
            gpu.normal(&[b, h, p], DType::BF16)?,
            gpu.normal(&[h], DType::F32)?,
        ];
        step_case(label.clone(), inputs)
    };
    (name, Box::new(make))
}

fn step_case(name: String, inputs: Vec<Tensor>) -> Result<Case> {
    let call: Call = Box::new(|x| {
        let args = SelectiveStateUpdate {
            d: Some(&x[6]),
            z: Some(&x[7]),
            dt_bias: Some(&x[8]),
            dt_softplus: true,
            ..SelectiveStateUpdate::new(&x[0], &x[1], &x[2], &x[3], &x[4], &x[5])
        };
        Ok(vec![selective_state_update(&args)?])
    });
    let bytes = inputs.iter().map(bytes).sum::<usize>() + bytes(&inputs[0]) + bytes(&inputs[1]);
    Ok(Case { name, inputs, call, bytes, differentiable: false })
}

fn conv_step(b: usize) -> (String, Make) {
    let (d, w) = (5376, 4);
    let name = format!("causal_conv1d_update bf16 D{d} W{w} B{b}");
    let label = name.clone();
    let make = move |gpu: &Gpu| {
        let inputs = vec![
            gpu.normal(&[b, 1, d], DType::BF16)?,
            gpu.normal(&[b, d, w - 1], DType::F32)?,
            gpu.normal(&[d, w], DType::BF16)?,
            gpu.normal(&[d], DType::BF16)?,
        ];
        let call: Call = Box::new(|x| {
            let y = causal_conv1d_update(&CausalConv1dUpdate {
                bias: Some(&x[3]),
                layout: SequenceLayout::ChannelsLast,
                ..CausalConv1dUpdate::new(&x[0], &x[1], &x[2])
            })?;
            Ok(vec![y])
        });
        let bytes = inputs.iter().map(bytes).sum::<usize>() + bytes(&inputs[0]) + bytes(&inputs[1]);
        Ok(Case { name: label.clone(), inputs, call, bytes, differentiable: false })
    };
    (name, Box::new(make))
}

fn cases() -> Vec<(String, Make)> {
    use SequenceLayout::{ChannelsFirst, ChannelsLast};
    vec![
        scan(DType::BF16, [1, 2048, 2048, 16]),
        scan(DType::BF16, [8, 2048, 2048, 16]),
        scan(DType::BF16, [8, 2048, 8192, 16]),
        scan(DType::BF16, [1, 5120, 2048, 16]),
        scan(DType::F32, [8, 2048, 2048, 16]),
        scan(DType::F32, [8, 2048, 8192, 16]),
        ssd([1, 2048, 80, 64, 128, 1]),
        ssd([8, 2048, 32, 64, 128, 1]),
        ssd([8, 8192, 32, 64, 128, 1]),
        ssd([8, 2048, 24, 64, 128, 1]),
        conv(ChannelsFirst, [8, 4096, 2048, 4]),
        conv(ChannelsLast, [8, 4096, 2048, 4]),
        conv(ChannelsFirst, [1, 5376, 2048, 4]),
        conv(ChannelsLast, [1, 5376, 2048, 4]),
        add_norm([16384, 2560]),
        add_norm([64, 2560]),
        gated_norm([16384, 5120]),
        gated_norm([64, 5120]),
        mamba1_step(1),
        mamba1_step(64),
        mamba1_step(256),
        mamba2_step(1),
        mamba2_step(64),
        mamba2_step(256),
        conv_step(1),
        conv_step(64),
        conv_step(256),
    ]
}

/// Times of a case: forward, forward and backward, candle's part of that, and the host's.
fn measure(gpu: &mut Gpu, case: &Case, args: &Args, rate: f64) -> Result<Value> {
    let call = || Ok((case.call)(&case.inputs).map(drop)?);
    let forward = gpu.time(args.budget, call)?;
    let host = gpu.host(call)?;
    let floor = case.bytes as f64 / rate * 1e3;
    let mut row = json!({ "case": case.name, "fwd_ms": forward, "floor_ms": floor, "host_us": host, "bytes": case.bytes });
    if case.differentiable && !args.forward {
        let vars = case.inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let like: Vec<(Shape, DType)> =
            (case.call)(&case.inputs)?.iter().map(|y| (y.shape().clone(), y.dtype())).collect();
        let total = gpu.time(args.budget, || backward(&(case.call)(&tracked)?))?;
        // The timer holds the GPU; the function that launches nothing needs no more than its parts.
        let parts = Gpu {
            device: gpu.device.clone(),
            cuda: gpu.cuda.clone(),
            stream: gpu.stream.clone(),
            flush: gpu.stream.alloc_zeros(1)?,
        };
        let candle = gpu.time(args.budget, || backward(&nothing(&parts, &tracked, &like)?))?;
        row["fwd_bwd_ms"] = total.into();
        row["candle_ms"] = candle.into();
        row["fwd_bwd_net_ms"] = (total - candle).into();
    }
    Ok(row)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut gpu = Gpu::new(args.device)?;
    let context = gpu.stream.context().clone();
    let (name, (major, minor)) = (context.name()?, context.compute_capability()?);
    let rate = gpu.copy_rate()?;
    println!("{name}, compute capability {major}.{minor}; a copy moves {:.2} TB/s", rate * 1e-12);
    println!("| case | fwd (ms) | floor | of floor | fwd+bwd | candle | net | host (µs) |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut rows = vec![];
    for (name, make) in cases() {
        if !args.case.is_empty() && !args.case.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let row = make(&gpu).and_then(|case| measure(&mut gpu, &case, &args, rate));
        let row = match row {
            Ok(row) => row,
            Err(e) => {
                println!("| {name} | failed: {e:#} | | | | | | |");
                rows.push(json!({ "case": name, "error": format!("{e:#}") }));
                continue;
            }
        };
        let n = |field: &str| row[field].as_f64().map_or("-".into(), |value| format!("{value:.4}"));
        let share = row["floor_ms"].as_f64().unwrap_or(0.0) / row["fwd_ms"].as_f64().unwrap_or(f64::NAN);
        println!(
            "| {name} | {} | {} | {:.0} % | {} | {} | {} | {:.1} |",
            n("fwd_ms"),
            n("floor_ms"),
            share * 100.0,
            n("fwd_bwd_ms"),
            n("candle_ms"),
            n("fwd_bwd_net_ms"),
            row["host_us"].as_f64().unwrap_or(f64::NAN),
        );
        rows.push(row);
    }
    if let Some(path) = &args.json {
        let all = json!({ "gpu": name, "copy_tb_per_s": rate * 1e-12, "rows": rows });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}
