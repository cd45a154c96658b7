//! What the memory of this machine gives: huge pages, read once, in order, and only added up.

use crate::team::Team;

pub struct Memory {
    data: *mut u64,
    words: usize,
}

// SAFETY: only read after it has been filled.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping, filled here.
        let data = unsafe {
            let read_write = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), bytes, read_write, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED, "no memory");
            libc::madvise(at, bytes, libc::MADV_HUGEPAGE);
            at.write_bytes(1, bytes);
            at.cast::<u64>()
        };
        Self { data, words: bytes / 8 }
    }

    pub fn bytes(&self) -> usize {
        self.words * 8
    }

    pub fn read(&self, team: &Team) {
        let part = self.words / team.len();
        team.run(&|worker| {
            // SAFETY: inside the mapping, which nobody writes any more.
            let words = unsafe { std::slice::from_raw_parts(self.data.add(worker * part), part) };
            let mut sums = [0u64; 32];
            for words in words.as_chunks::<32>().0 {
                sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
            }
            std::hint::black_box(sums);
        });
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.data.cast(), self.words * 8) };
    }
}
