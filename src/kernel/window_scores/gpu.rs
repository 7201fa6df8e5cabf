//! Window scores on the device: softmax without values, then the weights, in one submission.

use super::{NAME, WindowArgs, WindowReduce};
use crate::device::gpu::{Binding, Call, Context};
use crate::error::KernelError;
use crate::kernel::AttentionParams;
use crate::kernel::attend::Share;
use crate::kernel::attend::gpu::{self as attend, Unit};
use crate::kernel::attention_mass::gpu::{Output, batches, record_weights};

/// See [`super`].
///
/// # Errors
/// [`KernelError`].
pub(crate) fn run(
    context: &Context,
    params: &AttentionParams<'_>,
    args: &mut WindowArgs<'_>,
) -> Result<(), KernelError> {
    args.validate(params)?;
    let output = match args.reduce {
        WindowReduce::Sum => Output::Sums,
        WindowReduce::Rows => Output::Rows,
    };
    let units: Vec<Unit<'_>> =
        attend::units(0, args.heads, args.queries, args.positions, Share::ALL).collect();
    let floats = |u: &Unit<'_>| output.lines(params, u) * u.head.rows();
    let mut start = 0;
    for batch in batches(context, params, &units, floats)? {
        let tiles = attend::tiles(params, batch);
        let mut call = Call::new(context, NAME);
        let uploaded = attend::upload(&mut call, params, batch, &tiles);
        let softmax = attend::record(&mut call, params, batch, &tiles, &uploaded, false)?;
        let lse = Binding::from(&softmax.lse);
        let scores = record_weights(&mut call, params, output, batch, &tiles, &uploaded, &lse, |_| true)?;
        call.read(&scores);
        let back = call.finish()?;
        let len: usize = batch.iter().map(floats).sum();
        args.out[start..start + len].copy_from_slice(&back.floats(0)[..len]);
        start += len;
    }
    Ok(())
}
