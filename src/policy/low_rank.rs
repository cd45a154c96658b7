//! The options of `quant` that keep rows as coordinates in a subspace: [`crate::quantizer::basis`].

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::parse::{at, in_column};
use super::quant::column;
use super::weights::Weights;
use crate::cache::LowRank;
use crate::error::{Result, ensure};
use crate::quantizer::basis::{Bases, Basis};
use crate::registry::Args;
use crate::shape::ModelShape;
use crate::spec::Stage;

/// Which sides of blocks are kept as coordinates, and the file with the subspaces.
#[derive(Debug, Default)]
pub struct LowRanks {
    /// Dimensions that are kept of keys and of values; `None` for whole rows.
    pub ranks: [Option<usize>; 2],
    file: Option<Weights>,
    /// Where the spec says so.
    pub(super) column: usize,
}

impl LowRanks {
    pub(super) fn new(stage: &Stage, args: &Args) -> Result<Self> {
        let ranks =
            ["k_rank", "v_rank"].map(|name| Some(args.count(name)).filter(|rank| *rank > 0));
        let file = Weights::optional(args, "basis");
        let file = file.map_err(|error| in_column(column(stage, "basis"), &error))?;
        if file.is_some() && ranks == [None, None] {
            let text = "basis has no effect without k_rank or v_rank";
            return Err(at(column(stage, "basis"), text));
        }
        let first = ["k_rank", "v_rank"].into_iter().find(|name| args.count(name) > 0);
        let column = first.map_or(stage.column, |name| column(stage, name));
        Ok(Self { ranks, file, column })
    }

    /// What a cache for a model of this shape is told. The file has, for each layer L and each side that is
    /// kept so, `layers.L.key_basis` or `layers.L.value_basis`, `[num_kv_heads, rank, dim]`: directions, of
    /// which a row is the sum with its coordinates as factors. What makes coordinates of rows is
    /// `layers.L.key_projection` or `layers.L.value_projection` of the same shape, or the basis itself,
    /// which must be orthonormal then. A file may have more directions than are asked for: the first count.
    pub fn resolve(&self, shape: &ModelShape) -> Result<LowRank> {
        let mut low_rank = LowRank { ranks: self.ranks, ..LowRank::default() };
        let Some(file) = &self.file else { return Ok(low_rank) };
        let dims = [shape.head_dim, shape.value_dim()];
        let mut digest = Sha256::new();
        let mut heads = Vec::with_capacity(shape.num_layers * shape.num_kv_heads);
        for layer in 0..shape.num_layers {
            let mut sides = Vec::new();
            for (name, (rank, dim)) in ["key", "value"].iter().zip(self.ranks.iter().zip(dims)) {
                let Some(rank) = rank else {
                    sides.push(vec![None; shape.num_kv_heads]);
                    continue;
                };
                let read = |what: &str| {
                    let name = format!("layers.{layer}.{name}_{what}");
                    first_directions(file, &name, shape.num_kv_heads, *rank, dim)
                };
                let up = read("basis")?;
                let down = match file.has(&format!("layers.{layer}.{name}_projection")) {
                    true => read("projection")?.into_iter().map(Some).collect(),
                    false => vec![None; up.len()],
                };
                let bases = up.into_iter().zip(down).map(|(up, down)| {
                    let numbers = up.iter().chain(down.iter().flatten());
                    numbers.for_each(|x| digest.update(x.to_le_bytes()));
                    Basis::new(dim, up, down).map(Some)
                });
                let bases: Result<Vec<_>> = bases.collect();
                sides.push(bases.map_err(|error| error.within(format!("layer {layer}, {name}")))?);
            }
            let values = sides.pop().unwrap_or_default();
            let keys = sides.pop().unwrap_or_default();
            heads.extend(keys.into_iter().zip(values).map(|(key, value)| [key, value]));
        }
        low_rank.bases = Some(Arc::new(Bases::new(heads)));
        low_rank.digest = digest.finalize().into();
        Ok(low_rank)
    }
}

/// The first `rank` directions of each head of the tensor `name`, `[num_kv_heads, rank or more, dim]`.
fn first_directions(
    file: &Weights,
    name: &str,
    heads: usize,
    rank: usize,
    dim: usize,
) -> Result<Vec<Vec<f32>>> {
    let found = match file.shape(name)? {
        [_, found, _] => *found,
        _ => rank,
    };
    let data = file.tensor(name, &[heads, found, dim])?;
    ensure!(
        found >= rank,
        InvalidArgument,
        "tensor {name} has {found} directions, fewer than the rank {rank}"
    );
    Ok(data.chunks_exact(found * dim).map(|head| head[..rank * dim].to_vec()).collect())
}
