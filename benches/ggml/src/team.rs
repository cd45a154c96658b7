//! A few threads that spin while they wait, as the threads of engines do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

type Job = dyn Fn(usize) + Sync;

pub struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    round: AtomicUsize,
    running: AtomicUsize,
    stop: AtomicUsize,
    job: std::sync::Mutex<Option<&'static Job>>,
}

impl Team {
    /// A team of `size`, the caller included.
    pub fn new(size: usize) -> Self {
        let shared = Arc::new(Shared {
            round: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            stop: AtomicUsize::new(0),
            job: std::sync::Mutex::new(None),
        });
        let thread = |worker| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.serve(worker))
        };
        Self { threads: (1..size).map(thread).collect(), shared }
    }

    /// Workers of the team.
    pub fn len(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job(worker)` on every worker and waits for all.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        // SAFETY: no worker keeps the job after this call has waited for all of them.
        let kept = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Job>(job) };
        *self.shared.job.lock().expect("no panic in a job") = Some(kept);
        self.shared.running.store(self.threads.len(), Ordering::Release);
        self.shared.round.fetch_add(1, Ordering::Release);
        job(0);
        while self.shared.running.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

impl Shared {
    fn serve(&self, worker: usize) {
        let mut round = 0;
        let mut idle = 0u32;
        loop {
            if self.round.load(Ordering::Acquire) == round {
                if self.stop.load(Ordering::Acquire) > 0 {
                    return;
                }
                idle += 1;
                // A team that is not in use must not slow the other side.
                if idle > 20_000 {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                } else {
                    std::hint::spin_loop();
                }
                continue;
            }
            (round, idle) = (round + 1, 0);
            let job = *self.job.lock().expect("no panic in a job");
            job.expect("a job of this round")(worker);
            self.running.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(1, Ordering::Release);
        self.threads.drain(..).for_each(|thread| thread.join().expect("no panic in a job"));
    }
}
