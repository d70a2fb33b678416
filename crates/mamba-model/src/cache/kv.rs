//! Keys and values of one sequence, in blocks: what is there stays where it is when there is more.
//!
//! A fork shares all blocks. Whoever goes on first writes behind what both see; the other, should it go on too, into a copy of the
//! last block. Once a fork is given up, as one that has read wrong guesses, what it wrote counts for nothing and is
//! overwritten: going back costs no copy, however much was read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use mamba_ops::decoder::{BLOCK, KeysValues};

use crate::Result;

/// Keys and values of the tokens that a sequence has read, each token `(nheads_kv, headdim)`.
#[derive(Debug)]
pub(crate) struct KvCache {
    nheads_kv: usize,
    headdim: usize,
    blocks: Vec<Block>,
    window: Option<usize>,
}

/// `(1, capacity, nheads_kv, headdim)`, of which the first `len` tokens are there.
#[derive(Debug, Clone)]
struct Block {
    keys: Tensor,
    values: Tensor,
    len: usize,
    /// How many tokens all that share the memory have written, `len` at least.
    written: Arc<AtomicUsize>,
}

impl Block {
    fn new(keys: Tensor, values: Tensor, len: usize) -> Self {
        Self { keys, values, len, written: Arc::new(AtomicUsize::new(len)) }
    }

    fn capacity(&self) -> usize {
        self.keys.dims()[1]
    }

    fn bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        bytes(&self.keys) + bytes(&self.values)
    }

    /// Sees to it that the next `count` tokens can be written behind those that are there, and nobody else sees them.
    fn claim(&mut self, count: usize) -> Result<()> {
        let end = self.len + count;
        if let Some(written) = Arc::get_mut(&mut self.written) {
            *written.get_mut() = end; // nobody else is left, whatever was written
            return Ok(());
        }
        let first = self.written.compare_exchange(self.len, end, Ordering::Relaxed, Ordering::Relaxed);
        if first.is_err() {
            (self.keys, self.values) = (self.keys.copy()?, self.values.copy()?);
            self.written = Arc::new(AtomicUsize::new(end));
        }
        Ok(())
    }
}

impl KvCache {
    pub(super) fn new(nheads_kv: usize, headdim: usize, window: Option<usize>) -> Self {
        Self { nheads_kv, headdim, blocks: vec![], window }
    }

    /// The same with nothing left here.
    pub(super) fn take(&mut self) -> Self {
        Self { blocks: std::mem::take(&mut self.blocks), ..*self }
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    pub(super) fn bytes(&self) -> usize {
        self.blocks.iter().map(Block::bytes).sum()
    }

    /// The blocks, each by a number that no other memory has as long as this one is there, and its bytes.
    pub(super) fn shared_blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        self.blocks.iter().map(|block| (Arc::as_ptr(&block.written).addr(), block.bytes()))
    }

    /// Another that goes its own way, and shares the memory of what is there.
    pub(super) fn fork(&self) -> Self {
        Self { blocks: self.blocks.clone(), ..*self }
    }

    /// Room behind what is there, in a block of its own.
    fn push(&mut self, dtype: DType, device: &Device) -> Result<()> {
        let zeros = || Tensor::zeros((1, BLOCK, self.nheads_kv, self.headdim), dtype, device);
        self.blocks.push(Block::new(zeros()?, zeros()?, 0));
        Ok(())
    }

    /// Sees to it that a [`Decoder`](mamba_ops::decoder::Decoder) can write one more token; false if blocks are not as it takes them.
    pub(super) fn reserve(&mut self, dtype: DType, device: &Device) -> Result<bool> {
        let full = self.blocks.len().saturating_sub(1);
        let regular = |(i, block): (usize, &Block)| {
            block.capacity() == BLOCK && !block.keys.track_op() && (i >= full || block.len == BLOCK)
        };
        if !self.blocks.iter().enumerate().all(regular) {
            return Ok(false);
        }
        if self.blocks.last().is_none_or(|block| block.len == BLOCK) {
            self.push(dtype, device)?;
        }
        if let Some(block) = self.blocks.last_mut() {
            block.claim(1)?;
        }
        Ok(true)
    }

