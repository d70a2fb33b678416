//! Whether weights fit one another.

use std::cell::Cell;

use candle_core::{Result, Tensor, bail};

use super::{Attention, Conv, Layer, LowRank, Mixer, Mlp, MlpLayout, Norm, OP, Product, Shared, Stack};
use crate::args::Checker;
use crate::norm::NormKind;

/// Checks that the weights fit one another; whether some are trained, that is, may be others at the next token.
pub(super) fn check(stack: &Stack) -> Result<bool> {
    let checker = Checker::new(OP, "embedding", &stack.embedding)?;
    let [_, d_model] = checker.main_dims(["vocabulary", "d_model"])?;
    let check = Check { checker, trained: Cell::new(stack.embedding.track_op()), d_model };
    stack.layers.iter().try_for_each(|layer| check.layer(layer))?;
    check.norm("norm_f", &stack.norm_f, d_model)?;
    check.product("head", &stack.head, stack.head.outputs()?, d_model)?;
    Ok(check.trained.get())
}

struct Check<'a> {
    checker: Checker<'a>,
    trained: Cell<bool>,
    d_model: usize,
}

impl Check<'_> {
    fn see(&self, x: &Tensor) {
        self.trained.set(self.trained.get() || x.track_op());
    }

    fn matrix(&self, name: &'static str, x: &Tensor, outputs: usize, inputs: usize) -> Result<()> {
        self.see(x);
        self.checker.activation(name, x, &[("outputs", outputs), ("inputs", inputs)])
    }

    fn table(&self, name: &'static str, x: &Tensor, rows: usize, columns: usize) -> Result<()> {
        self.see(x);
        self.checker.parameter(name, x, &[("channels", rows), ("columns", columns)])
    }

    fn vector(&self, name: &'static str, x: &Tensor, len: usize) -> Result<()> {
        self.see(x);
        self.checker.parameter(name, x, &[("channels", len)])
    }

    fn optional(&self, name: &'static str, x: &Option<Tensor>, len: usize) -> Result<()> {
        x.iter().try_for_each(|x| self.vector(name, x, len))
    }

    fn norm(&self, name: &'static str, norm: &Norm, len: usize) -> Result<()> {
        self.vector(name, &norm.weight, len)?;
        self.optional(name, &norm.bias, len)
    }

    fn product(&self, name: &'static str, product: &Product, outputs: usize, inputs: usize) -> Result<()> {
        if !(1..=3).contains(&product.weights.len()) {
            bail!("{OP}: `{name}` has {} matrices, expected 1 to 3", product.weights.len());
        }
        if product.outputs()? != outputs {
            bail!("{OP}: `{name}` has {} outputs, expected {outputs}", product.outputs()?);
        }
        product.weights.iter().try_for_each(|x| self.matrix(name, x, x.dim(0)?, inputs))?;
        self.optional(name, &product.bias, outputs)?;
        self.optional(name, &product.scales, outputs)
    }

    fn conv(&self, conv: &Conv, channels: usize) -> Result<()> {
        self.table("conv.weight", &conv.weight, channels, conv.weight.dim(1)?)?;
        self.optional("conv.bias", &conv.bias, channels)
    }

    fn low_rank(&self, name: &'static str, x: &LowRank, outputs: usize, inputs: usize) -> Result<()> {
        let rank = x.down.dim(0)?;
        self.matrix(name, &x.down, rank, inputs)?;
        self.matrix(name, &x.up, outputs, rank)
    }

    fn layer(&self, layer: &Layer) -> Result<()> {
        let d_model = self.d_model;
        layer.shared.iter().try_for_each(|shared| self.shared(shared))?;
        self.norm("norm", &layer.norm, d_model)?;
        if !(1..=2).contains(&layer.mixers.len()) {
            bail!("{OP}: a layer has {} mixers, expected 1 or 2", layer.mixers.len());
        }
        for (_, mixer) in &layer.mixers {
            match mixer {
                Mixer::Mamba1(m) => {
                    let ((d_inner, d_state), dt_rank) = (m.a.dims2()?, m.dt_proj.dim(1)?);
                    self.table("a", &m.a, d_inner, d_state)?;
                    self.product("in_proj", &m.in_proj, 2 * d_inner, d_model)?;
                    self.conv(&m.conv, d_inner)?;
                    self.product("x_proj", &m.x_proj, dt_rank + 2 * d_state, d_inner)?;
                    self.matrix("dt_proj", &m.dt_proj, d_inner, dt_rank)?;
                    if let Some((_, weights)) = &m.dt_bc_norms {
                        let mut parts = weights.iter().zip([dt_rank, d_state, d_state]);
                        parts.try_for_each(|(x, len)| self.optional("dt_bc_norms", x, len))?;
                    }
                    self.vector("dt_bias", &m.dt_bias, d_inner)?;
                    self.vector("d", &m.d, d_inner)?;
                    self.product("out_proj", &m.out_proj, d_model, d_inner)?;
                }
                Mixer::Mamba2(m) => {
                    let nheads = m.a.dims1()?;
                    let (d_inner, bc) = (nheads * m.headdim, m.ngroups * m.d_state);
                    if m.ngroups == 0 || nheads % m.ngroups != 0 {
                        bail!("{OP}: `ngroups` is {}, expected a divisor of {nheads} heads", m.ngroups);
                    }
                    self.product("in_proj", &m.in_proj, 2 * d_inner + 2 * bc + nheads, d_model)?;
                    self.conv(&m.conv, d_inner + 2 * bc)?;
                    self.vector("a", &m.a, nheads)?;
                    self.vector("dt_bias", &m.dt_bias, nheads)?;
                    self.checker.dt_limit(m.dt_limit)?;
                    if m.norm.as_ref().is_some_and(|norm| norm.kind != NormKind::Rms) {
                        bail!("{OP}: `norm` of Mamba-2 is a layer norm, expected an RMSNorm");
                    }
                    self.vector("d", &m.d, if m.d.elem_count() == nheads { nheads } else { d_inner })?;
                    m.norm.iter().try_for_each(|n| self.norm("norm of Mamba-2", n, d_inner))?;
                    self.product("out_proj", &m.out_proj, d_model, d_inner)?;
                }
                Mixer::Attention(m) => self.attention(m, d_model)?,
                Mixer::Mlp(m) => self.mlp(m)?,
                Mixer::ShortConv(m) => {
                    let channels = m.conv.weight.dim(0)?;
                    self.product("in_proj", &m.in_proj, 3 * channels, d_model)?;
                    self.conv(&m.conv, channels)?;
                    self.product("out_proj", &m.out_proj, d_model, channels)?;
                }
            }
        }
        Ok(())
    }

    fn attention(&self, m: &Attention, inputs: usize) -> Result<()> {
        let Attention { nheads, nheads_kv, headdim, mlp, .. } = *m;
        if nheads == 0 || nheads_kv == 0 || nheads % nheads_kv != 0 || headdim == 0 || m.window == Some(0) {
            let window = m.window;
            bail!(
                "{OP}: no attention has {nheads} heads over {nheads_kv} of {headdim} in a window of {window:?}"
            );
        }
        let qkv = (nheads + 2 * nheads_kv) * headdim;
        self.product("qkv", &m.qkv, qkv + 2 * mlp, inputs)?;
        m.conv.iter().try_for_each(|conv| self.conv(conv, qkv))?;
        if let Some((_, weights)) = &m.qk_norms {
            weights.iter().try_for_each(|x| self.vector("qk_norms", x, headdim))?;
        }
        if let Some(rotary) = &m.rotary {
            let pairs = rotary.frequencies.dims1()?;
            self.vector("rotary.frequencies", &rotary.frequencies, pairs)?;
            if 2 * pairs > headdim {
                bail!("{OP}: `rotary` turns {pairs} pairs of {headdim} channels");
            }
        }
        self.product("out_proj", &m.out_proj, self.d_model, nheads * headdim + mlp)
    }

    fn mlp(&self, m: &Mlp) -> Result<()> {
        let (hidden, d_model) = (m.down.inputs()?, self.d_model);
        let parts = if m.layout == MlpLayout::Plain { 1 } else { 2 };
        self.product("up", &m.up, parts * hidden, d_model)?;
        self.product("down", &m.down, d_model, hidden)
    }

    fn shared(&self, m: &Shared) -> Result<()> {
        let d_model = self.d_model;
        self.norm("norm of a shared block", &m.norm, 2 * d_model)?;
        self.attention(&m.attention, 2 * d_model)?;
        if let Some(adapters) = &m.qkv_adapters {
            let rank = adapters[0].down.dim(0)?;
            for (adapter, heads) in adapters.iter().zip(m.attention.heads()) {
                self.low_rank("qkv_adapters", adapter, heads * m.attention.headdim, 2 * d_model)?;
                if adapter.down.dim(0)? != rank {
                    bail!("{OP}: `qkv_adapters` are of different ranks");
                }
            }
        }
        self.norm("norm2", &m.norm2, d_model)?;
        self.mlp(&m.mlp)?;
        let outputs = m.mlp.up.outputs()?;
        m.mlp_adapter.iter().try_for_each(|x| self.low_rank("mlp_adapter", x, outputs, d_model))?;
        self.matrix("linear", &m.linear, d_model, d_model)
    }
}
