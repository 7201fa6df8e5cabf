//! Storing, gathering, rotating and measuring rows: what depends on how entries lie in pages.
//!
//! *Helps* find a wrong stride or a forgotten mirror, before attention is blamed. *Hurts* nothing.

use super::{Effort, Failure, KernelReport, compare, expect_length_error, expect_same_bits, expect_written};
use crate::backend::{Backend, Reference};
use crate::columns::ColumnLayout;
use crate::device::encoding::{Format, Packing};
use crate::device::page::{HeadRows, Page, PageLayout, Segment, Side};
use crate::error::KernelError;
use crate::geometry::RotaryLayout;
use crate::kernel::gather::{self, GatherArgs, GatherTarget};
use crate::kernel::pack::{self, PackArgs};
use crate::kernel::rope::{self, RopeArgs, RopeTarget};
use crate::kernel::row_norms::{self, NormArgs};
use crate::kernel::total_rows;
use crate::plan::HeadPlan;
use crate::store::{self, NewRows, SharedPositions};
use crate::testing::Random;
use crate::testing::cache::{CacheSpec, SegmentSpec, packings, poisoned};
use crate::testing::random::round_to;
use crate::view::DType;
use std::sync::Arc;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Dimensions and types every kernel here is tried with.
fn specs() -> Vec<CacheSpec> {
    let mut specs = Vec::new();
    for d in [1, 2, 3, 7, 8, 16, 31, 33, 64, 80, 96, 128, 256] {
        for dtype in TYPES {
            let mut spec = CacheSpec::f32(70 + d as u64, d, &[37, 0, 16], 16).typed(dtype, dtype);
            spec.gaps = true;
            spec.bias = d % 2 == 0;
            spec.column_words = d % 3;
            specs.push(spec);
        }
    }
    for (d_k, d_v, k, v) in [
        (64, 96, DType::F16, DType::F32),
        (3, 128, DType::Bf16, DType::F16),
        (33, 1, DType::F32, DType::Bf16),
    ] {
        let mut spec = CacheSpec::f32(90, d_k, &[5, 130], 64).typed(k, v);
        spec.d_v = d_v;
        spec.column_words = 2;
        specs.push(spec);
    }
    specs
}

fn name(spec: &CacheSpec) -> String {
    let segment = spec.heads[0][0];
    format!("d_k {}, d_v {}, {}/{}", spec.d_k, spec.d_v, segment.k, segment.v)
}

/// All entries of a head, widened.
fn dense(
    backend: &dyn Backend,
    head: &HeadRows,
    d_k: usize,
    d_v: usize,
) -> Result<(Vec<f32>, Vec<f32>), Failure> {
    let slots: Vec<u32> = (0..head.rows() as u32).collect();
    let (mut keys, mut values) = (poisoned(slots.len() * d_k), poisoned(slots.len() * d_v));
    let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
    backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
    expect_written("keys", &keys)?;
    expect_written("values", &values)?;
    Ok((keys, values))
}

/// A head whose entries are these pages.
fn head_of(layout: &PageLayout, pages: Vec<Page>, rows: usize) -> HeadRows {
    let pages = pages.into_iter().map(Arc::new).collect();
    HeadRows::new(vec![Segment { pages, rows, ..Segment::new(Arc::new(layout.clone())) }])
}

