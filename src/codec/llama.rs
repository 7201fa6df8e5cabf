//! llama.cpp's blocks as they lie in its memory and files, into packed sides and back, bit for bit.
//!
//! *Helps* a host take over a cache that llama.cpp wrote, or hand ours to it. *Hurts* nothing: codes and halves are
//! the same numbers in another order, nothing is rounded.
//!
//! A row of d elements is d/32 blocks: the scale as a half; in `_1` formats the minimum as a half; in five-bit formats
//! the fifth bits, element `i` in bit `i` of four bytes; then the codes, a byte each, or the lower four bits of
//! elements `i` and `i + 16` in one byte.

use crate::device::encoding::{Format, GROUP, PackedLayout, PackedRows};
use crate::error::KernelError;
use half::f16;

/// Name in errors.
const NAME: &str = "llama blocks";

/// Bytes of a block of 32 elements; `None` for formats that are not llama.cpp's.
pub const fn block_bytes(format: Format) -> Option<usize> {
    match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 => {
            Some(2 + 2 * format.has_min() as usize + GROUP * format.bits() / 8)
        }
        _ => None,
    }
}

/// Bytes that `rows` rows take as blocks, or why they cannot.
fn size(layout: &PackedLayout, rows: usize) -> Result<usize, KernelError> {
    let problem = match block_bytes(layout.packing.format) {
        None => "only q8_0, q4_0, q4_1, q5_0 and q5_1 are llama.cpp's",
        Some(_) if !layout.d.is_multiple_of(GROUP) => "llama.cpp's rows are whole blocks of 32 elements",
        Some(_) if layout.packing.center => "llama.cpp's blocks have no mean: pack without center",
        Some(_) if rows > layout.capacity => "more rows than the page holds",
        Some(bytes) => return Ok(rows * layout.d / GROUP * bytes),
    };
    Err(KernelError::Layout { kernel: NAME, problem })
}

/// The first `rows` rows as blocks, row after row.
///
/// # Errors
/// [`KernelError::Layout`] for other formats, centred pages, and rows that are not whole blocks.
pub fn export(packed: &PackedRows<'_>, rows: usize) -> Result<Vec<u8>, KernelError> {
    let layout = &packed.layout;
    let format = layout.packing.format;
    let mut out = Vec::with_capacity(size(layout, rows)?);
    for row in 0..rows {
        for start in (0..layout.d).step_by(GROUP) {
            for half in packed.halves(layout.group(row, start), 1) {
                out.extend(half.to_le_bytes());
            }
            let code = |i: usize| packed.code(row, start + i);
            if format.bits() == 8 {
                out.extend((0..GROUP).map(code));
                continue;
            }
            if format.bits() == 5 {
                let fifth = (0..GROUP).fold(0u32, |bits, i| bits | u32::from(code(i) >> 4) << i);
                out.extend(fifth.to_le_bytes());
            }
            out.extend((0..GROUP / 2).map(|i| code(i) & 15 | code(i + GROUP / 2) << 4));
        }
    }
    Ok(out)
}

