//! Attention of one token of each sequence to those before it.

use std::f64::consts::TAU;

use candle_core::{CpuStorage, DType, Result, Storage, bail};
use parking_lot::RwLockReadGuard;

use super::gates::Gated;
use super::products::{Rows, Run};
use super::scratch::Work;
use super::shared::adapt;
use crate::attention::cpu::{Block, Inputs, forward};
use crate::attention::{Options, Sizes};
use crate::decoder::{Attention, BLOCK, KeysValues, LowRank, MlpActivation, OP, Rotary, State, expect};
use crate::host::{SharedMut, Stored, read, stored, write};
use crate::norm::cpu::{self as rows, forward_to};
use crate::norm::{self, NormKind};

/// Checks the keys and values of each sequence: those that are full, and one block with room for the new token.
pub(super) fn check(m: &Attention, rows: &[KeysValues], positions: &[usize], dtype: DType) -> Result<()> {
    for (kv, &position) in rows.iter().zip(positions) {
        if position < kv.len {
            bail!("{OP}: a sequence at position {position} has {} keys", kv.len);
        }
        if kv.len / BLOCK + 1 != kv.blocks.len() {
            bail!("{OP}: {} tokens and a new one are in {} blocks of {BLOCK}", kv.len, kv.blocks.len());
        }
        for x in kv.blocks.iter().flatten() {
            expect("a block of keys or values", x, &[1, BLOCK, m.nheads_kv, m.headdim])?;
            if x.dtype() != dtype || x.track_op() {
                let (got, expected) = (x.dtype().as_str(), dtype.as_str());
                bail!(
                    "{OP}: keys or values have dtype {got} or track gradients, expected {expected} that do not"
                );
            }
        }
    }
    Ok(())
}

/// `work.inner ← [attention | MLP]`; the keys and values of the token are written behind those that are there.
pub(super) fn attend(
    run: Run,
    m: &Attention,
    adapters: Option<&[LowRank; 3]>,
    x: Rows,
    work: &mut Work,
    positions: &[usize],
    state: &State,
) -> Result<()> {
    let outputs = m.qkv.outputs()?;
    let Work { arranged, projected, .. } = &mut *work;
    match &m.conv {
        Some(conv) => run.convolved(&m.qkv, x, arranged, projected, conv, 0, state.conv)?,
        None => run.product(&m.qkv, x, arranged, (&SharedMut::new(projected), outputs), |_, _| {})?,
    }
    let mut begin = 0;
    for (adapter, heads) in adapters.into_iter().flatten().zip(m.heads()) {
        adapt(run, adapter, x, work, outputs, begin)?;
        begin += heads * m.headdim;
    }
    let Work { projected, inner, steps, .. } = work;
    let width = m.nheads * m.headdim;
    let heads = projected.chunks_exact_mut(outputs).zip(inner.chunks_exact_mut(width + m.mlp));
    for (((qkv, y), kv), &position) in heads.zip(&state.kv).zip(positions) {
        let (q, rest) = qkv.split_at_mut(width);
        let (k, rest) = rest.split_at_mut(m.nheads_kv * m.headdim);
        let v = &rest[..k.len()];
        if let Some((eps, [q_norm, k_norm])) = &m.qk_norms {
            for (x, weight) in [(&mut *q, q_norm), (&mut *k, k_norm)] {
                let weight = read(OP, weight)?;
                let sizes = norm::Sizes { rows: x.len() / m.headdim, dim: m.headdim, group_size: m.headdim };
                let y = &mut steps[..x.len()];
                let (kind, eps, weight) = (NormKind::Rms, *eps as f32, Some(&*weight));
                let rows = rows::Rows {
                    sizes,
                    kind,
                    eps,
                    norm_before_gate: false,
                    x,
                    weight,
                    bias: None,
                    residual: None,
                    z: None,
                };
                forward_to(&rows, run.isa, y);
                x.copy_from_slice(y);
            }
        }
        k.iter_mut().for_each(|k| *k *= m.key_scale as f32);
        if let Some(rotary) = &m.rotary {
            let turns = Turns::of(rotary)?;
            turns.turn(rotary, position, m.headdim, q);
            turns.turn(rotary, position, m.headdim, k);
        }
        if let Some(block) = kv.blocks.last() {
            for (x, new) in block.iter().zip([&*k, v]) {
                write(OP, x, kv.len % BLOCK * new.len(), new)?;
            }
        }
        y[..width].copy_from_slice(&scores(run, m, q, kv)?);
    }
    if m.mlp > 0 {
        let up = outputs - 2 * m.mlp;
        let gated = Gated { activation: MlpActivation::Silu, scale: 1.0 };
        let x = Rows::new(projected, outputs);
        run.gate(gated, x, [up + m.mlp], Some(up), (inner, width + m.mlp, width), m.mlp);
    }
    Ok(())
}

/// What the queries of one sequence read from its values, the new ones too.
fn scores(run: Run, m: &Attention, q: &[f32], kv: &KeysValues) -> Result<Vec<f32>> {
    let held: Vec<Option<[Stored; 2]>> =
        kv.blocks.iter().map(|[k, v]| Some([stored(k)?, stored(v)?])).collect();
    let mut blocks = vec![];
    for (i, block) in held.iter().flatten().enumerate() {
        let (Some(keys), Some(values)) = (block[0].values(), block[1].values()) else { continue };
        blocks.push(Block { keys, values, len: BLOCK.min(kv.len + 1 - i * BLOCK) });
    }
    if blocks.len() != kv.blocks.len() {
        bail!("{OP}: keys or values cannot be read")
    }
    let Attention { nheads, headdim, nheads_kv, softmax_scale: scale, window, .. } = *m;
    let sizes = Sizes { batch: 1, seqlen: 1, nheads, headdim, nheads_kv, kv_len: kv.len + 1 };
    let inputs = Inputs { sizes, options: Options { scale, causal: true, window }, q, blocks };
    Ok(forward(&inputs, run.isa))
}

/// By what parts of a whole turn each pair turns from one position to the next.
struct Turns<'a>(RwLockReadGuard<'a, Storage>);

impl<'a> Turns<'a> {
    fn of(rotary: &'a Rotary) -> Result<Self> {
        let (storage, layout) = rotary.frequencies.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F64(turns)), Some((0, end))) if turns.len() == end => Ok(Self(storage)),
            _ => bail!("{OP}: `rotary.frequencies` cannot be read"),
        }
    }

    /// Turns the first channels of each head.
    fn turn(&self, rotary: &Rotary, position: usize, headdim: usize, x: &mut [f32]) {
        let Storage::Cpu(CpuStorage::F64(turns)) = &*self.0 else { return };
        for (pair, turn) in turns.iter().enumerate() {
            let (sin, cos) = ((position as f64 * turn).fract() * TAU).sin_cos();
            let [sin, cos] = [sin, cos].map(|x| (x * rotary.factor) as f32);
            let [first, second] =
                if rotary.interleaved { [2 * pair, 2 * pair + 1] } else { [pair, pair + turns.len()] };
            for head in x.chunks_exact_mut(headdim) {
                let (a, b) = (head[first], head[second]);
                (head[first], head[second]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
}
