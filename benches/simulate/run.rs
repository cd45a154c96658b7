//! Requests against pools of other sizes with other evictors: what would have been cached.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use kvmgr::block::manager::TraceEvent;
use kvmgr::block::{BlockPool, Request, SequenceId, Tables, TablesConfig};
use kvmgr::error::{Error, Kind, Result};
use kvmgr::evictor;
use plotters::prelude::*;

use super::trace::{Trace, wrong};

/// Tokens of prompts: how many there were, and how many of them were cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Hits {
    /// Tokens of all prompts.
    pub(crate) asked: u64,
    /// Of these, tokens in blocks that were cached.
    pub(crate) found: u64,
}

impl Hits {
    /// Percent.
    pub(crate) fn rate(self) -> f64 {
        100.0 * self.found as f64 / self.asked.max(1) as f64
    }
}

/// What a pool of `blocks` blocks with `evictor` answers to a trace. A prompt that does not fit even
/// after every idle block is reclaimed is not admitted; a sequence that cannot grow ends.
pub(crate) fn simulate(trace: &Trace, evictor: &str, blocks: usize) -> Result<Hits> {
    let mut pool = BlockPool::new(blocks, evictor::create(evictor, blocks)?);
    let mut tables = Tables::new(TablesConfig::new(trace.block_size))?;
    let mut live: HashMap<u64, SequenceId> = HashMap::new();
    let mut hits = Hits::default();
    for event in &trace.events {
        match event {
            TraceEvent::Admit { sequence, tokens, root } => {
                hits.asked += tokens.len() as u64;
                match tables.admit(&mut pool, &Request::new(tokens, *root)) {
                    Ok(admission) => {
                        hits.found += admission.num_cached as u64;
                        let rest = (tokens.len() - admission.num_cached) as u32;
                        tables.commit(&mut pool, &[admission.id], &[rest], &[])?;
                        live.insert(*sequence, admission.id);
                    }
                    Err(error) if error.kind() == Kind::OutOfBlocks => {}
                    Err(error) => return Err(error),
                }
            }
            TraceEvent::Extend { sequence, tokens } => {
                let Some(id) = live.get(sequence) else { continue };
                let (ids, counts) = (&[*id], &[tokens.len() as u32]);
                match tables.reserve(&mut pool, ids, counts) {
                    Ok(()) => tables.commit(&mut pool, ids, counts, tokens)?,
                    Err(error) if error.kind() == Kind::OutOfBlocks => {
                        tables.release(&mut pool, ids)?;
                        live.remove(sequence);
                    }
                    Err(error) => return Err(error),
                }
            }
            TraceEvent::End { sequence } => {
                if let Some(id) = live.remove(sequence) {
                    tables.release(&mut pool, &[id])?;
                }
            }
        }
    }
    Ok(hits)
}

/// Hit rates: one row for each evictor, one column for each pool.
pub(crate) struct Rates {
    /// Blocks of the pools, rising.
    pub(crate) pools: Vec<usize>,
    /// Evictors and their rates in percent.
    pub(crate) rows: Vec<(String, Vec<f64>)>,
}

/// Every evictor against every pool.
pub(crate) fn rates(trace: &Trace, evictors: &[String], pools: &[usize]) -> Result<Rates> {
    if pools.is_empty() || !pools.is_sorted() || pools[0] == 0 {
        return Err(wrong(format!("pools are {pools:?}, must rise from at least 1")));
    }
    let row = |evictor: &String| {
        let rate = |blocks: &usize| Ok(simulate(trace, evictor, *blocks)?.rate());
        Ok((evictor.clone(), pools.iter().map(rate).collect::<Result<_>>()?))
    };
    let rows = evictors.iter().map(row).collect::<Result<_>>()?;
    Ok(Rates { pools: pools.to_vec(), rows })
}

impl Rates {
    /// A table for people.
    pub(crate) fn table(&self) -> String {
        let mut out = "| evictor, hit % at blocks |".to_string();
        self.pools.iter().for_each(|blocks| _ = write!(out, " {blocks} |"));
        _ = write!(out, "\n| --- |{}", " ---: |".repeat(self.pools.len()));
        for (evictor, rates) in &self.rows {
            _ = write!(out, "\n| {evictor} |");
            rates.iter().for_each(|rate| _ = write!(out, " {rate:.1} |"));
        }
        out + "\n"
    }

    /// A line for each evictor over the size of the pool, as SVG.
    pub(crate) fn plot(&self, path: &Path) -> Result<()> {
        self.draw(path).map_err(|error| {
            Error::new(Kind::Store, format!("cannot draw {}: {error}", path.display()))
        })
    }

    fn draw(&self, path: &Path) -> std::result::Result<(), Box<dyn std::error::Error + '_>> {
        let root = SVGBackend::new(path, (800, 500)).into_drawing_area();
        root.fill(&WHITE)?;
        let (first, last) = (self.pools[0] as f64, self.pools[self.pools.len() - 1] as f64);
        let all = self.rows.iter().flat_map(|(_, rates)| rates.iter().copied());
        let low = all.fold(100.0, f64::min);
        let mut chart = ChartBuilder::on(&root)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(first..last.max(first + 1.0), low.floor()..100.0)?;
        let blocks = |x: &f64| format!("{x:.0}");
        chart
            .configure_mesh()
            .x_desc("blocks")
            .y_desc("prompt tokens cached, %")
            .x_label_formatter(&blocks)
            .draw()?;
        for (i, (evictor, rates)) in self.rows.iter().enumerate() {
            let points = self.pools.iter().map(|x| *x as f64).zip(rates.iter().copied());
            let color = Palette99::pick(i).stroke_width(2);
            chart
                .draw_series(LineSeries::new(points, color))?
                .label(evictor)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()?;
        root.present()?;
        Ok(())
    }
}
