//! Weights as the kernels read them.

use candle_core::{DType, Result, Tensor};

use super::{
    Attention, Conv, Layer, LowRank, Mamba1, Mamba2, Mixer, Mlp, Norm, Product, Rotary, Shared, ShortConv,
    Stack,
};

/// The same weights: matrices contiguous and, on a GPU, at addresses of 16 bytes, everything else in f32, frequencies as parts of a whole
/// turn, biases as they are added at last, scales of mixers as those of their last products; what is so already is shared.
pub(super) fn prepared(stack: &Stack) -> Result<Stack> {
    let layer = |layer: &Layer| -> Result<Layer> {
        let mixers = layer.mixers.iter().map(|(scale, mixer)| Ok((1.0, of_mixer(mixer, *scale)?)));
        Ok(Layer {
            shared: layer.shared.as_ref().map(shared).transpose()?,
            norm: norm(&layer.norm)?,
            mixers: mixers.collect::<Result<_>>()?,
        })
    };
    Ok(Stack {
        embedding: aligned(&stack.embedding)?,
        embedding_scale: stack.embedding_scale,
        layers: stack.layers.iter().map(layer).collect::<Result<_>>()?,
        norm_f: norm(&stack.norm_f)?,
        head: product(&stack.head)?,
    })
}

fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let address = crate::device::views(super::OP, [Some(&x)], |_, [x]| Ok(x.address))?;
        return if address.is_multiple_of(16) { Ok(x) } else { x.copy() };
    }
    Ok(x)
}

fn vector(x: &Tensor) -> Result<Tensor> {
    aligned(&x.to_dtype(DType::F32)?)
}

fn some(x: &Option<Tensor>) -> Result<Option<Tensor>> {
    x.as_ref().map(vector).transpose()
}

fn norm(n: &Norm) -> Result<Norm> {
    Ok(Norm { weight: vector(&n.weight)?, bias: some(&n.bias)?, ..n.clone() })
}

fn product(p: &Product) -> Result<Product> {
    scaled(p, 1.0)
}

/// The product times a factor.
fn scaled(p: &Product, factor: f64) -> Result<Product> {
    let weights = p.weights.iter().map(aligned).collect::<Result<_>>()?;
    let (mut bias, scales) = (some(&p.bias)?, some(&p.scales)?);
    if let (Some(bias), true) = (&mut bias, scales.is_some() || factor != 1.0) {
        *bias = (&*bias * factor)?;
        if let Some(scales) = &scales {
            *bias = (&*bias * scales)?;
        }
    }
    Ok(Product { weights, bias, scale: p.scale * factor, scales })
}

fn conv(c: &Conv) -> Result<Conv> {
    Ok(Conv { weight: vector(&c.weight)?, bias: some(&c.bias)?, silu: c.silu })
}

fn attention(m: &Attention, factor: f64) -> Result<Attention> {
    let rotary = |rotary: &Rotary| -> Result<Rotary> {
        let turns = (rotary.frequencies.to_dtype(DType::F64)? * std::f64::consts::TAU.recip())?;
        Ok(Rotary { frequencies: turns, ..rotary.clone() })
    };
    let qk_norms = match &m.qk_norms {
        Some((eps, [q, k])) => Some((*eps, [vector(q)?, vector(k)?])),
        None => None,
    };
    Ok(Attention {
        qkv: product(&m.qkv)?,
        conv: m.conv.as_ref().map(conv).transpose()?,
        qk_norms,
        rotary: m.rotary.as_ref().map(rotary).transpose()?,
        out_proj: scaled(&m.out_proj, factor)?,
        ..m.clone()
    })
}

fn mlp(m: &Mlp, factor: f64) -> Result<Mlp> {
    Ok(Mlp { up: product(&m.up)?, down: scaled(&m.down, factor)?, ..m.clone() })
}

fn shared(m: &Shared) -> Result<Shared> {
    let low_rank =
        |x: &LowRank| -> Result<LowRank> { Ok(LowRank { down: aligned(&x.down)?, up: aligned(&x.up)? }) };
    let qkv_adapters = match &m.qkv_adapters {
        Some([q, k, v]) => Some([low_rank(q)?, low_rank(k)?, low_rank(v)?]),
        None => None,
    };
    Ok(Shared {
        norm: norm(&m.norm)?,
        attention: attention(&m.attention, 1.0)?,
        qkv_adapters,
        norm2: norm(&m.norm2)?,
        mlp: mlp(&m.mlp, 1.0)?,
        mlp_adapter: m.mlp_adapter.as_ref().map(low_rank).transpose()?,
        linear: aligned(&m.linear)?,
    })
}

/// A mixer whose output is multiplied by a factor.
fn of_mixer(mixer: &Mixer, factor: f64) -> Result<Mixer> {
    Ok(match mixer {
        Mixer::Mamba1(m) => Mixer::Mamba1(Mamba1 {
            in_proj: product(&m.in_proj)?,
            conv: conv(&m.conv)?,
            x_proj: product(&m.x_proj)?,
            dt_bc_norms: match &m.dt_bc_norms {
                Some((eps, [dt, b, c])) => Some((*eps, [some(dt)?, some(b)?, some(c)?])),
                None => None,
            },
            dt_proj: aligned(&m.dt_proj)?,
            dt_bias: vector(&m.dt_bias)?,
            a: vector(&m.a)?,
            d: vector(&m.d)?,
            out_proj: scaled(&m.out_proj, factor)?,
        }),
        Mixer::Mamba2(m) => Mixer::Mamba2(Mamba2 {
            in_proj: product(&m.in_proj)?,
            conv: conv(&m.conv)?,
            dt_bias: vector(&m.dt_bias)?,
            a: vector(&m.a)?,
            d: vector(&m.d)?,
            norm: m.norm.as_ref().map(norm).transpose()?,
            out_proj: scaled(&m.out_proj, factor)?,
            ..m.clone()
        }),
        Mixer::Attention(m) => Mixer::Attention(attention(m, factor)?),
        Mixer::Mlp(m) => Mixer::Mlp(mlp(m, factor)?),
        Mixer::ShortConv(m) => Mixer::ShortConv(ShortConv {
            in_proj: product(&m.in_proj)?,
            conv: conv(&m.conv)?,
            out_proj: scaled(&m.out_proj, factor)?,
        }),
    })
}
