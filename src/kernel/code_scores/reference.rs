//! One query, one entry and one index at a time.

use super::CodeArgs;
use crate::device::page::Side;
use crate::error::KernelError;

/// See [`super`].
///
/// # Errors
/// As [`CodeArgs::validate`].
pub fn run(args: &mut CodeArgs<'_>) -> Result<(), KernelError> {
    args.validate()?;
    let (layout, levels, per_head) = (args.layout, args.levels, args.group * args.tokens);
    let table = layout.codes * levels;
    let mut key = vec![0.0; layout.words()];
    let mut codes = vec![0; layout.codes];
    let mut start = 0;
    for (h, head) in args.heads.iter().enumerate() {
        let (rows, mut at) = (args.entries(h), 0);
        let tables = &args.tables[h * per_head * table..(h + 1) * per_head * table];
        let out = &mut args.out[start..start + per_head * rows];
        for p in head.pages() {
            for row in 0..p.rows {
                let slot = p.first + row;
                if args.spans.is_some_and(|s| !s[h].spans().iter().any(|s| s.slots().contains(&slot))) {
                    continue;
                }
                p.layout.read_row(p.page, Side::Key, row, &mut key);
                layout.unpack(bytemuck::cast_slice(&key), &mut codes);
                for (i, table) in tables.chunks_exact(table).enumerate() {
                    let found = table.chunks_exact(levels).zip(&codes);
                    out[i * rows + at] =
                        found.map(|(codewords, &code)| codewords[usize::from(code).min(levels - 1)]).sum();
                }
                at += 1;
            }
        }
        start += per_head * rows;
    }
    Ok(())
}
