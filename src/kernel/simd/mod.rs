//! What the CPU halves of the kernels share: the instruction set chosen at run time, the threads, and the
//! small vector routines (widening, exponential, a block product) they are built from.
//!
//! Vector code is generic over `fearless_simd`'s token and enters through `dispatch!`, so one source
//! serves every instruction set and there is no `unsafe`. *Helps* every kernel alike. *Hurts* by one copy of
//! the machine code per instruction set.

/// Runs an expression with the token of a level: `fearless_simd`'s macro of that name, without the copy for SSE4.2.
/// Processors that have it and not AVX2 are from before 2013; for them the baseline will do, and everyone compiles
/// one copy less.
macro_rules! dispatch {
    ($level:expr, $simd:ident => $op:expr) => {{
        let level: fearless_simd::Level = $level;
        #[cfg(target_arch = "x86_64")]
        {
            use fearless_simd::{Level, Simd as _};
            match level {
                Level::Avx512($simd) => $simd.vectorize(
                    #[inline(always)]
                    || $op,
                ),
                Level::Avx2($simd) => $simd.vectorize(
                    #[inline(always)]
                    || $op,
                ),
                lower => {
                    let Some($simd) = lower.as_sse2() else { unreachable!("x86-64 has SSE2") };
                    $simd.vectorize(
                        #[inline(always)]
                        || $op,
                    )
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        fearless_simd::dispatch!(level, $simd => $op)
    }};
}
pub(crate) use dispatch;

pub(crate) mod apart;
pub(crate) mod chosen;
pub(crate) mod copies;
pub(crate) mod digits;
pub(crate) mod dots;
pub(crate) mod gemm;
pub(crate) mod integer;
pub(crate) mod math;
pub(crate) mod prefetch;
pub(crate) mod tile;
mod turn;
pub(crate) mod unpack;
pub(crate) mod weights;
pub(crate) mod widen;

use crate::device::Pool;

/// Instruction sets in ascending order. Detected once; an option may lower it, never raise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Level {
    /// What the target always has: SSE2 on x86-64, NEON on 64-bit Arm, scalar code elsewhere.
    Baseline,
    /// AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 as of Ice Lake.
    Avx512,
}

impl Level {
    /// All, ascending.
    pub const ALL: [Self; 3] = [Self::Baseline, Self::Avx2, Self::Avx512];

    /// The highest this machine can run.
    pub fn detect() -> Self {
        let level = fearless_simd::Level::new();
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        {
            if level.as_avx512().is_some() {
                return Self::Avx512;
            }
            if level.as_avx2().is_some() {
                return Self::Avx2;
            }
        }
        let _ = level;
        Self::Baseline
    }

    /// Those this machine can run, ascending.
    pub fn available() -> impl Iterator<Item = Self> {
        let highest = Self::detect();
        Self::ALL.into_iter().filter(move |&level| level <= highest)
    }

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline if cfg!(any(target_arch = "x86", target_arch = "x86_64")) => "sse2",
            Self::Baseline if cfg!(target_arch = "aarch64") => "neon",
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The proof `dispatch!` wants. A level this machine lacks, which [`Exec`] never holds, becomes the
    /// highest it has.
    pub(crate) fn token(self) -> fearless_simd::Level {
        let highest = fearless_simd::Level::new();
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        {
            use fearless_simd::Level as L;
            let lowered = match self {
                Self::Avx512 => highest.as_avx512().map(L::Avx512),
                Self::Avx2 => highest.as_avx2().map(L::Avx2),
                Self::Baseline => highest.as_sse2().map(L::Sse2),
            };
            lowered.unwrap_or(highest)
        }
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
        highest
    }
}

/// Where a CPU kernel runs: which instructions, which threads.
#[derive(Clone, Debug)]
pub struct Exec {
    level: Level,
    pool: Pool,
}

/// Scalar operations a call must be worth before other threads are woken. Waking one and joining it costs
/// 5 to 10 µs, in which one thread does about this much.
pub(crate) const PARALLEL_MIN_WORK: usize = 1 << 18;

/// Tasks per thread: enough that one which drew the cheap end of a causal triangle finds more to do.
const TASKS_PER_THREAD: usize = 4;

impl Exec {
    /// The highest level on the threads of `pool`.
    pub fn new(pool: Pool) -> Self {
        Self { level: Level::detect(), pool }
    }

    /// Lowers the level; a higher one than now changes nothing.
    pub fn lower(&mut self, level: Level) {
        self.level = self.level.min(level);
    }

    /// The level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The token of the level.
    pub(crate) fn token(&self) -> fearless_simd::Level {
        self.level.token()
    }

    /// Into how many tasks a call of so many scalar operations may split: one if it is not worth waking
    /// other threads, or if there are none.
    pub(crate) fn tasks(&self, operations: usize) -> usize {
        let threads = self.pool.threads();
        if threads < 2 || operations < PARALLEL_MIN_WORK { 1 } else { threads * TASKS_PER_THREAD }
    }

    /// Runs `work` in the pool, or right here if it is one task. Nothing may fork in the latter case: without
    /// a pool of its own that would start the process-wide one.
    pub(crate) fn run<R: Send>(&self, tasks: usize, work: impl FnOnce() -> R + Send) -> R {
        if tasks < 2 { work() } else { self.pool.run(work) }
    }
}

/// A rectangle of work that can be cut in two: how the kernels spread over threads without collecting tasks.
pub(crate) trait Split: Sized + Send {
    /// Equal pieces it consists of.
    fn pieces(&self) -> usize;

    /// The first `at` pieces and the rest; `0 < at < pieces`.
    fn split(self, at: usize) -> (Self, Self);

    /// Does the work of all its pieces.
    fn work(self);

    /// Cuts into up to `tasks` parts that run in parallel. The pieces, and so the results, do not depend on
    /// how they are grouped.
    fn spread(self, tasks: usize) {
        let pieces = self.pieces();
        if tasks < 2 || pieces < 2 {
            return self.work();
        }
        let (left, right) = self.split(pieces / 2);
        rayon::join(|| left.spread(tasks / 2), || right.spread(tasks - tasks / 2));
    }
}

/// How many tasks a part of the work may use, and scratch for as many.
#[derive(Debug)]
pub(crate) struct Lent<'a> {
    /// Equal parts, one per task.
    pub scratch: &'a mut [f32],
    /// How many.
    pub tasks: usize,
}

/// Two parts of the work, of these weights: in parallel if there is scratch for two tasks, else in turn.
pub(crate) fn both(
    lent: Lent<'_>,
    weights: (usize, usize),
    left: impl FnOnce(Lent<'_>) + Send,
    right: impl FnOnce(Lent<'_>) + Send,
) {
    let Lent { scratch, tasks } = lent;
    if tasks < 2 {
        left(Lent { scratch: &mut *scratch, tasks });
        right(Lent { scratch, tasks });
        return;
    }
    let share = tasks * weights.0 / (weights.0 + weights.1).max(1);
    let share = share.clamp(1, tasks - 1);
    let unit = scratch.len() / tasks;
    let (a, b) = scratch.split_at_mut(share * unit);
    let (a, b) = (Lent { scratch: a, tasks: share }, Lent { scratch: b, tasks: tasks - share });
    rayon::join(|| left(a), || right(b));
}

/// The first `len` elements, which are taken out of `slice`.
pub(crate) fn take<'a, T>(slice: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(len);
    *slice = tail;
    head
}
