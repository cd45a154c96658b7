//! Vectors that other programs made; `tests/golden/README.md` names them.

use std::path::PathBuf;

use safetensors::SafeTensors;

static FILE: &[u8] = include_bytes!("../golden/policy_subset.safetensors");

pub const LAYERS: usize = 2;
pub const HEADS: usize = 2;
pub const GROUP: usize = 4;
pub const DIM: usize = 64;
pub const LEN: usize = 512;
/// Tokens of the prompt of a decode trace.
pub const PROMPT: usize = 256;
/// Scores agree up to this relative error.
pub const TOLERANCE: f64 = 2e-5;

/// Files with vectors: the one of this repository and, if `KVMGR_GOLDEN` names the folder of the full
/// set, that as well.
pub struct Golden(Vec<(&'static str, SafeTensors<'static>)>);

impl Golden {
    pub fn open() -> Self {
        let parse = |bytes: &'static [u8]| SafeTensors::deserialize(bytes).expect("a whole file");
        let mut files = vec![("", parse(FILE))];
        if let Some(folder) = std::env::var_os("KVMGR_GOLDEN") {
            for (prefix, file) in [
                ("", "press_T512"),
                ("", "decode_T512"),
                ("states/", "states_T512"),
                ("weights/", "model_weights"),
            ] {
                let path = PathBuf::from(&folder).join(format!("{file}.safetensors"));
                let bytes = std::fs::read(&path).expect("KVMGR_GOLDEN names the full set");
                files.push((prefix, parse(bytes.leak())));
            }
        }
        Self(files)
    }

    pub fn tensor(&self, name: &str) -> Option<safetensors::tensor::TensorView<'static>> {
        let find = |(prefix, file): &(&str, SafeTensors<'static>)| {
            file.tensor(name.strip_prefix(prefix)?).ok()
        };
        self.0.iter().find_map(find)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    pub fn bytes(&self, name: &str) -> &'static [[u8; 4]] {
        let tensor = self.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        tensor.data().as_chunks().0
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    pub fn indices(&self, name: &str) -> Vec<usize> {
        self.bytes(name).iter().map(|bytes| i32::from_le_bytes(*bytes) as usize).collect()
    }

    /// The scores of a press, which may be stored once for all ratios.
    pub fn scores(&self, press: &str, layer: usize) -> Vec<f32> {
        let own = format!("{press}/l{layer}.score");
        if self.has(&own) {
            return self.floats(&own);
        }
        let base = press.split('@').next().unwrap_or(press);
        self.floats(&format!("{base}@0.5/l{layer}.score"))
    }

    /// The kept indices of one head of a press.
    pub fn kept(&self, press: &str, layer: usize, head: usize) -> Vec<usize> {
        let place = format!("{press}/l{layer}");
        if self.has(&format!("{place}.kept")) {
            let kept = self.indices(&format!("{place}.kept"));
            let tensor = self.tensor(&format!("{place}.kept"));
            if tensor.is_some_and(|tensor| tensor.shape().len() == 1) {
                return kept; // All heads keep the same.
            }
            return kept
                .chunks(kept.len() / HEADS)
                .nth(head)
                .expect("one part for each head")
                .to_vec();
        }
        let ends = self.indices(&format!("{place}.kept_cu"));
        self.indices(&format!("{place}.kept_flat"))[ends[head]..ends[head + 1]].to_vec()
    }
}
