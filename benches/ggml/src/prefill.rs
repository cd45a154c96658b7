//! Many queries over a context, the last rows of which are their own.

use crate::data::{Input, shape};
use crate::decode::compare;
use crate::measure::{Candidate, Settings, table};
use crate::ours::Ours;
use crate::peer::{self, Peer, Threads};
use crate::team::Team;

pub fn run(tokens: usize, queries: usize, settings: &Settings) {
    let input = Input::new(tokens, queries);
    let (team, threads) = (Team::new(settings.threads), Threads::new(settings.threads));
    let pairs: usize = (1..=queries).map(|i| tokens - queries + i).sum();
    // A multiply-add is two operations; K and V.
    let work = (pairs * shape(1).num_q_heads * shape(1).head_dim * 4) as f64;
    let mut candidates = Vec::new();
    for (dtype, name) in [(peer::F16, "f16"), (peer::Q8_0, "q8_0"), (peer::Q4_0, "q4_0")] {
        let mut peer = Peer::new(dtype, &input, 1, &threads);
        let mut ours = Ours::new(name, &input, 1);
        peer.run(0);
        ours.run(0, &team);
        compare(name, &ours.output, peer.output(0));
        let team = &team;
        candidates.push(Candidate {
            name: format!("ggml {name}"),
            against: String::new(),
            work,
            units: 1,
            call: Box::new(move || peer.run(0)),
        });
        candidates.push(Candidate {
            name: name.into(),
            against: format!("ggml {name}"),
            work,
            units: 1,
            call: Box::new(move || ours.run(0, team)),
        });
    }
    let title = format!("prefill, {queries} queries over {tokens} tokens");
    table(&title, "GFLOP/s", &mut candidates, settings.rounds.div_ceil(3));
}
