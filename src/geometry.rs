//! What a model's attention looks like: layers, heads, dimensions, windows, rotary embedding, and the
//! counting types that keep positions, slots and row counts apart.
//!
//! *Helps* when a host describes its model once and every later call is checked against that description.
//! *Hurts* nobody at run time: these are plain values, read on the attend path and never changed there.
//!
//! Symbols used throughout the crate: `L` layers, `Hq` query heads, `H` key/value heads, `G = Hq / H`
//! (the group that shares one KV head), `d_k` and `d_v` the dimensions of a key and of a value.

use crate::error::ShapeError;

/// A token's place in the text. It drives rotary angles and causality and is never derived from how many
/// rows are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub i32);

/// Where an entry sits now: its index among the entries of one KV head, oldest first. A slot changes when
/// entries before it are evicted; a [`Position`] does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// A number of entries stored for one KV head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowCount(pub usize);

/// How rotary pairs sit in a head's dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RotaryLayout {
    /// Dimension `2i` pairs with `2i + 1` (GGUF Llama, GPT-J).
    Interleaved,
    /// Dimension `i` pairs with `i + dims / 2` (Hugging Face Llama, GPT-NeoX).
    HalfSplit,
}

/// How the inverse frequencies are stretched for contexts beyond the trained one.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// Frequencies as trained.
    None,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// Context multiplier, > 0.
        factor: f32,
    },
    /// Llama 3.1's piecewise rule: long wavelengths divided by `factor`, short ones kept, a linear ramp
    /// between `original_context / low` and `original_context / high`.
    Llama3 {
        /// Context multiplier of the long wavelengths.
        factor: f32,
        /// Low-frequency bound (`low_freq_factor`).
        low: f32,
        /// High-frequency bound (`high_freq_factor`).
        high: f32,
        /// Context length of the original training.
        original_context: f32,
    },
    /// YaRN: interpolation of slow dimensions, none for fast ones, a ramp between `beta_slow` and
    /// `beta_fast` rotations over the original context.
    Yarn {
        /// Context multiplier.
        factor: f32,
        /// Rotations above which a dimension is left alone (32 in the paper).
        beta_fast: f32,
        /// Rotations below which a dimension is fully interpolated (1 in the paper).
        beta_slow: f32,
        /// Context length of the original training.
        original_context: f32,
    },
    /// One divisor per pair, as GGUF's `rope_freqs.weight` carries them.
    Factors(
        /// `dims / 2` divisors.
        Vec<f32>,
    ),
}

/// The rotary embedding of a layer, as far as the library must know it to rotate, un-rotate and re-rotate
/// stored keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// How many leading dimensions of a key rotate (`<= d_k`, even).
    pub dims: usize,
    /// Base of the geometric frequency series (`rope_theta`).
    pub theta: f32,
    /// Which dimensions pair up.
    pub layout: RotaryLayout,
    /// Frequency scaling.
    pub scaling: RotaryScaling,
}

impl Rotary {
    /// A plain rotary embedding over `dims` dimensions.
    pub fn new(dims: usize, theta: f32, layout: RotaryLayout) -> Self {
        Self { dims, theta, layout, scaling: RotaryScaling::None }
    }

    /// The same embedding with scaled frequencies.
    #[must_use]
    pub fn with_scaling(mut self, scaling: RotaryScaling) -> Self {
        self.scaling = scaling;
        self
    }

