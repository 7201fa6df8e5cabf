//! What a replay leaves: tensors in a file, numbers on standard output.

use super::trace::Trace;
use crate::error::{Error, Result, write};
use crate::table::{Table, bytes, milliseconds, number};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Serialize;
use std::path::Path;

/// Everything measured.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) layers: Vec<LayerReport>,
    /// Mean time of a whole decode step.
    pub(super) seconds: Option<f64>,
    pub(super) tensors: Tensors,
}

/// One layer, or the total.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Numbers {
    pub(super) output_error: Option<f64>,
    pub(super) mass_recall: Option<f64>,
    pub(super) missing_mass: Option<f64>,
    pub(super) bytes_logical: usize,
    pub(super) bytes_resident: usize,
    pub(super) bytes_read_per_step: usize,
    pub(super) seconds_per_step: Option<f64>,
    pub(super) entries: usize,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct LayerReport {
    pub(super) layer: usize,
    #[serde(flatten)]
    pub(super) numbers: Numbers,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) recipe: String,
    pub(super) effective_recipe: String,
    pub(super) budget: Option<String>,
    pub(super) backend: &'static str,
    pub(super) layers: Vec<LayerReport>,
    pub(super) total: Numbers,
}

impl Report {
    pub(super) fn print_json(&self) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|e| Error::usage(e.to_string(), "report this"))?;
        println!("{text}");
        Ok(())
    }

    pub(super) fn print_table(&self) -> Result<()> {
        let budget = self.budget.as_deref().unwrap_or("none");
        println!("recipe {}, budget {budget}, backend {}\n", self.effective_recipe, self.backend);
        let heading = [
            "layer",
            "output error",
            "mass recall",
            "entries",
            "logical",
            "resident",
            "read/step",
            "time/step",
        ];
        let mut table = Table::new(1, &heading);
        for layer in &self.layers {
            table.row(layer.numbers.cells(layer.layer.to_string()));
        }
        table.row(self.total.cells("all".to_owned()));
        table.print();
        Ok(())
    }
}

impl Numbers {
    fn cells(&self, name: String) -> Vec<String> {
        vec![
            name,
            number(self.output_error, 5),
            number(self.mass_recall, 5),
            self.entries.to_string(),
            bytes(self.bytes_logical),
            bytes(self.bytes_resident),
            bytes(self.bytes_read_per_step),
            self.seconds_per_step.map_or_else(|| "-".to_owned(), milliseconds),
        ]
    }
}

/// Per layer, in the trace's order.
#[derive(Debug)]
pub(super) struct Tensors {
    /// `[H, prompt]`.
    pub(super) scores: Vec<Option<Vec<f32>>>,
    /// Prompt positions that stayed, per KV head.
    pub(super) kept: Vec<Vec<Vec<i32>>>,
    /// `[Hq, decode, dim]`.
    pub(super) out: Vec<Vec<f32>>,
}

impl Tensors {
    pub(super) fn write(&self, path: &Path, trace: &Trace) -> Result<()> {
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (index, recorded) in trace.layers.iter().enumerate() {
            let name = |part: &str| format!("layers.{}.{part}", recorded.layer);
            if let Some(scores) = &self.scores[index] {
                let shape = vec![trace.kv_heads, trace.prompt];
                tensors.push((name("scores"), Dtype::F32, shape, floats(scores)));
            }
            let heads = &self.kept[index];
            let positions: Vec<i32> = heads.concat();
            let mut offsets = vec![0i32];
            offsets.extend(heads.iter().scan(0, |sum, head| {
                *sum += head.len() as i32;
                Some(*sum)
            }));
            tensors.push((name("kept.positions"), Dtype::I32, vec![positions.len()], integers(&positions)));
            tensors.push((name("kept.offsets"), Dtype::I32, vec![offsets.len()], integers(&offsets)));
            let shape = vec![trace.query_heads, trace.decode, trace.dim];
            tensors.push((name("out"), Dtype::F32, shape, floats(&self.out[index])));
        }
        let problem = |e: safetensors::SafeTensorError| Error::usage(e.to_string(), "report this");
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| {
                Ok((name, TensorView::new(*dtype, shape.clone(), data).map_err(problem)?))
            })
            .collect::<Result<Vec<_>>>()?;
        write(path, &safetensors::serialize(views, None).map_err(problem)?)
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn integers(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}