/// Page operations: fresh pages, narrowing, copies, memory accounting. Not a kernel, but what all of them
/// stand on.
pub fn storage(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new("storage");
    for spec in specs() {
        report.case(format!("write and read, {}", name(&spec)), || {
            let (ours, theirs) = (spec.build(&Reference::default())?, spec.build(backend)?);
            for (a, b) in ours.iter().zip(&theirs) {
                let (want, got) = (
                    dense(&Reference::default(), a, spec.d_k, spec.d_v)?,
                    dense(backend, b, spec.d_k, spec.d_v)?,
                );
                expect_same_bits("keys", &got.0, &want.0)?;
                expect_same_bits("values", &got.1, &want.1)?;
            }
            Ok(0.0)
        });
    }
    for dtype in TYPES {
        report.case(format!("narrowing to {}", dtype.name()), || {
            let layout = layout_of(backend, 8, dtype);
            let mut page = backend.allocate(&layout)?;
            let mut random = Random::new(71);
            // From below the smallest subnormal half to beyond the largest, halfway cases included.
            let mut rows: Vec<f32> = (0..32 * 8).map(|i| random.normal() * 2f32.powi(i % 40 - 26)).collect();
            rows[..6].copy_from_slice(&[
                1.0 + 2f32.powi(-11),
                1.0 + 3.0 * 2f32.powi(-11),
                65519.0,
                -0.0,
                6e-8,
                2e-8,
            ]);
            backend.write_rows(&layout, &mut page, 0, &rows, &rows)?;
            let (keys, values) = dense(backend, &head_of(&layout, vec![page], 32), 8, 8)?;
            let want: Vec<f32> = rows.iter().map(|&x| round_to(dtype, x)).collect();
            expect_same_bits("keys", &keys, &want)?;
            expect_same_bits("values", &values, &want)?;
            Ok(0.0)
        });
    }
    report.case("a fresh page is zero, also after another was freed", || {
        let layout = layout_of(backend, 5, DType::F16);
        for _ in 0..3 {
            let mut page = backend.allocate(&layout)?;
            if page.bias.is_some() {
                return Err("a fresh page has a bias".to_owned().into());
            }
            let ones = vec![1.0; 32 * 5];
            let (keys, _) = dense(backend, &head_of(&layout, vec![backend.allocate(&layout)?], 32), 5, 5)?;
            expect_same_bits("keys", &keys, &vec![0.0; 32 * 5])?;
            backend.write_rows(&layout, &mut page, 0, &ones, &ones)?;
        }
        Ok(0.0)
    });
    report.case("a copied page is independent", || {
        let layout = layout_of(backend, 6, DType::F16);
        let mut page = backend.allocate(&layout)?;
        let ones = vec![1.0; 32 * 6];
        page.positions_mut().iter_mut().zip(0..).for_each(|(p, i)| *p = i);
        page.bias = Some(vec![0.5; 32].into());
        backend.write_rows(&layout, &mut page, 0, &ones, &ones)?;
        let copy = backend.copy_page(&layout, &page)?;
        backend.write_rows(&layout, &mut page, 3, &[2.0; 6], &[2.0; 6])?;
        if copy.positions != page.positions || copy.bias != page.bias {
            return Err("the copy has other positions or β".to_owned().into());
        }
        page.positions_mut().fill(7);
        if !copy.positions.iter().copied().eq(0..32) {
            return Err("writing the page's positions reached the copy".to_owned().into());
        }
        let (keys, values) = dense(backend, &head_of(&layout, vec![copy], 32), 6, 6)?;
        expect_same_bits("keys of the copy", &keys, &ones)?;
        expect_same_bits("values of the copy", &values, &ones)?;
        Ok(0.0)
    });
    for dims in [1, 3, 4] {
        report.case(format!("{dims} words of any bits per entry, and no values"), || words(backend, dims));
    }
    report.case("memory is counted and given back", || {
        let layout = layout_of(backend, 64, DType::F32);
        let before = backend.memory().resident;
        let pages: Vec<Page> = (0..10).map(|_| backend.allocate(&layout)).collect::<Result<_, _>>()?;
        let during = backend.memory();
        drop(pages);
        let after = backend.memory().resident;
        if during.resident < before + 10 * layout.block_bytes()
            || during.peak < during.resident
            || after != before
        {
            return Err(format!("resident {before} before, {during:?} with ten pages, {after} after").into());
        }
        Ok(0.0)
    });
    report
}

