//! Weights of policies that were learned or measured offline, from safetensors files.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Kind, Result, bail, ensure};
use crate::registry::Args;

/// The tensors of a file, as f32.
#[derive(Debug)]
pub struct Weights {
    path: String,
    tensors: HashMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl Weights {
    /// The file that the argument `name` of a stage names; an error if it names none.
    pub fn required(args: &Args, name: &str) -> Result<Self> {
        match Self::optional(args, name)? {
            Some(weights) => Ok(weights),
            None => bail!(InvalidArgument, "{name} must name a safetensors file"),
        }
    }

    /// The file that the argument `name` of a stage names, if it names one.
    pub fn optional(args: &Args, name: &str) -> Result<Option<Self>> {
        match args.text(name) {
            "" => Ok(None),
            path => Self::load(Path::new(path)).map(Some),
        }
    }

    /// Reads a whole file.
    pub fn load(path: &Path) -> Result<Self> {
        let place = path.display();
        let fail = |error: &dyn std::fmt::Display| {
            Error::new(Kind::InvalidArgument, format!("file {place}: {error}"))
        };
        let bytes = std::fs::read(path).map_err(|error| fail(&error))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| fail(&error))?;
        let mut tensors = HashMap::new();
        for (name, view) in file.iter() {
            let data = match view.dtype() {
                Dtype::F32 => floats(view.data(), f32::from_le_bytes),
                Dtype::F16 => floats(view.data(), |bytes| f16::from_le_bytes(bytes).to_f32()),
                Dtype::BF16 => floats(view.data(), |bytes| bf16::from_le_bytes(bytes).to_f32()),
                other => bail!(
                    InvalidArgument,
                    "file {place}: tensor {name} is of type {other:?}, must be F32, F16 or BF16"
                ),
            };
            tensors.insert(name.to_string(), Tensor { shape: view.shape().to_vec(), data });
        }
        Ok(Self { path: place.to_string(), tensors })
    }

    /// Whether the file has a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of the tensor `name`.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.find(name)?.shape)
    }

    /// The tensor `name`, which must have `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        let tensor = self.find(name)?;
        ensure!(
            tensor.shape == shape,
            InvalidArgument,
            "file {}: tensor {name} has shape {:?}, must have {shape:?}",
            self.path,
            tensor.shape
        );
        Ok(&tensor.data)
    }

    fn find(&self, name: &str) -> Result<&Tensor> {
        let missing =
            || Error::new(Kind::InvalidArgument, format!("file {}: no tensor {name}", self.path));
        self.tensors.get(name).ok_or_else(missing)
    }
}

fn floats<const N: usize>(bytes: &[u8], read: fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| read(*bytes)).collect()
}
