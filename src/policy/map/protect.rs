//! Protects the first and the last tokens, whatever the score says of them.

use super::{Context, Entry, Map, Scores};
use crate::error::Result;
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "protect",
    summary: "the first and the last tokens stay",
    paper: "",
    params: &[
        Param {
            name: "sink",
            help: "leading tokens that stay",
            domain: Domain::Int { default: 4, min: 0, max: 1 << 20 },
        },
        Param {
            name: "recent",
            help: "newest tokens that stay",
            domain: Domain::Int { default: 0, min: 0, max: 1 << 30 },
        },
    ],
    needs: Needs::NONE,
    examples: &["knorm | protect(sink=4, recent=32) | keep(0.5)"],
    create: |args| Ok(Box::new(Protect { sink: args.count("sink"), recent: args.count("recent") })),
};

#[derive(Debug)]
struct Protect {
    sink: usize,
    recent: usize,
}

impl Map for Protect {
    fn map(&self, _context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        for head in &mut scores.heads {
            let len = head.protected.len();
            head.protected[..self.sink.min(len)].fill(true);
            head.protected[len - self.recent.min(len)..].fill(true);
        }
        Ok(())
    }
}
