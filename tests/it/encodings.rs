//! Packed formats: what they cost in bits, and how much they lose on data whose answer is known.

use crate::support::noise_normal;
use kvsieve::backend::{Backend, Reference};
use kvsieve::device::encoding::{Format, PackedLayout, Packing};
use kvsieve::device::page::{HeadRows, PageLayout, Segment, Side};
use kvsieve::kernel::gather::{GatherArgs, GatherTarget};
use kvsieve::kernel::pack::PackArgs;
use kvsieve::view::DType;
use std::sync::Arc;

const D: usize = 128;
const ROWS: usize = 128;

fn plain(format: Format) -> Packing {
    Packing { format, center: false, hadamard: false }
}

#[test]
fn bits_per_element_are_those_of_the_formats() {
    let bits = |packing| PackedLayout::new(packing, Side::Key, D, ROWS).bits_per_element();
    for (packing, want) in [
        (plain(Format::Int8), 8.125),
        (plain(Format::Int4), 4.25),
        (plain(Format::Int4).centered().rotated(), 4.375),
        (Packing::new(Format::Lm4), 4.25),
        (Packing::new(Format::Lm3), 3.25),
        (Packing::new(Format::Lm2), 2.25),
        (plain(Format::Kivi4), 5.0),
        (plain(Format::Kivi2), 3.0),
        (plain(Format::Q8_0), 8.5),
        (plain(Format::Q4_0), 4.5),
        (plain(Format::Q4_1), 5.0),
        (plain(Format::Q5_0), 5.5),
        (plain(Format::Q5_1), 6.0),
    ] {
        assert_eq!(bits(packing), want, "{packing}");
    }
}

/// A page of packed rows, and the rows read back.
fn round_trip(packing: Packing, rows: &[f32]) -> Vec<f32> {
    let backend = Reference::default();
    let layout = Arc::new(PageLayout {
        capacity: ROWS,
        d_k: D,
        d_v: D,
        k: packing.into(),
        v: DType::F32.into(),
        mirrored: false,
        column_words: 0,
        steady: false,
    });
    let mut page = backend.allocate(&layout).unwrap();
    backend.pack(&mut PackArgs { layout: &layout, page: &mut page, keys: rows, values: rows }).unwrap();
    let head =
        HeadRows::new(vec![Segment { pages: vec![Arc::new(page)], rows: ROWS, ..Segment::new(layout) }]);
    let (mut keys, mut values) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
    let slots: Vec<u32> = (0..ROWS as u32).collect();
    let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
    backend.gather(&mut GatherArgs { head: &head, slots: &slots, target }).unwrap();
    assert_eq!(values, rows);
    keys
}

/// Relative squared error over 4,096 vectors.
fn error(packing: Packing) -> f64 {
    let (mut lost, mut all) = (0.0, 0.0);
    for page in 0..32 {
        let rows: Vec<f32> = (0..ROWS * D).map(|i| noise_normal((page * ROWS * D + i) as u64)).collect();
        for (a, b) in rows.iter().zip(round_trip(packing, &rows)) {
            lost += f64::from(a - b) * f64::from(a - b);
            all += f64::from(*a) * f64::from(*a);
        }
    }
    lost / all
}

/// The error of each format on normally distributed rows, measured once with an independent program: for `int4` and the
/// Lloyd–Max formats with the fit that `kernel::pack` describes.
#[test]
fn normal_rows_lose_what_the_format_says() {
    for (format, want) in [
        (Format::Int8, 4.2e-5),
        // Without the fit 9.98e-3, 9.22e-3, 3.37e-2 and 0.1157.
        (Format::Int4, 8.75e-3),
        (Format::Lm4, 7.93e-3),
        (Format::Lm3, 3.18e-2),
        (Format::Lm2, 0.1147),
        (Format::Kivi2, 0.153),
        (Format::Q8_0, 2.9e-5),
        (Format::Q5_0, 1.84e-3),
        (Format::Q5_1, 1.43e-3),
        (Format::Q4_0, 7.35e-3),
        (Format::Q4_1, 6.08e-3),
    ] {
        for packing in [plain(format), plain(format).rotated()] {
            let got = error(packing);
            assert!((got / want - 1.0).abs() <= 0.05, "{packing}: {got:.3e}, should be {want:.3e}");
        }
    }
}

/// A bias that all keys share costs a format its levels; centring gives them back. The softmax cannot see the bias,
/// so what counts is the error less its mean.
#[test]
fn centring_frees_the_levels_from_a_common_bias() {
    let rows: Vec<f32> =
        (0..ROWS * D).map(|i| noise_normal(i as u64) + if i % D % 32 == 5 { 11.0 } else { 0.0 }).collect();
    let centred = |packing: Packing| -> f64 {
        let back = round_trip(packing, &rows);
        let (mut lost, mut all) = (0.0, 0.0);
        for c in 0..D {
            let column = |data: &dyn Fn(usize) -> f32| -> f64 {
                let values: Vec<f64> = (0..ROWS).map(|j| f64::from(data(j * D + c))).collect();
                let mean = values.iter().sum::<f64>() / ROWS as f64;
                values.iter().map(|x| (x - mean) * (x - mean)).sum()
            };
            lost += column(&|i| rows[i] - back[i]);
            all += column(&|i| rows[i]);
        }
        lost / all
    };
    for format in [Format::Int4, Format::Lm3, Format::Lm2] {
        let (without, with) = (centred(plain(format).rotated()), centred(plain(format).centered().rotated()));
        assert!(with < 0.6 * without, "{}: {without:.4} without, {with:.4} with", format.name());
    }
}
