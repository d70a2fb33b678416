//! The launch of attention over keys and values.

use candle_core::{DType, Result};

use super::arguments::AttentionArgs;
use super::calls::{Args, Call};
use super::products::{Rows, address};
use super::scratch::Scratch;
use super::tables::Tables;
use crate::decoder::{Attention, OP};
use crate::device::{Buffer, Gpu, Kernel, Launch, Module, int, module};

pub(super) static MODULE: Module = module!("decoder_attention");

/// As in the kernel: threads of a block, heads of queries that it has at once, lanes of a warp.
const THREADS: usize = 128;
const HEADS: usize = 4;
const LANES: usize = 32;

/// The most parts that keys of a head are split into, and how many blocks there are for a multiprocessor.
const MOST_PARTS: usize = 32;
const BLOCKS: usize = 2;

/// How an attention is laid out on the GPU, whatever the number of keys.
struct Shape {
    /// Elements of a head that are read at once, packs of them for a lane, heads of queries of a block.
    pack: usize,
    chunks: usize,
    heads: usize,
    /// Blocks beside each other: by parts of the keys, and by heads.
    parts: usize,
    groups: usize,
    name: &'static str,
}

impl Shape {
    fn of(gpu: &Gpu, m: &Attention, dtype: DType, batch: usize) -> Self {
        let packed = 16 / dtype.size_in_bytes();
        let queries = m.nheads / m.nheads_kv;
        let (pack, chunks, heads, name) = match (m.headdim % packed, m.headdim <= LANES * packed, queries) {
            (0, true, 1) => (packed, 1, 1, "decoder_attend_packs_1_1"),
            (0, true, _) => (packed, 1, HEADS, "decoder_attend_packs_1_4"),
            (0, false, 1) => (packed, 2, 1, "decoder_attend_packs_2_1"),
            (0, false, _) => (packed, 2, HEADS, "decoder_attend_packs_2_4"),
            _ => (1, 4, 1, "decoder_attend_each_4_1"),
        };
        let groups = m.nheads_kv * queries.div_ceil(heads);
        let parts = (BLOCKS * gpu.multiprocessors()).div_ceil(batch * groups).clamp(1, MOST_PARTS);
        Self { pack, chunks, heads, parts, groups, name }
    }

    /// Bytes: heads of queries and a key, then what lanes of one head have found.
    fn shared(&self, headdim: usize) -> usize {
        let lanes = headdim.div_ceil(self.pack * self.chunks).next_power_of_two();
        ((self.heads + 1) * headdim).max(THREADS / lanes * (headdim + 2)) * size_of::<f32>()
    }
}

/// Where parts of the keys leave what they found, and how many have; for all attentions, one after another.
pub(super) struct Joining {
    parts: Buffer,
    done: Buffer,
}

impl Joining {
    /// None if there is no attention.
    pub(super) fn new(
        gpu: &Gpu,
        attentions: &[&Attention],
        dtype: DType,
        batch: usize,
    ) -> Result<Option<Self>> {
        let (mut parts, mut done) = (0, 0);
        for m in attentions {
            let shape = Shape::of(gpu, m, dtype, batch);
            let blocks = batch * shape.groups;
            parts = parts.max(blocks * shape.parts * shape.heads * (m.headdim + 2));
            done = done.max(blocks);
        }
        match attentions {
            [] => Ok(None),
            _ => Ok(Some(Self { parts: gpu.buffer(DType::F32, parts)?, done: gpu.zeros(DType::U32, done)? })),
        }
    }
}

impl Scratch {
    /// Attention of what is in `qkv`, to `y`; `number` is its place among all.
    pub(super) fn attend(
        &self,
        gpu: &Gpu,
        m: &Attention,
        tables: &Tables,
        number: usize,
        [qkv, y]: [Rows; 2],
    ) -> Result<Vec<Call>> {
        let Some(joining) = &self.joining else { return Ok(vec![]) };
        let shape = Shape::of(gpu, m, self.dtype, self.batch);
        let (eps, [q_norm, k_norm]) = match &m.qk_norms {
            Some((eps, [q, k])) => (*eps, [address(Some(q))?, address(Some(k))?]),
            None => (0.0, [0; 2]),
        };
        let rotary = m.rotary.as_ref();
        let frequencies = rotary.map(|rotary| &rotary.frequencies);
        let args = AttentionArgs {
            qkv: qkv.at.address,
            y: y.at,
            positions: self.positions.pointer().address,
            table: tables.address(number),
            parts: joining.parts.pointer().address,
            done: joining.done.pointer().address,
            q_norm,
            k_norm,
            turns: address(frequencies)?,
            stride: qkv.stride as i64,
            y_stride: y.stride as i64,
            nheads: int(OP, m.nheads)?,
            nheads_kv: int(OP, m.nheads_kv)?,
            headdim: int(OP, m.headdim)?,
            most: int(OP, tables.most())?,
            pairs: int(OP, frequencies.map_or(0, |x| x.elem_count()))?,
            interleaved: i32::from(rotary.is_some_and(|rotary| rotary.interleaved)),
            window: m.window.map_or(Ok(0), |window| int(OP, window))?,
            scale: m.softmax_scale as f32,
            key_scale: m.key_scale as f32,
            eps: eps as f32,
            turned_by: rotary.map_or(1.0, |rotary| rotary.factor) as f32,
            table_row: int(OP, tables.row())?,
        };
        let launch = Launch {
            blocks: [shape.parts, shape.groups, self.batch],
            threads: [THREADS, 1],
            shared: shape.shared(m.headdim),
        };
        let kernel = Kernel { module: &MODULE, name: shape.name, dtype: Some(self.dtype) };
        Ok(vec![Call::Kernel(kernel, launch, Args::Attention(args))])
    }
}