    /// What is there, and room for a token more, for a decoder.
    pub(super) fn keys_values(&self) -> KeysValues<'_> {
        KeysValues {
            len: self.blocks.iter().map(|block| block.len).sum(),
            blocks: self.blocks.iter().map(|block| [&block.keys, &block.values]).collect(),
        }
    }

    /// Counts the token that a decoder has written.
    pub(super) fn grow(&mut self) {
        if let Some(block) = self.blocks.last_mut() {
            block.len += 1;
        }
        self.trim();
    }

    /// Adds tokens, `(1, seqlen, nheads_kv, headdim)`.
    pub(crate) fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let seqlen = keys.dim(1)?;
        if keys.track_op() || values.track_op() {
            // Writing into a block would cut their gradients.
            self.blocks.push(Block::new(keys.clone(), values.clone(), seqlen));
            return Ok(());
        }
        let mut read = 0;
        while read < seqlen {
            if self.blocks.last().is_none_or(|block| block.len == block.capacity() || block.keys.track_op()) {
                self.push(keys.dtype(), keys.device())?;
            }
            let Some(block) = self.blocks.last_mut() else { break };
            let count = (block.capacity() - block.len).min(seqlen - read);
            block.claim(count)?;
            for (target, source) in [(&block.keys, keys), (&block.values, values)] {
                target.slice_set(&source.narrow(1, read, count)?.contiguous()?, 1, block.len)?;
            }
            block.len += count;
            read += count;
        }
        Ok(())
    }

    /// Blocks of keys and of values, the oldest first.
    pub(crate) fn blocks(&self) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let filled = |x: &Tensor, len: usize| x.narrow(1, 0, len);
        let (mut keys, mut values) = (vec![], vec![]);
        for block in &self.blocks {
            keys.push(filled(&block.keys, block.len)?);
            values.push(filled(&block.values, block.len)?);
        }
        Ok((keys, values))
    }

    /// Lets go of blocks that no later token will see.
    pub(crate) fn trim(&mut self) {
        let Some(window) = self.window else { return };
        let mut total: usize = self.blocks.iter().map(|block| block.len).sum();
        // The next token sees itself and `window - 1` before it.
        while let Some(first) = self.blocks.first()
            && total - first.len + 1 >= window
            && self.blocks.len() > 1
        {
            total -= first.len;
            self.blocks.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Storage};
    use proptest::prelude::*;

    use super::*;

    /// `count` tokens of one head of two numbers, from `first` on.
    fn tokens(first: usize, count: usize) -> Tensor {
        let numbers: Vec<f32> = (2 * first..2 * (first + count)).map(|n| n as f32).collect();
        Tensor::from_vec(numbers, (1, count, 1, 2), &Device::Cpu).unwrap()
    }

    fn append(cache: &mut KvCache, first: usize, count: usize) {
        let keys = tokens(first, count);
        cache.append(&keys, &keys.neg().unwrap()).unwrap();
    }

    fn numbers(cache: &KvCache) -> Vec<f32> {
        let (keys, values) = cache.blocks().unwrap();
        let flat = |blocks: &[Tensor]| -> Vec<f32> {
            blocks.iter().flat_map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
        };
        let (keys, values) = (flat(&keys), flat(&values));
        assert!(keys.iter().zip(&values).all(|(k, v)| *k == -v) && keys.len() == values.len());
        keys
    }

    /// Where the last block lies.
    fn place(cache: &KvCache) -> *const f32 {
        let (storage, _) = cache.blocks.last().unwrap().keys.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        storage.as_slice::<f32>().unwrap().as_ptr()
    }

    #[test]
    fn what_is_given_up_is_overwritten_in_place() {
        let mut cache = KvCache::new(1, 2, None);
        append(&mut cache, 0, 100);
        let before = place(&cache);
        for round in 0..5 {
            let mut guess = cache.fork();
            append(&mut guess, 1000, 50);
            assert_eq!((place(&guess), numbers(&guess).len()), (before, 2 * (150 + round)));
            drop(guess);
            append(&mut cache, 100 + round, 1);
            assert_eq!(place(&cache), before);
        }
        assert_eq!(numbers(&cache), (0..210).map(|n| n as f32).collect::<Vec<_>>());
        // And what is gone on with stays in place too.
        let mut right = cache.fork();
        append(&mut right, 105, 3);
        cache = right;
        append(&mut cache, 108, 1);
        assert_eq!((place(&cache), numbers(&cache).len()), (before, 218));
    }

    #[test]
    fn of_two_that_go_on_one_is_copied() {
        for first in [0, 1] {
            let mut one = KvCache::new(1, 2, None);
            append(&mut one, 0, 10);
            let mut caches = [one.fork(), one];
            let before = place(&caches[0]);
            append(&mut caches[first], 10, 5);
            append(&mut caches[1 - first], 20, 5);
            assert_eq!(place(&caches[first]), before);
            assert_ne!(place(&caches[1 - first]), before);
            assert_eq!(numbers(&caches[first])[20..], numbers_of(10..15));
            assert_eq!(numbers(&caches[1 - first])[20..], numbers_of(20..25));
        }
    }

    fn numbers_of(tokens: std::ops::Range<usize>) -> Vec<f32> {
        (2 * tokens.start..2 * tokens.end).map(|n| n as f32).collect()
    }

    proptest! {
        /// Any tree of forks, in any order: each has what it was given.
        #[test]
        fn forks_are_values(steps in prop::collection::vec((0u8..8, 0usize..8, 1usize..300), 1..60)) {
            let mut caches = vec![(KvCache::new(1, 2, None), vec![])];
            let mut next = 0;
            for (step, at, count) in steps {
                let at = at % caches.len();
                match step {
                    0 | 1 => {
                        let (cache, known) = &caches[at];
                        let fork = (cache.fork(), known.clone());
                        caches.push(fork);
                    }
                    2 if caches.len() > 1 => drop(caches.swap_remove(at)),
                    _ => {
                        let count = if step < 6 { count % 7 + 1 } else { count };
                        let (cache, known) = &mut caches[at];
                        append(cache, next, count);
                        known.extend(numbers_of(next..next + count));
                        next += count;
                    }
                }
                for (cache, known) in &caches {
                    prop_assert_eq!(&numbers(cache), known);
                }
            }
        }
    }

    #[test]
    fn a_copy_has_the_dtype_and_the_window() {
        let mut one = KvCache::new(1, 2, Some(4));
        let half = tokens(0, 3).to_dtype(DType::BF16).unwrap();
        one.append(&half, &half).unwrap();
        let mut two = one.fork();
        one.append(&half, &half).unwrap();
        two.append(&half, &half).unwrap();
        let (keys, _) = two.blocks().unwrap();
        assert_eq!((keys[0].dtype(), keys[0].dims(), two.window), (DType::BF16, &[1, 6, 1, 2][..], Some(4)));
    }
}
