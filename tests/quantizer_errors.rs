//! The error of every registered quantizer on reference data, and its page: the tables between the
//! marks of `docs/QUANTIZERS.md` are what this test computes. `BLESS=1` rewrites them.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fmt::Write;
use std::fs;
use std::path::Path;

use kvmgr::quantizer::{Cell, QUANTIZERS, Quantizer, Side, create};
use safetensors::SafeTensors;

static GOLDEN: &[u8] = include_bytes!("golden/quant_subset.safetensors");

/// Tokens of a cell.
const BLOCK: usize = 64;

/// Rotations worth a row besides the examples of the registry.
const MORE: [&str; 4] = ["had+q5_0", "had+iq4_nl", "had+nvfp4", "had+fp8(e4m3)"];

fn floats(name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(GOLDEN).unwrap();
    let bytes = file.tensor(name).unwrap().data();
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Keys, values `[256, dim]` and queries `[64, dim]`.
struct Data {
    dim: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
}

impl Data {
    /// Keys with constant offsets of channels; gaussian values and queries.
    fn outlier() -> Self {
        let queries = floats("data/gauss");
        let row = |t: usize| &queries[(t * 7 + 3) % 64 * 128..][..128];
        let values = (0..256).flat_map(|t| row(t).iter().copied()).collect();
        Self { dim: 128, keys: floats("data/outlier"), values, queries }
    }

    /// Keys, values and later queries of a random Llama.
    fn model() -> Self {
        let [keys, values, queries] = ["data/model_k", "data/model_v", "data/model_q"].map(floats);
        Self { dim: 64, keys, values, queries }
    }

    /// Centred logits `[queries, tokens]` and attention outputs `[queries, dim]`.
    fn attention(&self, keys: &[f32], values: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let (mut all_logits, mut outputs) = (Vec::new(), Vec::new());
        for query in self.queries.chunks(self.dim) {
            let dot = |key: &[f32]| -> f64 {
                key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let scale = 1.0 / (self.dim as f64).sqrt();
            let mut logits: Vec<f64> = keys.chunks(self.dim).map(|key| scale * dot(key)).collect();
            let mean = logits.iter().sum::<f64>() / logits.len() as f64;
            logits.iter_mut().for_each(|x| *x -= mean);
            let largest = logits.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for c in 0..self.dim {
                let column = values.iter().skip(c).step_by(self.dim);
                let sum: f64 = weights.iter().zip(column).map(|(w, v)| w * f64::from(*v)).sum();
                outputs.push(sum / total);
            }
            all_logits.extend(logits);
        }
        (all_logits, outputs)
    }
}

/// What a quantizer does to a set of data.
struct Errors {
    spec: String,
    /// Bits for each element, mean of both sides.
    bits: f64,
    /// Of the keys, relative, L2.
    key: f64,
    /// Of the logits, root of the mean square; a constant for a query does not matter.
    logit: f64,
    /// Of the outputs, relative, L2, with exact values.
    output: f64,
    /// Of the outputs, with values coded as well.
    output_both: f64,
}

fn measure(spec: &str, data: &Data) -> Errors {
    let sides = [Side::Key, Side::Value].map(|side| create(spec, side).unwrap());
    let bits = sides.each_ref().map(|side| side.bits_per_element(BLOCK, data.dim));
    let keys = round_trip(&*sides[0], &data.keys, data.dim);
    let values = round_trip(&*sides[1], &data.values, data.dim);
    let (logits, outputs) = data.attention(&data.keys, &data.values);
    let (coded_logits, coded_outputs) = data.attention(&keys, &data.values);
    let (_, both_outputs) = data.attention(&keys, &values);
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    Errors {
        spec: spec.into(),
        bits: (bits[0] + bits[1]) / 2.0,
        key: relative(&wide(&data.keys), &wide(&keys)),
        logit: norm(logits.iter().zip(&coded_logits).map(|(a, b)| a - b))
            / (logits.len() as f64).sqrt(),
        output: relative(&outputs, &coded_outputs),
        output_both: relative(&outputs, &both_outputs),
    }
}

fn round_trip(quantizer: &dyn Quantizer, rows: &[f32], dim: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows.len()];
    for (rows, out) in rows.chunks(BLOCK * dim).zip(out.chunks_mut(BLOCK * dim)) {
        let tokens = rows.len() / dim;
        let mut bytes = vec![0; quantizer.bytes(tokens, dim)];
        quantizer.encode(rows, dim, &mut bytes);
        quantizer.decode(&Cell { bytes: &bytes, tokens, dim, rows: 0..tokens, ahead: &[] }, out);
    }
    out
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn relative(exact: &[f64], coded: &[f64]) -> f64 {
    norm(exact.iter().zip(coded).map(|(a, b)| a - b)) / norm(exact.iter().copied())
}

fn measure_all(data: &Data) -> Vec<Errors> {
    let examples = QUANTIZERS.iter().flat_map(|entry| entry.examples);
    let mut all: Vec<_> = examples.chain(&MORE).map(|spec| measure(spec, data)).collect();
    all.sort_by(|a, b| (a.bits, a.output).partial_cmp(&(b.bits, b.output)).unwrap());
    all
}

fn table(all: &[Errors]) -> String {
    let mut out = String::from(
        "| spec | bits | keys | logits | output | output, V too |\n\
         | --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for Errors { spec, bits, key, logit, output, output_both } in all {
        let _ = writeln!(
            out,
            "| `{spec}` | {bits:.3} | {key:.4} | {logit:.4} | {output:.4} | {output_both:.4} |"
        );
    }
    out
}

#[test]
fn the_page_holds_the_errors_of_every_quantizer() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/QUANTIZERS.md");
    let page = fs::read_to_string(&path).unwrap();
    let mut wanted = page.clone();
    for (mark, data) in [("outlier", Data::outlier()), ("model", Data::model())] {
        let (open, close) = (format!("<!-- {mark} -->\n"), format!("<!-- end of {mark} -->"));
        let start = wanted.find(&open).unwrap() + open.len();
        let end = wanted.find(&close).unwrap();
        wanted.replace_range(start..end, &table(&measure_all(&data)));
    }
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, wanted).unwrap();
        return;
    }
    assert!(
        page == wanted,
        "stale: BLESS=1 cargo test --test quantizer_errors, then read the diff"
    );
}

/// What the page says in words.
#[test]
fn claims_of_the_page_hold() {
    for data in [Data::outlier(), Data::model()] {
        let output = |spec: &str| measure(spec, &data).output;
        for inner in ["q8_0", "q5_0", "q4_0"] {
            let (plain, rotated) = (output(inner), output(&format!("had+{inner}")));
            assert!(rotated < 0.75 * plain, "{inner}: {plain}, rotated {rotated}");
        }
        assert!(output("tq(bits=2)") < output("qjl(ratio=2)"));
        assert!(output("nuq(bits=3)") < output("gear(bits=2)"));
        assert!(output("f32") == 0.0);
    }
}
