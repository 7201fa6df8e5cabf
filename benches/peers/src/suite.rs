//! All contestants of one cache: built once for each length and dimension, measured for each group size.
//!
//! *Helps* because building takes longer than measuring. *Hurts* by memory: everyone's copy of the cache is
//! there at once; who does not fit is left out, with the reason.

use crate::candle;
use crate::config::{Config, Phase};
use crate::contestant::{Contestant, Result};
use crate::data::{Dense, Oracle};
use crate::ggml;
use crate::limits::{self, Arithmetic, ONCE, STREAM, Stream, stream::Reader};
use crate::machine;
use crate::ours;
use crate::rounds::{Outcome, measure};
use candle_core::DType;
use kvsieve::backend::Cpu;
use memmap2::MmapMut;
use rayon::ThreadPool;
use std::rc::Rc;
use std::sync::Arc;

/// What lives as long as the program.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) pool: ThreadPool,
    pub(crate) cpu: Cpu,
    pub(crate) ggml: ggml::Pool,
    /// Why candle stays out of all configurations, if it does.
    pub(crate) candle_out: Option<String>,
    pub(crate) reader: Reader,
    pub(crate) stream: Arc<MmapMut>,
    pub(crate) rounds: usize,
    /// Beginnings of names that are left out.
    pub(crate) without: Vec<String>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        !self.without.iter().any(|start| name.starts_with(start.as_str()))
    }
}

/// One cache in everyone's form.
#[derive(Debug)]
pub(crate) struct Suite<'a> {
    bench: &'a Bench,
    phase: Phase,
    dense: Dense,
    ours: Vec<ours::Store>,
    ggml: Vec<ggml::Store>,
    candle: Vec<(candle::Store, DType)>,
    once: Option<Arc<MmapMut>>,
    skipped: Vec<String>,
}

impl<'a> Suite<'a> {
    /// The cache of `n` entries of dimension `d`.
    ///
    /// # Errors
    /// If not even the exact data fit.
    pub(crate) fn build(bench: &'a Bench, phase: Phase, n: usize, d: usize) -> Result<Self> {
        let config = Config { phase, n, d, group: 1 };
        let exact = config.kv_bytes(size_of::<f32>());
        if let Some(reason) = machine::short_of(2 * exact) {
            return Err(format!("the exact data do not fit: {reason}").into());
        }
        let first = ours::Store::build(&bench.cpu, 0, n, d)?;
        let dense = first.dense(n, d);
        let mut suite = Self {
            bench,
            phase,
            dense,
            ours: vec![first],
            ggml: Vec::new(),
            candle: Vec::new(),
            once: None,
            skipped: Vec::new(),
        };
        // No packed format is larger than the exact one.
        for (i, (label, ..)) in ours::FORMATS.iter().enumerate().skip(1) {
            let name = ours::label(label);
            if bench.wants(&name) {
                let build = || ours::Store::build(&bench.cpu, i, n, d);
                suite.ours.extend(fits(&mut suite.skipped, &name, exact, build));
            }
        }
        for format in ggml::FORMATS {
            let name = ggml::label(format.name());
            if bench.wants(&name) {
                let build = || ggml::Store::build(*format, &suite.dense);
                suite.ggml.extend(fits(&mut suite.skipped, &name, format.bytes(n, d), build));
            }
        }
        match &bench.candle_out {
            _ if phase == Phase::Prefill || !bench.wants("candle") => {}
            Some(reason) => suite.skipped.push(format!("candle: {reason}")),
            None => {
                for dtype in [DType::F32, DType::F16] {
                    let name = format!("candle {}", dtype.as_str());
                    let build = || candle::Store::build(&suite.dense, dtype);
                    // A copy in f32 is made on the way.
                    let store = fits(&mut suite.skipped, &name, exact * 3 / 2, build);
                    suite.candle.extend(store.map(|store| (store, dtype)));
                }
            }
        }
        if phase == Phase::Decode {
            let bytes = config.kv_bytes(2);
            let build = || limits::buffer(bytes as usize, true).map(Arc::new);
            suite.once = fits(&mut suite.skipped, ONCE, bytes, build);
        }
        Ok(suite)
    }

    /// Measures one group size.
    pub(crate) fn run(&self, group: usize, arithmetic: &Arithmetic<'_>) -> Result<(Config, Outcome)> {
        let Bench { pool, cpu, reader, .. } = self.bench;
        let config = Config { phase: self.phase, n: self.dense.n, d: self.dense.d, group };
        let queries = Rc::new(config.queries());
        let oracle = Oracle::new(config, &self.dense, &queries);
        let mut outcome = Outcome { skipped: self.skipped.clone(), ..Outcome::default() };
        let mut all: Vec<Box<dyn Contestant + '_>> = Vec::new();
        match self.phase {
            Phase::Decode => {
                let stream = Arc::clone(&self.bench.stream);
                all.push(Box::new(Stream::new(STREAM, stream, *reader, pool)));
                if let Some(once) = &self.once {
                    all.push(Box::new(Stream::new(ONCE, Arc::clone(once), *reader, pool)));
                }
            }
            Phase::Prefill => all.push(Box::new(arithmetic.again())),
        }
        for store in &self.ours {
            all.push(Box::new(ours::Attend::new(cpu, store, config, Rc::clone(&queries))));
        }
        for store in &self.ggml {
            all.push(Box::new(ggml::Attention::new(&self.bench.ggml, store, config, &queries)?));
        }
        for (store, dtype) in &self.candle {
            for path in [candle::Path::Stock, candle::Path::Flash] {
                let needs = candle::Attention::transient(path, config, *dtype);
                if let Some(reason) = machine::short_of(needs) {
                    outcome.skipped.push(format!("candle {} ({path:?}): {reason}", dtype.as_str()));
                } else {
                    all.push(Box::new(candle::Attention::new(store, path, config, &queries)?));
                }
            }
        }
        // The exact store is built whatever is wanted, and `candle` names both of its paths.
        all.retain(|contestant| self.bench.wants(&contestant.label()));
        measure(all, self.bench.rounds, &oracle, &mut outcome);
        Ok((config, outcome))
    }
}

/// Builds something of `bytes`, or notes why not.
fn fits<T>(
    skipped: &mut Vec<String>,
    name: &str,
    bytes: u64,
    build: impl FnOnce() -> Result<T>,
) -> Option<T> {
    let built = match machine::short_of(bytes) {
        None => build().map_err(|e| e.to_string()),
        Some(reason) => Err(reason),
    };
    built.map_err(|reason| skipped.push(format!("{name}: {reason}"))).ok()
}
