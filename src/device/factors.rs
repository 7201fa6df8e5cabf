//! Rows that are products: entries of low rank, whose keys or values are not stored but made of two factors.
//!
//! ```text
//! x̂[i] = latents[i] · basis            latents [T, r], basis [r, d]
//! ```
//! The latent rows are shared by the KV heads of one or several layers; each head has a basis of its own. Keys are
//! products before their rotary embedding and are turned to their positions when they are made.
//!
//! *Helps* long runs of entries that lie near a space of few dimensions: `T r + n r` numbers instead of `T n`. *Hurts*
//! every reader of a key, who multiplies by the basis first; values are summed as latents and multiplied once. A few keys of
//! a head that lie outside the space may be kept as they are ([`Kept`]).

use super::angles::Angles;
use super::page::{Page, PageLayout, Segment, Side};
use std::ops::Range;
use std::sync::Arc;

/// Columns of a basis lie in multiples of this: the widest vector of floats.
pub const BASIS_PAD: usize = 16;

/// The second factor of one side of one KV head: `rank` rows in a page of keys.
#[derive(Clone, Debug)]
pub struct Basis {
    /// Capacity is the rank, `d_k` the dimension up to the next multiple of [`BASIS_PAD`]; no values.
    pub layout: Arc<PageLayout>,
    /// The rows.
    pub page: Arc<Page>,
}

impl Basis {
    /// Rows, `r`.
    pub fn rank(&self) -> usize {
        self.layout.capacity
    }
}

/// Keys that a product would be furthest from and that are stored beside it, of one KV head.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The latent rows in whose place they stand, ascending.
    pub latents: Arc<[u32]>,
    /// The keys in that order, before their rotary embedding as products are.
    pub keys: Arc<Segment>,
}

impl Kept {
    /// The row of the key that stands in the place of a latent row.
    #[inline]
    pub fn find(&self, latent: usize) -> Option<usize> {
        self.latents.binary_search(&(latent as u32)).ok()
    }

    /// A key in single precision.
    pub fn read(&self, row: usize, out: &mut [f32]) {
        let (layout, pages) = (&self.keys.layout, &self.keys.pages);
        layout.read_row(&pages[row / layout.capacity], Side::Key, row % layout.capacity, out);
    }

    /// Bytes without padding.
    pub fn bytes(&self) -> usize {
        self.keys.rows * self.keys.layout.row_bytes(Side::Key) + size_of_val(&*self.latents)
    }
}

/// What the entries of a segment are made of.
#[derive(Clone, Debug)]
pub struct Factors {
    /// Latent rows: of keys as keys, of values as values; a side that is not factored has no dimensions.
    pub latents: Arc<Segment>,
    /// Of keys, unless they lie in the pages.
    pub keys: Option<Basis>,
    /// Of values, likewise.
    pub values: Option<Basis>,
    /// The latent row of every entry; in their order if there is none.
    pub rows: Option<Arc<[u32]>>,
    /// Keys that are read instead of being made.
    pub kept: Option<Kept>,
    /// How keys are turned; none if they carry no rotary embedding.
    pub angles: Option<Arc<Angles>>,
}

impl Factors {
    /// The basis of a side.
    pub fn basis(&self, side: Side) -> Option<&Basis> {
        match side {
            Side::Key => self.keys.as_ref(),
            Side::Value => self.values.as_ref(),
        }
    }

    /// The latent row of an entry of the segment.
    #[inline]
    pub fn latent(&self, entry: usize) -> usize {
        self.rows.as_ref().map_or(entry, |rows| rows[entry] as usize)
    }

    /// The row of an entry's key among those that are kept.
    #[inline]
    pub fn kept(&self, entry: usize) -> Option<(&Kept, usize)> {
        let kept = self.kept.as_ref()?;
        Some((kept, kept.find(self.latent(entry))?))
    }

    /// How many of some entries' keys are kept.
    pub fn kept_among(&self, entries: Range<usize>) -> usize {
        let Some(kept) = self.kept.as_ref().filter(|_| !entries.is_empty()) else { return 0 };
        let (first, last) = (self.latent(entries.start) as u32, self.latent(entries.end - 1) as u32);
        let from = kept.latents.partition_point(|&row| row < first);
        let to = kept.latents.partition_point(|&row| row <= last);
        match &self.rows {
            None => to - from,
            // Of latent rows between, nothing may be made any more.
            Some(rows) => {
                let made = &rows[entries];
                kept.latents[from..to].iter().filter(|row| made.binary_search(row).is_ok()).count()
            }
        }
    }

    /// The latent row of an entry in single precision, of one side.
    pub fn read_latent(&self, side: Side, entry: usize, out: &mut [f32]) {
        let (layout, row) = (&self.latents.layout, self.latent(entry));
        layout.read_row(&self.latents.pages[row / layout.capacity], side, row % layout.capacity, out);
    }

    /// Bytes that a reader of one entry takes in: its latent rows.
    pub fn latent_bytes(&self) -> usize {
        let layout = &self.latents.layout;
        layout.row_bytes(Side::Key) + layout.row_bytes(Side::Value)
    }

    /// Bytes of the bases.
    pub fn basis_bytes(&self) -> usize {
        let bases = [&self.keys, &self.values].into_iter().flatten();
        bases.map(|basis| basis.layout.block_bytes()).sum()
    }
}
