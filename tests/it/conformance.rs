//! The conformance suite over the host backends.

use kvsieve::backend::{Cpu, Reference};
use kvsieve::testing::conformance::{self, Effort};

#[test]
fn the_reference_agrees_with_itself() {
    let report = conformance::run(&Reference::default(), Effort::Full);
    assert!(report.passed(), "{report}");
}

#[test]
fn cpu() {
    let report = conformance::run(&Cpu::default(), Effort::Full);
    assert!(report.passed(), "{report}");
}
