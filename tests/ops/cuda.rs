//! What is true of a GPU alone: captured graphs, sizes that the laws do not reach.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags as GraphFlags, CUstreamCaptureMode as CaptureMode,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{
    Activation, CausalConv1d, CausalConv1dUpdate, Norm, NormKind, SelectiveScan, SelectiveStateUpdate,
    SequenceLayout, SsdChunkScan, causal_conv1d_update, norm, selective_state_update,
};

use crate::causal_conv1d::Conv;
use crate::laws::{self, Op, PackedOp};
use crate::selective_scan::Scan;
use crate::ssd::Ssd;
use crate::support::random::Random;
use crate::support::target::with_gpu;
use crate::support::tolerance::{self, relative_rms};
use crate::{causal_conv1d, norm as norms, selective_scan, ssd};

/// The tensors of one decoding step: convolution, state update, gated norm.
struct Step {
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    y: Tensor,
    parameters: Vec<Tensor>,
}

impl Step {
    fn new(device: &Device) -> Result<Self> {
        let (batch, dim, width, d_state) = (3, 64, 4, 16);
        let mut random = Random::new(1);
        let mut draw = |shape: &[usize]| random.normal(shape).to_dtype(DType::F32)?.to_device(device);
        let x = draw(&[batch, 1, dim])?;
        let (conv_state, ssm_state) = (draw(&[batch, dim, width - 1])?, draw(&[batch, dim, d_state])?);
        let parameters = vec![
            draw(&[dim, width])?,
            draw(&[batch, dim])?,
            draw(&[dim, d_state])?.exp()?.neg()?,
            draw(&[batch, d_state])?,
            draw(&[batch, d_state])?,
            draw(&[dim])?,
        ];
        Ok(Self { y: Tensor::zeros((batch, dim), DType::F32, device)?, x, conv_state, ssm_state, parameters })
    }

    fn run(&self) -> Result<()> {
        let [weight, dt, a, b, c, gain] = &self.parameters[..] else { unreachable!() };
        let x = causal_conv1d_update(&CausalConv1dUpdate {
            activation: Activation::Silu,
            layout: SequenceLayout::ChannelsLast,
            ..CausalConv1dUpdate::new(&self.x, &self.conv_state, weight)
        })?
        .squeeze(1)?;
        let update = SelectiveStateUpdate::new(&self.ssm_state, &x, dt, a, b, c);
        let y = selective_state_update(&SelectiveStateUpdate { dt_softplus: true, ..update })?;
        let y = norm(&Norm { z: Some(&x), ..Norm::rms(&y, gain, 1e-5) })?.y;
        self.y.slice_set(&y, 0, 0)
    }
}

/// A step is captured once, replayed three times, and leaves what four steps on the CPU leave.
#[test]
fn graphs_capture_a_step() {
    with_gpu(|_| {
        let device = Device::new_cuda_with_stream(0)?;
        let cuda = device.as_cuda_device()?;
        // SAFETY: everything of this device is used on its one stream.
        unsafe { cuda.disable_event_tracking() };
        let (step, want) = (Step::new(&device)?, Step::new(&Device::Cpu)?);
        let stream = cuda.cuda_stream();
        let _uploads = cuda.enable_cuda_graph_htod_cache();
        step.run()?; // loads the kernels
        stream.synchronize().unwrap();
        stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        step.run()?;
        let free = GraphFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(free).unwrap().unwrap();
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        stream.synchronize().unwrap();
        for _ in 0..4 {
            want.run()?;
        }
        for (got, want) in
            [(&step.conv_state, &want.conv_state), (&step.ssm_state, &want.ssm_state), (&step.y, &want.y)]
        {
            assert!(relative_rms(&got.to_device(&Device::Cpu)?, want) < 1e-5);
        }
        Ok(1)
    });
}

/// A fused function with its gradients, through `y` and through the state, as somebody who captures a training step calls it.
struct Pass<O: Op> {
    case: O::Case,
    inputs: BTreeMap<String, Var>,
    /// What comes out, in the same memory each time.
    results: Vec<Tensor>,
}

