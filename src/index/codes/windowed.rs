//! Rotary positions at one distance: what a code can say of a key wherever the text goes on from it.
//!
//! A rotated key turns with its position, and the same thing said twice has two codes; a query turns on with every token,
//! away from those that codebooks were learnt for. So keys are turned back to position 0 before they are encoded, and a
//! query is turned to a constant distance from all of them (A2ATS, "windowed rotary embedding"): the logit of an entry is
//! estimated as if it stood that far back. Entries near by, for which the distance counts most, are recent and read anyway.

use crate::backend::Backend;
use crate::error::KernelError;
use crate::geometry::{KeyPhase, LayerShape, Rotary};
use crate::kernel::rope::{RopeArgs, RopeTarget};

/// Turns rows `[.., T, d_k]` that stand at `positions` (`T`) to `target`; keys and queries without a rotary embedding stay
/// as they are.
///
/// # Errors
/// [`KernelError`].
pub fn place(
    backend: &dyn Backend,
    shape: &LayerShape,
    target: i32,
    positions: &[i32],
    rows: &mut [f32],
) -> Result<(), KernelError> {
    let Some(rotary) = turns(shape).filter(|_| !rows.is_empty()) else { return Ok(()) };
    let once = rotary.table(positions.iter().map(|p| target - p));
    let table = match rows.len() / shape.d_k / positions.len() {
        1 => once,
        times => once.repeat(times),
    };
    let target = RopeTarget::Dense { rows, dim: shape.d_k };
    backend.rope(&mut RopeArgs { layout: rotary.layout, dims: rotary.dims, table: &table, target })
}

/// The rotary embedding that a layer's stored keys carry.
fn turns(shape: &LayerShape) -> Option<&Rotary> {
    shape.rotary.as_ref().filter(|_| shape.key_phase == KeyPhase::PostRope)
}
