//! Two-pass softmax attention, one query at a time: the definition, written out.

use super::AttendLane;
use crate::device::page::{HeadRows, Side};
use crate::error::KernelError;
use crate::kernel::AttentionParams;

/// Logits of one query on every entry of a head, `None` where it does not see the entry, or the entry is made of factors.
pub(in crate::kernel) fn logits(
    params: &AttentionParams<'_>,
    head: &HeadRows,
    query: &[f32],
    position: i32,
) -> Vec<Option<f32>> {
    let mut key = vec![0.0; params.d_k];
    let mut logits = Vec::with_capacity(head.rows());
    for p in head.pages() {
        for (row, &at) in p.positions().iter().enumerate() {
            logits.push((!p.layout.is_factored() && params.sees(position, at)).then(|| {
                p.layout.read_row(p.page, Side::Key, row, &mut key);
                let dot: f32 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                params.logit(dot) + p.bias().map_or(0.0, |b| b[row])
            }));
        }
    }
    logits
}

/// ln Σ exp, −∞ for an empty sum.
pub(in crate::kernel) fn log_sum_exp(values: impl Iterator<Item = f32> + Clone) -> f32 {
    let max = values.clone().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return max;
    }
    max + values.map(|x| (x - max).exp()).sum::<f32>().ln()
}

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`].
pub fn run(params: &AttentionParams<'_>, lanes: &mut [AttendLane<'_>]) -> Result<(), KernelError> {
    for lane in lanes {
        lane.validate(params)?;
        let tokens = lane.positions.len();
        let mut mass_start = 0;
        if let Some(mass) = &mut lane.mass {
            mass.fill(0.0);
        }
        for (h, head) in lane.heads.iter().enumerate() {
            let rows = head.rows();
            let pages = head.pages().count();
            let share = lane.share.range(pages);
            // Entries of the pages in this share, and of the spans.
            let mut in_share: Vec<bool> = head
                .pages()
                .enumerate()
                .flat_map(|(i, p)| std::iter::repeat_n(share.contains(&i), p.rows))
                .collect();
            if let Some(spans) = lane.spans {
                spans[h].gaps(rows).for_each(|gap| in_share[gap].fill(false));
            }
            for g in 0..params.group {
                for (i, &position) in lane.positions.iter().enumerate() {
                    let row = (h * params.group + g) * tokens + i;
                    let query = &lane.queries[row * params.d_k..(row + 1) * params.d_k];
                    let mut x = logits(params, head, query, position);
                    x.iter_mut().zip(&in_share).for_each(|(x, &keep)| {
                        if !keep {
                            *x = None;
                        }
                    });
                    let sink =
                        params.sink_logits.filter(|_| lane.share.index == 0).map(|s| s[h * params.group + g]);
                    let lse = log_sum_exp(x.iter().flatten().copied().chain(sink));
                    lane.lse[row] = lse;
                    let out = &mut lane.out[row * params.d_v..(row + 1) * params.d_v];
                    out.fill(0.0);
                    if lse == f32::NEG_INFINITY {
                        // Nothing seen, or only entries whose β is −∞.
                        continue;
                    }
                    let mut value = vec![0.0; params.d_v];
                    for p in head.pages() {
                        for local in 0..p.rows {
                            let Some(x) = x[p.first + local] else { continue };
                            let weight = (x - lse).exp();
                            p.layout.read_row(p.page, Side::Value, local, &mut value);
                            out.iter_mut().zip(&value).for_each(|(o, v)| *o += weight * v);
                            if let Some(mass) = &mut lane.mass {
                                mass[mass_start + g * rows + p.first + local] += weight;
                            }
                        }
                    }
                }
            }
            mass_start += params.group * rows;
        }
    }
    Ok(())
}
