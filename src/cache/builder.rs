//! Building a cache: everything is checked here, before anything runs.
//!
//! *Helps* because an unsupported combination is an error that names the option to change, not a surprise at
//! token 5,000. *Hurts* nothing.

use super::KvCache;
use super::scratch::Scratch;
use crate::backend::{Backend, Cpu};
use crate::codec::{Exact, PACK_ENTRIES};
use crate::columns::{ColumnLayout, MERGED};
use crate::device::encoding::Encoding;
use crate::device::page::PageLayout;
use crate::error::{Error, RecipeError};
use crate::geometry::{KeyPhase, ModelShape};
use crate::index::{Codebook, Codebooks, Retrieval, TableStorage};
use crate::low_rank::LowRank;
use crate::policy::{Policy, SideKind};
use crate::profile::Profile;
use crate::recipe::{Budget, PositionMode, Recipe};
use crate::store::{Packed, Storage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Entries per page unless the builder says otherwise: 32 KiB of keys and values at d 64 in `f32`.
pub(super) const DEFAULT_PAGE_ENTRIES: usize = 64;

/// What [`CacheBuilder::recipe`] takes: text, or a recipe already made.
#[derive(Debug)]
pub enum RecipeSource {
    /// To be parsed.
    Text(String),
    /// Made from parts.
    Recipe(Box<Recipe>),
}

impl From<&str> for RecipeSource {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}
impl From<String> for RecipeSource {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}
impl From<Recipe> for RecipeSource {
    fn from(recipe: Recipe) -> Self {
        Self::Recipe(Box::new(recipe))
    }
}

/// Options of a cache. Without any it keeps everything, in `f32`, on the CPU.
#[derive(Debug)]
pub struct CacheBuilder {
    shape: ModelShape,
    recipe: RecipeSource,
    budget: Option<Budget>,
    backend: Option<Arc<dyn Backend>>,
    page_entries: usize,
    codebooks: Codebooks,
    profile: Option<Arc<Profile>>,
}

impl CacheBuilder {
    pub(super) fn new(shape: ModelShape) -> Self {
        Self {
            shape,
            recipe: RecipeSource::Text("full".to_owned()),
            budget: None,
            backend: None,
            page_entries: DEFAULT_PAGE_ENTRIES,
            codebooks: Codebooks::default(),
            profile: None,
        }
    }

    /// Which policy, types and schedule: `"snapkv(window=64)+k=f16"`, or a [`Recipe`].
    #[must_use]
    pub fn recipe(mut self, recipe: impl Into<RecipeSource>) -> Self {
        self.recipe = recipe.into();
        self
    }

    /// A policy of the caller's own, with `f32` storage and compression at the end of the prompt. For other
    /// options build a [`Recipe`] around it.
    #[must_use]
    pub fn policy(self, policy: Arc<dyn Policy>) -> Self {
        self.recipe(Recipe::new(policy))
    }

    /// How much to keep. Required by every policy that drops anything.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Where pages live and kernels run; by default a [`Cpu`] backend with a thread per core.
    #[must_use]
    pub fn backend(mut self, backend: impl Backend + 'static) -> Self {
        self.backend = Some(Arc::new(backend));
        self
    }

    /// A backend that several caches share.
    #[must_use]
    pub fn shared_backend(mut self, backend: Arc<dyn Backend>) -> Self {
        self.backend = Some(backend);
        self
    }

    /// Entries per page of exact entries, 64 by default: smaller wastes less on ragged heads, larger costs fewer
    /// system calls. Packed pages hold [`PACK_ENTRIES`].
    #[must_use]
    pub fn page_entries(mut self, entries: usize) -> Self {
        self.page_entries = entries;
        self
    }

    /// Codebooks for an index of codes, learnt elsewhere ([`KvCache::codebooks`]): KV heads that have one encode entries as
    /// they come, and learn nothing.
    #[must_use]
    pub fn codebooks(mut self, codebooks: Codebooks) -> Self {
        self.codebooks = codebooks;
        self
    }

    /// What was learned or measured of the model, for policies that go by it (`kvsieve policies` says which); others ignore it.
    #[must_use]
    pub fn profile(mut self, profile: impl Into<Arc<Profile>>) -> Self {
        self.profile = Some(profile.into());
        self
    }

    /// The cache.
    ///
    /// # Errors
    /// [`RecipeError`] for a recipe that does not parse, or does not go with the model, the budget or the
    /// backend; it names the option to change. [`ProfileError`](crate::error::ProfileError) for a profile of another model, or one
    /// that lacks what the policy goes by. A device error if the model has
    /// [`SinkEntries`](crate::geometry::SinkEntries) and there is no page for them.
    pub fn build(self) -> Result<KvCache, Error> {
        let recipe = match self.recipe {
            RecipeSource::Text(text) => text.parse()?,
            RecipeSource::Recipe(recipe) => *recipe,
        };
        let recipe = match &self.profile {
            Some(profile) => recipe.bind(profile, &self.shape)?,
            None => recipe,
        };
        if self.page_entries == 0 || self.page_entries > 1 << 16 {
            return Err(RecipeError::Argument {
                term: "builder".to_owned(),
                argument: "page_entries".to_owned(),
                got: self.page_entries.to_string(),
                want: "1 ..= 65536".to_owned(),
            }
            .into());
        }
        let backend = match self.backend {
            Some(backend) => backend,
            None => Arc::new(Cpu::default()),
        };
        KvCache::check(&self.shape, &recipe, self.budget, &*backend)?;
        if self.codebooks != Codebooks::default() {
            self.codebooks.check(recipe.index.as_deref(), &self.shape)?;
        }
        let given = |book: Arc<Codebook>| Arc::new(Arc::unwrap_or_clone(book).given());
        let layers = self
            .codebooks
            .layers
            .into_iter()
            .map(|heads| heads.into_iter().map(|book| book.map(given)).collect());
        let codebooks = Codebooks { layers: layers.collect() };
        let mut columns = recipe.policy.columns();
        if recipe.reduce.is_some() && !columns.contains(&MERGED) {
            columns.push(MERGED);
        }
        let columns = ColumnLayout::new(columns);
        let mut cache = KvCache {
            shape: Arc::new(self.shape),
            needs: needs(&recipe),
            recipe,
            budget: self.budget,
            backend,
            storage: Vec::new(),
            tables: Vec::new(),
            constant: Vec::new(),
            page_entries: self.page_entries,
            codebooks,
            columns,
            sequences: BTreeMap::new(),
            next_id: 0,
            scratch: Scratch::default(),
        };
        cache.storage = (0..cache.shape.layers())
            .map(|layer| {
                let heads = 0..cache.shape.layer(layer).kv_heads;
                let of = |head| {
                    let recipe = (&cache.recipe, cache.budget);
                    head_storage(&cache.shape, recipe, (layer, head), cache.layout_of(layer))
                };
                heads.map(of).collect()
            })
            .collect();
        if let Some(index) = &cache.recipe.index {
            let tables = |layer| TableStorage::of(index, cache.shape.layer(layer), cache.backend.mirrored());
            cache.tables = (0..cache.shape.layers()).map(tables).collect();
        }
        cache.constant = super::constant::store(&cache.shape, &*cache.backend)?;
        Ok(cache)
    }
}

impl KvCache {
    /// Makes layouts of a layer's pages.
    pub(super) fn layout_of(
        &self,
        layer: usize,
    ) -> impl Fn(Option<usize>, (Encoding, Encoding)) -> PageLayout {
        let (shape, page_entries) = (self.shape.layer(layer).clone(), self.page_entries);
        let (mirrored, words) = (self.backend.mirrored(), self.columns.words());
        move |entries, (k, v)| PageLayout::new(&shape, entries.unwrap_or(page_entries), k, v, mirrored, words)
    }

    /// Whether a recipe works for a model with a budget on a backend, without building anything. A recipe that goes by a profile
    /// must have it: see [`Recipe::bind`].
    ///
    /// # Errors
    /// [`RecipeError`] names what does not go together and the option to change.
    pub fn check(
        shape: &ModelShape,
        recipe: &Recipe,
        budget: Option<Budget>,
        _backend: &dyn Backend,
    ) -> Result<(), RecipeError> {
        let policy = &recipe.policy;
        policy.check(shape)?;
        check_learned(shape, recipe)?;
        recipe.reduce.as_ref().map_or(Ok(()), |reduce| reduce.check(shape))?;
        if policy.compresses() {
            check_budget(recipe, budget)?;
        }
        if let Some(index) = &recipe.index {
            check_read(index, budget)?;
            index.summary.check(shape, index.rule.dense)?;
        }
        if let Some(low_rank) = &recipe.low_rank {
            check_low_rank(shape, low_rank)?;
        }
        if recipe.positions == PositionMode::Renumber {
            check_renumber(shape, recipe)?;
        }
        Ok(())
    }

    /// What the recipe asks of the host beyond `q`, `k` and `v`: recorded queries and fed attention, both
    /// taken from the attend call itself.
    pub fn needs(&self) -> crate::policy::Needs {
        self.needs
    }
}

/// What policy, reducer and index want to be recorded.
fn needs(recipe: &Recipe) -> crate::policy::Needs {
    let needs = recipe.policy.needs();
    let asked = recipe.index.as_ref().map_or(0, |index| {
        index.rule.calibration.map_or(0, |calibration| calibration.queries).max(index.summary.queries())
    });
    let mixed = recipe.reduce.as_ref().map_or(0, |reduce| reduce.needs().queries);
    let queries = needs.queries.max(asked).max(mixed);
    crate::policy::Needs { queries, ..needs }
}

/// The storage of a KV head of a layer, from the recipe's rules. `layout` makes layouts of that layer, of so many
/// entries or as many as pages of exact ones hold.
pub(super) fn head_storage(
    model: &ModelShape,
    (recipe, budget): (&Recipe, Option<Budget>),
    (layer, head): (usize, usize),
    layout: impl Fn(Option<usize>, (Encoding, Encoding)) -> PageLayout,
) -> Storage {
    let shape = model.layer(layer);
    let precision = recipe.precision.head((layer, model.layers()), (head, shape.kv_heads), shape.group());
    let Exact { sinks, tail, .. } = recipe.precision.exact;
    // Exact rows that wait to be factored leave page by page.
    let limited = budget.is_some() && recipe.policy.compresses();
    let stays =
        !limited && recipe.policy.stays(layer, head) && shape.window.is_none() && recipe.low_rank.is_none();
    let exact = layout(None, (precision.exact.0.into(), precision.exact.1.into()));
    let exact = PageLayout { steady: stays && !precision.packs(), ..exact };
    let packed = || layout(Some(PACK_ENTRIES), (precision.k, precision.v));
    Storage {
        packed: precision.packs().then(|| Packed {
            layout: Arc::new(PageLayout { steady: stays, ..packed() }),
            sinks,
            sink_layout: Arc::new(PageLayout { capacity: sinks.clamp(1, exact.capacity), ..exact.clone() }),
            tail,
        }),
        exact: Arc::new(exact),
    }
}

fn check_budget(recipe: &Recipe, budget: Option<Budget>) -> Result<(), RecipeError> {
    let name = recipe.policy.name();
    let Some(budget) = budget else {
        if !recipe.policy.needs_budget() {
            return Ok(());
        }
        return Err(RecipeError::Budget {
            budget: "(none)".to_owned(),
            problem: format!("{name} drops entries and must be told how many to keep"),
            change: "give one as tokens (2048), a share of the prompt (25%) or bytes (64MiB), or use the recipe full".to_owned(),
        });
    };
    let (sinks, recent) = recipe.policy.protected();
    match budget {
        Budget::Tokens(tokens) if tokens < sinks + recent || tokens == 0 => Err(RecipeError::Budget {
            budget: budget.to_string(),
            problem: format!("{name} protects {sinks} sinks and {recent} recent entries"),
            change: format!(
                "give at least {} tokens, or lower sinks= and recent= (or window=)",
                (sinks + recent).max(1)
            ),
        }),
        _ => Ok(()),
    }
}

/// What a policy learned must be there, and what it learned from must be within reach.
fn check_learned(shape: &ModelShape, recipe: &Recipe) -> Result<(), RecipeError> {
    let policy = &recipe.policy;
    let conflict = |with: String, why: String, change: &str| {
        let what = policy.name().to_owned();
        Err(RecipeError::Conflict { what, with, why, change: change.to_owned() })
    };
    let reduce = recipe.reduce.as_ref();
    let lacking = [
        (policy.name().to_owned(), policy.lacks()),
        reduce.map_or_else(Default::default, |reduce| (format!("reduce={}", reduce.name()), reduce.lacks())),
    ];
    if let Some((what, part)) = lacking.into_iter().find_map(|(what, part)| Some((what, part?))) {
        return Err(RecipeError::Conflict {
            what,
            with: "a cache without a profile".to_owned(),
            why: format!("it goes by numbers learned of the model (the part {part} of a profile)"),
            change: "make them with kvsieve calibrate and give them with CacheBuilder::profile".to_owned(),
        });
    }
    let needs = policy.needs();
    if needs.side == SideKind::PreRope {
        let unknown = |l: &usize| {
            let layer = shape.layer(*l);
            layer.window.is_none() && layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope
        };
        if let Some(layer) = shape.owners().find(unknown) {
            return conflict(
                format!("layer {layer} without a rotary description"),
                "it judges queries and keys before their rotation, and they come rotated".to_owned(),
                "set LayerShape::rotary, or KeyPhase::Unrotated if keys carry none",
            );
        }
    }
    if needs.replay
        && (recipe.schedule.chunk || recipe.schedule.every.is_some() || recipe.schedule.over.is_some())
    {
        return conflict(
            "a schedule that compresses before or after the end of the prompt".to_owned(),
            "it judges a whole context by its replay, and tokens that came later were not replayed"
                .to_owned(),
            "use when=prefill",
        );
    }
    Ok(())
}

fn check_read(index: &Retrieval, budget: Option<Budget>) -> Result<(), RecipeError> {
    let always = index.always();
    let refuse = |budget: String, problem: String, change: String| {
        Err(RecipeError::Budget { budget, problem, change })
    };
    match budget {
        None if index.rule.goal.is_none() => refuse(
            "(none)".to_owned(),
            format!("{} reads part of what is stored and must be told how much", index.name),
            "give what a step may read as tokens (2048), a share of the prompt (25%) or bytes (64MiB), or a goal (mass=0.99)".to_owned(),
        ),
        Some(Budget::Tokens(tokens)) if tokens < always => refuse(
            tokens.to_string(),
            format!(
                "{} always reads {} sinks, {} recent entries and up to {} that are in no unit yet",
                index.name,
                index.rule.sinks,
                index.rule.recent,
                always - index.rule.sinks - index.rule.recent
            ),
            format!("give at least {always} tokens, or lower sinks=, recent= or the size of pages"),
        ),
        _ => Ok(()),
    }
}

fn check_low_rank(shape: &ModelShape, low_rank: &LowRank) -> Result<(), RecipeError> {
    let conflict = |with: String, why: &str, change: &str| {
        let what = format!("factor={}", low_rank.name);
        Err(RecipeError::Conflict { what, with, why: why.to_owned(), change: change.to_owned() })
    };
    if !cfg!(feature = "lowrank") {
        return conflict(
            "a build without the feature lowrank".to_owned(),
            "decompositions are not in it",
            "turn the feature on",
        );
    }
    let unknown = |l: &usize| {
        let layer = shape.layer(*l);
        layer.window.is_none() && layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope
    };
    match shape.owners().find(unknown) {
        Some(layer) => conflict(
            format!("layer {layer} without a rotary description"),
            "its keys cannot be turned back, and turned ones are of full rank",
            "set LayerShape::rotary, or KeyPhase::Unrotated if its keys carry none",
        ),
        None => Ok(()),
    }
}

fn check_renumber(shape: &ModelShape, recipe: &Recipe) -> Result<(), RecipeError> {
    let conflict = |with: String, why: &str, change: &str| {
        Err(RecipeError::Conflict {
            what: "positions=renumber".to_owned(),
            with,
            why: why.to_owned(),
            change: change.to_owned(),
        })
    };
    if !recipe.policy.equal_counts() {
        return conflict(
            recipe.policy.name().to_owned(),
            "heads or layers keep different numbers of entries, so there is no one next position",
            "use positions=keep, or alloc=uniform",
        );
    }
    for (index, layer) in shape.iter().enumerate() {
        if layer.window.is_some() {
            return conflict(
                format!("the sliding window of layer {index}"),
                "its entries leave at other times than those of other layers",
                "use positions=keep",
            );
        }
        if layer.rotary.is_none() && layer.key_phase == KeyPhase::PostRope {
            return conflict(
                format!("layer {index} without a rotary description"),
                "its keys cannot be re-rotated",
                "set LayerShape::rotary, or use positions=keep",
            );
        }
    }
    Ok(())
}
