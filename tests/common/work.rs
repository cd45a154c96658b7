//! Work for the kernels of decoding attention.

#![allow(unreachable_pub, reason = "a module of tests")]

use kvmgr::device::cuda::params::Item;

/// What 16-byte loads of floats want.
#[repr(C, align(16))]
#[derive(Debug, Clone, Copy)]
pub struct Quad(pub [f32; 4]);

/// CTAs of a launch.
pub const GRID: usize = 5;

/// Items, dealt out to CTAs like cards: the first of each CTA, then the others.
pub fn deal(items: &[Item]) -> Vec<Item> {
    let mut dealt = vec![Item::default(); GRID];
    let mut last: Vec<usize> = (0..GRID).collect();
    for (i, item) in items.iter().enumerate() {
        let cta = i % GRID;
        if i < GRID {
            dealt[cta] = *item;
        } else {
            dealt[last[cta]].next = dealt.len() as u32;
            last[cta] = dealt.len();
            dealt.push(*item);
        }
    }
    dealt
}
