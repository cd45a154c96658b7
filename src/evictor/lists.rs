//! Doubly linked lists threaded through flat arrays: the material that evictors are made of.

use crate::device::host;
use crate::simd::prefetch;

/// No slot.
const NONE: u32 = u32::MAX;
/// The bits of a number in a link that name a slot.
const SLOT: u32 = u32::MAX >> 1;
/// How many lists two bits tell apart, beside none.
const NARROW: usize = 3;

/// Up to 254 lists over the slots `0..capacity`, of which there are at most 2^31; a slot is in one of
/// them or in none.
#[derive(Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    /// The list of each slot that is in one, if there are more than [`NARROW`]: otherwise the links
    /// say it, so that one cache line has all that is known of a slot.
    wide: Vec<u8>,
    ends: Vec<Ends>,
    len: usize,
}

/// The neighbours of a slot: itself where there is none. The highest bits of both are a number: 0 if
/// the slot is in no list, otherwise the list's plus 1, or 1 where `wide` says which.
#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

impl Link {
    /// In no list.
    const NOWHERE: Self = Self { previous: 0, next: 0 };

    fn number(self) -> usize {
        (self.previous >> 31 << 1 | self.next >> 31) as usize
    }
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
    len: usize,
    /// The number of the list, in the bits of a link.
    mark: Link,
}

impl Ends {
    fn empty(number: u32) -> Self {
        let mark = Link { previous: number >> 1 << 31, next: number << 31 };
        Self { head: NONE, tail: NONE, len: 0, mark }
    }
}

impl Lists {
    /// `num_lists` empty lists.
    pub(super) fn new(capacity: usize, num_lists: usize) -> Self {
        let is_wide = num_lists > NARROW;
        let ends = |list| Ends::empty(if is_wide { 1 } else { list as u32 + 1 });
        Self {
            links: host::large(capacity, |_| Link::NOWHERE),
            wide: host::large(if is_wide { capacity } else { 0 }, |_| 0),
            ends: (0..num_lists).map(ends).collect(),
            len: 0,
        }
    }