impl<O: Op> Pass<O> {
    fn new(case: &O::Case, dtype: DType, device: &Device) -> Result<Self> {
        let inputs = laws::cast::<O>(&O::inputs(case, &mut Random::new(1)), dtype)?;
        let there = |(name, x): (String, Tensor)| Ok((name, Var::from_tensor(&x.to_device(device)?)?));
        let mut pass = Self {
            case: case.clone(),
            inputs: inputs.into_iter().map(there).collect::<Result<_>>()?,
            results: vec![],
        };
        pass.results = pass.compute()?.iter().map(Tensor::zeros_like).collect::<Result<_>>()?;
        Ok(pass)
    }

    /// Outputs, and the gradients of the sum of each.
    fn compute(&self) -> Result<Vec<Tensor>> {
        let tracked = self.inputs.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
        let mut results = vec![];
        for output in O::run(&self.case, &tracked)?.into_values() {
            let gradients = output.backward()?;
            results.push(output.detach());
            results.extend(self.inputs.values().filter_map(|x| Some(gradients.get(x)?.detach())));
        }
        Ok(results)
    }

    fn run(&self) -> Result<()> {
        let results = self.compute()?;
        self.results
            .iter()
            .zip(&results)
            .try_for_each(|(kept, result)| kept.slice_set(&result.contiguous()?, 0, 0))
    }
}

