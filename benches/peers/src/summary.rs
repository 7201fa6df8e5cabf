//! The ratios that the attention kernels are accepted by, from one run.
//!
//! *Helps* because a target is either held or it is not. *Hurts* nothing; what was not measured is not
//! claimed.

use crate::config::Phase;
use crate::ggml;
use crate::ours;
use crate::report::Table;

/// A target, and the configurations it speaks of.
struct Target {
    what: &'static str,
    phase: Phase,
    group: &'static [usize],
    d: &'static [usize],
    n: fn(usize) -> bool,
    least: f64,
    value: fn(&Table) -> Option<f64>,
}

fn f16_of_stream(table: &Table) -> Option<f64> {
    table.of_stream(&ours::label("f16"))
}

fn f16_against_ggml(table: &Table) -> Option<f64> {
    table.faster(&ours::label("f16"), &ggml::label("f16"))
}

fn f16_of_peak(table: &Table) -> Option<f64> {
    table.of_peak(&ours::label("f16"))
}

/// How many times faster than kvsieve's own f16.
fn own(table: &Table, format: &str) -> Option<f64> {
    table.faster(&ours::label(format), &ours::label("f16"))
}

/// d 64 may be within 15 % of the shares of d 128.
const NARROW: f64 = 0.85;

#[rustfmt::skip]
const TARGETS: &[Target] = &[
    Target { what: "f16 decode, of streaming bandwidth", phase: Phase::Decode, group: &[1, 4], d: &[128],
        n: |n| n >= 32768, least: 0.85, value: f16_of_stream },
    Target { what: "f16 decode, of streaming bandwidth", phase: Phase::Decode, group: &[8], d: &[128],
        n: |n| n >= 32768, least: 0.60, value: f16_of_stream },
    Target { what: "f16 decode, of streaming bandwidth", phase: Phase::Decode, group: &[1, 4], d: &[64],
        n: |n| n >= 32768, least: 0.85 * NARROW, value: f16_of_stream },
    Target { what: "f16 decode, of streaming bandwidth", phase: Phase::Decode, group: &[8], d: &[64],
        n: |n| n >= 32768, least: 0.60 * NARROW, value: f16_of_stream },
    Target { what: "f16 decode, times faster than ggml f16", phase: Phase::Decode, group: &[4], d: &[128],
        n: |n| n == 65536, least: 6.0, value: f16_against_ggml },
    Target { what: "f16 decode, times faster than ggml f16", phase: Phase::Decode, group: &[8], d: &[128],
        n: |n| n == 65536, least: 8.0, value: f16_against_ggml },
    Target { what: "int8 decode, times faster than own f16", phase: Phase::Decode, group: &[4], d: &[128],
        n: |n| n == 65536, least: 1.7, value: |t| own(t, "int8") },
    Target { what: "int4 decode, times faster than own f16", phase: Phase::Decode, group: &[4], d: &[128],
        n: |n| n == 65536, least: 2.8, value: |t| own(t, "int4") },
    Target { what: "int4 decode, times faster than ggml q4_0", phase: Phase::Decode, group: &[4], d: &[128],
        n: |n| n == 65536, least: 20.0, value: |t| t.faster(&ours::label("int4"), &ggml::label("q4_0")) },
    Target { what: "f16 prefill, times faster than ggml f16", phase: Phase::Prefill, group: &[1, 4, 8], d: &[64, 128],
        n: |_| true, least: 2.0, value: f16_against_ggml },
    Target { what: "f16 prefill, of the FMA peak", phase: Phase::Prefill, group: &[1, 4, 8], d: &[64, 128],
        n: |_| true, least: 0.5, value: f16_of_peak },
];

/// Prints each target with each configuration that was measured; returns `(held, missed)`.
pub(crate) fn print(tables: &[Table]) -> (usize, usize) {
    println!("\nacceptance ratios (8 KV heads)");
    let (mut held, mut missed) = (0, 0);
    for target in TARGETS {
        for table in tables.iter().filter(|table| concerns(target, table)) {
            let Some(value) = (target.value)(table) else { continue };
            let good = value >= target.least;
            *(if good { &mut held } else { &mut missed }) += 1;
            let (n, group, d) = (table.config.n, table.config.group, table.config.d);
            println!(
                "  {:<42} n {n:<7} G {group}  d {d:<4} {value:>7.2}  (at least {:.2})  {}",
                target.what,
                target.least,
                if good { "ok" } else { "MISSED" }
            );
        }
    }
    println!("  {held} held, {missed} missed; what is not listed was not measured");
    (held, missed)
}

fn concerns(target: &Target, table: &Table) -> bool {
    let config = table.config;
    target.phase == config.phase
        && target.group.contains(&config.group)
        && target.d.contains(&config.d)
        && (target.n)(config.n)
}
