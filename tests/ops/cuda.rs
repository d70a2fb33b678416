//! What is true of a GPU alone: captured graphs, sizes that the laws do not reach.

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags as GraphFlags, CUstreamCaptureMode as CaptureMode,
};
use candle_core::{DType, Device, Tensor};
use mamba_ops::{
    Activation, CausalConv1d, CausalConv1dUpdate, Norm, SelectiveStateUpdate, SequenceLayout, causal_conv1d,
    causal_conv1d_update, norm, selective_state_update,
};

use crate::support::random::Random;
use crate::support::target::with_gpu;
use crate::support::tolerance::relative_rms;

/// The tensors of one decoding step: convolution, state update, gated norm.
struct Step {
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    y: Tensor,
    parameters: Vec<Tensor>,
}

impl Step {
    fn new(device: &Device) -> candle_core::Result<Self> {
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

    fn run(&self) -> candle_core::Result<()> {
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

/// More than 2³¹ elements: both ends are what they are in a small tensor.
#[test]
fn offsets_beyond_32_bits() {
    with_gpu(|device| {
        let (tokens, dim) = (1 << 17, 2064);
        let part = Tensor::randn(0f32, 1.0, (1, tokens, dim), device)?.to_dtype(DType::BF16)?;
        let x = Tensor::cat(&[&part; 8], 1)?;
        assert!(x.elem_count() > 1 << 31);
        let seqlen = x.dim(1)?;
        let same = |got: &Tensor, want: &Tensor| -> candle_core::Result<()> {
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
                causal_conv1d(&CausalConv1d { layout, ..CausalConv1d::new(x, weight) })
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
