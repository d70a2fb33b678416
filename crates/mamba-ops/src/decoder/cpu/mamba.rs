//! Blocks of Mamba and Mamba-2.

use candle_core::{Result, Tensor, bail};

use super::products::{Gate, Rows, Run};
use super::scratch::Work;
use crate::decoder::{Mamba1, Mamba2, Norm, OP, State};
use crate::host::{SharedMut, modify, parallel, read};
use crate::norm::NormKind;
use crate::selective_state_update::Sizes;
use crate::selective_state_update::cpu::{ROWS, Update, UpdateRows, rows_of_task};

/// `work.inner ← y · silu(z)`. The step of a channel's state follows that of its step size.
pub(super) fn mamba1(run: Run, m: &Mamba1, x: Rows, work: &mut Work, state: &State) -> Result<()> {
    let ((d_inner, d_state), dt_rank) = (m.a.dims2()?, m.dt_proj.dim(1)?);
    let Work { arranged, projected, inner, steps, low, .. } = work;
    run.convolved(&m.in_proj, x, arranged, projected, &m.conv, 0, state.conv)?;
    let (xz, width) = (Rows::new(projected, 2 * d_inner), dt_rank + 2 * d_state);
    run.product(&m.x_proj, xz, arranged, (&SharedMut::new(low), width), |_, _| {})?;
    if let Some((eps, weights)) = &m.dt_bc_norms {
        let parts = [(0, dt_rank), (dt_rank, d_state), (dt_rank + d_state, d_state)];
        for ((first, len), weight) in parts.into_iter().zip(weights) {
            let weight = match weight {
                Some(weight) => weight.clone(),
                None => Tensor::ones(len, candle_core::DType::F32, m.a.device())?,
            };
            let norm = Norm { kind: NormKind::Rms, weight, bias: None, eps: *eps };
            run.norm(&norm, Rows::new(&low[first..], width), len, steps)?;
            for (low, part) in low.chunks_exact_mut(width).zip(steps.chunks_exact(len)).take(run.batch) {
                low[first..first + len].copy_from_slice(part);
            }
        }
    }
    let (a, d, dt_bias) = (read(OP, &m.a)?, read(OP, &m.d)?, read(OP, &m.dt_bias)?);
    let dbc = Rows::new(low, width);
    let (steps, inner) = (SharedMut::new(steps), SharedMut::new(inner));
    let move_on = |row: usize, first: usize, len: usize, h: &SharedMut| {
        // SAFETY: these channels are those of one task.
        let (dt, y, state) = unsafe {
            let at = row * d_inner + first;
            (steps.get(at, len), inner.get(at, len), h.get(at * d_state, len * d_state))
        };
        let update = Update {
            sizes: Sizes {
                batch: 1,
                tokens: 1,
                nheads: len,
                headdim: 1,
                ngroups: 1,
                d_state,
                has_heads: false,
                dt_per_head: false,
                a_per_head: false,
            },
            x: xz.part(row, first..first + len),
            dt,
            a: &a[first * d_state..(first + len) * d_state],
            b: dbc.part(row, dt_rank..dt_rank + d_state),
            c: dbc.part(row, dt_rank + d_state..width),
            d: Some(&d[first..first + len]),
            d_per_head: false,
            z: Some(xz.part(row, d_inner + first..d_inner + first + len)),
            dt_bias: Some(&dt_bias[first..first + len]),
            bias_per_head: false,
            dt_softplus: true,
            dt_limit: (0.0, f32::INFINITY),
            states: None,
        };
        run.isa.dispatch(UpdateRows { update: &update, token: 0, first: 0, y, state });
    };
    modify(OP, ssm(state)?, |h| {
        let h = SharedMut::new(h);
        run.matrix(&m.dt_proj, dbc, arranged, (&steps, d_inner, 0), true, |first, count| {
            for row in 0..run.batch {
                for at in (0..count).step_by(ROWS) {
                    move_on(row, first + at, ROWS.min(count - at), &h);
                }
            }
        })
    })
}

/// `work.inner ← norm(y, z)`, or `y · silu(z)`.
pub(super) fn mamba2(run: Run, m: &Mamba2, x: Rows, work: &mut Work, state: &State) -> Result<()> {
    let nheads = m.a.dim(0)?;
    let (d_inner, bc) = (nheads * m.headdim, m.ngroups * m.d_state);
    let Work { arranged, projected, inner, steps, .. } = work;
    run.convolved(&m.in_proj, x, arranged, projected, &m.conv, d_inner, state.conv)?;
    let zxbcdt = Rows::new(projected, m.in_proj.outputs()?);
    let (a, d, dt_bias) = (read(OP, &m.a)?, read(OP, &m.d)?, read(OP, &m.dt_bias)?);
    // What the norm does not gate, the update does.
    let scanned = if m.norm.is_some() { &mut *steps } else { &mut *inner };
    modify(OP, ssm(state)?, |h| {
        let (h, y) = (SharedMut::new(h), SharedMut::new(scanned));
        let rows = rows_of_task(m.d_state);
        let pieces = d_inner.div_ceil(rows);
        parallel(run.batch * pieces, run.batch * d_inner * (6 * m.d_state + 40), |task| {
            let (row, first) = (task / pieces, task % pieces * rows);
            let part = |first: usize, len: usize| zxbcdt.part(row, first..first + len);
            let update = Update {
                sizes: Sizes {
                    batch: 1,
                    tokens: 1,
                    nheads,
                    headdim: m.headdim,
                    ngroups: m.ngroups,
                    d_state: m.d_state,
                    has_heads: true,
                    dt_per_head: true,
                    a_per_head: true,
                },
                x: part(d_inner, d_inner),
                dt: part(2 * d_inner + 2 * bc, nheads),
                a: &a,
                b: part(2 * d_inner, bc),
                c: part(2 * d_inner + bc, bc),
                d: Some(&d),
                d_per_head: d.len() == nheads,
                z: m.norm.is_none().then(|| part(0, d_inner)),
                dt_bias: Some(&dt_bias),
                bias_per_head: true,
                dt_softplus: true,
                dt_limit: (m.dt_limit.0 as f32, m.dt_limit.1 as f32),
                states: None,
            };
            let (at, len) = (row * d_inner + first, rows.min(d_inner - first));
            // SAFETY: each task has its own channels.
            let (y, state) = unsafe { (y.get(at, len), h.get(at * m.d_state, len * m.d_state)) };
            run.isa.dispatch(UpdateRows { update: &update, token: 0, first, y, state });
        });
        Ok(())
    })?;
    match &m.norm {
        Some(norm) => {
            let gate = Gate { z: zxbcdt, norm_before_gate: m.norm_before_gate, groups: m.ngroups };
            run.gated_norm(norm, Rows::new(steps, d_inner), gate, inner)
        }
        None => Ok(()),
    }
}

fn ssm<'a>(state: &State<'a>) -> Result<&'a Tensor> {
    state.ssm.map_or_else(|| bail!("{OP}: a state is missing"), Ok)
}
