//! Codebooks as a part of a profile: learnt from one text, kept in a file, given to caches of the same model.
//!
//! *Helps* prompts that are short, and hosts that start often: nothing is learnt, and entries are encoded while they come.
//! *Hurts* where the text is unlike the one that codewords were learnt from; keys where they stand (`rotary=true`) are
//! unlike at other positions already.

use super::aware::Metric;
use super::{Codebook, Codebooks};
use crate::error::ProfileError;
use crate::geometry::{MAX_HEAD_DIM, ModelShape};
use crate::kernel::code_scores::CodeLayout;
use crate::profile::{Array, Part, Profile};
use std::sync::Arc;

/// Numbers that are whole up to here are exact in `f32`.
const MOST: f32 = 16_777_216.0;

fn prefix(layer: usize, head: usize) -> String {
    format!("layers.{layer}.heads.{head}.")
}

impl Codebooks {
    /// The part's name in a profile.
    pub const PART: &'static str = "codebooks";

    /// The part of a profile that holds them; `made` says how and on what they were learnt.
    ///
    /// Of KV head `h` of layer `l`, arrays under `layers.{l}.heads.{h}.`:
    ///
    /// | array | extents | what |
    /// |---|---|---|
    /// | `about` | `[5]` | indices of a code, their bits, codewords of a piece, where queries are put and 1 (0: where they stand), 1 for codes of what keys have beside means of units |
    /// | `center` | `[d_k]` | mean key |
    /// | `words` | `[levels · d_k]` | codewords relative to it, piece after piece, `[levels, dims]` each |
    /// | `metric.{m}` | `[dims, dims]` | for piece `m`, what errors in it do to logits; absent where queries were not known |
    ///
    /// # Errors
    /// [`ProfileError::NonFinite`].
    pub fn to_part(&self, made: impl Into<String>) -> Result<Part, ProfileError> {
        let mut part = Part::new(made);
        for (layer, heads) in self.layers.iter().enumerate() {
            for (head, book) in heads.iter().enumerate() {
                let Some(book) = book else { continue };
                for (name, array) in arrays(book)? {
                    part = part.with(prefix(layer, head) + &name, array);
                }
            }
        }
        Ok(part)
    }

    /// Those that a profile holds for a model. Whether an index can use them says [`Codebooks::check`], which
    /// [`crate::cache::CacheBuilder::build`] asks.
    ///
    /// # Errors
    /// [`ProfileError`] if the profile is of another model, has no such part, or one that no codebook can be made of.
    pub fn of(profile: &Profile, shape: &ModelShape) -> Result<Self, ProfileError> {
        profile.check(shape)?;
        let part = profile.part(Self::PART)?;
        let there = |layer, head| part.array(&(prefix(layer, head) + "about")).is_some();
        let book = |layer, head, d| -> Result<Option<Arc<Codebook>>, ProfileError> {
            if !there(layer, head) {
                return Ok(None);
            }
            codebook(profile, part, &prefix(layer, head), d).map(|book| Some(Arc::new(book)))
        };
        let layers = shape.iter().enumerate().map(|(layer, own)| {
            (0..own.kv_heads).map(|head| book(layer, head, own.d_k)).collect::<Result<Vec<_>, _>>()
        });
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }
}

fn arrays(book: &Codebook) -> Result<Vec<(String, Array)>, ProfileError> {
    let layout = book.layout();
    let distance = book.distance().map_or(0.0, |distance| distance as f32 + 1.0);
    let about = [layout.codes, layout.bits, book.levels()].map(|n| n as f32);
    let about = [&about[..], &[distance, f32::from(u8::from(book.within()))]].concat();
    let mut arrays = vec![
        ("about".to_owned(), Array::new(vec![5], about)?),
        ("center".to_owned(), Array::new(vec![book.dims()], book.center().to_vec())?),
        ("words".to_owned(), Array::new(vec![book.words().len()], book.words().to_vec())?),
    ];
    for m in 0..layout.codes {
        if let Some(metric) = book.metric(m) {
            let dims = book.piece(m).len();
            arrays.push((format!("metric.{m}"), Array::new(vec![dims, dims], metric.numbers().to_vec())?));
        }
    }
    Ok(arrays)
}

fn codebook(profile: &Profile, part: &Part, prefix: &str, d: usize) -> Result<Codebook, ProfileError> {
    let array = |name: &str, want: &[usize]| {
        let want: Vec<_> = want.iter().map(|&n| Some(n)).collect();
        profile.array(Codebooks::PART, &(prefix.to_owned() + name), &want)
    };
    let about = array("about", &[5])?.numbers();
    let refuse = |at: usize, want| {
        let (part, array) = (Codebooks::PART, prefix.to_owned() + "about");
        Err(ProfileError::Range { part, array, at, value: about[at], want })
    };
    let whole = |x: f32| x.fract() == 0.0 && (0.0..=MOST).contains(&x);
    if let Some(at) = about.iter().position(|&x| !whole(x)) {
        return refuse(at, "a whole number");
    }
    let [codes, bits, levels] = [0, 1, 2].map(|at| about[at] as usize);
    if !(1..=MAX_HEAD_DIM).contains(&codes) {
        return refuse(0, "1 to 1024 indices");
    }
    if ![4, 8, 16].contains(&bits) {
        return refuse(1, "4, 8 or 16 bits");
    }
    if !(1..=1 << bits).contains(&levels) {
        return refuse(2, "1 codeword to as many as the bits tell apart");
    }
    if about[4] > 1.0 {
        return refuse(4, "0 or 1");
    }
    let distance = (about[3] > 0.0).then(|| about[3] as i32 - 1);
    let center = array("center", &[d])?.numbers().to_vec();
    let mut words = array("words", &[levels * d])?.numbers();
    let layout = CodeLayout { codes, bits };
    let mut book = Codebook::new(layout, levels, center, distance, about[4] > 0.0);
    for m in 0..codes {
        let dims = book.piece(m).len();
        let (own, behind) = words.split_at(levels * dims);
        words = behind;
        let name = format!("metric.{m}");
        let metric = match part.array(&(prefix.to_owned() + &name)).is_some() {
            true => Some(Metric::from(array(&name, &[dims, dims])?.numbers().to_vec())),
            false => None,
        };
        book.push(own, metric);
    }
    Ok(book)
}
