//! The gradient of the table: positions sorted by id, then one task an id, so that each row has one writer.

use crate::host::{SharedMut, parallel};

/// Adds the rows of `grad`, `(ids, dim)`, to the rows `ids` of a table of zeros, `(rows, dim)`.
pub(super) fn backward(ids: &[u32], grad: &[f32], rows: usize, dim: usize) -> Vec<f32> {
    let mut table = vec![0.0; rows * dim];
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&position| ids[position as usize]); // stable: equal ids stay in their order
    let groups: Vec<&[u32]> = order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]).collect();
    {
        let table = SharedMut::new(&mut table);
        parallel(groups.len(), grad.len(), |group| {
            let group = groups[group];
            let row = ids[group[0] as usize] as usize;
            // SAFETY: ids are checked to be below `rows`, and no two groups have the same.
            let sum = unsafe { table.get(row * dim, dim) };
            for &position in group {
                let start = position as usize * dim;
                sum.iter_mut().zip(&grad[start..start + dim]).for_each(|(sum, grad)| *sum += grad);
            }
        });
    }
    table
}
