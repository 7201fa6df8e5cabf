//! ggml's flash attention on its CPU backend: what llama.cpp runs.
//!
//! *Helps* as the peer that most people use. *Hurts* nothing; it is used in its favour: the graph is built
//! once and only its computation is timed, its threads are awake before the clock starts, and the rows of a KV
//! head are adjacent (llama.cpp itself interleaves the heads of a token).

mod ffi;
pub(crate) mod llama;

pub(crate) use ffi::Pool;

use crate::config::{Config, KV_HEADS, Phase};
use crate::contestant::{Contestant, Kind, Result, Side};
use crate::data::Dense;
use ffi::{Extents, Graph, Type};
use half::f16;
use memmap2::MmapMut;

/// Types of keys and values.
pub(crate) const FORMATS: &[Format] =
    &[Format("f16", Type::F16), Format("q8_0", Type::Q8_0), Format("q4_0", Type::Q4_0)];

/// A type of keys and values, with its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format(&'static str, Type);

impl Format {
    /// ggml's name of it.
    pub(crate) fn name(self) -> &'static str {
        self.0
    }

    /// Bytes of a row of `d`.
    pub(crate) fn row_bytes(self, d: usize) -> usize {
        self.1.row_bytes(d)
    }

    /// Bytes of the keys and values of a configuration.
    pub(crate) fn bytes(self, n: usize, d: usize) -> u64 {
        (2 * KV_HEADS * n * self.row_bytes(d)) as u64
    }
}

/// A row's name in tables.
pub(crate) fn label(format: &str) -> String {
    format!("ggml {format}")
}

/// The instruction sets ggml was built with, and what is wrong with them.
pub(crate) fn describe() -> (String, Option<String>) {
    let sets = ffi::instruction_sets();
    let built: Vec<_> = sets.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    let missing = missing(&built);
    let complaint = (!missing.is_empty()).then(|| {
        format!(
            "ggml was built without {}, which this processor has: its times are too long. Build in benches/peers, \
             where .cargo/config.toml says -march=native (make bench-peers does)",
            missing.join(", ")
        )
    });
    (built.join(" "), complaint)
}

#[cfg(target_arch = "x86_64")]
fn missing(built: &[&str]) -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let present = [
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avx512f", has!("avx512f") && has!("avx512bw") && has!("avx512vl")),
        ("avx512vnni", has!("avx512vnni")),
    ];
    present.iter().filter(|(name, has)| *has && !built.contains(name)).map(|(name, _)| *name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn missing(_: &[&str]) -> Vec<&'static str> {
    Vec::new()
}

/// Keys and values packed by ggml, `[KV heads, n]` rows each.
#[derive(Debug)]
pub(crate) struct Store {
    format: Format,
    k: MmapMut,
    v: MmapMut,
}

impl Store {
    pub(crate) fn build(format: Format, dense: &Dense) -> Result<Self> {
        let pack = |rows| format.1.pack(rows, dense.d);
        Ok(Self { format, k: pack(&dense.k)?, v: pack(&dense.v)? })
    }
}

/// One `GGML_OP_FLASH_ATTN_EXT`.
#[derive(Debug)]
pub(crate) struct Attention<'a> {
    pool: &'a Pool,
    store: &'a Store,
    config: Config,
    graph: Graph<'a>,
}

impl<'a> Attention<'a> {
    pub(crate) fn new(pool: &'a Pool, store: &'a Store, config: Config, queries: &[f32]) -> Result<Self> {
        let mask: Vec<f16> = match config.phase {
            Phase::Decode => Vec::new(),
            Phase::Prefill => (0..config.tokens())
                .flat_map(|token| {
                    let visible = config.visible(token);
                    (0..config.n).map(move |at| if at < visible { f16::ZERO } else { f16::NEG_INFINITY })
                })
                .collect(),
        };
        let extents = Extents {
            ty: store.format.1,
            d: config.d,
            n: config.n,
            tokens: config.tokens(),
            query_heads: config.query_heads(),
            kv_heads: KV_HEADS,
            scale: config.scale(),
        };
        let graph = Graph::new(pool, extents, queries, &mask, &store.k, &store.v)?;
        Ok(Self { pool, store, config, graph })
    }
}

impl Contestant for Attention<'_> {
    fn label(&self) -> String {
        label(self.store.format.0)
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn bytes(&self) -> u64 {
        (self.store.k.len() + self.store.v.len()) as u64
    }

    fn active(&mut self, active: bool) {
        self.pool.awake(active);
    }

    fn run(&mut self) -> Result<()> {
        self.graph.run()
    }

    fn result(&self) -> Result<Option<Vec<f32>>> {
        let (heads, tokens, d) = (self.config.query_heads(), self.config.tokens(), self.config.d);
        let out = self.graph.out();
        let row = |head: usize, token: usize| &out[(token * heads + head) * d..][..d];
        Ok(Some((0..heads).flat_map(|h| (0..tokens).flat_map(move |t| row(h, t)).copied()).collect()))
    }

    fn held(&self, head: usize, side: Side, rows: usize) -> Option<Vec<f32>> {
        let all = match side {
            Side::Key => &self.store.k,
            Side::Value => &self.store.v,
        };
        let (Format(_, ty), Config { n, d, .. }) = (self.store.format, self.config);
        let row = ty.row_bytes(d);
        ty.unpack(&all[head * n * row..][..rows * row], d)
    }
}