/// Entries without values, whose keys are words and no numbers (codes): appended, forked, truncated, compacted.
fn words(backend: &dyn Backend, dims: usize) -> Result<f64, Failure> {
    let layout = Arc::new(PageLayout { d_k: dims, d_v: 0, ..layout_of(backend, 1, DType::F32) });
    let mut random = Random::new(77);
    let mut word = || match random.below(6) {
        // A NaN that signals, one with a payload, a negative one, infinity, a subnormal number, anything.
        0 => 0x7f80_0001,
        1 => 0x7fc5_a5a5,
        2 => 0xffff_ffff,
        3 => 0xff80_0000,
        4 => 0x0000_0001,
        _ => random.bits() as u32,
    };
    let mut words: Vec<u32> = (0..80 * dims).map(|_| word()).collect();
    let append = |head: &mut HeadRows, rows: &[u32]| {
        let first = head.pages().last().map_or(0, |p| p.positions()[p.rows - 1] + 1);
        let positions: Vec<i32> = (first..).take(rows.len() / dims).collect();
        let new = NewRows { positions: &positions, keys: bytemuck::cast_slice(rows), values: &[] };
        store::append(backend, &layout, head, new)
    };
    let expect = |what: &str, head: &HeadRows, words: &[u32]| {
        let slots: Vec<u32> = (0..head.rows() as u32).collect();
        let mut keys = poisoned(slots.len() * dims);
        let target = GatherTarget::Dense { keys: &mut keys, values: &mut [] };
        backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
        match keys.iter().map(|x| x.to_bits()).eq(words.iter().copied()) {
            true => Ok(()),
            false => Err(Failure::from(format!("{what}: other words than were stored"))),
        }
    };
    let mut head = HeadRows::default();
    let (all, other) = words.split_at_mut(70 * dims);
    append(&mut head, &all[..5 * dims])?;
    append(&mut head, &all[5 * dims..])?;
    expect("appended", &head, all)?;
    let mut fork = head.clone();
    store::truncate_rows(&mut fork, 40);
    expect("truncated", &fork, &all[..40 * dims])?;
    append(&mut fork, other)?;
    let mut forked = [&all[..40 * dims], other].concat();
    expect("appended to a fork", &fork, &forked)?;
    expect("what it was forked from", &head, all)?;
    let keep: Vec<u32> = (0..50).filter(|slot| slot % 3 != 1).collect();
    let plan = HeadPlan::new(50, keep.clone());
    let (columns, shared) = (&ColumnLayout::default(), &mut SharedPositions::default());
    store::compact(backend, &mut fork, &plan, columns, shared)?;
    forked = keep.iter().flat_map(|&slot| &forked[slot as usize * dims..][..dims]).copied().collect();
    expect("compacted", &fork, &forked)?;
    let mut norms = poisoned(fork.rows());
    let heads = std::slice::from_ref(&fork);
    backend.row_norms(&mut NormArgs { heads, side: Side::Value, out: &mut norms })?;
    match norms.iter().all(|&norm| norm == 0.0) {
        true => Ok(0.0),
        false => Err(format!("norms of no values: {norms:?}").into()),
    }
}

fn layout_of(backend: &dyn Backend, d: usize, dtype: DType) -> PageLayout {
    PageLayout {
        capacity: 32,
        d_k: d,
        d_v: d,
        k: dtype.into(),
        v: dtype.into(),
        mirrored: backend.mirrored(),
        column_words: 1,
        steady: false,
    }
}

/// One cache per packed format and treatment, in dimensions that end inside every kind of group.
fn packed_specs() -> Vec<CacheSpec> {
    let mut specs = Vec::new();
    for (i, packing) in packings().into_iter().enumerate() {
        let (d_k, d_v) = [(64, 64), (128, 80), (40, 96), (7, 128)][i % 4];
        let mut spec = CacheSpec::f32(200 + i as u64, d_k, &[150, 0, 3], 64).typed(packing, packing);
        spec.d_v = d_v;
        specs.push(spec);
    }
    specs
}

