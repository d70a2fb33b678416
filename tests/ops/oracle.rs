//! The ops in `f64` as plain loops over numbers, forward and backward: no tensors, no graph, so sequences may be long.

use mamba_ops::PackedSequence;

/// `ln(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    if x > 30.0 { x + (-x).exp() } else { x.exp().ln_1p() }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn silu_derivative(x: f64) -> f64 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// `B` or `C`.
#[derive(Clone, Copy)]
pub enum Coefficient<'a> {
    /// `(dim, d_state)`.
    Constant(&'a [f64]),
    /// `(batch, seqlen, ngroups, d_state)`.
    Varying(&'a [f64], usize),
}

/// Both state space models: channels with a state each; some parameters are shared by neighbouring channels.
pub struct Ssm<'a> {
    pub batch: usize,
    /// Where each sequence lies; where `batch` stands in the shape of a state, it is their number.
    pub sequences: &'a [PackedSequence],
    pub seqlen: usize,
    pub dim: usize,
    pub d_state: usize,
    /// `(batch, seqlen, dim)`.
    pub x: &'a [f64],
    /// `(batch, seqlen, dim / dt_share)`.
    pub dt: &'a [f64],
    pub dt_share: usize,
    /// `(dim, d_state)`, or `(dim / a_share,)` where `a_share` is given.
    pub a: &'a [f64],
    pub a_share: Option<usize>,
    pub b: Coefficient<'a>,
    pub c: Coefficient<'a>,
    /// `(dim / share,)` and the share.
    pub d: Option<(&'a [f64], usize)>,
    /// `(batch, seqlen, dim)`.
    pub z: Option<&'a [f64]>,
    /// `(dim / share,)` and the share.
    pub dt_bias: Option<(&'a [f64], usize)>,
    pub dt_softplus: bool,
    pub dt_limit: (f64, f64),
    /// `(batch, dim, d_state)`.
    pub initial_state: Option<&'a [f64]>,
}

/// Gradients, each in the layout of what it belongs to; those of absent inputs are empty.
#[derive(Default)]
pub struct SsmGradients {
    pub x: Vec<f64>,
    pub dt: Vec<f64>,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub c: Vec<f64>,
    pub d: Vec<f64>,
    pub z: Vec<f64>,
    pub dt_bias: Vec<f64>,
    pub initial_state: Vec<f64>,
}

impl Coefficient<'_> {
    fn values(&self) -> &[f64] {
        match self {
            Self::Constant(values) | Self::Varying(values, _) => values,
        }
    }

    /// Where those of a channel and token begin.
    fn start(&self, ssm: &Ssm, token: usize, channel: usize) -> usize {
        match self {
            Self::Constant(_) => channel * ssm.d_state,
            Self::Varying(_, groups) => (token * groups + channel / (ssm.dim / groups)) * ssm.d_state,
        }
    }
}

impl Ssm<'_> {
    /// `y` and the final state, in the layouts of `x` and the initial state.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let (y, state, _) = self.run(None);
        (y, state)
    }

    /// As [`forward`](Self::forward), and the gradients of `Σ y · grad_y + Σ final_state · grad_state`.
    pub fn backward(&self, grad_y: &[f64], grad_state: &[f64]) -> (Vec<f64>, Vec<f64>, SsmGradients) {
        self.run(Some((grad_y, grad_state)))
    }

    fn run(&self, cotangents: Option<(&[f64], &[f64])>) -> (Vec<f64>, Vec<f64>, SsmGradients) {
        let Self { batch, seqlen, dim, d_state: n, .. } = *self;
        let mut y = vec![0.0; batch * seqlen * dim];
        let mut last = vec![0.0; self.sequences.len() * dim * n];
        let mut g = SsmGradients {
            x: vec![0.0; self.x.len()],
            dt: vec![0.0; self.dt.len()],
            a: vec![0.0; self.a.len()],
            b: vec![0.0; self.b.values().len()],
            c: vec![0.0; self.c.values().len()],
            d: vec![0.0; self.d.map_or(0, |d| d.0.len())],
            z: vec![0.0; self.z.map_or(0, <[f64]>::len)],
            dt_bias: vec![0.0; self.dt_bias.map_or(0, |bias| bias.0.len())],
            initial_state: vec![0.0; self.initial_state.map_or(0, <[f64]>::len)],
        };
        let (mut h, mut dh) = (vec![0.0; n], vec![0.0; n]);
        // The states of one channel; only the last one where nothing is differentiated.
        let mut history: Vec<f64> = vec![];
        let mut decays: Vec<f64> = vec![];
        let (b_values, c_values) = (self.b.values(), self.c.values());
        for row in 0..self.sequences.len() * dim {
            let (sequence, channel) = (self.sequences[row / dim], row % dim);
            // Tokens of all rows before the first one of the sequence.
            let (first, len) = (sequence.row * seqlen + sequence.start, sequence.len);
            let at = |t: usize| (first + t) * dim + channel;
            let dt_at = |t: usize| (first + t) * (dim / self.dt_share) + channel / self.dt_share;
            let raw =
                |t: usize| self.dt[dt_at(t)] + self.dt_bias.map_or(0.0, |(v, share)| v[channel / share]);
            let delta = |t: usize| {
                let raw = raw(t);
                let delta = if self.dt_softplus { softplus(raw) } else { raw };
                delta.max(self.dt_limit.0).min(self.dt_limit.1)
            };
            let a = match self.a_share {
                Some(share) => &self.a[channel / share..][..1],
                None => &self.a[channel * n..][..n],
            };
            let a_start = self.a_share.map_or(channel * n, |share| channel / share);
            let skip = self.d.map_or(0.0, |(v, share)| v[channel / share]);
            match self.initial_state {
                Some(state) => h.copy_from_slice(&state[row * n..][..n]),
                None => h.fill(0.0),
            }
            history.clear();
            decays.clear();
            for t in 0..len {
                let (delta, x) = (delta(t), self.x[at(t)]);
                let b = &b_values[self.b.start(self, first + t, channel)..][..n];
                let c = &c_values[self.c.start(self, first + t, channel)..][..n];
                if cotangents.is_some() {
                    history.extend_from_slice(&h);
                }
                let (input, mut sum) = (delta * x, 0.0);
                if let [a] = *a {
                    let decay = (delta * a).exp();
                    decays.push(decay);
                    for i in 0..n {
                        h[i] = decay * h[i] + input * b[i];
                        sum += c[i] * h[i];
                    }
                } else {
                    for i in 0..n {
                        let decay = (delta * a[i]).exp();
                        decays.push(decay);
                        h[i] = decay * h[i] + input * b[i];
                        sum += c[i] * h[i];
                    }
                }
                y[at(t)] = sum + skip * x;
            }
            last[row * n..][..n].copy_from_slice(&h);
            let (grad_y, grad_state) = match cotangents {
                Some(cotangents) => cotangents,
                None => {
                    if let Some(z) = self.z {
                        (0..len).for_each(|t| y[at(t)] *= silu(z[at(t)]));
                    }
                    decays.clear();
                    continue;
                }
            };
            dh.copy_from_slice(&grad_state[row * n..][..n]);
            for t in (0..len).rev() {
                let (delta, x) = (delta(t), self.x[at(t)]);
                let (b_start, c_start) =
                    (self.b.start(self, first + t, channel), self.c.start(self, first + t, channel));
                let mut gy = grad_y[at(t)];
                if let Some(z) = self.z {
                    let z = z[at(t)];
                    g.z[at(t)] += gy * y[at(t)] * silu_derivative(z);
                    y[at(t)] *= silu(z);
                    gy *= silu(z);
                }
                if let Some((_, share)) = self.d {
                    g.d[channel / share] += gy * x;
                }
                let (mut gx, mut gdelta) = (gy * skip, 0.0);
                let before = &history[t * n..][..n];
                for i in 0..n {
                    let (ai, j) = if a.len() == 1 { (0, t) } else { (i, t * n + i) };
                    let (decay, b, c) = (decays[j], b_values[b_start + i], c_values[c_start + i]);
                    let after = if t + 1 < len { history[(t + 1) * n + i] } else { h[i] };
                    dh[i] += gy * c;
                    g.c[c_start + i] += gy * after;
                    g.b[b_start + i] += dh[i] * delta * x;
                    g.a[a_start + ai] += dh[i] * before[i] * decay * delta;
                    gdelta += dh[i] * (before[i] * decay * a[ai] + b * x);
                    gx += dh[i] * delta * b;
                    dh[i] *= decay;
                }
                g.x[at(t)] += gx;
                let raw = raw(t);
                let free = if self.dt_softplus { softplus(raw) } else { raw };
                let inside = free >= self.dt_limit.0 && free <= self.dt_limit.1;
                let slope = if self.dt_softplus { sigmoid(raw) } else { 1.0 };
                let graw = if inside { gdelta * slope } else { 0.0 };
                g.dt[dt_at(t)] += graw;
                if let Some((_, share)) = self.dt_bias {
                    g.dt_bias[channel / share] += graw;
                }
            }
            if self.initial_state.is_some() {
                g.initial_state[row * n..][..n].copy_from_slice(&dh);
            }
        }
        (y, last, g)
    }
}

