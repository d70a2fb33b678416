//! What is measured: each op in the shapes of models, with its inputs, its reference and what it must do at least.

use anyhow::Result;
use candle_core::{Device, Tensor};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, Norm, NormKind, Packing, SelectiveScan, SelectiveStateUpdate,
    SequenceLayout, SsdChunkScan, causal_conv1d, causal_conv1d_update, norm, selective_scan,
    selective_state_update, ssd_chunk_scan,
};

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
pub struct Cost {
    pub exps: f64,
    /// Vector operations beside those of the exponentials, times lanes: a multiplication with addition is one.
    pub operations: f64,
    pub bytes: f64,
}

pub type Inputs = Box<dyn Fn(usize) -> Result<Vec<Tensor>>>;
pub type Run = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>>;

pub struct Case {
    pub op: &'static str,
    pub name: String,
    /// Tokens or rows: of the case, and few for the check.
    pub len: usize,
    pub few: usize,
    pub inputs: Inputs,
    /// From the inputs to `y` and what else comes out.
    pub fused: Run,
    pub reference: Run,
    pub forward: Cost,
    /// Forward and backward; `None` for ops that have none.
    pub backward: Option<Cost>,
    /// Matrix products `(count, rows, inner, columns)` of the forward and of the backward pass.
    pub products: [Vec<[usize; 4]>; 2],
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
        // The sums over taps once more, their gradients for the input and for the weight.
        backward: Some(Cost {
            exps: 2.0 * exps,
            operations: operations + len * (3.0 * width as f64 + 7.0),
            bytes: len * (8.0 + 12.0),
        }),
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
        // Backward reads the inputs and the gradient, and writes that of the sum, or those of `x` and `z`.
        backward: Some(Cost {
            exps: 2.0 * exps,
            operations: len * 12.0,
            bytes: len * if gated { 12.0 + 20.0 } else { 16.0 + 16.0 },
        }),
        products: [vec![], vec![]],
    }
}

pub fn cases() -> Vec<Case> {
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
