//! Which sizes the kernels are for.

use candle_core::{DType, Result};

use super::products;
use crate::decoder::{Attention, Conv, Mixer, Mlp, OP, Product, Stack};
use crate::device::Gpu;

/// The widest convolution, and the widest heads: 16 bytes times two of each of 32 lanes, or, of odd sizes, four elements.
const WIDEST: usize = 4;
const WIDEST_HEAD_PACKS: usize = 64;
const WIDEST_ODD_HEAD: usize = 128;

/// Whether the kernels are for these sizes; matrices, and states of Mamba, are read 16 bytes at once.
pub(super) fn runs(stack: &Stack, batch: usize) -> Result<bool> {
    let dtype = stack.embedding.dtype();
    let pack = 16 / dtype.size_in_bytes();
    let gpu = Gpu::of(OP, &[Some(&stack.embedding)])?;
    let inputs = |inputs: usize| inputs.is_multiple_of(pack) && products::fits(&gpu, inputs, batch, dtype);
    let product = |x: &Product| -> Result<bool> { Ok(inputs(x.inputs()?)) };
    let conv = |x: &Conv| -> Result<bool> { Ok((2..=WIDEST).contains(&x.weight.dim(1)?)) };
    let attention = |m: &Attention| -> Result<bool> {
        let head = match m.headdim.is_multiple_of(pack) {
            true => m.headdim / pack <= WIDEST_HEAD_PACKS,
            false => m.headdim <= WIDEST_ODD_HEAD,
        };
        let conv = m.conv.as_ref().map_or(Ok(true), conv)?;
        Ok(head && conv && product(&m.qkv)? && product(&m.out_proj)?)
    };
    let mlp = |m: &Mlp| -> Result<bool> { Ok(product(&m.up)? && product(&m.down)?) };
    let mut runs = product(&stack.head)?;
    for layer in &stack.layers {
        if let Some(m) = &layer.shared {
            let ranks = m.qkv_adapters.iter().flatten().chain(&m.mlp_adapter);
            let ranks: Vec<usize> = ranks.map(|x| x.down.dim(0)).collect::<Result<_>>()?;
            let plain = m.attention.mlp == 0 && m.attention.conv.is_none();
            runs &= plain && attention(&m.attention)? && mlp(&m.mlp)? && ranks.into_iter().all(inputs);
        }
        for (_, mixer) in &layer.mixers {
            runs &= match mixer {
                Mixer::Mamba1(m) => {
                    product(&m.in_proj)?
                        && product(&m.x_proj)?
                        && product(&m.out_proj)?
                        && conv(&m.conv)?
                        && m.a.dim(1)? % 4 == 0
                        && products::fits(&gpu, m.x_proj.outputs()?, 1, DType::F32)
                }
                Mixer::Mamba2(m) => {
                    product(&m.in_proj)?
                        && product(&m.out_proj)?
                        && conv(&m.conv)?
                        && m.d_state % 4 == 0
                        && m.out_proj.inputs()? % (4 * m.ngroups) == 0
                }
                Mixer::Attention(m) => attention(m)?,
                Mixer::Mlp(m) => mlp(m)?,
                Mixer::ShortConv(m) => product(&m.in_proj)? && product(&m.out_proj)? && conv(&m.conv)?,
            };
        }
    }
    Ok(runs)
}
