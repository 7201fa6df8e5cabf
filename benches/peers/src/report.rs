//! A table for each configuration, and all samples as JSON.
//!
//! *Helps* because every number stands beside the limit it is measured against. *Hurts* readers who take one
//! ratio out of its run.

use crate::config::{Config, Phase};
use crate::contestant::Kind;
use crate::limits::{ONCE, PEAK, STREAM};
use crate::rounds::{Outcome, Row};
use serde_json::{Value, json};

/// A configuration with what it gave.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) config: Config,
    pub(crate) outcome: Outcome,
}

impl Table {
    /// The row of this label.
    pub(crate) fn row(&self, label: &str) -> Option<&Row> {
        self.outcome.rows.iter().find(|row| row.label == label)
    }

    /// Bytes per second of `label`, of those of the streaming read.
    pub(crate) fn of_stream(&self, label: &str) -> Option<f64> {
        Some(self.row(label)?.rate() / self.row(STREAM)?.rate())
    }

    /// Multiply-adds per second of `label`, of the peak.
    pub(crate) fn of_peak(&self, label: &str) -> Option<f64> {
        let peak = self.row(PEAK)?;
        let rate = self.config.multiply_adds() / self.row(label)?.time();
        Some(rate / (peak.multiply_adds? / peak.time()))
    }

    /// How many times faster `label` is than `other`.
    pub(crate) fn faster(&self, label: &str, other: &str) -> Option<f64> {
        Some(self.row(other)?.time() / self.row(label)?.time())
    }

    /// Prints it.
    pub(crate) fn print(&self) {
        println!("\n{}", self.config);
        let peers: Vec<&Row> = self.outcome.rows.iter().filter(|row| row.kind == Kind::Peer).collect();
        let mut head = format!("{:<17}{:>10}{:>7}{:>6}", "", "ms", "iqr%", "runs");
        head += &match self.config.phase {
            Phase::Decode => format!("{:>8}{:>9}{:>8}", "GB/s", "%stream", "%once"),
            Phase::Prefill => format!("{:>9}{:>8}", "GMA/s", "%peak"),
        };
        head += &format!("{:>9}", "error%");
        for peer in &peers {
            head += &format!(" {:>w$}", peer.label, w = width(peer));
        }
        if !peers.is_empty() {
            println!("{:>w$} times faster than:", "", w = head.find("error%").unwrap_or(0) + 6);
        }
        println!("{head}");
        for row in &self.outcome.rows {
            println!("{}", self.line(row, &peers).trim_end());
        }
        if let Some(distance) = self.outcome.agreement {
            println!("kvsieve f16 and ggml f16 differ by {:.3} % of the norm", distance * 100.0);
        }
        for reason in &self.outcome.skipped {
            println!("not measured: {reason}");
        }
    }

    fn line(&self, row: &Row, peers: &[&Row]) -> String {
        let mut line = format!("{:<17}{:>10.3}", row.label, row.time() * 1e3);
        line += &format!("{:>7.1}{:>6}", row.spread() * 100.0, row.seconds.len());
        let share = |share: Option<f64>| share.map_or_else(String::new, |s| format!("{:.1}", s * 100.0));
        match self.config.phase {
            Phase::Decode => {
                let once = self.row(ONCE).map(|once| row.rate() / once.rate());
                let stream = share(self.of_stream(&row.label));
                line += &format!("{:>8.2}{stream:>9}{:>8}", row.rate() / 1e9, share(once));
            }
            Phase::Prefill => {
                let count = row.multiply_adds.unwrap_or(self.config.multiply_adds());
                let peak = if row.kind == Kind::Limit { Some(1.0) } else { self.of_peak(&row.label) };
                line += &format!("{:>9.1}{:>8}", count / row.time() / 1e9, share(peak));
            }
        }
        let error = row.checked.map_or_else(String::new, |c| format!("{:.3}", c.error * 100.0));
        line += &format!("{error:>9}");
        if row.kind == Kind::Ours {
            for peer in peers {
                line += &format!(" {:>w$.2}", peer.time() / row.time(), w = width(peer));
            }
        }
        line
    }

    /// The table and every sample.
    pub(crate) fn json(&self) -> Value {
        let Config { phase, n, d, group } = self.config;
        let rows: Vec<Value> = self
            .outcome
            .rows
            .iter()
            .map(|row| {
                json!({
                    "label": row.label,
                    "kind": row.kind.name(),
                    "bytes": row.bytes,
                    "multiply_adds": row.multiply_adds,
                    "median_ms": row.time() * 1e3,
                    "of_stream": self.of_stream(&row.label),
                    "of_peak": self.of_peak(&row.label),
                    "error": row.checked.map(|c| c.error),
                    "storage_error": row.checked.map(|c| c.storage),
                    "seconds": row.seconds,
                })
            })
            .collect();
        json!({
            "phase": phase.name(), "n": n, "d": d, "group": group,
            "multiply_adds": self.config.multiply_adds(),
            "agreement": self.outcome.agreement,
            "rows": rows,
            "not_measured": self.outcome.skipped,
        })
    }
}

fn width(peer: &Row) -> usize {
    peer.label.len().max(8)
}
