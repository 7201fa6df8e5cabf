//! kvsieve, through its public interface: pages of one layer, and [`Backend::attend`] on the CPU.
//!
//! *Helps* as what all this is about. *Hurts* nothing; a host pays the same call.

use crate::config::{Config, KV_HEADS};
use crate::contestant::{Contestant, Kind, Result, Side};
use crate::data::Dense;
use kvsieve::backend::{Backend, Cpu};
use kvsieve::device::page::{self, PageRef};
use kvsieve::device::{Encoding, Format, HeadRows, Packing};
use kvsieve::kernel::AttentionParams;
use kvsieve::kernel::attend::{AttendLane, Share, Workspace};
use kvsieve::testing::cache::{CacheSpec, end_position};
use kvsieve::view::DType;
use std::rc::Rc;

/// Storage formats: label, keys, values. The first holds the data exactly: the others, and the peers, are made from
/// or compared with it.
pub(crate) const FORMATS: &[(&str, Encoding, Encoding)] = &[
    ("f32", Encoding::Exact(DType::F32), Encoding::Exact(DType::F32)),
    ("f16", Encoding::Exact(DType::F16), Encoding::Exact(DType::F16)),
    ("bf16", Encoding::Exact(DType::Bf16), Encoding::Exact(DType::Bf16)),
    ("int8", packed(Format::Int8), packed(Format::Int8)),
    ("int4", packed(Format::Int4), packed(Format::Int4)),
    ("lm3", packed(Format::Lm3), packed(Format::Lm3)),
    ("lm2", packed(Format::Lm2), packed(Format::Lm2)),
    ("kivi2", packed(Format::Kivi2), packed(Format::Kivi2)),
    ("ours q8_0", packed(Format::Q8_0), packed(Format::Q8_0)),
    ("ours q4_0", packed(Format::Q4_0), packed(Format::Q4_0)),
];

/// A format with what its name brings.
const fn packed(format: Format) -> Encoding {
    Encoding::Packed(Packing::new(format))
}

/// Entries per page, the library's default.
const PAGE: usize = 64;
/// The same random rows in every format.
const SEED: u64 = 1;

/// One layer's entries in one format.
#[derive(Debug)]
pub(crate) struct Store {
    label: &'static str,
    heads: Vec<HeadRows>,
}

impl Store {
    /// `n` entries for each KV head, in pages as a cache that evicts nothing holds them.
    pub(crate) fn build(cpu: &Cpu, format: usize, n: usize, d: usize) -> Result<Self> {
        let (label, k, v) = FORMATS[format];
        let heads = CacheSpec::f32(SEED, d, &[n; KV_HEADS], PAGE).typed(k, v).steady().build(cpu)?;
        Ok(Self { label, heads })
    }

    /// Bytes of all keys and values.
    fn bytes(&self) -> u64 {
        let pages = self.heads.iter().flat_map(HeadRows::pages);
        let side = |p: &PageRef<'_>, side: page::Side| p.layout.side_bytes(side) * p.rows / p.layout.capacity;
        pages.map(|p| (side(&p, page::Side::Key) + side(&p, page::Side::Value)) as u64).sum()
    }

    /// Rows of a head, widened.
    fn rows(&self, head: usize, side: Side, rows: usize, d: usize) -> Vec<f32> {
        let side = match side {
            Side::Key => page::Side::Key,
            Side::Value => page::Side::Value,
        };
        let mut out = vec![0.0; rows * d];
        for p in self.heads[head].pages().filter(|p| p.first < rows) {
            for (i, row) in out[p.first * d..].chunks_exact_mut(d).take(p.rows).enumerate() {
                p.layout.read_row(p.page, side, i, row);
            }
        }
        out
    }

    /// All of it, widened.
    pub(crate) fn dense(&self, n: usize, d: usize) -> Dense {
        let all = |side| (0..KV_HEADS).flat_map(|head| self.rows(head, side, n, d)).collect();
        Dense { n, d, k: all(Side::Key), v: all(Side::Value) }
    }
}

/// One attend call.
#[derive(Debug)]
pub(crate) struct Attend<'a> {
    cpu: &'a Cpu,
    store: &'a Store,
    config: Config,
    queries: Rc<Vec<f32>>,
    positions: Vec<i32>,
    out: Vec<f32>,
    lse: Vec<f32>,
    workspace: Workspace,
}

impl<'a> Attend<'a> {
    pub(crate) fn new(cpu: &'a Cpu, store: &'a Store, config: Config, queries: Rc<Vec<f32>>) -> Self {
        let (rows, end) = (config.query_heads() * config.tokens(), end_position(&store.heads));
        Self {
            cpu,
            store,
            config,
            queries,
            positions: (end - config.tokens() as i32..end).collect(),
            out: vec![0.0; rows * config.d],
            lse: vec![0.0; rows],
            workspace: Workspace::default(),
        }
    }
}

/// A row's name in tables.
pub(crate) fn label(format: &str) -> String {
    format!("kvsieve {format}")
}

impl Contestant for Attend<'_> {
    fn label(&self) -> String {
        label(self.store.label)
    }

    fn kind(&self) -> Kind {
        Kind::Ours
    }

    fn bytes(&self) -> u64 {
        self.store.bytes()
    }

    fn run(&mut self) -> Result<()> {
        let Config { group, d, .. } = self.config;
        let params = AttentionParams {
            group,
            d_k: d,
            d_v: d,
            scale: self.config.scale(),
            softcap: None,
            window: None,
            sink_logits: None,
        };
        let lane = AttendLane {
            heads: &self.store.heads,
            queries: &self.queries,
            positions: &self.positions,
            share: Share::ALL,
            spans: None,
            out: &mut self.out,
            lse: &mut self.lse,
            mass: None,
        };
        self.cpu.attend(&params, &mut [lane], &mut self.workspace)?;
        Ok(())
    }

    fn result(&self) -> Result<Option<Vec<f32>>> {
        Ok(Some(self.out.clone()))
    }

    fn held(&self, head: usize, side: Side, rows: usize) -> Option<Vec<f32>> {
        Some(self.store.rows(head, side, rows, self.config.d))
    }
}