/// The depthwise convolution.
pub struct Conv<'a> {
    pub sequences: &'a [PackedSequence],
    pub seqlen: usize,
    pub dim: usize,
    pub width: usize,
    /// `(batch, seqlen, dim)`.
    pub x: &'a [f64],
    /// `(dim, width)`.
    pub weight: &'a [f64],
    pub bias: Option<&'a [f64]>,
    /// `(batch, dim, width - 1)`.
    pub initial_state: Option<&'a [f64]>,
    pub silu: bool,
}

#[derive(Default)]
pub struct ConvGradients {
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub initial_state: Vec<f64>,
}

impl Conv<'_> {
    /// `y`, the final window and the gradients of `Σ y · grad_y + Σ window · grad_state`.
    pub fn backward(&self, grad_y: &[f64], grad_state: &[f64]) -> (Vec<f64>, Vec<f64>, ConvGradients) {
        let Self { sequences, dim, width, .. } = *self;
        let mut y = vec![0.0; self.x.len()];
        let mut last = vec![0.0; sequences.len() * dim * (width - 1)];
        let mut g = ConvGradients {
            x: vec![0.0; self.x.len()],
            weight: vec![0.0; self.weight.len()],
            bias: vec![0.0; self.bias.map_or(0, <[f64]>::len)],
            initial_state: vec![0.0; self.initial_state.map_or(0, <[f64]>::len)],
        };
        for row in 0..sequences.len() * dim {
            let (sequence, channel) = (sequences[row / dim], row % dim);
            let (first, seqlen) = (sequence.row * self.seqlen + sequence.start, sequence.len);
            let at = |t: usize| (first + t) * dim + channel;
            let window = |k: usize| row * (width - 1) + k;
            let before = |k: usize| self.initial_state.map_or(0.0, |state| state[window(k)]);
            let line: Vec<f64> =
                (0..width - 1).map(before).chain((0..seqlen).map(|t| self.x[at(t)])).collect();
            let mut gline = vec![0.0; line.len()];
            let weight = &self.weight[channel * width..][..width];
            for t in 0..seqlen {
                let taps = weight.iter().zip(&line[t..]).map(|(w, x)| w * x).sum::<f64>();
                let sum = taps + self.bias.map_or(0.0, |bias| bias[channel]);
                y[at(t)] = if self.silu { silu(sum) } else { sum };
                let gsum = grad_y[at(t)] * if self.silu { silu_derivative(sum) } else { 1.0 };
                if self.bias.is_some() {
                    g.bias[channel] += gsum;
                }
                for k in 0..width {
                    g.weight[channel * width + k] += gsum * line[t + k];
                    gline[t + k] += gsum * weight[k];
                }
            }
            for k in 0..width - 1 {
                last[window(k)] = line[seqlen + k];
                gline[seqlen + k] += grad_state[window(k)];
            }
            (0..seqlen).for_each(|t| g.x[at(t)] = gline[width - 1 + t]);
            if self.initial_state.is_some() {
                (0..width - 1).for_each(|k| g.initial_state[window(k)] = gline[k]);
            }
        }
        (y, last, g)
    }
}