    /// Slots in all lists.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Slots in one list.
    pub(super) fn len_of(&self, list: usize) -> usize {
        self.ends[list].len
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> usize {
        self.links.len() * size_of::<Link>() + self.wide.len() + self.ends.len() * size_of::<Ends>()
    }

    /// The list that `slot` is in.
    pub(super) fn list_of(&self, slot: u32) -> Option<usize> {
        let list = self.links[slot as usize].number().checked_sub(1)?;
        Some(self.wide.get(slot as usize).map_or(list, |wide| usize::from(*wide)))
    }

    /// Asks memory for what [`Self::push`] of `slots` will touch.
    pub(super) fn prefetch(&self, slots: &[u32]) {
        for slot in slots {
            prefetch(&self.links, *slot as usize);
            prefetch(&self.wide, *slot as usize);
        }
    }

    /// Writes the first slots of `list` to `out`. Answers how many.
    pub(super) fn first(&self, list: usize, out: &mut [u32]) -> usize {
        let Ends { head, len, .. } = self.ends[list];
        let count = len.min(out.len());
        let mut slot = head;
        for out in &mut out[..count] {
            *out = slot;
            slot = self.links[slot as usize].next & SLOT;
        }
        count
    }

    /// Adds `slot`, which is in no list, at the end of `list`.
    pub(super) fn push(&mut self, list: usize, slot: u32) {
        self.push_all(list, std::iter::once(slot));
    }

    /// [`Self::push`] of different slots in their order, without a detour over memory between two.
    pub(super) fn push_all(&mut self, list: usize, slots: impl Iterator<Item = u32>) {
        let Ends { mut head, mut tail, mark, .. } = self.ends[list];
        let mut count = 0;
        for slot in slots {
            let previous = if tail == NONE {
                head = slot;
                slot
            } else {
                self.links[tail as usize].next = mark.next | slot;
                tail
            };
            self.links[slot as usize] =
                Link { previous: mark.previous | previous, next: mark.next | slot };
            if let Some(wide) = self.wide.get_mut(slot as usize) {
                *wide = list as u8;
            }
            tail = slot;
            count += 1;
        }
        let ends = &mut self.ends[list];
        (ends.head, ends.tail) = (head, tail);
        ends.len += count;
        self.len += count;
    }

    /// Takes `slot` out of its list. Answers which it was.
    pub(super) fn remove(&mut self, slot: u32) -> Option<usize> {
        let list = self.list_of(slot)?;
        let link = std::mem::replace(&mut self.links[slot as usize], Link::NOWHERE);
        let (previous, next) = (link.previous & SLOT, link.next & SLOT);
        let (is_first, is_last) = (previous == slot, next == slot);
        let ends = &mut self.ends[list];
        if is_first {
            ends.head = if is_last { NONE } else { next };
        } else {
            let next = if is_last { previous } else { next };
            self.links[previous as usize].next = ends.mark.next | next;
        }
        if is_last {
            ends.tail = if is_first { NONE } else { previous };
        } else {
            let previous = if is_first { next } else { previous };
            self.links[next as usize].previous = ends.mark.previous | previous;
        }
        ends.len -= 1;
        self.len -= 1;
        Some(list)
    }

    /// Moves the slot between `live` and `doomed` if it is in the order but on the wrong side;
    /// other lists than `doomed` count as live.
    pub(super) fn redoom(&mut self, idle: super::Idle, live: usize, doomed: usize) {
        let Some(list) = self.list_of(idle.slot) else { return };
        if idle.doomed != (list == doomed) {
            self.remove(idle.slot);
            self.push(if idle.doomed { doomed } else { live }, idle.slot);
        }
    }

    /// Takes out the first slot of `list`.
    pub(super) fn pop(&mut self, list: usize) -> Option<u32> {
        let head = self.ends[list].head;
        (head != NONE).then(|| {
            self.remove(head);
            head
        })
    }
}

/// Lists in an order: the first one that is not empty is found without a search.
#[derive(Debug)]
pub(super) struct Ranks {
    lists: Lists,
    /// Bit for each list that is not empty.
    present: u128,
}

impl Ranks {
    /// `num_lists` empty lists, at most 128.
    pub(super) fn new(capacity: usize, num_lists: usize) -> Self {
        assert!(num_lists <= 128, "a bit for each of {num_lists} lists");
        Self { lists: Lists::new(capacity, num_lists), present: 0 }
    }

    /// Slots in all lists.
    pub(super) fn len(&self) -> usize {
        self.lists.len()
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> usize {
        self.lists.bytes()
    }

    /// The list that `slot` is in.
    pub(super) fn list_of(&self, slot: u32) -> Option<usize> {
        self.lists.list_of(slot)
    }

    /// See [`Lists::prefetch`].
    pub(super) fn prefetch(&self, slots: &[u32]) {
        self.lists.prefetch(slots);
    }

    /// Writes the first slots of the first list that is not empty to `out`. Answers how many.
    pub(super) fn first(&self, out: &mut [u32]) -> usize {
        match self.present {
            0 => 0,
            present => self.lists.first(present.trailing_zeros() as usize, out),
        }
    }

    /// Adds `slot`, which is in no list, at the end of `list`.
    pub(super) fn push(&mut self, list: usize, slot: u32) {
        self.lists.push(list, slot);
        self.present |= 1 << list;
    }

    /// Takes `slot` out of its list. Answers whether it was in one.
    pub(super) fn remove(&mut self, slot: u32) -> bool {
        let Some(list) = self.lists.remove(slot) else { return false };
        self.note(list);
        true
    }

    /// Takes out the first slot of the first list that is not empty.
    pub(super) fn pop(&mut self) -> Option<u32> {
        if self.present == 0 {
            return None;
        }
        let list = self.present.trailing_zeros() as usize;
        let slot = self.lists.pop(list);
        self.note(list);
        slot
    }

    fn note(&mut self, list: usize) {
        if self.lists.len_of(list) == 0 {
            self.present &= !(1 << list);
        }
    }
}
