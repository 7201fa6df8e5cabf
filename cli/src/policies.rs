//! `kvsieve policies`: the registry, as a table or as JSON.

use crate::error::{Error, Result};
use crate::table::Table;
use kvsieve::codec::{CODECS, PRESETS};
use kvsieve::policy::registry::{Entry, Registry, Value};
use serde_json::json;

const EXAMPLES: &str = "\
Examples:
  kvsieve policies                    all of them
  kvsieve policies snapkv             one, with its arguments
  kvsieve policies --json | jq '.[].name'

A name is a recipe; arguments go in parentheses, storage and other stages after `+`:
  snapkv            snapkv(window=32,kernel=7)            snapkv+k=int8+v=int4(hadamard)";

/// Arguments of `kvsieve policies`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Show these only, with their arguments.
    names: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let registry = Registry::builtin();
    let chosen: Vec<&Entry> = if args.names.is_empty() {
        registry.iter().collect()
    } else {
        args.names.iter().map(|name| Ok(registry.find(name)?)).collect::<Result<_>>()?
    };
    if args.json {
        let list: Vec<_> = chosen.iter().map(|entry| describe(entry)).collect();
        let text =
            serde_json::to_string_pretty(&list).map_err(|e| Error::usage(e.to_string(), "report this"))?;
        println!("{text}");
        return Ok(());
    }
    if args.names.is_empty() {
        let mut table = Table::new(4, &["name", "kind", "needs", "what it does"]);
        for entry in chosen {
            let cells = [entry.name, entry.build.kind(), entry.needs, entry.summary];
            table.row(cells.map(str::to_owned).to_vec());
        }
        table.print();
        println!();
        let mut table = Table::new(2, &["storage", "what it is"]);
        for codec in &CODECS {
            table.row(vec![format!("k={0}, v={0}", codec.format.name()), codec.summary.to_owned()]);
        }
        for preset in &PRESETS {
            table.row(vec![preset.name.to_owned(), preset.summary.to_owned()]);
        }
        table.print();
        println!(
            "\n`kvsieve policies NAME` shows a policy's arguments; docs/policies/NAME.md and docs/codecs say more."
        );
        return Ok(());
    }
    for entry in chosen {
        println!("{} ({})\n  {}", entry.name, entry.build.kind(), entry.summary);
        println!("  source: {}\n  needs:  {}\n  page:   {}", entry.source, entry.needs, entry.page());
        if entry.args.is_empty() {
            println!("  no arguments\n");
            continue;
        }
        println!();
        let mut table = Table::new(4, &["  argument", "default", "accepts", "what it does"]);
        for arg in entry.args {
            table.row(vec![
                format!("  {}", arg.name),
                arg.default.to_string(),
                arg.accepts.to_string(),
                arg.doc.to_owned(),
            ]);
        }
        table.print();
        println!();
    }
    Ok(())
}

fn describe(entry: &Entry) -> serde_json::Value {
    let default = |value: &Value| match value {
        Value::Count(n) => json!(n),
        Value::Real(x) => json!(x),
        Value::Word(word) => json!(word),
    };
    let args: Vec<_> = entry
        .args
        .iter()
        .map(|arg| {
            json!({
                "name": arg.name,
                "default": default(&arg.default),
                "accepts": arg.accepts.to_string(),
                "doc": arg.doc,
            })
        })
        .collect();
    json!({
        "name": entry.name,
        "kind": entry.build.kind(),
        "summary": entry.summary,
        "source": entry.source,
        "needs": entry.needs,
        "page": entry.page(),
        "args": args,
    })
}
