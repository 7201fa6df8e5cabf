//! Pages of consecutive entries: their means, their bounds, or both.

use super::{Codebook, Lesson, Role, Summary, Table, UnitRows, Units};
use crate::device::encoding::{Encoding, Format};
use crate::error::KernelError;
use crate::view::DType;
use half::{bf16, f16};

/// Entries summarised by one call, at most: bounds the memory of building an index over a long prompt.
const BATCH: usize = 4096;

/// Units of `page` consecutive entries.
#[derive(Clone, Debug)]
pub struct Pages {
    page: usize,
    /// Entries are taken in multiples of this.
    step: usize,
    tables: Vec<Table>,
    /// Whether how far members point away from their mean is said of every page.
    stray: bool,
}

impl Pages {
    /// Pages with means.
    pub fn means(page: usize, encoding: Encoding) -> Self {
        Self { page, step: page, tables: vec![Table::new(Role::Mean, encoding)], stray: false }
    }

    /// Pages with bounds.
    pub fn bounds(page: usize, encoding: Encoding) -> Self {
        Self { page, step: page, tables: vec![Table::new(Role::Bound, encoding)], stray: false }
    }

    /// The same with means beside, stored alike.
    #[must_use]
    pub fn and_means(self) -> Self {
        self.and(Role::Mean)
    }

    /// The same with bounds beside, stored alike.
    #[must_use]
    pub fn and_bounds(self) -> Self {
        self.and(Role::Bound)
    }

    fn and(mut self, role: Role) -> Self {
        self.tables.push(Table::new(role, self.tables[0].encoding));
        self
    }

    /// The same with [`Units::strays`].
    #[must_use]
    pub fn and_strays(mut self) -> Self {
        self.stray = true;
        self
    }

    /// The same with pages made so many entries at a time, a multiple of the page.
    #[must_use]
    pub fn by(mut self, step: usize) -> Self {
        self.step = step;
        self
    }
}

impl Summary for Pages {
    fn tables(&self) -> &[Table] {
        &self.tables
    }

    fn take(&self, pending: usize, _: bool, _: bool) -> usize {
        pending.min(BATCH.max(self.step)) / self.step * self.step
    }

    fn unit(&self) -> Option<usize> {
        Some(self.page)
    }

    fn waiting(&self) -> usize {
        self.step - 1
    }

    fn summarise(&self, lesson: &Lesson<'_>, _: Option<&Codebook>) -> Result<Units, KernelError> {
        let Lesson { shape, entries, .. } = *lesson;
        let units = entries.count / self.page;
        let rows = self.tables.iter().map(|table| {
            let (d_k, d_v) = table.role.dims(shape);
            let mut rows = UnitRows { keys: vec![0.0; units * d_k], values: vec![0.0; units * d_v] };
            let pages = entries.keys.chunks_exact(self.page * shape.d_k);
            let pages = pages.zip(entries.values.chunks_exact(self.page * shape.d_v));
            let out = rows.keys.chunks_exact_mut(d_k).zip(rows.values.chunks_exact_mut(d_v));
            for ((keys, values), (key, value)) in pages.zip(out) {
                match table.role {
                    Role::Mean => {
                        mean(keys, key);
                        mean(values, value);
                    }
                    Role::Bound => bound(keys, table, key),
                    Role::Group | Role::Code(_) | Role::Residual(_) => {
                        unreachable!("pages have means and bounds")
                    }
                }
            }
            rows
        });
        let rows = rows.collect();
        let strays = match self.stray {
            true => entries.keys.chunks_exact(self.page * shape.d_k).map(|p| stray(p, shape.d_k)).collect(),
            false => Vec::new(),
        };
        Ok(Units { counts: vec![self.page as u32; units], rows, strays, ..Units::default() })
    }
}

/// How far the keys of a page (`[n, d]`) point away from their mean: 1 less the least cosine between one of them and it.
pub fn stray(keys: &[f32], d: usize) -> f32 {
    let mut center = [0.0; crate::geometry::MAX_HEAD_DIM];
    let center = &mut center[..d];
    mean(keys, center);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let length = dot(center, center).sqrt();
    let cosine = |key: &[f32]| dot(key, center) / (length * dot(key, key).sqrt()).max(f32::MIN_POSITIVE);
    1.0 - keys.chunks_exact(d).map(cosine).fold(1.0, f32::min)
}

/// The mean of some rows.
pub(super) fn mean(rows: &[f32], out: &mut [f32]) {
    let count = rows.len() / out.len();
    out.fill(0.0);
    for row in rows.chunks_exact(out.len()) {
        out.iter_mut().zip(row).for_each(|(o, x)| *o += x);
    }
    out.iter_mut().for_each(|o| *o /= count as f32);
}

/// `[c, r]` with `|k − c| <= r` for every row `k`, also after `out` is stored as the table is, and before.
pub(super) fn bound(rows: &[f32], table: &Table, out: &mut [f32]) {
    let dtype = table.waiting();
    let d = out.len() / 2;
    let (center, radius) = out.split_at_mut(d);
    for (i, (c, r)) in center.iter_mut().zip(radius.iter_mut()).enumerate() {
        let column = || rows.iter().skip(i).step_by(d).copied();
        let (low, high) = column().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        // Halved before they are added: the sum of two large numbers would be infinite.
        *c = stored(0.5 * low + 0.5 * high, dtype, false);
        *r = stored(above((high - *c).max(*c - low)), dtype, true);
    }
    let margin = margin(out, table.encoding);
    if margin > 0.0 {
        out[d..].iter_mut().for_each(|r| *r = stored(above(*r + margin), dtype, true));
    }
}

/// The next number up: a difference was rounded.
fn above(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.next_up() }
}

/// A number as a type holds it, rounded up if `outward`.
fn stored(x: f32, dtype: DType, outward: bool) -> f32 {
    let (rounded, next) = match dtype {
        DType::F32 => return x,
        DType::F16 => (f16::from_f32(x).to_f32(), f16::from_bits(f16::from_f32(x).to_bits() + 1).to_f32()),
        DType::Bf16 => {
            (bf16::from_f32(x).to_f32(), bf16::from_bits(bf16::from_f32(x).to_bits() + 1).to_f32())
        }
    };
    // Only radii are rounded up, and they are not negative: the next bit pattern is the next number.
    if outward && rounded < x { next } else { rounded }
}

/// How much packing a row may move center and radius of one dimension together: half a step each, and a twentieth of
/// one for the rounding of scale and minimum.
fn margin(row: &[f32], encoding: Encoding) -> f32 {
    let Encoding::Packed(packing) = encoding else { return 0.0 };
    let (low, high) = row.iter().fold((0.0f32, 0.0f32), |(a, b), &x| (a.min(x), b.max(x)));
    // The margin itself widens what is packed, so it is taken of what it leads to.
    let share = |steps: f32, range: f32| 1.05 * range / (steps - 1.05);
    match packing.format {
        Format::Int8 => share(127.0, high.max(-low)),
        _ => share(15.0, high - low),
    }
}
