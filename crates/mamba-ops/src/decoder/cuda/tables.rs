//! Where keys and values lie, in GPU memory: a graph of kernels that read it there stays good while they grow.

use candle_core::{Result, Tensor, TensorId, bail};

use crate::decoder::{Attention, BLOCK, KeysValues, OP, expect};
use crate::device::{self, Buffer, Gpu};

/// The fewest blocks of a sequence that there is room for.
const FEWEST: usize = 16;

/// For each sequence and each attention in order: the position of the first key, then where blocks of keys lie, then
/// those of values.
pub(super) struct Tables {
    buffer: Buffer,
    /// Blocks of a sequence that there is room for.
    most: usize,
    count: usize,
    /// What is there, by sequence and attention.
    written: Vec<Vec<Record>>,
}

/// What a record was made of: a tensor has a number that no other one gets.
#[derive(Default, PartialEq)]
struct Record {
    begin: usize,
    blocks: Vec<[TensorId; 2]>,
}

impl Record {
    fn is_of(&self, begin: usize, kv: &KeysValues) -> bool {
        let ids = kv.blocks.iter().map(|block| block.map(Tensor::id));
        self.begin == begin && self.blocks.len() == kv.blocks.len() && self.blocks.iter().copied().eq(ids)
    }
}

impl Tables {
    /// Of so many attentions.
    pub(super) fn new(gpu: &Gpu, count: usize, batch: usize) -> Result<Self> {
        Self::with_room(gpu, count, batch, FEWEST)
    }

    fn with_room(gpu: &Gpu, count: usize, batch: usize, most: usize) -> Result<Self> {
        let buffer = gpu.buffer(candle_core::DType::I64, batch * count * (1 + 2 * most))?;
        let written = (0..batch).map(|_| (0..count).map(|_| Record::default()).collect()).collect();
        Ok(Self { buffer, most, count, written })
    }

    /// Blocks of a sequence that there is room for.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Numbers from one sequence to the next.
    pub(super) fn row(&self) -> usize {
        self.count * (1 + 2 * self.most)
    }

    /// Where the record of the first sequence of an attention lies.
    pub(super) fn address(&self, attention: usize) -> u64 {
        self.buffer.pointer().address + (attention * (1 + 2 * self.most) * size_of::<i64>()) as u64
    }

    /// Brings the tables to where keys and values of all attentions lie now; whether the tables themselves lie elsewhere.
    pub(super) fn update(
        &mut self,
        gpu: &Gpu,
        positions: &[usize],
        attentions: &[(&Attention, &[KeysValues])],
        dtype: candle_core::DType,
    ) -> Result<bool> {
        let needed =
            attentions.iter().flat_map(|(_, rows)| *rows).map(|kv| kv.blocks.len()).max().unwrap_or(0);
        let moves = needed > self.most;
        if moves {
            *self = Self::with_room(gpu, self.count, positions.len(), needed.next_power_of_two())?;
        }
        let record = 1 + 2 * self.most;
        for (row, (&position, written)) in positions.iter().zip(&mut self.written).enumerate() {
            let kvs = || attentions.iter().map(|(attention, rows)| (*attention, &rows[row]));
            let begin = |kv: &KeysValues| match position.checked_sub(kv.len) {
                Some(begin) => Ok(begin),
                None => bail!("{OP}: a sequence at position {position} has {} keys", kv.len),
            };
            let mut same = true;
            for ((_, kv), written) in kvs().zip(&*written) {
                same &= written.is_of(begin(kv)?, kv);
            }
            if same {
                continue;
            }
            let mut numbers = vec![0; self.count * record];
            for (i, ((attention, kv), written)) in kvs().zip(written).enumerate() {
                check(attention, kv, dtype)?;
                let numbers = &mut numbers[i * record..(i + 1) * record];
                numbers[0] = begin(kv)? as i64;
                for (j, block) in kv.blocks.iter().enumerate() {
                    for (number, x) in [1 + j, 1 + self.most + j].into_iter().zip(block) {
                        numbers[number] = device::modify_any(OP, x, |x| Ok(x.address as i64))?;
                    }
                }
                let blocks = kv.blocks.iter().map(|block| block.map(Tensor::id)).collect();
                *written = Record { begin: begin(kv)?, blocks };
            }
            gpu.write(&mut self.buffer, row * self.count * record, &numbers)?;
        }
        Ok(moves)
    }
}

/// Checks the blocks of a sequence: those that are full, and one with room for the new token.
fn check(attention: &Attention, kv: &KeysValues, dtype: candle_core::DType) -> Result<()> {
    if kv.len / BLOCK + 1 != kv.blocks.len() {
        bail!("{OP}: {} tokens and a new one are in {} blocks of {BLOCK}", kv.len, kv.blocks.len());
    }
    for x in kv.blocks.iter().flatten() {
        expect("a block of keys or values", x, &[1, BLOCK, attention.nheads_kv, attention.headdim])?;
        if x.dtype() != dtype || x.track_op() {
            let dtypes = (x.dtype().as_str(), dtype.as_str());
            bail!(
                "{OP}: keys or values have dtype {} or track gradients, expected {} that do not",
                dtypes.0,
                dtypes.1
            );
        }
    }
    Ok(())
}
