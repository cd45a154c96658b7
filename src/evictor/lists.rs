//! Doubly linked lists threaded through flat arrays: the material that evictors are made of.

use crate::device::host;
use crate::simd::prefetch;

/// No neighbour, no list.
const NONE: u32 = u32::MAX;
const NO_LIST: u8 = u8::MAX;

/// Up to 254 lists over the slots `0..capacity`; a slot is in one of them or in none.
#[derive(Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    list: Vec<u8>,
    ends: Vec<Ends>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
    len: usize,
}

impl Lists {
    /// `num_lists` empty lists.
    pub(super) fn new(capacity: usize, num_lists: usize) -> Self {
        Self {
            links: host::large(capacity, |_| Link { previous: NONE, next: NONE }),
            list: host::large(capacity, |_| NO_LIST),
            ends: vec![Ends { head: NONE, tail: NONE, len: 0 }; num_lists],
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
        self.links.len() * (size_of::<Link>() + 1) + self.ends.len() * size_of::<Ends>()
    }

    /// The list that `slot` is in.
    pub(super) fn list_of(&self, slot: u32) -> Option<usize> {
        let list = self.list[slot as usize];
        (list != NO_LIST).then_some(usize::from(list))
    }

    /// Asks memory for what [`Self::push`] of `slots` will touch.
    pub(super) fn prefetch(&self, slots: &[u32]) {
        for slot in slots {
            prefetch(&self.links, *slot as usize);
            prefetch(&self.list, *slot as usize);
        }
    }

    /// Writes the first slots of `list` to `out`. Answers how many.
    pub(super) fn first(&self, list: usize, out: &mut [u32]) -> usize {
        let mut slot = self.ends[list].head;
        let mut count = 0;
        for out in out {
            if slot == NONE {
                break;
            }
            *out = slot;
            count += 1;
            slot = self.links[slot as usize].next;
        }
        count
    }

    /// Adds `slot`, which is in no list, at the end of `list`.
    pub(super) fn push(&mut self, list: usize, slot: u32) {
        let ends = &mut self.ends[list];
        self.links[slot as usize] = Link { previous: ends.tail, next: NONE };
        match ends.tail {
            NONE => ends.head = slot,
            tail => self.links[tail as usize].next = slot,
        }
        ends.tail = slot;
        ends.len += 1;
        self.list[slot as usize] = list as u8;
        self.len += 1;
    }

    /// Takes `slot` out of its list. Answers which it was.
    pub(super) fn remove(&mut self, slot: u32) -> Option<usize> {
        let list = self.list_of(slot)?;
        let Link { previous, next } = self.links[slot as usize];
        let ends = &mut self.ends[list];
        match previous {
            NONE => ends.head = next,
            previous => self.links[previous as usize].next = next,
        }
        match next {
            NONE => ends.tail = previous,
            next => self.links[next as usize].previous = previous,
        }
        ends.len -= 1;
        self.list[slot as usize] = NO_LIST;
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