    /// Inverse frequencies after scaling, radians per position, one per rotated pair.
    ///
    /// Computed in `f64`: at position 10⁵ an `f32` angle is already wrong in the third decimal.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let pairs = self.dims / 2;
        let theta = f64::from(self.theta);
        let base = (0..pairs).map(|i| theta.powf(-2.0 * i as f64 / self.dims as f64));
        match &self.scaling {
            RotaryScaling::None => base.collect(),
            RotaryScaling::Linear { factor } => base.map(|f| f / f64::from(*factor)).collect(),
            RotaryScaling::Factors(factors) => {
                base.zip(factors).map(|(f, divisor)| f / f64::from(*divisor)).collect()
            }
            RotaryScaling::Llama3 { factor, low, high, original_context } => {
                let (factor, low, high) = (f64::from(*factor), f64::from(*low), f64::from(*high));
                let context = f64::from(*original_context);
                base.map(|f| {
                    let wavelength = std::f64::consts::TAU / f;
                    if wavelength < context / high {
                        f
                    } else if wavelength > context / low {
                        f / factor
                    } else {
                        let smooth = (context / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
            }
            RotaryScaling::Yarn { factor, beta_fast, beta_slow, original_context } => {
                // The pair index at which a dimension makes `rotations` turns over the original context.
                let pair_at = |rotations: f64| {
                    let turns = f64::from(*original_context) / (rotations * std::f64::consts::TAU);
                    self.dims as f64 * turns.ln() / (2.0 * theta.ln())
                };
                let low = pair_at(f64::from(*beta_fast)).floor().max(0.0);
                let high = pair_at(f64::from(*beta_slow)).ceil().min(self.dims as f64 - 1.0);
                base.enumerate()
                    .map(|(i, f)| {
                        let ramp = ((i as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0);
                        f * (1.0 - ramp) + f / f64::from(*factor) * ramp
                    })
                    .collect()
            }
        }
    }

    /// Cosine and sine of each pair's angle for every distance in `deltas`: `[deltas, dims / 2, 2]`.
    ///
    /// One table serves every backend, so that a re-rotation gives the same bits everywhere.
    pub fn table(&self, deltas: impl Iterator<Item = i32>) -> Vec<f32> {
        let frequencies = self.inverse_frequencies();
        deltas
            .flat_map(|delta| {
                frequencies.iter().flat_map(move |f| {
                    let (sin, cos) = (f64::from(delta) * f).sin_cos();
                    [cos as f32, sin as f32]
                })
            })
            .collect()
    }
}

/// What a layer's stored keys are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum KeyPhase {
    /// Keys and queries arrive with the rotary embedding applied (the usual point of integration).
    #[default]
    PostRope,
    /// Keys and queries carry no rotary embedding (NoPE layers, or hosts that use another scheme).
    Unrotated,
}

/// Learned keys and values that every query of a layer sees, at no position: never rotated, outside any sliding window,
/// never evicted (Sink-KV of ReLIC, arXiv 2410.02751, has one for each KV head).
///
/// The logit of a query is `cap(scale · q·k) + β`. What is left out is zero: keys alone add to the denominator by how well they
/// fit a query, values alone are mixed in by a constant share of it, and without either an entry is a sink logit of β for the
/// whole group (`β = 0`: the softmax that may attend to nothing).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SinkEntries {
    /// Entries of each KV head, `n`; at least 1.
    pub entries: usize,
    /// `[H, n, d_k]`, as queries arrive (after their rotary embedding).
    pub keys: Option<Vec<f32>>,
    /// `[H, n, d_v]`.
    pub values: Option<Vec<f32>>,
    /// β of each, `[H, n]`.
    pub bias: Option<Vec<f32>>,
}

impl SinkEntries {
    /// One entry for each KV head: `keys` `[H, d_k]`, `values` `[H, d_v]`, either or both.
    pub fn one(keys: Option<Vec<f32>>, values: Option<Vec<f32>>) -> Self {
        Self { entries: 1, keys, values, bias: None }
    }

    fn validate(&self, layer: usize, shape: &LayerShape) -> Result<(), ShapeError> {
        let invalid = |what, got, want| Err(ShapeError::Geometry { layer, what, got, want });
        if self.entries == 0 || self.entries > MAX_SINK_ENTRIES {
            let want = format!("1 ..= {MAX_SINK_ENTRIES}, or no sink_entries");
            return invalid("sink_entries.entries", self.entries.to_string(), want);
        }
        let (heads, n) = (shape.kv_heads, self.entries);
        let parts = [
            ("sink_entries.keys", &self.keys, shape.d_k),
            ("sink_entries.values", &self.values, shape.d_v),
            ("sink_entries.bias", &self.bias, 1),
        ];
        for (what, numbers, dim) in parts {
            let Some(numbers) = numbers else { continue };
            if numbers.len() != heads * n * dim {
                let want = format!("{} ({heads} KV heads × {n} entries × {dim})", heads * n * dim);
                return invalid(what, format!("{} values", numbers.len()), want);
            }
            if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                return invalid(what, format!("{} at index {at}", numbers[at]), "finite".into());
            }
        }
        Ok(())
    }
}

/// The attention geometry of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerShape {
    /// Query heads `Hq`.
    pub query_heads: usize,
    /// Key/value heads `H`; divides `query_heads`.
    pub kv_heads: usize,
    /// Key dimension.
    pub d_k: usize,
    /// Value dimension.
    pub d_v: usize,
    /// Factor on `q · k` before the softmax, usually `1 / sqrt(d_k)`.
    pub scale: f32,
    /// `Some(c)`: logits become `c * tanh(logit / c)` (Gemma 2).
    pub softcap: Option<f32>,
    /// `Some(w)`: a query at position `p` sees positions `> p - w` only.
    pub window: Option<u32>,
    /// Learned sink logits, one per query head: they join the softmax's denominator and carry no value.
    pub sink_logits: Option<Vec<f32>>,
    /// Learned entries that every query sees, whatever is stored.
    pub sink_entries: Option<SinkEntries>,
    /// `Some(l)`: this layer stores nothing and reads the cache of layer `l` (`l` < this layer).
    pub shared_with: Option<usize>,
    /// The rotary embedding; needed to renumber positions after an eviction.
    pub rotary: Option<Rotary>,
    /// Whether keys arrive rotated.
    pub key_phase: KeyPhase,
}