/// Blocks into the first rows of a packed side's bytes, [`PackedLayout::bytes`] long. Gives the number of rows.
///
/// # Errors
/// As [`export`]; [`KernelError::Length`] for part of a row, or bytes of another length than the side's.
pub fn import(layout: &PackedLayout, blocks: &[u8], bytes: &mut [u8]) -> Result<usize, KernelError> {
    let row_bytes = size(layout, 1)?;
    let rows = blocks.len() / row_bytes;
    let length = |buffer, got, want| match got == want {
        true => Ok(()),
        false => Err(KernelError::Length { kernel: NAME, buffer, got, want }),
    };
    length("blocks (whole rows)", blocks.len(), rows * row_bytes)?;
    size(layout, rows)?;
    length("side", bytes.len(), layout.bytes())?;
    let format = layout.packing.format;
    let half = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
    let block_bytes = row_bytes / (layout.d / GROUP);
    for (index, block) in blocks.chunks_exact(block_bytes).enumerate() {
        let (row, start) = (index * GROUP / layout.d, index * GROUP % layout.d);
        let min = if format.has_min() { half(block, 2) } else { f16::ZERO };
        layout.set_parameters(bytes, layout.group(row, start), half(block, 0), min);
        let codes = &block[block.len() - GROUP * format.bits().min(8) / 8..];
        for i in 0..GROUP {
            let code = match format.bits() {
                8 => codes[i],
                bits => {
                    let nibbles = &codes[codes.len() - GROUP / 2..];
                    let low = nibbles[i % (GROUP / 2)] >> (i / (GROUP / 2) * 4) & 15;
                    let fifth = if bits == 5 { codes[i / 8] >> (i % 8) & 1 } else { 0 };
                    low | fifth << 4
                }
            };
            layout.set_code(bytes, row, start + i, code);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::encoding::Packing;
    use crate::device::page::Side;

    const FORMATS: [Format; 5] = [Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1];

    fn layout(format: Format, d: usize) -> PackedLayout {
        PackedLayout::new(Packing::new(format), Side::Key, d, 8)
    }

    #[test]
    fn any_blocks_come_back_bit_for_bit() {
        let mut state = 7u32;
        for format in FORMATS {
            let layout = layout(format, 96);
            let row_bytes = 3 * block_bytes(format).unwrap();
            let mut blocks: Vec<u8> = Vec::new();
            for _ in 0..5 * row_bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                blocks.push((state >> 24) as u8);
            }
            let mut bytes = vec![0xa5; layout.bytes()];
            assert_eq!(import(&layout, &blocks, &mut bytes), Ok(5));
            let packed = PackedRows { layout, bytes: &bytes };
            assert_eq!(export(&packed, 5), Ok(blocks), "{}", format.name());
        }
    }

    #[test]
    fn elements_stand_where_llama_cpp_puts_them() {
        // q4_0: scale 0.5, element 1 has code 3, element 17 has code 12.
        let mut block = vec![0u8; 18];
        block[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        block[2..].fill(0x88);
        block[3] = 0xc3;
        let layout4 = layout(Format::Q4_0, 32);
        let mut bytes = vec![0; layout4.bytes()];
        import(&layout4, &block, &mut bytes).unwrap();
        let mut row = vec![0.0; 32];
        PackedRows { layout: layout4, bytes: &bytes }.read(0, &mut row);
        assert_eq!((row[0], row[1], row[17]), (0.0, -2.5, 2.0));
        // q5_1: scale 1, minimum −1, fifth bits of elements 2 and 31.
        let mut block = vec![0u8; 24];
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        block[2..4].copy_from_slice(&f16::NEG_ONE.to_le_bytes());
        block[4..8].copy_from_slice(&(1u32 << 2 | 1 << 31).to_le_bytes());
        block[8 + 15] = 0x70;
        let layout5 = layout(Format::Q5_1, 32);
        let mut bytes = vec![0; layout5.bytes()];
        import(&layout5, &block, &mut bytes).unwrap();
        PackedRows { layout: layout5, bytes: &bytes }.read(0, &mut row);
        assert_eq!((row[0], row[2], row[31]), (-1.0, 15.0, 22.0));
    }

    #[test]
    fn what_is_no_block_is_refused() {
        let good = layout(Format::Q4_0, 64);
        let mut bytes = vec![0; good.bytes()];
        assert!(import(&good, &[0; 35], &mut bytes).is_err());
        assert!(import(&good, &[0; 36 * 9], &mut bytes).is_err());
        assert!(import(&good, &[0; 36], &mut bytes[1..]).is_err());
        assert!(import(&layout(Format::Int8, 64), &[0; 68], &mut bytes).is_err());
        assert!(import(&layout(Format::Q4_0, 48), &[0; 27], &mut bytes).is_err());
        let centred = PackedLayout { packing: good.packing.centered(), ..good };
        assert!(import(&centred, &[0; 36], &mut vec![0; centred.bytes()]).is_err());
        assert!(export(&PackedRows { layout: good, bytes: &bytes }, 9).is_err());
    }
}