/// The norm, over rows of `dim` channels.
pub struct Norm<'a> {
    pub dim: usize,
    pub group_size: usize,
    pub layer: bool,
    pub eps: f64,
    pub norm_before_gate: bool,
    pub x: &'a [f64],
    pub weight: Option<&'a [f64]>,
    pub bias: Option<&'a [f64]>,
    pub residual: Option<&'a [f64]>,
    pub z: Option<&'a [f64]>,
}

#[derive(Default)]
pub struct NormGradients {
    /// Of `x` and of `residual`.
    pub sum: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub z: Vec<f64>,
}

impl Norm<'_> {
    /// `y`, the sum with the residual and the gradients of `Σ y · grad_y + Σ sum · grad_sum`.
    pub fn backward(&self, grad_y: &[f64], grad_sum: Option<&[f64]>) -> (Vec<f64>, Vec<f64>, NormGradients) {
        let len = self.x.len();
        let sum: Vec<f64> = match self.residual {
            Some(residual) => self.x.iter().zip(residual).map(|(x, r)| x + r).collect(),
            None => self.x.to_vec(),
        };
        let mut y = vec![0.0; len];
        let mut g = NormGradients {
            sum: grad_sum.map_or_else(|| vec![0.0; len], <[f64]>::to_vec),
            weight: vec![0.0; self.weight.map_or(0, <[f64]>::len)],
            bias: vec![0.0; self.bias.map_or(0, <[f64]>::len)],
            z: vec![0.0; self.z.map_or(0, <[f64]>::len)],
        };
        let size = self.group_size as f64;
        for start in (0..len).step_by(self.group_size.max(1)) {
            let group = start..start + self.group_size;
            let gate = |i: usize| self.z.map_or(1.0, |z| silu(z[i]));
            let u = |i: usize| if self.norm_before_gate { sum[i] } else { sum[i] * gate(i) };
            let mean = if self.layer { group.clone().map(u).sum::<f64>() / size } else { 0.0 };
            let variance = group.clone().map(|i| (u(i) - mean).powi(2)).sum::<f64>() / size;
            let scale = 1.0 / (variance + self.eps).sqrt();
            // The gradient of what is normalised, and its means.
            let mut ghat = vec![0.0; self.group_size];
            let (mut mean_g, mut mean_gx) = (0.0, 0.0);
            for i in group.clone() {
                let channel = i % self.dim;
                let (xhat, w) = ((u(i) - mean) * scale, self.weight.map_or(1.0, |w| w[channel]));
                let plain = xhat * w + self.bias.map_or(0.0, |b| b[channel]);
                let mut gy = grad_y[i];
                y[i] = plain;
                if self.norm_before_gate
                    && let Some(z) = self.z
                {
                    y[i] *= gate(i);
                    g.z[i] += gy * plain * silu_derivative(z[i]);
                    gy *= gate(i);
                }
                if self.weight.is_some() {
                    g.weight[channel] += gy * xhat;
                }
                if self.bias.is_some() {
                    g.bias[channel] += gy;
                }
                ghat[i - start] = gy * w;
                mean_g += gy * w / size;
                mean_gx += gy * w * xhat / size;
            }
            for i in group {
                let xhat = (u(i) - mean) * scale;
                let centre = if self.layer { mean_g } else { 0.0 };
                let gu = scale * (ghat[i - start] - centre - xhat * mean_gx);
                match self.z {
                    Some(z) if !self.norm_before_gate => {
                        g.z[i] += gu * sum[i] * silu_derivative(z[i]);
                        g.sum[i] += gu * gate(i);
                    }
                    _ => g.sum[i] += gu,
                }
            }
        }
        (y, sum, g)
    }
}
