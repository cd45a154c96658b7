//! Acts: what becomes of evicted tokens besides being freed. Their values go into those of survivors, or they
//! are not evicted at all but demoted.
//!
//! Keys stay as they are: mixing keys of different positions mixes their phases.

use std::fmt::Debug;

use super::{HeadScores, LayerInput};
use crate::registry::{StageEntry, registry};
use crate::shape::{KeepSet, Needs};

registry! {
    /// Every act, in the order of the documentation.
    pub static ACTS: Entry = { merge, cam, d2o, kvmerger, demote, }
}

/// What an act sees of one head.
#[derive(Debug, Clone, Copy)]
pub struct Evicted<'a> {
    /// The layer, with keys and values.
    pub layer: &'a LayerInput<'a>,
    /// Index of the KV head.
    pub head: usize,
    /// The final scores of its tokens.
    pub scores: &'a HeadScores,
    /// What stays.
    pub kept: &'a KeepSet,
}

/// Lets survivors take over from the evicted.
pub trait Act: Debug + Send + Sync {
    /// What the engine has to hand over.
    fn needs(&self) -> Needs;

    /// The values of the survivors from now on, `[kept, value_dim]`. Something was evicted.
    fn values(&self, _evicted: &Evicted<'_>) -> Vec<f32> {
        Vec::new()
    }

    /// The quantizers of keys and values in which tokens stay instead of being evicted, if they do.
    /// Then no value of another changes.
    fn demotes(&self) -> Option<[&str; 2]> {
        None
    }
}

/// How the registry describes an act.
pub type Entry = StageEntry<dyn Act>;

impl Evicted<'_> {
    /// Indices of the survivors and of the evicted, ascending.
    fn split(&self) -> (Vec<usize>, Vec<usize>) {
        let mut stays = vec![false; self.scores.scores.len()];
        self.kept.iter().for_each(|i| stays[i] = true);
        (0..stays.len()).partition(|i| stays[*i])
    }

    /// The key of row `i`.
    fn key(&self, i: usize) -> &[f32] {
        let dim = self.layer.head_dim;
        &self.layer.heads[self.head].keys[i * dim..][..dim]
    }

    /// The value of row `i`.
    fn value(&self, i: usize) -> &[f32] {
        let dim = self.layer.value_dim;
        &self.layer.heads[self.head].values[i * dim..][..dim]
    }
}
