//! One query over a long context.

use crate::data::Input;
use crate::measure::{Candidate, Settings, table};
use crate::memory::Memory;
use crate::ours::Ours;
use crate::peer::{self, Peer, Threads};
use crate::team::Team;

/// Our spec, the peer's type and name, and what its time is divided by.
const PEERS: [(u32, &str); 3] =
    [(peer::F16 as u32, "f16"), (peer::Q8_0 as u32, "q8_0"), (peer::Q4_0 as u32, "q4_0")];
const OURS: [(&str, &str); 9] = [
    ("f16", "ggml f16"),
    ("q8_0", "ggml q8_0"),
    ("q4_0", "ggml q4_0"),
    ("q4_0", "f16"),
    ("had+q4_0", "f16"),
    ("kivi(bits=2)", "f16"),
    ("kivi(bits=4)", "f16"),
    ("tq3", "f16"),
    ("tq4", "f16"),
];

/// Bytes that a candidate goes through before it comes back to the first: several times the last
/// level cache.
const TRAFFIC: f64 = 144e6;

pub fn run(tokens: usize, settings: &Settings) {
    let input = Input::new(tokens, 1);
    let (team, threads) = (Team::new(settings.threads), Threads::new(settings.threads));
    let memory = Memory::new(256 << 20);
    let layers = |spec: &str| {
        let bytes = Ours::new(spec, &Input::new(64, 1), 1).layer_bytes() * tokens as f64 / 64.0;
        (TRAFFIC / bytes).ceil() as usize
    };
    let wanted = |name: &str| name.contains(&settings.only);
    let mut peers: Vec<_> = PEERS
        .iter()
        .filter(|(_, name)| wanted(name))
        .map(|(dtype, name)| (*name, Peer::new(*dtype as _, &input, layers(name), &threads)))
        .collect();
    let mut ours: Vec<(&str, Ours)> = Vec::new();
    for (spec, _) in OURS.iter().filter(|(spec, _)| wanted(spec)) {
        if !ours.iter().any(|(other, _)| other == spec) && exists(spec) {
            ours.push((spec, Ours::new(spec, &input, layers(spec))));
        }
    }
    for (name, peer) in &mut peers {
        let Some((_, ours)) = ours.iter_mut().find(|(spec, _)| spec == name) else { continue };
        ours.run(0, &team);
        peer.run(0);
        compare(name, &ours.output, peer.output(0));
    }
    let mut candidates = vec![Candidate {
        name: "read".into(),
        against: String::new(),
        work: memory.bytes() as f64,
        units: 1,
        call: Box::new(|| memory.read(&team)),
    }];
    let bytes: Vec<(&str, f64)> =
        ours.iter().map(|(spec, ours)| (*spec, ours.layer_bytes())).collect();
    for (name, mut peer) in peers {
        let work = bytes.iter().find(|(spec, _)| *spec == name).map_or(0.0, |(_, bytes)| *bytes);
        candidates.push(Candidate {
            name: format!("ggml {name}"),
            against: String::new(),
            work,
            units: peer.num_layers,
            call: Box::new(move || (0..peer.num_layers).for_each(|layer| peer.run(layer))),
        });
    }
    for (spec, mut ours) in ours {
        let against = OURS.iter().find(|(other, _)| *other == spec).map_or("", |(_, name)| name);
        let team = &team;
        candidates.push(Candidate {
            name: spec.into(),
            against: against.into(),
            work: ours.layer_bytes(),
            units: ours.num_layers,
            call: Box::new(move || (0..ours.num_layers).for_each(|layer| ours.run(layer, team))),
        });
    }
    table(&format!("decode, {tokens} tokens"), "GB/s", &mut candidates, settings.rounds);
}

fn exists(spec: &str) -> bool {
    kvmgr::quantizer::create(spec, kvmgr::quantizer::Side::Key).is_ok()
}

/// Both sides must answer the same, or a ratio of times means nothing. ggml adds up values in f16.
pub fn compare(name: &str, ours: &[f32], peer: &[f32]) {
    let worst = ours.iter().zip(peer).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = ours.iter().map(|x| x.abs()).fold(0.0, f32::max);
    println!("{name}: outputs up to {largest:.4}, which differ by at most {worst:.5}");
    assert!(worst <= 0.1 * largest, "the two sides do not compute the same");
}