/// Cases of [`crate::kernel::pack`], read back by [`crate::kernel::gather`].
pub fn pack(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(pack::NAME);
    for spec in packed_specs() {
        report.case(name(&spec), || {
            let (ours, theirs) = (spec.build(&Reference::default())?, spec.build(backend)?);
            let mut worst = 0.0f64;
            for (a, b) in ours.iter().zip(&theirs) {
                let want = dense(&Reference::default(), a, spec.d_k, spec.d_v)?;
                let got = dense(backend, b, spec.d_k, spec.d_v)?;
                worst = worst.max(compare("key", &got.0, &want.0, pack::allowed)?);
                worst = worst.max(compare("value", &got.1, &want.1, pack::allowed)?);
            }
            Ok(worst)
        });
    }
    for (what, bad) in [("NaN", f32::NAN), ("infinity", f32::NEG_INFINITY), ("too large", f32::MAX)] {
        report.case(what, || {
            let layout =
                PageLayout { k: Packing::new(Format::Int4).into(), ..layout_of(backend, 64, DType::F32) };
            let mut page = backend.allocate(&layout)?;
            let (mut keys, values) = (vec![1.0; 2 * 64], vec![1.0; 2 * 64]);
            keys[70] = bad;
            let args = &mut PackArgs { layout: &layout, page: &mut page, keys: &keys, values: &values };
            match backend.pack(args) {
                Err(KernelError::NotFinite { row: 1, .. } | KernelError::Range { row: 1, .. }) => Ok(0.0),
                other => Err(format!("{other:?}").into()),
            }
        });
    }
    for rows in [33, 0] {
        report.case(format!("{rows} rows in a page of 32"), || {
            let layout = layout_of(backend, 4, DType::F32);
            let mut page = backend.allocate(&layout)?;
            let (keys, values) = (vec![0.0; 4 * rows], vec![0.0; 4 * rows]);
            let packed = backend.pack(&mut PackArgs {
                layout: &layout,
                page: &mut page,
                keys: &keys,
                values: &values,
            });
            if rows == 0 {
                packed.map(|()| 0.0).map_err(Failure::from)
            } else {
                expect_length_error("rows", packed)
            }
        });
    }
    report
}

/// Cases of [`crate::kernel::row_norms`].
pub fn row_norms(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(row_norms::NAME);
    for spec in specs().into_iter().chain(packed_specs()) {
        for side in [Side::Key, Side::Value] {
            report.case(format!("{side:?}, {}", name(&spec)), || {
                let (ours, theirs) = (spec.build(&Reference::default())?, spec.build(backend)?);
                let (mut want, mut got) = (poisoned(total_rows(&ours)), poisoned(total_rows(&ours)));
                Reference::default().row_norms(&mut NormArgs { heads: &ours, side, out: &mut want })?;
                backend.row_norms(&mut NormArgs { heads: &theirs, side, out: &mut got })?;
                compare("norm", &got, &want, |w| row_norms::TOLERANCE * f64::from(w))
            });
        }
    }
    report.case("wrong length of out", || {
        let heads = CacheSpec::f32(72, 4, &[3, 2], 4).build(backend)?;
        expect_length_error(
            "out",
            backend.row_norms(&mut NormArgs { heads: &heads, side: Side::Key, out: &mut [0.0; 4] }),
        )
    });
    report
}

