//! Sealing: rows of f32 to encoded bytes, on one thread.

use kvmgr::quantizer::{Side, create};

use crate::data::noise;
use crate::measure::{Candidate, Settings, table};
use crate::peer;

const DIM: usize = 128;
const TOKENS: usize = 32;
/// Cells of a call: 4 MiB of rows, so that they come from a cache as freshly computed rows do.
const CELLS: usize = 256;

pub fn run(settings: &Settings) {
    let rows = noise(CELLS * TOKENS * DIM, 4);
    let mut candidates = Vec::new();
    for (dtype, name) in [(peer::F16, "f16"), (peer::Q8_0, "q8_0"), (peer::Q4_0, "q4_0")] {
        let bits = match name {
            "f16" => 512,
            "q8_0" => 272,
            _ => 144,
        };
        let (encode, rows) = (peer::encoder(dtype), &rows);
        let mut out = vec![0; TOKENS * DIM / 32 * bits / 8];
        candidates.push(Candidate {
            name: format!("ggml {name}"),
            against: String::new(),
            work: (4 * rows.len()) as f64,
            units: 1,
            call: Box::new(move || {
                rows.chunks(TOKENS * DIM).for_each(|cell| encode(cell, &mut out));
            }),
        });
    }
    let specs = [
        ("f16", Side::Key, "ggml f16"),
        ("q8_0", Side::Key, "ggml q8_0"),
        ("q4_0", Side::Key, "ggml q4_0"),
        ("had+q4_0", Side::Key, "ggml q4_0"),
        ("kivi(bits=2)", Side::Key, "ggml q4_0"),
        ("kivi(bits=2)", Side::Value, "ggml q4_0"),
        ("kivi(bits=4)", Side::Key, "ggml q4_0"),
        ("kivi(bits=4)", Side::Value, "ggml q4_0"),
    ];
    for (spec, side, against) in specs {
        let (quantizer, rows) = (create(spec, side).expect("a spec"), &rows);
        let mut out = vec![0; quantizer.bytes(TOKENS, DIM)];
        candidates.push(Candidate {
            name: format!("{spec} {side:?}"),
            against: against.into(),
            work: (4 * rows.len()) as f64,
            units: 1,
            call: Box::new(move || {
                rows.chunks(TOKENS * DIM).for_each(|cell| quantizer.encode(cell, DIM, &mut out));
            }),
        });
    }
    table("encode, one thread", "GB/s of f32", &mut candidates, settings.rounds * 3);
}
