//! Scores of each head moved and scaled to mean 0 and deviation 1, for budgets that compare heads.

use super::{Context, Entry, Map, Scores};
use crate::error::Result;
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "znorm",
    summary: "scores of each head get mean 0 and deviation 1",
    paper: "",
    params: &[],
    needs: Needs::NONE,
    examples: &["keydiff | znorm | adakv | keep(0.5)"],
    create: |_| Ok(Box::new(ZNorm)),
};

#[derive(Debug)]
struct ZNorm;

impl Map for ZNorm {
    fn map(&self, _context: &Context<'_>, scores: &mut Scores) -> Result<()> {
        for head in &mut scores.heads {
            let open = || {
                let pairs = head.scores.iter().zip(&head.protected);
                pairs.filter(|pair| !pair.1 && pair.0.is_finite()).map(|pair| f64::from(*pair.0))
            };
            let count = open().count().max(2) as f64;
            let mean = open().sum::<f64>() / count;
            let squares: f64 = open().map(|x| (x - mean) * (x - mean)).sum();
            let deviation = (squares / (count - 1.0)).sqrt().max(1e-12);
            for score in &mut head.scores {
                *score = ((f64::from(*score) - mean) / deviation) as f32;
            }
        }
        Ok(())
    }
}