impl LayerShape {
    /// A plain layer: `d_v = d_k`, scale `1 / sqrt(d_k)`, nothing else.
    pub fn new(query_heads: usize, kv_heads: usize, d_k: usize) -> Self {
        Self {
            query_heads,
            kv_heads,
            d_k,
            d_v: d_k,
            scale: 1.0 / (d_k as f32).sqrt(),
            softcap: None,
            window: None,
            sink_logits: None,
            sink_entries: None,
            shared_with: None,
            rotary: None,
            key_phase: KeyPhase::PostRope,
        }
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The same layer with a rotary description.
    #[must_use]
    pub fn with_rotary(mut self, rotary: Rotary) -> Self {
        self.rotary = Some(rotary);
        self
    }

    fn validate(&self, layer: usize, earlier: &[Self]) -> Result<(), ShapeError> {
        let invalid = |what: &'static str, got: String, want: String| {
            Err(ShapeError::Geometry { layer, what, got, want })
        };
        if self.query_heads == 0 || self.kv_heads == 0 || !self.query_heads.is_multiple_of(self.kv_heads) {
            return invalid(
                "query_heads and kv_heads",
                format!("{} and {}", self.query_heads, self.kv_heads),
                "both > 0 and query_heads a multiple of kv_heads".into(),
            );
        }
        for (what, d) in [("d_k", self.d_k), ("d_v", self.d_v)] {
            if d == 0 || d > MAX_HEAD_DIM {
                return invalid(what, d.to_string(), format!("1 ..= {MAX_HEAD_DIM}"));
            }
        }
        if !self.scale.is_finite() || self.scale <= 0.0 {
            return invalid("scale", self.scale.to_string(), "finite and > 0".into());
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return invalid("softcap", cap.to_string(), "finite and > 0, or None".into());
        }
        if self.window == Some(0) {
            return invalid("window", "0".into(), ">= 1, or None".into());
        }
        if let Some(sinks) = &self.sink_logits {
            if sinks.len() != self.query_heads {
                return invalid(
                    "sink_logits",
                    format!("{} values", sinks.len()),
                    format!("{} (one per query head)", self.query_heads),
                );
            }
            if sinks.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
                return invalid("sink_logits", "NaN or +infinity".into(), "finite values".into());
            }
        }
        if let Some(sinks) = &self.sink_entries {
            sinks.validate(layer, self)?;
        }
        if let Some(owner) = self.shared_with {
            let Some(owned) = earlier.get(owner) else {
                return invalid("shared_with", owner.to_string(), format!("a layer before {layer}"));
            };
            if owned.shared_with.is_some()
                || (owned.kv_heads, owned.d_k, owned.d_v) != (self.kv_heads, self.d_k, self.d_v)
            {
                return invalid(
                    "shared_with",
                    format!("layer {owner}"),
                    "a layer that owns its cache and has the same kv_heads, d_k and d_v".into(),
                );
            }
        }
        if let Some(rotary) = &self.rotary {
            if rotary.dims == 0 || !rotary.dims.is_multiple_of(2) || rotary.dims > self.d_k {
                return invalid(
                    "rotary.dims",
                    rotary.dims.to_string(),
                    format!("even and 2 ..= d_k = {}", self.d_k),
                );
            }
            if !(rotary.theta.is_finite() && rotary.theta > 1.0) {
                return invalid("rotary.theta", rotary.theta.to_string(), "finite and > 1".into());
            }
            if let RotaryScaling::Factors(f) = &rotary.scaling
                && f.len() != rotary.dims / 2
            {
                return invalid(
                    "rotary factors",
                    f.len().to_string(),
                    format!("{} (one per pair)", rotary.dims / 2),
                );
            }
            if rotary.inverse_frequencies().iter().any(|f| !f.is_finite()) {
                return invalid(
                    "rotary scaling",
                    format!("{:?}", rotary.scaling),
                    "finite frequencies".into(),
                );
            }
        }
        Ok(())
    }
}

