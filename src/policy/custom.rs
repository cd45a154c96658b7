//! Scores that an engine brings along, under names of its choice.

use std::sync::Arc;

use parking_lot::RwLock;

use super::score::Score;
use super::stages::STAGES;
use crate::error::{Result, bail, ensure};
use crate::spec;

static CUSTOM: RwLock<Vec<(String, Arc<dyn Score>)>> = RwLock::new(Vec::new());

/// Lets specs name a score as a stage `name` without arguments. The name must be new; only then is the
/// score made.
pub fn register(name: &str, make: impl FnOnce() -> Arc<dyn Score>) -> Result<()> {
    let stage = spec::parse_stage(name).map_err(|error| error.within("name"))?;
    ensure!(
        stage.name == name && !["prefill", "decode", "all"].contains(&name),
        InvalidArgument,
        "name is {name:?}, must be one word"
    );
    ensure!(
        STAGES.iter().all(|stage| stage.name != name),
        InvalidArgument,
        "name is {name:?}, which is a stage of the library"
    );
    let mut custom = CUSTOM.write();
    ensure!(
        custom.iter().all(|(other, _)| other != name),
        InvalidState,
        "a score named {name:?} is registered already"
    );
    custom.push((name.to_string(), make()));
    Ok(())
}

/// Takes a name back. Pipelines that use the score go on.
pub fn unregister(name: &str) -> Result<()> {
    let mut custom = CUSTOM.write();
    let Some(index) = custom.iter().position(|(other, _)| other == name) else {
        bail!(NotFound, "no score named {name:?} is registered");
    };
    let score = custom.remove(index);
    // The engine's destroy hook may run here and may register again.
    drop(custom);
    drop(score);
    Ok(())
}

/// The score of this name.
pub(super) fn find(name: &str) -> Option<Arc<dyn Score>> {
    CUSTOM.read().iter().find(|(other, _)| other == name).map(|(_, score)| score.clone())
}
