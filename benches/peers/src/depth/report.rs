//! A table for each depth, the ratio to be held, and all samples as JSON.
//!
//! *Helps* because the two ways to tell the time of attention stand side by side wherever both are known. *Hurts*
//! readers who take one ratio out of its run.

use super::decoder::llama_label;
use crate::contestant::Kind;
use crate::ours;
use crate::rounds::{median, quantile};
use serde_json::{Value, json};

/// How many times less llama.cpp's attention kvsieve's has to take, both in f16, and at which depths.
const TARGET: (f64, &[usize]) = (4.0, &[4000, 8000]);

/// Distance between the quartiles above which a ratio of medians says little.
const NOISY: f64 = 0.25;

/// What one contestant did at one depth.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples {
    /// Seconds of each token.
    pub(super) whole: Vec<f64>,
    /// Seconds of attention of each token, where that is known apart.
    pub(super) attention: Vec<f64>,
    /// KL of predictions to llama.cpp's in f16, in nats, once a round.
    pub(super) kl: Vec<f64>,
}

/// A contestant, with its samples for each depth.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) label: String,
    pub(super) kind: Kind,
    pub(super) samples: Vec<Samples>,
}

impl Row {
    pub(super) fn new(label: String, kind: Kind, depths: usize) -> Self {
        Self { label, kind, samples: vec![Samples::default(); depths] }
    }

    /// Median seconds of a token.
    fn token(&self, at: usize) -> f64 {
        median(&mut self.samples[at].whole.clone())
    }

    /// Seconds of attention of the fastest tokens: what other programs on the machine disturb least.
    fn fastest(&self, at: usize) -> f64 {
        let least = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
        match &self.samples[at].attention[..] {
            [] => least(&self.samples[at].whole) - least(&self.samples[0].whole),
            told => least(told),
        }
    }

    /// Whether what its attention is computed from is spread too far.
    fn noisy(&self, at: usize) -> bool {
        let told = !self.samples[at].attention.is_empty();
        self.spread(at) > NOISY || (!told && self.spread(0) > NOISY)
    }

    /// By how much a token takes longer than with an empty context.
    fn growth(&self, at: usize) -> f64 {
        self.token(at) - self.token(0)
    }

    /// Median seconds of attention: as told by the engine, or else the growth.
    fn attention(&self, at: usize) -> f64 {
        match &self.samples[at].attention[..] {
            [] => self.growth(at),
            told => median(&mut told.to_vec()),
        }
    }

    /// Distance between the quartiles of what was timed, as a share of the median.
    fn spread(&self, at: usize) -> f64 {
        let Samples { whole, attention, .. } = &self.samples[at];
        let mut times = if attention.is_empty() { whole.clone() } else { attention.clone() };
        (quantile(&mut times, 0.75) - quantile(&mut times, 0.25)) / median(&mut times)
    }

    /// Mean distance of predictions.
    fn kl(&self, at: usize) -> Option<f64> {
        let kl = &self.samples[at].kl;
        (!kl.is_empty()).then(|| kl.iter().sum::<f64>() / kl.len() as f64)
    }
}

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    model: String,
    /// Ascending, 0 the first.
    pub(super) depths: Vec<usize>,
    pub(super) rows: Vec<Row>,
    /// Who is missing, and why.
    skipped: Vec<String>,
    /// Contestants of kvsieve's that failed or were wrong.
    pub(crate) wrong: usize,
}

impl Report {
    pub(super) fn new(model: String, depths: Vec<usize>) -> Self {
        Self { model, depths, rows: Vec::new(), skipped: Vec::new(), wrong: 0 }
    }

    /// Notes that a contestant has no row.
    pub(super) fn fail(&mut self, label: &str, kind: Kind, reason: &str) {
        self.wrong += usize::from(kind == Kind::Ours);
        self.skipped.push(format!("{label}: {reason}"));
    }

    /// Compares everyone's logits, in the order of the rows, with llama.cpp's in f16.
    pub(super) fn compare(&mut self, at: usize, logits: &[Vec<f32>]) {
        let label = llama_label("f16");
        let Some(want) = self.rows.iter().position(|row| row.label == label) else { return };
        for (who, row) in self.rows.iter_mut().enumerate() {
            if who != want && logits[who].len() == logits[want].len() && !logits[want].is_empty() {
                row.samples[at].kl.push(kl(&logits[want], &logits[who]));
            }
        }
    }

