//! First in, first out: the order in which slots first became idle; coming back for one does not
//! help it, unless it was in use when its turn came.

use super::Entry;
use super::queue::Queue;

pub(super) static ENTRY: Entry = Entry {
    name: "fifo",
    summary: "first in, first out",
    params: &[],
    create: |_, capacity| Box::new(Queue::new(capacity, true)),
};
