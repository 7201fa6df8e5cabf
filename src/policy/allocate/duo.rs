//! DuoAttention: some KV heads only ever look at the first and the last tokens, and keep no others.
//!
//! *Helps* without looking at anything while it runs, also without a budget: memory falls by the share of heads that stream, and
//! what the others keep is exact. *Hurts* by a floor (heads that retrieve keep everything unless a budget says otherwise), and where
//! the profile is of other weights than the model's.
//!
//! Of the `n` KV heads in layers that take part, the `round(share · n)` of lowest gate stream; of equals the lower layer's, then the
//! lower head. They keep `e = sinks + recent` entries at most. With a mean target of `T` entries
//! ```text
//! Σ over layers of min(rows_l, (retrieving_l · x + streaming_l · min(e, x)) / H) = L · T
//! ```
//! says what a retrieving head keeps: `x`, the same in all layers.

use super::{Allocator, Ends, HeadRequest, shares};
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::policy::TargetRequest;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::schedule::Schedule;
use crate::policy::select::protected_counts;
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "duo",
    summary: "KV heads that do not retrieve keep their first and last entries only",
    source: "DuoAttention: Xiao et al. 2024, arXiv:2410.10819",
    needs: "a profile with the part duo; no budget",
    args: &[
        Arg::real("share", 0.5, 0.0, 1.0, "share of KV heads that stream"),
        Arg::count("sinks", 64, 0, usize::MAX, "first entries that a streaming head keeps"),
        Arg::count("recent", 256, 0, usize::MAX, "last entries that a streaming head keeps"),
    ],
    build: Build::Allocate { over: "streaming", schedule: Some(SCHEDULE), build },
};

/// Streaming heads are trimmed while the prompt comes in, so that they never hold it, and while tokens are generated.
const SCHEDULE: Schedule = Schedule { prefill: true, chunk: true, every: Some(16), over: None };

