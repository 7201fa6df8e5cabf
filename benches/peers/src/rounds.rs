//! Runs of all contestants in turn, and what remains of their times.
//!
//! *Helps* because heat, clock and other load of the machine hit all alike: a ratio of medians of interleaved
//! runs is trustworthy where two runs one after the other are not. *Hurts* by the caches, which each finds as
//! the one before left them; so each round starts with another contestant.

use crate::contestant::{Contestant, Kind, Result};
use crate::data::{Checked, Oracle, distance_f32, tolerance};
use crate::{ggml, ours};
use std::time::{Duration, Instant};

/// A contestant takes part in all rounds if they take it no longer than this in total.
const PATIENCE: Duration = Duration::from_secs(8);
/// Rounds that everyone takes part in.
const LEAST: usize = 3;
/// Between contestants, so that threads of the one before fall asleep.
const PAUSE: Duration = Duration::from_millis(2);

/// The middle of sorted times.
pub(crate) fn median(times: &mut [f64]) -> f64 {
    quantile(times, 0.5)
}

/// The value below which a share of `times` lies.
pub(crate) fn quantile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    let at = share * times.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (times.get(low), times.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * (at - low as f64),
        _ => f64::NAN,
    }
}

/// One line of a table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) label: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) multiply_adds: Option<f64>,
    pub(crate) checked: Option<Checked>,
    /// Seconds of each run.
    pub(crate) seconds: Vec<f64>,
}

impl Row {
    /// Median seconds.
    pub(crate) fn time(&self) -> f64 {
        median(&mut self.seconds.clone())
    }

    /// Distance between the quartiles, as a share of the median.
    pub(crate) fn spread(&self) -> f64 {
        let mut times = self.seconds.clone();
        (quantile(&mut times, 0.75) - quantile(&mut times, 0.25)) / self.time()
    }

    /// Bytes per second.
    pub(crate) fn rate(&self) -> f64 {
        self.bytes as f64 / self.time()
    }
}

/// What one configuration gave.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) rows: Vec<Row>,
    /// Who is missing, and why.
    pub(crate) skipped: Vec<String>,
    /// Contestants of kvsieve's that failed or were wrong.
    pub(crate) wrong: usize,
    /// Distance of kvsieve's result from ggml's, both in f16, over all outputs.
    pub(crate) agreement: Option<f64>,
}

fn timed(contestant: &mut dyn Contestant) -> Result<Duration> {
    contestant.active(true);
    let start = Instant::now();
    let done = contestant.run();
    let time = start.elapsed();
    contestant.active(false);
    std::thread::sleep(PAUSE);
    done.map(|()| time)
}

struct Entry<'a> {
    contestant: Box<dyn Contestant + 'a>,
    runs: usize,
    row: Row,
}

/// Runs, checks and measures all of `contestants`.
pub(crate) fn measure(
    contestants: Vec<Box<dyn Contestant + '_>>,
    rounds: usize,
    oracle: &Oracle<'_>,
    outcome: &mut Outcome,
) {
    let mut entries = Vec::new();
    for mut contestant in contestants {
        match admit(&mut *contestant, rounds, oracle) {
            Ok((runs, row)) => entries.push(Entry { contestant, runs, row }),
            Err(reason) => {
                outcome.wrong += usize::from(contestant.kind() == Kind::Ours);
                outcome.skipped.push(format!("{}: {reason}", contestant.label()));
            }
        }
    }
    outcome.agreement = agreement(&entries, &ours::label("f16"), &ggml::label("f16"));
    for round in 0..rounds {
        for i in 0..entries.len() {
            let at = (i + round) % entries.len();
            let Entry { contestant, runs, row } = &mut entries[at];
            if round < *runs {
                match timed(&mut **contestant) {
                    Ok(time) => row.seconds.push(time.as_secs_f64()),
                    Err(reason) => outcome.skipped.push(format!("{}: {reason}", row.label)),
                }
            }
        }
    }
    outcome.rows.extend(entries.into_iter().map(|entry| entry.row).filter(|row| !row.seconds.is_empty()));
}

/// Two runs to warm up; the result of the first is checked.
fn admit(contestant: &mut dyn Contestant, rounds: usize, oracle: &Oracle<'_>) -> Result<(usize, Row)> {
    let mut time = timed(contestant)?;
    let checked = oracle.check(contestant)?;
    let most = tolerance(contestant.kind(), oracle.config.n);
    if let Some(Checked { error, .. }) = checked
        && (error.is_nan() || error > most)
    {
        let (error, most) = (error * 100.0, most * 100.0);
        return Err(format!("its result is wrong by {error:.2} %, more than {most:.1} %: not timed").into());
    }
    if time < PATIENCE / 8 {
        time = timed(contestant)?;
    }
    let runs = ((PATIENCE.as_secs_f64() / time.as_secs_f64()) as usize).clamp(LEAST.min(rounds), rounds);
    let row = Row {
        label: contestant.label(),
        kind: contestant.kind(),
        bytes: contestant.bytes(),
        multiply_adds: contestant.multiply_adds(),
        checked,
        seconds: Vec::with_capacity(runs),
    };
    Ok((runs, row))
}

/// How far the results of two of them are apart; `None` if one is missing.
fn agreement(entries: &[Entry<'_>], a: &str, b: &str) -> Option<f64> {
    let find = |label: &str| entries.iter().find(|e| e.row.label == label)?.contestant.result().ok()?;
    Some(distance_f32(&find(a)?, &find(b)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let mut times = [4.0, 1.0, 3.0, 2.0];
        assert!((median(&mut times) - 2.5).abs() < 1e-12);
        assert!((quantile(&mut times, 0.25) - 1.75).abs() < 1e-12);
        assert!(median(&mut []).is_nan());
    }
}
