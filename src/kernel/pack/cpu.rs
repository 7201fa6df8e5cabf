//! Both sides at once, on two threads; within a side the work of [`super::reference`].
//!
//! *Helps* the prompt, which is packed in one go. *Hurts* nothing: a page is packed once.

use super::PackArgs;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::kernel::simd::Exec;

/// See [`super`].
///
/// # Errors
/// [`KernelError::Length`], [`KernelError::NotFinite`], [`KernelError::Range`].
pub fn run(exec: &Exec, args: &mut PackArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let layout = args.layout;
    let (k, v) = args.page.block.host_mut()[..layout.mirror_offset()].split_at_mut(layout.v_offset());
    // Quantizing an element takes a few dozen operations.
    let tasks = exec.tasks(32 * (args.keys.len() + args.values.len()));
    let (keys, values) = (args.keys, args.values);
    exec.run(tasks, || {
        let mut key = || super::reference::side(layout, Side::Key, keys, k);
        let mut value = || super::reference::side(layout, Side::Value, values, v);
        let (a, b) = if tasks < 2 { (key(), value()) } else { rayon::join(key, value) };
        a.and(b)
    })
}