/// Cases of [`crate::kernel::gather`].
pub fn gather(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(gather::NAME);
    for spec in specs() {
        for keep in ["all", "none", "first", "last", "some", "runs"] {
            report.case(format!("{keep}, {}", name(&spec)), || gather_case(backend, &spec, keep));
        }
    }
    report.case("dense from several segments", || {
        let mut spec = CacheSpec::f32(73, 40, &[], 16);
        spec.heads = vec![vec![
            SegmentSpec::stored(3, 16, DType::F32, DType::F32),
            SegmentSpec::stored(50, 8, DType::F16, DType::Bf16),
            SegmentSpec::stored(9, 64, DType::F32, DType::F16),
        ]];
        let (ours, theirs) = (spec.build(&Reference::default())?, spec.build(backend)?);
        let (want, got) =
            (dense(&Reference::default(), &ours[0], 40, 40)?, dense(backend, &theirs[0], 40, 40)?);
        expect_same_bits("keys", &got.0, &want.0)?;
        expect_same_bits("values", &got.1, &want.1)?;
        Ok(0.0)
    });
    report.case("into pages of a packed layout", || {
        let packing = Packing::new(Format::Int8);
        let heads = CacheSpec::f32(76, 32, &[20], 32).typed(packing, packing).build(backend)?;
        let layout = heads[0].segments[0].layout.clone();
        let mut pages = vec![backend.allocate(&layout)?];
        let target = GatherTarget::Pages { layout: &layout, pages: &mut pages };
        match backend.gather(&mut GatherArgs { head: &heads[0], slots: &[1], target }) {
            Err(KernelError::Layout { .. }) => Ok(0.0),
            other => Err(format!("{other:?}").into()),
        }
    });
    for (i, what) in ["pages", "keys", "values", "slots"].into_iter().enumerate() {
        report.case(format!("wrong {what}"), || {
            let heads = CacheSpec::f32(74, 4, &[20], 8).build(backend)?;
            let layout = heads[0].segments[0].layout.clone();
            let slots = [0, 3, if i == 3 { 20 } else { 19 }];
            let (mut keys, mut values) =
                (vec![0.0; 12 + usize::from(i == 1)], vec![0.0; 12 + usize::from(i == 2)]);
            let mut pages = Vec::new();
            let target = match i {
                0 => GatherTarget::Pages { layout: &layout, pages: &mut pages },
                _ => GatherTarget::Dense { keys: &mut keys, values: &mut values },
            };
            expect_length_error(
                what,
                backend.gather(&mut GatherArgs { head: &heads[0], slots: &slots, target }),
            )
        });
    }
    report
}

fn gather_case(backend: &dyn Backend, spec: &CacheSpec, keep: &str) -> Result<f64, Failure> {
    let (ours, theirs) = (spec.build(&Reference::default())?, spec.build(backend)?);
    for (a, b) in ours.iter().zip(&theirs) {
        let rows = a.rows() as u32;
        let mut random = Random::new(75);
        let slots: Vec<u32> = match keep {
            "all" => (0..rows).collect(),
            "none" => Vec::new(),
            "first" => (0..rows.min(1)).collect(),
            "last" => (rows.saturating_sub(1)..rows).collect(),
            "some" => (0..rows).filter(|_| random.one_in(3)).collect(),
            _ => (0..rows).filter(|s| s / 5 % 2 == 0).collect(),
        };
        let Some(segment) = a.segments.first() else { continue };
        let want = gather_pages(&Reference::default(), a, &segment.layout, &slots)?;
        let layout = &b.segments[0].layout;
        let got = gather_pages(backend, b, layout, &slots)?;
        let words = layout.column_words;
        for (g, w) in got.pages().zip(want.pages()) {
            if g.positions() != w.positions() || g.bias() != w.bias() {
                return Err(format!("positions or β of the page at slot {} differ", g.first).into());
            }
            if g.page.columns[..g.rows * words] != w.page.columns[..w.rows * words] {
                return Err(format!("columns of the page at slot {} differ", g.first).into());
            }
        }
        let (got, want) = (
            dense(backend, &got, spec.d_k, spec.d_v)?,
            dense(&Reference::default(), &want, spec.d_k, spec.d_v)?,
        );
        expect_same_bits("keys", &got.0, &want.0)?;
        expect_same_bits("values", &got.1, &want.1)?;
    }
    Ok(0.0)
}

fn gather_pages(
    backend: &dyn Backend,
    head: &HeadRows,
    layout: &PageLayout,
    slots: &[u32],
) -> Result<HeadRows, Failure> {
    let count = slots.len().div_ceil(layout.capacity);
    let mut pages: Vec<Page> = (0..count).map(|_| backend.allocate(layout)).collect::<Result<_, _>>()?;
    backend.gather(&mut GatherArgs {
        head,
        slots,
        target: GatherTarget::Pages { layout, pages: &mut pages },
    })?;
    Ok(head_of(layout, pages, slots.len()))
}

