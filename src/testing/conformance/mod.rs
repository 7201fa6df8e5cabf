//! Every kernel, every case, on any backend, against the reference kernels.
//!
//! [`run`] is the whole suite; each kernel also has a function of its own, for a backend that is being
//! written. Outputs start as a NaN pattern, so a value that was never written is told apart from a zero.
//! *Helps* find the kernel, the case and the row that differ. *Hurts* by the scalar reference's time: a few
//! seconds for the full list, which [`Effort::Quick`] thins out.

mod attention;
mod codes;
mod factored;
mod layout;
mod linear;
mod merging;
mod selection;
mod weighing;

pub use attention::{attend, attention_mass, dot_scores, merge_partials, window_scores};
pub use codes::code_scores;
pub use factored::{attend_factored, rebuild};
pub use layout::{gather, pack, rope, row_norms, storage};
pub use linear::linear;
pub use merging::{merge_rows, nearest};
pub use selection::{pool, top_k};
pub use weighing::weigh_values;

use super::cache::is_poison;
use crate::backend::Backend;
use crate::error::{DeviceError, KernelError};
use std::fmt;

/// How many of the cases run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// All.
    Full,
    /// Every fifth: for slow devices (software Vulkan) and for repetitions over thread counts.
    Quick,
}

impl Effort {
    fn wants(self, index: usize) -> bool {
        match self {
            Self::Full => true,
            Self::Quick => index.is_multiple_of(5),
        }
    }
}

/// Why a case failed.
#[derive(Clone, Debug)]
pub enum Failure {
    /// A wrong result.
    Wrong(String),
    /// The kernel returned an error where it should have worked.
    Kernel(KernelError),
    /// The backend could not store the case's entries.
    Device(DeviceError),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Wrong(text)
    }
}

impl From<KernelError> for Failure {
    fn from(e: KernelError) -> Self {
        Self::Kernel(e)
    }
}

impl From<DeviceError> for Failure {
    fn from(e: DeviceError) -> Self {
        Self::Device(e)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(text) => f.write_str(text),
            Self::Kernel(e) => write!(f, "{e}"),
            Self::Device(e) => write!(f, "{e}"),
        }
    }
}

/// What one kernel's cases showed.
#[derive(Clone, Debug)]
pub struct KernelReport {
    /// The kernel.
    pub kernel: &'static str,
    /// Cases run.
    pub cases: usize,
    /// The largest error met, as a share of the tolerance (0 for exact kernels).
    pub worst: f64,
    /// The case that had it.
    pub worst_case: String,
    /// Cases that failed, with the reason.
    pub failures: Vec<String>,
}

impl KernelReport {
    fn new(kernel: &'static str) -> Self {
        Self { kernel, cases: 0, worst: 0.0, worst_case: String::new(), failures: Vec::new() }
    }

    /// Runs a case and keeps what it showed.
    fn case(&mut self, name: impl fmt::Display, check: impl FnOnce() -> Result<f64, Failure>) {
        self.cases += 1;
        match check() {
            // A NaN share is a failure the checks below must have named; it would never be the maximum.
            Ok(share) => {
                if share > self.worst {
                    self.worst = share;
                    self.worst_case = name.to_string();
                }
            }
            Err(failure) => self.failures.push(format!("{name}: {failure}")),
        }
    }

    /// Whether every case passed (and there were any).
    pub fn passed(&self) -> bool {
        self.cases > 0 && self.failures.is_empty()
    }
}

impl fmt::Display for KernelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.failures.len();
        write!(f, "{}: {} of {} cases passed", self.kernel, self.cases - failed.min(self.cases), self.cases)?;
        if self.worst > 0.0 {
            write!(f, ", worst error {:.3} of the tolerance ({})", self.worst, self.worst_case)?;
        }
        for failure in self.failures.iter().take(10) {
            write!(f, "\n    {failure}")?;
        }
        if failed > 10 {
            write!(f, "\n    … and {} more", failed - 10)?;
        }
        Ok(())
    }
}

/// What the suite showed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The backend and its hardware.
    pub backend: String,
    /// One entry per kernel.
    pub kernels: Vec<KernelReport>,
}

impl Report {
    /// Whether every case of every kernel passed.
    pub fn passed(&self) -> bool {
        self.kernels.iter().all(KernelReport::passed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.backend)?;
        self.kernels.iter().try_for_each(|k| write!(f, "\n  {k}"))
    }
}

/// Every kernel on `backend`.
pub fn run(backend: &dyn Backend, effort: Effort) -> Report {
    let kernels: [fn(&dyn Backend, Effort) -> KernelReport; 19] = [
        storage,
        pack,
        attend,
        merge_partials,
        attention_mass,
        window_scores,
        dot_scores,
        code_scores,
        weigh_values,
        row_norms,
        pool,
        top_k,
        gather,
        nearest,
        merge_rows,
        rebuild,
        attend_factored,
        linear,
        rope,
    ];
    Report {
        backend: format!("{} ({})", backend.name(), backend.describe()),
        kernels: kernels.iter().map(|kernel| kernel(backend, effort)).collect(),
    }
}

/// Fails on values never written and on NaN.
fn expect_written(what: &str, values: &[f32]) -> Result<(), Failure> {
    match values.iter().position(|x| x.is_nan()) {
        Some(i) if is_poison(values[i]) => Err(format!("{what}[{i}] was never written").into()),
        Some(i) => Err(format!("{what}[{i}] is NaN").into()),
        None => Ok(()),
    }
}

/// Fails if two runs of the same call differ in a bit.
fn expect_same_bits(what: &str, a: &[f32], b: &[f32]) -> Result<(), Failure> {
    match a.iter().zip(b).position(|(x, y)| x.to_bits() != y.to_bits()) {
        Some(i) => Err(format!("{what}[{i}] is {} in one run and {} in the next", a[i], b[i]).into()),
        None => Ok(()),
    }
}

/// Elementwise comparison: the largest error as a share of `allowed(want)`.
fn compare(what: &str, got: &[f32], want: &[f32], allowed: impl Fn(f32) -> f64) -> Result<f64, Failure> {
    expect_written(what, got)?;
    let mut worst = 0.0f64;
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if g == w {
            continue;
        }
        let share = (f64::from(g) - f64::from(w)).abs() / allowed(w);
        if share.is_nan() || share > 1.0 {
            return Err(
                format!("{what}[{i}] is {g}, should be {w} (error {share:.2} of the tolerance)").into()
            );
        }
        worst = worst.max(share);
    }
    Ok(worst)
}

/// Passes iff the call was refused for a length.
fn expect_length_error(what: &str, result: Result<(), KernelError>) -> Result<f64, Failure> {
    match result {
        Err(KernelError::Length { .. }) => Ok(0.0),
        Err(e) => Err(format!("{what}: refused, but with: {e}").into()),
        Ok(()) => Err(format!("{what}: accepted").into()),
    }
}
