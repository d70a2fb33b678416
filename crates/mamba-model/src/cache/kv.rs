//! Keys and values of one sequence, in blocks: what is there stays where it is when there is more.

use candle_core::Tensor;

use crate::Result;

/// Tokens of a block.
const BLOCK: usize = 256;

/// Keys and values of the tokens that a sequence has read, each token `(nheads_kv, headdim)`.
#[derive(Debug, Default)]
pub(crate) struct KvCache {
    blocks: Vec<Block>,
    window: Option<usize>,
}

/// `(1, capacity, nheads_kv, headdim)`, of which the first `len` tokens are there.
#[derive(Debug)]
struct Block {
    keys: Tensor,
    values: Tensor,
    len: usize,
}

impl Block {
    fn capacity(&self) -> usize {
        self.keys.dims()[1]
    }
}

impl KvCache {
    pub(super) fn new(window: Option<usize>) -> Self {
        Self { blocks: vec![], window }
    }

    /// The same with nothing left here.
    pub(super) fn take(&mut self) -> Self {
        Self { blocks: std::mem::take(&mut self.blocks), window: self.window }
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    pub(super) fn bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        self.blocks.iter().map(|block| bytes(&block.keys) + bytes(&block.values)).sum()
    }

    /// A copy: full blocks are shared, since they never change.
    pub(super) fn fork(&self) -> Result<Self> {
        let fork = |block: &Block| {
            let full = block.len == block.capacity();
            let copy = |x: &Tensor| if full { Ok(x.clone()) } else { x.copy() };
            Ok(Block { keys: copy(&block.keys)?, values: copy(&block.values)?, len: block.len })
        };
        Ok(Self { blocks: self.blocks.iter().map(fork).collect::<Result<_>>()?, window: self.window })
    }

    /// Adds tokens, `(1, seqlen, nheads_kv, headdim)`.
    pub(crate) fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (_, seqlen, nheads_kv, headdim) = keys.dims4()?;
        if keys.track_op() || values.track_op() {
            // Writing into a block would cut their gradients.
            self.blocks.push(Block { keys: keys.clone(), values: values.clone(), len: seqlen });
            return Ok(());
        }
        let mut read = 0;
        while read < seqlen {
            if self.blocks.last().is_none_or(|block| block.len == block.capacity() || block.keys.track_op()) {
                let zeros = || Tensor::zeros((1, BLOCK, nheads_kv, headdim), keys.dtype(), keys.device());
                self.blocks.push(Block { keys: zeros()?, values: zeros()?, len: 0 });
            }
            let Some(block) = self.blocks.last_mut() else { break };
            let count = (block.capacity() - block.len).min(seqlen - read);
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
