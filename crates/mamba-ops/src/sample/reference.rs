//! The op in plain loops over numbers.

use candle_core::{DType, Result, Tensor};

use super::{Draw, NO_TOKEN, Sample};

/// The drawn ids, for any device and dtype: rows are read, sorted, and walked through in f64.
///
/// # Errors
/// If the logits cannot be read.
pub fn forward(args: &Sample) -> Result<Tensor> {
    let rows = args.logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let ids: Vec<u32> = rows.iter().zip(args.draws).map(|(row, draw)| one(row, draw)).collect();
    let count = ids.len();
    Tensor::from_vec(ids, count, args.logits.device())
}

fn one(row: &[f32], draw: &Draw) -> u32 {
    // Adding 0 makes -0 and 0 equal.
    let mut kept: Vec<(u32, f32)> = (0..).zip(row).map(|(id, x)| (id, x + 0.0)).collect();
    let likeliest = kept.iter().copied().reduce(|best, next| if next.1 > best.1 { next } else { best });
    let Some((likeliest, largest)) = likeliest else { return NO_TOKEN };
    if row.iter().any(|x| x.is_nan() || *x == f32::INFINITY) || largest == f32::NEG_INFINITY {
        return NO_TOKEN;
    }
    if draw.temperature == 0.0 {
        return likeliest;
    }
    let fits = (largest / draw.temperature).is_finite();
    for (_, x) in &mut kept {
        *x = match fits {
            true => *x / draw.temperature,
            // The difference may itself be too large for f32.
            false => ((f64::from(*x) - f64::from(largest)) / f64::from(draw.temperature)) as f32,
        };
    }
    let largest = kept[likeliest as usize].1;
    let mass = |(_, x): &(u32, f32)| f64::from(x - largest).exp();
    let sum = |kept: &[(u32, f32)]| kept.iter().map(mass).sum::<f64>();
    let top_k = draw.top_k.filter(|k| *k < kept.len());
    let top_p = draw.top_p.filter(|p| *p < 1.0);
    if top_k.is_some() || top_p.is_some() {
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    if let Some(k) = top_k {
        kept.truncate(k);
    }
    if let Some(p) = top_p {
        let wanted = p * sum(&kept);
        let mut reached = 0.0;
        let enough = kept.iter().position(|token| {
            reached += mass(token);
            reached >= wanted
        });
        kept.truncate(enough.map_or(kept.len(), |last| last + 1));
    }
    if let Some(p) = draw.min_p {
        kept.retain(|(_, x)| f64::from(*x) - f64::from(largest) >= p.ln());
    }
    let wanted = draw.uniform * sum(&kept);
    let mut reached = 0.0;
    let drawn = kept.iter().find(|token| {
        reached += mass(token);
        reached > wanted
    });
    drawn.map_or(likeliest, |(id, _)| *id)
}
