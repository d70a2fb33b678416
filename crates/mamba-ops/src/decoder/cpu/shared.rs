//! Blocks that several layers share, and adapters.

use candle_core::Result;

use super::products::{Rows, Run};
use super::scratch::{SharedScratch, Work};
use super::{attention, gates};
use crate::decoder::{LowRank, Shared, State};
use crate::host::SharedMut;

/// `sum ← stream + linear(mlp(norm2(attention(norm([stream | embedding])))))`.
#[expect(clippy::too_many_arguments, reason = "a block, its buffers, and where it stands")]
pub(super) fn sum(
    run: Run,
    m: &Shared,
    stream: &[f32],
    normed: &mut [f32],
    work: &mut Work,
    buffers: &mut SharedScratch,
    positions: &[usize],
    state: &State,
) -> Result<()> {
    let SharedScratch { embedding, both, given, sum } = buffers;
    let d_model = stream.len() / run.batch;
    let parts = stream.chunks_exact(d_model).zip(embedding.chunks_exact(d_model));
    for (both, (stream, embedding)) in both.chunks_exact_mut(2 * d_model).zip(parts) {
        both[..d_model].copy_from_slice(stream);
        both[d_model..].copy_from_slice(embedding);
    }
    run.norm(&m.norm, Rows::new(both, 2 * d_model), 2 * d_model, normed)?;
    let x = Rows::new(normed, 2 * d_model);
    attention::attend(run, &m.attention, m.qkv_adapters.as_ref(), x, work, positions, state)?;
    let out = &m.attention.out_proj;
    let inner = Rows::new(&work.inner, out.inputs()?);
    run.product(out, inner, &mut work.arranged, (&SharedMut::new(given), d_model), |_, _| {})?;

    run.norm(&m.norm2, Rows::new(given, d_model), d_model, normed)?;
    gates::mlp(run, &m.mlp, m.mlp_adapter.as_ref(), Rows::new(normed, d_model), work)?;
    let inner = Rows::new(&work.inner, m.mlp.down.inputs()?);
    run.product(&m.mlp.down, inner, &mut work.arranged, (&SharedMut::new(given), d_model), |_, _| {})?;

    let (given, sum) = (Rows::new(given, d_model), SharedMut::new(sum));
    run.matrix(&m.linear, given, &mut work.arranged, (&sum, d_model, 0), true, |first, count| {
        for (row, stream) in stream.chunks_exact(d_model).enumerate() {
            // SAFETY: these columns are this task's.
            let sum = unsafe { sum.get(row * d_model + first, count) };
            sum.iter_mut().zip(&stream[first..]).for_each(|(sum, x)| *sum += x);
        }
    })
}

/// Adds what an adapter gives of `x` to columns of `work.projected` from `begin` on, rows of which are `stride` apart.
pub(super) fn adapt(
    run: Run,
    adapter: &LowRank,
    x: Rows,
    work: &mut Work,
    stride: usize,
    begin: usize,
) -> Result<()> {
    let Work { arranged, projected, low, out, .. } = work;
    let (outputs, rank) = adapter.up.dims2()?;
    run.matrix(&adapter.down, x, arranged, (&SharedMut::new(low), rank, 0), true, |_, _| {})?;
    let (projected, out) = (SharedMut::new(projected), SharedMut::new(out));
    run.matrix(&adapter.up, Rows::new(low, rank), arranged, (&out, outputs, 0), true, |first, count| {
        for row in 0..run.batch {
            // SAFETY: these columns are this task's.
            let (sum, y) = unsafe {
                (projected.get(row * stride + begin + first, count), out.get(row * outputs + first, count))
            };
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += *y);
        }
    })
}