/// Captured once and replayed with other inputs, an op gives what it gives then: it waits for nothing and takes nothing from the
/// host. Returns the number of tensors that came out.
fn captured<O: Op>(case: &O::Case, dtype: DType) -> Result<usize> {
    let device = Device::new_cuda_with_stream(0)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: everything of this device is used on its one stream.
    unsafe { cuda.disable_event_tracking() };
    let pass = Pass::<O>::new(case, dtype, &device)?; // which loads the kernels
    let stream = cuda.cuda_stream();
    stream.synchronize().unwrap();
    stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let run = pass.run();
    let graph = stream.end_capture(GraphFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    run?;
    let graph = graph.unwrap().unwrap();
    for x in pass.inputs.values() {
        x.set(&x.affine(0.5, 0.0)?)?;
    }
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    stream.synchronize().unwrap();
    let values = |x: &Tensor| -> Result<Vec<f64>> { Ok(tolerance::values(&x.to_device(&Device::Cpu)?)) };
    let got: Vec<Vec<f64>> = pass.results.iter().map(values).collect::<Result<_>>()?;
    pass.run()?;
    for (i, (got, want)) in got.iter().zip(&pass.results).enumerate() {
        assert!(*got == values(want)?, "{case:?} {}: result {i} of the graph", dtype.as_str());
    }
    // Some gradients of a final state are 0; most results are not.
    let something = got.iter().filter(|x| x.iter().any(|x| *x != 0.0)).count();
    assert!(2 * something > got.len(), "{case:?}: {something} of {} results", got.len());
    Ok(got.len())
}

/// Every sequence op and the norm, forward and backward, alone and packed.
#[test]
fn graphs_capture_ops() {
    with_gpu(|_| {
        let (mut cases, packing) = (0, laws::packings()[7].clone());
        for dtype in laws::DTYPES {
            for layout in [SequenceLayout::ChannelsFirst, SequenceLayout::ChannelsLast] {
                let conv = causal_conv1d::Case {
                    batch: 2,
                    dim: 72,
                    seqlen: 100,
                    width: 4,
                    bias: true,
                    state: true,
                    activation: Activation::Silu,
                    layout,
                    packing: None,
                };
                cases += captured::<causal_conv1d::Conv>(&conv, dtype)?;
                cases += captured::<causal_conv1d::Conv>(&Conv::packed(&conv, Some(packing.clone())), dtype)?;
                let scan = selective_scan::Case::new([2, 72, 100, 16], layout);
                cases += captured::<Scan>(&scan, dtype)?;
                cases += captured::<Scan>(&Scan::packed(&scan, Some(packing.clone())), dtype)?;
            }
            for case in [
                ssd::Case::new([2, 100, 4, 64, 2, 128]),
                ssd::Case { z: false, ..ssd::Case::new([2, 100, 4, 64, 2, 128]) },
                ssd::Case { d: Some(2), ..ssd::Case::new([2, 100, 4, 16, 2, 24]) },
            ] {
                cases += captured::<Ssd>(&case, dtype)?;
                cases += captured::<Ssd>(&Ssd::packed(&case, Some(packing.clone())), dtype)?;
            }
            for kind in [NormKind::Rms, NormKind::Layer] {
                let case =
                    norms::Case { bias: true, residual: true, ..norms::Case::new(kind, &[2, 50, 264]) };
                cases += captured::<norms::InDtypeOfX>(&case, dtype)?;
            }
        }
        Ok(cases)
    });
}

/// More than 2³¹ elements: both ends are what they are in a small tensor.
#[test]
fn offsets_beyond_32_bits() {
    with_gpu(|device| {
        let _alone = with_much_memory();
        let (tokens, dim) = (1 << 17, 2064);
        let part = Tensor::randn(0f32, 1.0, (1, tokens, dim), device)?.to_dtype(DType::BF16)?;
        let x = Tensor::cat(&[&part; 8], 1)?;
        assert!(x.elem_count() > 1 << 31);
        let seqlen = x.dim(1)?;
        let same = |got: &Tensor, want: &Tensor| -> Result<()> {
            let [got, want] = [got, want].map(|x| x.contiguous()?.to_device(&Device::Cpu));
            assert_eq!(relative_rms(&got?, &want?), 0.0);
            Ok(())
        };

        let weight = Tensor::randn(0f32, 1.0, (dim, 4), device)?;
        for layout in [SequenceLayout::ChannelsLast, SequenceLayout::ChannelsFirst] {
            // Channels first, what were tokens are channels and the other way round.
            let weight = match layout {
                SequenceLayout::ChannelsLast => weight.clone(),
                SequenceLayout::ChannelsFirst => Tensor::randn(0f32, 1.0, (seqlen, 4), device)?,
            };
            let conv = |x: &Tensor, weight: &Tensor| {
                mamba_ops::causal_conv1d(&CausalConv1d { layout, ..CausalConv1d::new(x, weight) })
            };
            let whole = conv(&x, &weight)?.y;
            for start in [0, seqlen - 40] {
                let piece = x.narrow(1, start, 40)?;
                let (piece, skip) = match layout {
                    SequenceLayout::ChannelsLast => (conv(&piece, &weight)?.y, 3),
                    SequenceLayout::ChannelsFirst => (conv(&piece, &weight.narrow(0, start, 40)?)?.y, 0),
                };
                let len = 40 - skip;
                same(&whole.narrow(1, start + skip, len)?, &piece.narrow(1, skip, len)?)?;
            }
        }

        let gain = Tensor::randn(0f32, 1.0, dim, device)?;
        let whole = norm(&Norm::rms(&x, &gain, 1e-5))?.y;
        for start in [0, seqlen - 40] {
            let piece = norm(&Norm::rms(&x.narrow(1, start, 40)?, &gain, 1e-5))?.y;
            same(&whole.narrow(1, start, 40)?, &piece)?;
        }
        Ok(1)
    });
}

/// States of more than 2³¹ elements are changed at both ends.
#[test]
fn states_beyond_32_bits() {
    with_gpu(|device| {
        let _alone = with_much_memory();
        let (batch, nheads, headdim, d_state) = (3300, 80, 64, 128);
        let normal = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device);
        let state = Tensor::ones((batch, nheads, headdim, d_state), DType::F32, device)?;
        assert!(state.elem_count() > 1 << 31);
        let (x, dt) = (normal(&[batch, nheads, headdim])?, normal(&[batch, nheads])?);
        let a = normal(&[nheads])?.exp()?.neg()?;
        let (b, c) = (normal(&[batch, d_state])?, normal(&[batch, d_state])?);
        let step = |state: &Tensor, from: usize, len: usize| {
            let [x, dt, b, c] = [&x, &dt, &b, &c].map(|x| x.narrow(0, from, len).unwrap());
            let args = SelectiveStateUpdate::new(state, &x, &dt, &a, &b, &c);
            selective_state_update(&SelectiveStateUpdate { dt_softplus: true, ..args })
        };
        let y = step(&state, 0, batch)?;
        for start in [0, batch - 1] {
            let one = Tensor::ones((1, nheads, headdim, d_state), DType::F32, device)?;
            let want = step(&one, start, 1)?;
            let [got, want] = [y.narrow(0, start, 1)?, want].map(|x| x.to_device(&Device::Cpu));
            assert_eq!(relative_rms(&got?, &want?), 0.0);
            let [got, want] =
                [state.narrow(0, start, 1)?.contiguous()?, one].map(|x| x.to_device(&Device::Cpu));
            assert_eq!(relative_rms(&got?, &want?), 0.0);
        }
        Ok(1)
    });
}