/// Cases of [`crate::kernel::rope`].
pub fn rope(backend: &dyn Backend, _: Effort) -> KernelReport {
    let mut report = KernelReport::new(rope::NAME);
    let dims = [
        (2, 2),
        (4, 2),
        (7, 6),
        (16, 16),
        (33, 32),
        (64, 64),
        (80, 32),
        (96, 96),
        (128, 128),
        (130, 6),
        (256, 256),
        (64, 0),
    ];
    for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
        for (dim, dims) in dims {
            for rows in [0, 1, 5, 32] {
                report.case(format!("dense {layout:?}, {dims} of {dim}, {rows} rows"), || {
                    let (mut want, table) = rope_input(rows, dim, dims, DType::F32);
                    let mut got = want.clone();
                    let args = |rows| RopeArgs {
                        layout,
                        dims,
                        table: &table,
                        target: RopeTarget::Dense { rows, dim },
                    };
                    Reference::default().rope(&mut args(&mut want))?;
                    backend.rope(&mut args(&mut got))?;
                    compare("row", &got, &want, |w| rope::TOLERANCE * (1.0 + f64::from(w.abs())))
                });
            }
            for dtype in TYPES {
                report.case(format!("keys {layout:?}, {dims} of {dim}, {}", dtype.name()), || {
                    rope_keys(backend, layout, dim, dims, dtype)
                });
            }
        }
    }
    for (i, what) in ["table", "rows", "dims"].into_iter().enumerate() {
        report.case(format!("wrong {what}"), || {
            let (dim, dims) = (8, if i == 2 { 10 } else { 8 });
            let (mut rows, mut table) = rope_input(3, dim, dims, DType::F32);
            table.truncate(table.len() - usize::from(i == 0));
            rows.truncate(rows.len() - usize::from(i == 1));
            let target = RopeTarget::Dense { rows: &mut rows, dim };
            expect_length_error(
                what,
                backend.rope(&mut RopeArgs { layout: RotaryLayout::HalfSplit, dims, table: &table, target }),
            )
        });
    }
    report
}

fn rope_input(rows: usize, dim: usize, dims: usize, dtype: DType) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(76);
    let values = random.rows(rows * dim, 1.0, dtype);
    let table =
        (0..rows * dims / 2).flat_map(|_| <[f32; 2]>::from((random.unit() * 7.0).sin_cos())).collect();
    (values, table)
}

fn rope_keys(
    backend: &dyn Backend,
    rotary: RotaryLayout,
    dim: usize,
    dims: usize,
    dtype: DType,
) -> Result<f64, Failure> {
    let (values, table) = rope_input(32, dim, dims, dtype);
    let turned = 19;
    let run = |on: &dyn Backend| -> Result<(Vec<f32>, Vec<f32>), Failure> {
        let layout = layout_of(on, dim, dtype);
        let mut page = on.allocate(&layout)?;
        on.write_rows(&layout, &mut page, 0, &values, &values)?;
        let target = RopeTarget::Keys { layout: &layout, page: &mut page, rows: turned };
        on.rope(&mut RopeArgs { layout: rotary, dims, table: &table[..turned * dims], target })?;
        dense(on, &head_of(&layout, vec![page], 32), dim, dim)
    };
    let (want, got) = (run(&Reference::default())?, run(backend)?);
    expect_same_bits("values, which do not turn", &got.1, &want.1)?;
    expect_same_bits("keys after the last turned", &got.0[turned * dim..], &want.0[turned * dim..])?;
    // One rounding of the stored type may fall the other way.
    let step = match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-10),
        DType::Bf16 => 2f64.powi(-7),
    };
    compare("key", &got.0, &want.0, |w| rope::TOLERANCE + (rope::TOLERANCE + step) * f64::from(w.abs()))
}