/// The most entries of [`SinkEntries`] a KV head can have: they are one page. What is learned in larger numbers is a cache of its
/// own, and takes part in positions.
pub const MAX_SINK_ENTRIES: usize = 256;

/// The largest head dimension the kernels' stack tiles are sized for.
pub const MAX_HEAD_DIM: usize = 1024;

/// The attention geometry of a whole model: what [`crate::KvCache`] is built for.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    layers: Vec<LayerShape>,
    fingerprint: Option<String>,
}

impl ModelShape {
    /// Checks and takes the layers, first to last.
    ///
    /// # Errors
    /// [`ShapeError`] names the layer, the field, what it was and what it must be.
    pub fn new(layers: Vec<LayerShape>) -> Result<Self, ShapeError> {
        if layers.is_empty() {
            return Err(ShapeError::Geometry {
                layer: 0,
                what: "layers",
                got: "none".into(),
                want: "at least one".into(),
            });
        }
        for (index, layer) in layers.iter().enumerate() {
            layer.validate(index, &layers[..index])?;
        }
        Ok(Self { layers, fingerprint: None })
    }

    /// `count` equal layers.
    ///
    /// # Errors
    /// As [`ModelShape::new`].
    pub fn uniform(count: usize, layer: LayerShape) -> Result<Self, ShapeError> {
        Self::new(vec![layer; count])
    }

    /// The same with a name for the weights behind it, which tells models of equal geometry apart: what profiles of learned
    /// numbers ([`crate::profile::Profile`]) are held against. Any text that changes when the weights do.
    #[must_use]
    pub fn with_fingerprint(mut self, fingerprint: impl Into<String>) -> Self {
        self.fingerprint = Some(fingerprint.into());
        self
    }

    /// The name of the weights, where the host gave one.
    pub fn fingerprint(&self) -> Option<&str> {
        self.fingerprint.as_deref()
    }

    /// Number of layers `L`.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The geometry of one layer.
    ///
    /// # Panics
    /// If `layer >= self.layers()`.
    pub fn layer(&self, layer: usize) -> &LayerShape {
        &self.layers[layer]
    }

    /// All layers, first to last.
    pub fn iter(&self) -> std::slice::Iter<'_, LayerShape> {
        self.layers.iter()
    }

    /// The layer whose cache `layer` reads: itself unless it is shared.
    ///
    /// # Panics
    /// If `layer >= self.layers()`.
    pub fn owner(&self, layer: usize) -> usize {
        self.layers[layer].shared_with.unwrap_or(layer)
    }

    /// Layers that own storage, first to last.
    pub fn owners(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers.len()).filter(|&l| self.layers[l].shared_with.is_none())
    }
}