/// Held by a test that needs much memory, lest several need it at once.
fn with_much_memory() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first and the last row of a batch are what each is alone, and so, if asked for, are the gradients. (Not to the bit: blocks
/// share out the work on one row in another way.)
fn ends_are_alone(
    inputs: &[Tensor],
    gradients: bool,
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let results = |inputs: Vec<Tensor>| -> Result<Vec<Tensor>> {
        if !gradients {
            return Ok(vec![run(&inputs)?]);
        }
        let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let y = run(&vars.iter().map(|x| x.as_tensor().clone()).collect::<Vec<_>>())?;
        let store = y.backward()?;
        let gradients = vars.iter().map(|x| store.get(x).unwrap().clone());
        Ok([y.detach()].into_iter().chain(gradients).collect())
    };
    let whole = results(inputs.to_vec())?;
    let batch = inputs[0].dim(0)?;
    for row in [0, batch - 1] {
        let of_row = |x: &Tensor| x.narrow(0, row, 1)?.contiguous();
        let alone = results(inputs.iter().map(of_row).collect::<Result<_>>()?)?;
        for (i, (got, want)) in whole.iter().zip(&alone).enumerate() {
            let (got, want) = (of_row(got)?.to_device(&Device::Cpu)?, want.to_device(&Device::Cpu)?);
            assert!(tolerance::values(&want).iter().any(|x| *x != 0.0), "result {i} of row {row} is nothing");
            let error = relative_rms(&got, &want);
            assert!(error < 2f64.powi(-8), "result {i} of row {row} is off by {error:.1e}");
        }
    }
    Ok(())
}

/// Rows of a batch, which repeat; in `bf16`.
fn rows(batch: usize, rest: &[usize], device: &Device) -> Result<Tensor> {
    const TIMES: usize = 10;
    let part = Tensor::randn(0f32, 1.0, [&[batch / TIMES], rest].concat(), device)?.to_dtype(DType::BF16)?;
    Tensor::cat(&[&part; TIMES], 0)
}

/// Scans of more than 2³¹ elements. (Where an input has so many, candle cannot add up gradients.)
#[test]
fn scans_beyond_32_bits() {
    with_gpu(|device| {
        let _alone = with_much_memory();
        let (dim, seqlen) = (2048, 1024);
        for layout in [SequenceLayout::ChannelsFirst, SequenceLayout::ChannelsLast] {
            let (batch, d_state) = (1030, 16);
            let (channels, coefficients) = match layout {
                SequenceLayout::ChannelsFirst => ([dim, seqlen], vec![1, d_state, seqlen]),
                SequenceLayout::ChannelsLast => ([seqlen, dim], vec![seqlen, 1, d_state]),
            };
            let (u, delta) = (rows(batch, &channels, device)?, rows(batch, &channels, device)?);
            let (b, c) = (rows(batch, &coefficients, device)?, rows(batch, &coefficients, device)?);
            assert!(u.elem_count() > 1 << 31);
            let a = Tensor::randn(0f32, 1.0, (dim, d_state), device)?.exp()?.neg()?;
            ends_are_alone(&[u, delta, b, c], false, |x| {
                let args = SelectiveScan::new(&x[0], &x[1], &a, &x[2], &x[3]);
                Ok(mamba_ops::selective_scan(&SelectiveScan { layout, delta_softplus: true, ..args })?.y)
            })?;
        }
        Ok(2)
    });
}

/// The same of the duality, in sizes that have kernels of their own.
#[test]
fn dualities_beyond_32_bits() {
    with_gpu(|device| {
        let _alone = with_much_memory();
        let (seqlen, nheads, headdim, d_state) = (2048, 32, 64, 128);
        for (batch, gradients) in [(520, false), (140, true)] {
            let x = rows(batch, &[seqlen, nheads, headdim], device)?;
            let dt = rows(batch, &[seqlen, nheads], device)?;
            let [b, c] = [(); 2].map(|()| rows(batch, &[seqlen, 1, d_state], device).unwrap());
            assert!(gradients || x.elem_count() > 1 << 31);
            let a = Tensor::randn(0f32, 1.0, nheads, device)?.exp()?.neg()?;
            ends_are_alone(&[x, dt, b, c], gradients, |x| {
                let args = SsdChunkScan::new(&x[0], &x[1], &a, &x[2], &x[3]);
                Ok(mamba_ops::ssd_chunk_scan(&SsdChunkScan { dt_softplus: true, ..args })?.y)
            })?;
        }
        Ok(2)
    });
}
