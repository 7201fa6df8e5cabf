//! One array for all pages that hold the same positions.
//!
//! KV heads and layers that were given the same tokens hold the same positions until a policy treats them differently.
//! With d 64 an array for every packed page takes 0.25 bits per element, as much as the scales of a 4-bit format.
//!
//! A page is compared with those that the same operation made before it, and with no others. *Helps* because heads and
//! layers are sealed and compacted together, so that equal pages are made together, and nothing is kept between
//! operations: a table of arrays would hold memory of its own, or be swept. *Hurts* sequences that are no forks of one
//! another: they do not share with each other, which costs one array per 128 tokens and sequence.

use crate::device::page::{Page, PageLayout};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Positions of the pages that one operation has made so far.
#[derive(Debug, Default)]
pub struct SharedPositions(BTreeSet<Arc<[i32]>>);

impl SharedPositions {
    /// Gives a page with `rows` entries the array of an equal one.
    ///
    /// A page that takes further entries keeps its own: it would have to be copied for the next of them.
    pub(super) fn share(&mut self, layout: &PageLayout, page: &mut Page, rows: usize) {
        if layout.is_exact() && rows < layout.capacity {
            return;
        }
        match self.0.get(&page.positions) {
            Some(shared) => page.positions = Arc::clone(shared),
            None => {
                self.0.insert(Arc::clone(&page.positions));
            }
        }
    }
}
