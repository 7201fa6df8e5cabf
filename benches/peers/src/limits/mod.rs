//! What the machine can do at all: read memory, and multiply and add.
//!
//! *Helps* because a kernel at the limit needs no further work, and one far from it does, whatever its peers
//! take. *Hurts* where a limit is measured too low: everything then looks better than it is. So several ways
//! to read are tried, and the best one counts.

pub(crate) mod peak;
pub(crate) mod stream;

use crate::contestant::{Contestant, Kind, Result, Side};
use crate::rounds::median;
use memmap2::MmapMut;
use peak::Peak;
use rayon::ThreadPool;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;
use stream::Reader;

/// Name of the large streaming read in tables.
pub(crate) const STREAM: &str = "stream";
/// Name of the read of one configuration's bytes.
pub(crate) const ONCE: &str = "same bytes once";
/// Name of the arithmetic peak.
pub(crate) const PEAK: &str = "FMA peak";

/// Anonymous memory that is really there: every page was written.
pub(crate) fn buffer(bytes: usize, huge: bool) -> Result<MmapMut> {
    let mut map = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    {
        use memmap2::Advice::{HugePage, NoHugePage};
        // A system without huge pages measures with small ones.
        let _ = map.advise(if huge { HugePage } else { NoHugePage });
    }
    for (i, page) in map.chunks_mut(4096).enumerate() {
        page.fill(i as u8);
    }
    Ok(map)
}

/// Reads `map` once on all threads of `pool`, each its own contiguous part.
fn read(pool: &ThreadPool, reader: Reader, map: &[u8]) -> u64 {
    let words: &[u64] = bytemuck::cast_slice(map);
    let sums = pool.broadcast(|thread| {
        let (i, of) = (thread.index(), thread.num_threads());
        reader.sum(&words[words.len() * i / of..words.len() * (i + 1) / of])
    });
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Tries every way to read, prints what each reached, and returns the best.
pub(crate) fn calibrate(pool: &ThreadPool, bytes: usize) -> Result<(Reader, Arc<MmapMut>)> {
    let rate = |reader, map: &[u8]| {
        let mut times: Vec<f64> = (0..6)
            .map(|_| {
                let start = Instant::now();
                black_box(read(pool, reader, map));
                start.elapsed().as_secs_f64()
            })
            .collect();
        bytes as f64 / median(&mut times) / 1e9
    };
    let map = buffer(bytes, true)?;
    let mut tried: Vec<(f64, Reader)> = Reader::all().into_iter().map(|r| (rate(r, &map), r)).collect();
    tried.sort_by(|a, b| b.0.total_cmp(&a.0));
    println!("streaming read of {} MiB, ways tried (GB/s):", bytes >> 20);
    for (rate, reader) in &tried {
        println!("  {rate:6.2}  {reader}");
    }
    let Some(&(_, best)) = tried.first() else { return Err("no way to read".into()) };
    let small = rate(best, &buffer(bytes, false)?);
    println!("  {small:6.2}  {best}, in pages of 4 KiB; all others in huge pages where the system has them");
    Ok((best, Arc::new(map)))
}

/// A streaming read of a whole buffer.
#[derive(Debug)]
pub(crate) struct Stream<'a> {
    label: &'static str,
    map: Arc<MmapMut>,
    reader: Reader,
    pool: &'a ThreadPool,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(label: &'static str, map: Arc<MmapMut>, reader: Reader, pool: &'a ThreadPool) -> Self {
        Self { label, map, reader, pool }
    }
}

impl Contestant for Stream<'_> {
    fn label(&self) -> String {
        self.label.into()
    }

    fn kind(&self) -> Kind {
        Kind::Limit
    }

    fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    fn run(&mut self) -> Result<()> {
        black_box(read(self.pool, self.reader, &self.map));
        Ok(())
    }

    fn result(&self) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    fn held(&self, _: usize, _: Side, _: usize) -> Option<Vec<f32>> {
        None
    }
}

/// Multiply-adds in registers on all threads.
#[derive(Debug)]
pub(crate) struct Arithmetic<'a> {
    peak: Peak,
    steps: usize,
    pool: &'a ThreadPool,
}

impl<'a> Arithmetic<'a> {
    /// With the instruction set that was faster in a first try.
    pub(crate) fn calibrate(pool: &'a ThreadPool) -> Result<Self> {
        let steps = 8_000_000;
        let mut tried: Vec<(f64, Peak)> = Vec::new();
        for peak in Peak::all() {
            let mut contestant = Self { peak, steps, pool };
            let mut times = Vec::new();
            for _ in 0..5 {
                let start = Instant::now();
                contestant.run()?;
                times.push(start.elapsed().as_secs_f64());
            }
            let rate = contestant.count() / median(&mut times) / 1e9;
            println!("multiply-adds in registers: {rate:.1} G/s in f32 with {peak}");
            tried.push((rate, peak));
        }
        tried.sort_by(|a, b| b.0.total_cmp(&a.0));
        let Some(&(_, peak)) = tried.first() else { return Err("no arithmetic".into()) };
        Ok(Self { peak, steps, pool })
    }

    /// Another handle of the same measurement.
    pub(crate) fn again(&self) -> Self {
        Self { peak: self.peak, steps: self.steps, pool: self.pool }
    }

    fn count(&self) -> f64 {
        (self.pool.current_num_threads() * self.steps * self.peak.per_step()) as f64
    }
}

impl Contestant for Arithmetic<'_> {
    fn label(&self) -> String {
        PEAK.into()
    }

    fn kind(&self) -> Kind {
        Kind::Limit
    }

    fn bytes(&self) -> u64 {
        0
    }

    fn multiply_adds(&self) -> Option<f64> {
        Some(self.count())
    }

    fn run(&mut self) -> Result<()> {
        black_box(self.pool.broadcast(|_| self.peak.run(self.steps)));
        Ok(())
    }

    fn result(&self) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    fn held(&self, _: usize, _: Side, _: usize) -> Option<Vec<f32>> {
        None
    }
}
