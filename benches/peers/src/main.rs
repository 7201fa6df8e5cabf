//! Attention of kvsieve and of its peers in one process, interleaved, beside what the machine can do at all; and that
//! of a real model beside llama.cpp's.
//!
//! `make bench-peers` at the repository's root, or `cargo run --release` here; `--help` lists the flags.
//!
//! *Helps* because a ratio of interleaved runs in one process says who is faster, where two programs on two
//! days do not. *Hurts* by its build (ggml is compiled from source), so it is a Cargo project of its own.

mod candle;
mod config;
mod contestant;
mod data;
mod depth;
mod ggml;
mod limits;
mod machine;
mod options;
mod ours;
mod report;
mod rounds;
mod suite;
mod summary;

use config::{PREFILL_CONTEXT, Phase};
use contestant::Result;
use kvsieve::backend::{Backend, Cpu};
use options::{HELP, Options, Part};
use report::Table;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::sync::Arc;
use suite::{Bench, Suite};

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).map_err(Into::into).and_then(|o| run(&o)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            eprintln!("kvsieve failed or was wrong in {wrong} places: see \"not measured\" above");
            ExitCode::FAILURE
        }
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Measures everything asked for; how often kvsieve failed or was wrong.
fn run(options: &Options) -> Result<usize> {
    if options.help {
        print!("{HELP}");
        return Ok(0);
    }
    let machine = Machine::prepare(options)?;
    if options.only == Some(Part::Depth) {
        return depth(options, machine);
    }
    let bench = bench(options, machine)?;
    let arithmetic = limits::Arithmetic::calibrate(&bench.pool)?;
    let mut tables = Vec::new();
    for &d in &options.dim {
        let decode = options.n.iter().map(|&n| (Phase::Decode, n));
        for (phase, n) in decode.chain([(Phase::Prefill, PREFILL_CONTEXT)]) {
            if !options.wants(phase) {
                continue;
            }
            let suite = match Suite::build(&bench, phase, n, d) {
                Ok(suite) => suite,
                Err(reason) => {
                    println!("\n{}, n = {n}, d = {d}: not measured: {reason}", phase.name());
                    continue;
                }
            };
            for &group in &options.group {
                let (config, outcome) = suite.run(group, &arithmetic)?;
                let table = Table { config, outcome };
                table.print();
                tables.push(table);
            }
        }
    }
    summary::print(&tables);
    let described = bench.cpu.describe();
    let all = ("tables", tables.iter().map(Table::json).collect::<Vec<_>>().into());
    write_json(options, bench.pool.current_num_threads(), &described, all)?;
    Ok(tables.iter().map(|table| table.outcome.wrong).sum())
}

/// A real model's tokens; how often kvsieve failed or was wrong.
fn depth(options: &Options, machine: Machine) -> Result<usize> {
    let Machine { threads, cpu, ggml, .. } = machine;
    let backend: Arc<dyn Backend> = Arc::new(cpu);
    let task = depth::Task {
        model: options.model.as_deref(),
        depths: &options.depth,
        kv: &options.kv,
        rounds: options.rounds,
        without: &options.without,
    };
    let report = depth::run(&task, &backend, &ggml)?;
    report.print();
    write_json(options, threads, &backend.describe(), ("depth", report.json()))?;
    Ok(report.wrong)
}

/// What was measured, on what, where that is asked for.
fn write_json(
    options: &Options,
    threads: usize,
    kvsieve: &str,
    (what, measured): (&str, Value),
) -> Result<()> {
    if let Some(path) = &options.json {
        let all = json!({
            "processor": machine::processor(),
            "threads": threads,
            "kvsieve": kvsieve,
            "ggml": ggml::describe().0,
            what: measured,
        });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

/// Threads of every contestant.
struct Machine {
    threads: usize,
    /// The number that candle uses, whatever it is told.
    physical: usize,
    cpu: Cpu,
    ggml: ggml::Pool,
}

impl Machine {
    /// Starts them; says what is measured on.
    fn prepare(options: &Options) -> Result<Self> {
        // candle takes its number of threads from here and cannot be told another; everyone follows.
        let physical = candle_core::utils::get_num_threads();
        let threads = options.threads.unwrap_or(physical);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
        let cpu = Cpu::with_threads(threads)?;
        let (built, complaint) = ggml::describe();
        println!("{}, {threads} threads each, load {}", machine::processor(), machine::load());
        println!("kvsieve: {}; ggml: built with {built}", cpu.describe());
        if let Some(complaint) = complaint {
            println!("WARNING: {complaint}");
        }
        Ok(Self { threads, physical, cpu, ggml: ggml::Pool::new(threads)? })
    }
}

/// Buffers and limits.
fn bench(options: &Options, machine: Machine) -> Result<Bench> {
    let Machine { threads, physical, cpu, ggml } = machine;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let mib = options.stream_mib.unwrap_or_else(machine::stream_mib);
    if machine::last_level_cache().is_some_and(|cache| (mib as u64) << 20 < 2 * cache) {
        println!("WARNING: the streaming read of {mib} MiB may be served by the cache; --stream-mib sets it");
    }
    let (reader, stream) = limits::calibrate(&pool, mib << 20)?;
    let candle_out = (threads != physical).then(|| {
        format!("would use {physical} threads; set RAYON_NUM_THREADS={threads} in place of --threads")
    });
    let (rounds, without) = (options.rounds, options.without.clone());
    Ok(Bench { pool, cpu, ggml, candle_out, reader, stream, rounds, without })
}