    /// Takes out who predicted something else.
    pub(super) fn judge(&mut self, most: f64) {
        for row in std::mem::take(&mut self.rows) {
            let mut distances = (0..self.depths.len()).filter_map(|at| row.kl(at));
            match distances.find(|kl| kl.is_nan() || *kl > most) {
                None => self.rows.push(row),
                Some(kl) => {
                    let reason = format!("its predictions are {kl:.2} nats from llama f16's");
                    self.fail(&row.label, row.kind, &reason);
                }
            }
        }
    }

    /// How many times less attention `row` takes than a peer.
    fn less(at: usize, row: &Row, peer: &Row) -> f64 {
        peer.attention(at) / row.attention(at)
    }

    fn row(&self, label: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.label == label)
    }

    /// The two whose ratio is accepted, kvsieve's first.
    fn accepted_rows(&self) -> Option<(&Row, &Row)> {
        Some((self.row(&ours::label("f16"))?, self.row(&llama_label("f16"))?))
    }

    /// The ratio of the acceptance at a depth.
    fn accepted(&self, at: usize) -> Option<f64> {
        self.accepted_rows().map(|(ours, theirs)| Self::less(at, ours, theirs))
    }

    /// Prints everything.
    pub(crate) fn print(&self) {
        println!(
            "attention: kvsieve's as its candle host and `kvsieve run` tell it, llama.cpp's is token less at 0"
        );
        for at in 1..self.depths.len() {
            self.table(at);
        }
        for reason in &self.skipped {
            println!("not measured: {reason}");
        }
        let (least, depths) = TARGET;
        println!("\nacceptance ratios ({})", self.model);
        let (mut held, mut missed) = (0, 0);
        for (at, depth) in self.depths.iter().enumerate().filter(|(_, depth)| depths.contains(depth)) {
            let Some((ours, theirs)) = self.accepted_rows() else { continue };
            let (value, fastest) = (Self::less(at, ours, theirs), theirs.fastest(at) / ours.fastest(at));
            let good = value >= least;
            *(if good { &mut held } else { &mut missed }) += 1;
            let verdict = if good { "ok" } else { "MISSED" };
            let what = "f16 attention, times less than llama f16's";
            println!("  {what:<42} context {depth:<7} {value:>7.2}  (at least {least:.2})  {verdict}");
            println!("  {:<42} {:<15} {fastest:>7.2}", "  by the fastest tokens alone", "");
            for row in [ours, theirs].into_iter().filter(|row| row.noisy(at)) {
                println!("  NOISY: {} spreads over more than {:.0} %", row.label, NOISY * 100.0);
            }
        }
        println!("  {held} held, {missed} missed; what is not listed was not measured");
    }

    fn table(&self, at: usize) {
        println!("\n{}, a token after {}, ms", self.model, self.depths[at]);
        let peers: Vec<&Row> = self.rows.iter().filter(|row| row.kind == Kind::Peer).collect();
        let mut head = format!("{:<15}{:>10}{:>7}{:>9}{:>9}", "", "attention", "iqr%", "token", "at 0");
        head += &format!("{:>9}{:>9}{:>6}", "grows", "KL", "runs");
        if !peers.is_empty() {
            println!("{:>w$} times less attention than:", "", w = head.len());
        }
        for peer in &peers {
            head += &format!(" {:>w$}", peer.label, w = peer.label.len());
        }
        println!("{head}");
        for row in &self.rows {
            let ms = |seconds: f64| seconds * 1e3;
            let mut line = format!("{:<15}{:>10.2}", row.label, ms(row.attention(at)));
            line += &format!("{:>7.1}{:>9.2}", row.spread(at) * 100.0, ms(row.token(at)));
            line += &format!("{:>9.2}{:>9.2}", ms(row.token(0)), ms(row.growth(at)));
            let kl = row.kl(at).map_or_else(String::new, |kl| format!("{kl:.4}"));
            line += &format!("{kl:>9}{:>6}", row.samples[at].whole.len());
            if row.kind == Kind::Ours {
                for peer in &peers {
                    // A growth that the noise has turned round is no time to compare with.
                    let less = Some(Self::less(at, row, peer)).filter(|less| *less > 0.0);
                    let less = less.map_or_else(|| "-".to_owned(), |less| format!("{less:.2}"));
                    line += &format!(" {less:>w$}", w = peer.label.len());
                }
            }
            println!("{line}");
        }
    }

    /// Everything, every sample included.
    pub(crate) fn json(&self) -> Value {
        let table = |at: usize| {
            let row = |row: &Row| {
                let Samples { whole, attention, kl } = &row.samples[at];
                json!({
                    "label": row.label,
                    "kind": row.kind.name(),
                    "attention_ms": row.attention(at) * 1e3,
                    "token_ms": row.token(at) * 1e3,
                    "growth_ms": row.growth(at) * 1e3,
                    "fastest_attention_ms": row.fastest(at) * 1e3,
                    "noisy": row.noisy(at),
                    "mean_kl": row.kl(at),
                    "token_seconds": whole,
                    "attention_seconds": attention,
                    "kl": kl,
                })
            };
            json!({
                "depth": self.depths[at],
                "times_less_than_llama_f16": self.accepted(at).filter(|_| at > 0),
                "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            })
        };
        json!({
            "model": self.model,
            "tables": (0..self.depths.len()).map(table).collect::<Vec<_>>(),
            "not_measured": self.skipped,
        })
    }
}

/// KL from the predictions of `want` to those of `got`, in nats.
fn kl(want: &[f32], got: &[f32]) -> f64 {
    let total = |row: &[f32]| {
        let top = row.iter().fold(f64::NEG_INFINITY, |top, x| top.max(f64::from(*x)));
        top + row.iter().map(|x| (f64::from(*x) - top).exp()).sum::<f64>().ln()
    };
    let (a, b) = (total(want), total(got));
    let terms = want.iter().zip(got).map(|(x, y)| {
        let (x, y) = (f64::from(*x) - a, f64::from(*y) - b);
        x.exp() * (x - y)
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(label: String, kind: Kind, whole: [f64; 2], attention: Option<f64>) -> Row {
        let mut row = Row::new(label, kind, 2);
        for (samples, seconds) in row.samples.iter_mut().zip(whole) {
            samples.whole = vec![seconds * 0.9, seconds, seconds * 1.5];
            samples.attention = attention.into_iter().collect();
        }
        row
    }

    fn report() -> Report {
        let mut report = Report::new("model".into(), vec![0, 4000]);
        report.rows.push(row(llama_label("f16"), Kind::Peer, [0.010, 0.050], None));
        report.rows.push(row(ours::label("f16"), Kind::Ours, [0.030, 0.039], Some(0.008)));
        report
    }

    #[test]
    fn what_an_engine_does_not_tell_is_the_growth_of_its_token() {
        let report = report();
        assert!((report.rows[0].attention(1) - 0.040).abs() < 1e-12);
        assert!((report.rows[1].attention(1) - 0.008).abs() < 1e-12);
        assert!((report.rows[1].growth(1) - 0.009).abs() < 1e-12);
        assert!((report.rows[0].fastest(1) - 0.036).abs() < 1e-12);
        assert!(report.rows[0].noisy(1) && !report.rows[1].noisy(1));
        assert!((report.accepted(1).unwrap() - 5.0).abs() < 1e-9);
    }

    #[test]
    fn predictions_of_something_else_are_not_a_measurement() {
        let mut report = report();
        let logits = [vec![5.0, 0.0, 0.0], vec![0.0, 5.0, 0.0]];
        report.compare(1, &logits);
        report.judge(0.5);
        assert_eq!((report.rows.len(), report.wrong), (1, 1));
        assert!(report.accepted(1).is_none());
    }

    #[test]
    fn equal_predictions_have_no_distance_whatever_their_offset() {
        assert!(kl(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]).abs() < 1e-9);
        assert!(kl(&[0.0, 1000.0], &[1000.0, 0.0]) > 100.0);
        assert!(kl(&[0.0, 1.0], &[f32::NAN, 0.0]).is_nan());
    }
}