/// The part of a profile, and its array.
const PART: &str = "duo";
const GATES: &str = "gates";

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    let ends = Ends { sinks: args.count("sinks")?, recent: args.count("recent")? };
    Ok(Arc::new(Duo { share: args.real("share")?, ends, streams: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Duo {
    /// Share of KV heads that stream, `0 ..= 1`.
    pub share: f64,
    /// What these keep.
    pub ends: Ends,
    /// Which they are, `[L][H]`; `None` before [`Allocator::bind`]. In layers that take no part none do.
    pub streams: Option<Vec<Vec<bool>>>,
}

impl Default for Duo {
    fn default() -> Self {
        Self { share: 0.5, ends: Ends { sinks: 64, recent: 256 }, streams: None }
    }
}

impl Duo {
    /// Whether each KV head of a layer streams; empty for a layer it knows nothing of.
    fn layer(&self, layer: usize) -> &[bool] {
        self.streams.as_ref().and_then(|layers| layers.get(layer)).map_or(&[], Vec::as_slice)
    }
}

impl Allocator for Duo {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn lacks(&self) -> Option<&'static str> {
        self.streams.is_none().then_some(PART)
    }

    fn bind(
        &self,
        profile: &Profile,
        shape: &ModelShape,
    ) -> Result<Option<Arc<dyn Allocator>>, ProfileError> {
        let heads = shape.layer(0).kv_heads;
        let gates = profile.array(PART, GATES, &[Some(shape.layers()), Some(heads)])?.numbers();
        let taking_part = shape.owners().filter(|&layer| shape.layer(layer).window.is_none());
        let mut order: Vec<usize> =
            taking_part.flat_map(|layer| layer * heads..(layer + 1) * heads).collect();
        let count = (self.share * order.len() as f64).round() as usize;
        order.sort_by(|&a, &b| gates[a].total_cmp(&gates[b]));
        let mut streams = vec![vec![false; heads]; shape.layers()];
        order.iter().take(count).for_each(|&at| streams[at / heads][at % heads] = true);
        Ok(Some(Arc::new(Self { streams: Some(streams), ..self.clone() })))
    }

    fn ends(&self, layer: usize, head: usize) -> Option<Ends> {
        self.layer(layer).get(head).filter(|streams| **streams).map(|_| self.ends)
    }

    fn needs_budget(&self) -> bool {
        false
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        // Heads that stream, all heads, and rows of each layer.
        let of = |(&layer, &rows): (&usize, &usize)| {
            let heads = self.layer(layer);
            let streaming = heads.iter().filter(|streams| **streams).count();
            (streaming as f64, heads.len().max(1) as f64, rows)
        };
        let layers: Vec<_> = request.layers.iter().zip(request.rows).map(of).collect();
        let ends = self.ends.sinks.saturating_add(self.ends.recent);
        let bounds = layers.iter().map(|&(streaming, heads, rows)| match streaming < heads {
            true => (0, rows),
            false => (0, rows.min(ends)),
        });
        let bounds: Vec<(usize, usize)> = bounds.collect();
        let most = bounds.iter().map(|bound| bound.1).sum::<usize>();
        let total = most.min(request.target.saturating_mul(layers.len()));
        let share = |x: f64| {
            let each = layers.iter().map(move |&(streaming, heads, rows)| {
                let kept = (heads - streaming) * x + streaming * x.min(ends as f64);
                (kept / heads).min(rows as f64)
            });
            each.collect::<Vec<f64>>()
        };
        let x = shares::level(total as f64, |x| share(x).iter().sum());
        shares::whole(&share(x), &bounds, total)
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        let lengths = &request.scores.lengths;
        let protected = protected_counts(lengths, request.protect);
        let streams = |head| self.ends(request.layer, head).is_some();
        let bounds = lengths.iter().zip(&protected).enumerate();
        let bounds = bounds.map(|(head, (&len, &own))| (own, if streams(head) { own } else { len }));
        let bounds: Vec<(usize, usize)> = bounds.collect();
        let real: Vec<(f64, f64)> = bounds.iter().map(|&(a, b)| (a as f64, b as f64)).collect();
        let total = request.total();
        let shares = shares::fill(&vec![1.0; lengths.len()], &real, total as f64);
        Ok(shares::whole(&shares, &bounds, total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::geometry::LayerShape;
    use crate::policy::LayerScores;
    use crate::policy::select::protection;
    use crate::profile::{Array, Part};
    use proptest::prelude::*;

    fn duo(share: f64, ends: (usize, usize), gates: &[[f32; 2]]) -> Arc<dyn Allocator> {
        let shape = ModelShape::uniform(gates.len(), LayerShape::new(4, 2, 8)).unwrap();
        bound(share, ends, gates, &shape)
    }

    fn bound(share: f64, ends: (usize, usize), gates: &[[f32; 2]], shape: &ModelShape) -> Arc<dyn Allocator> {
        let array = Array::new(vec![gates.len(), 2], gates.concat()).unwrap();
        let profile = Profile::new(shape).unwrap().with(PART, Part::new("by hand").with(GATES, array));
        let duo = Duo { share, ends: Ends { sinks: ends.0, recent: ends.1 }, streams: None };
        assert_eq!(duo.lacks(), Some("duo"));
        let duo = duo.bind(&profile, shape).unwrap().unwrap();
        assert_eq!(duo.lacks(), None);
        duo
    }

    fn streaming(duo: &dyn Allocator, layers: usize) -> Vec<(usize, usize)> {
        (0..2 * layers).map(|i| (i / 2, i % 2)).filter(|&(l, h)| duo.ends(l, h).is_some()).collect()
    }

    fn targets(duo: &dyn Allocator, rows: &[usize], target: usize) -> Vec<usize> {
        let layers: Vec<usize> = (0..rows.len()).collect();
        duo.layer_targets(&TargetRequest { layers: &layers, rows, target, recent: 0, measures: &[] })
    }

    const GATES_OF_THREE: [[f32; 2]; 3] = [[0.9, 0.1], [0.1, 0.2], [0.8, 0.7]];

    #[test]
    fn the_lowest_gates_stream_the_earlier_of_equals_first() {
        let which = |share| streaming(&*duo(share, (1, 2), &GATES_OF_THREE), 3);
        assert_eq!(which(0.0), []);
        assert_eq!(which(0.2), [(0, 1)], "round(1.2), and of the two gates of 0.1 the earlier");
        assert_eq!(which(0.5), [(0, 1), (1, 0), (1, 1)]);
        assert_eq!(which(1.0).len(), 6);
    }

    #[test]
    fn layers_with_a_window_take_no_part() {
        let layer = || LayerShape::new(4, 2, 8);
        let windowed = LayerShape { window: Some(16), ..layer() };
        let shape = ModelShape::new(vec![layer(), windowed, layer()]).unwrap();
        let duo = bound(0.5, (1, 2), &GATES_OF_THREE, &shape);
        assert_eq!(streaming(&*duo, 3), [(0, 1), (2, 1)], "half of four heads");
    }

    #[test]
    fn heads_that_retrieve_keep_equally_many_in_all_layers() {
        let duo = duo(0.5, (64, 256), &GATES_OF_THREE);
        // Layer 0 keeps (x + 320) / 2, layer 1 320, layer 2 x: 3 · 500 for x = 680.
        assert_eq!(targets(&*duo, &[5000; 3], 500), [500, 320, 680]);
        // Below what streaming heads keep all heads are alike.
        assert_eq!(targets(&*duo, &[5000; 3], 100), [100; 3]);
        // What is left over of 3 · 501 goes to the earliest of those that rounding took most from.
        assert_eq!(targets(&*duo, &[5000; 3], 501).iter().sum::<usize>(), 1503);
        // No layer is given more than it stores.
        assert_eq!(targets(&*duo, &[5000, 5000, 600], 500), [580, 320, 600]);
        assert_eq!(targets(&*duo, &[400; 3], 500), [400, 320, 400]);
    }

    #[test]
    fn heads_of_a_layer_divide_what_streaming_ones_leave() {
        let duo = duo(0.5, (1, 2), &GATES_OF_THREE);
        let counts = |layer: usize, target: usize, lengths: [usize; 2]| {
            let scores =
                LayerScores { lengths: lengths.to_vec(), values: vec![0.0; lengths[0] + lengths[1]] };
            let protect: Vec<u8> = (0..2)
                .flat_map(|head| {
                    let Ends { sinks, recent } =
                        duo.ends(layer, head).unwrap_or(Ends { sinks: 0, recent: 0 });
                    protection(&[lengths[head]], target, sinks, recent)
                })
                .collect();
            let backend = &Reference::default();
            let request = HeadRequest { layer, target, scores: &scores, protect: &protect, backend };
            duo.head_counts(&request).unwrap()
        };
        assert_eq!(counts(0, 10, [40, 40]), [17, 3]);
        assert_eq!(counts(0, 10, [12, 40]), [12, 3]);
        assert_eq!(counts(0, 2, [40, 40]), [2, 2]);
        assert_eq!(counts(1, 10, [40, 40]), [3, 3]);
        assert_eq!(counts(2, 10, [40, 4]), [16, 4]);
        assert_eq!(counts(2, usize::MAX, [40, 41]), [40, 41]);
    }

    proptest! {
        #[test]
        fn sums_are_exact_and_bounded(
            rows in prop::collection::vec(1usize..3000, 1..16), target in 0usize..3000, share in 0.0f64..=1.0, seed in 0u64..99,
        ) {
            let mut random = crate::testing::Random::new(seed);
            let gates: Vec<[f32; 2]> = rows.iter().map(|_| [random.normal(), random.normal()]).collect();
            let duo = duo(share, (16, 64), &gates);
            let got = targets(&*duo, &rows, target);
            let stream = streaming(&*duo, rows.len());
            let most = |layer: usize| match stream.iter().filter(|(l, _)| *l == layer).count() {
                2 => rows[layer].min(80),
                _ => rows[layer],
            };
            let all: usize = (0..rows.len()).map(most).sum();
            prop_assert_eq!(got.iter().sum::<usize>(), all.min(target * rows.len()));
            prop_assert!(got.iter().enumerate().all(|(layer, &got)| got <= most(layer)), "{:?}", got);
        }
    }
}
