//! An allocator that counts, for the test programs that install it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

pub struct Counting;

/// Bytes that are alive in the whole program.
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// The most that were alive since the last reset.
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// How often memory was asked for, and how many bytes in all.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// What this thread allocated less what it freed, which may be others' memory; and the most of it.
    static OWN: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// Where a thread ends, its own counts may be gone already.
fn own(by: isize) {
    let _ = OWN.try_with(|own| {
        let (live, peak) = own.get();
        own.set((live + by, peak.max(live + by)));
    });
}

// SAFETY: every call is passed on to the system's allocator as it is; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        own(layout.size() as isize);
        CALLS.fetch_add(1, Relaxed);
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        own(-(layout.size() as isize));
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes that are alive in the whole program.
pub fn live() -> usize {
    LIVE.load(Relaxed)
}

/// The most bytes that were alive in the whole program since the last reset.
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// How often anybody asked for memory while something ran, and for how many bytes.
pub fn asked<T>(run: impl FnOnce() -> T) -> (usize, usize) {
    let before = (CALLS.load(Relaxed), BYTES.load(Relaxed));
    drop(run());
    (CALLS.load(Relaxed) - before.0, BYTES.load(Relaxed) - before.1)
}

/// Forgets the peak.
pub fn reset_peak() {
    PEAK.store(live(), Relaxed);
}

/// Runs something, and says how many bytes more than before this thread held at most.
pub fn peak_of_thread<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = OWN.with(|own| {
        let (live, _) = own.get();
        own.set((live, live));
        live
    });
    let result = run();
    let (_, peak) = OWN.with(Cell::get);
    (result, (peak - before) as usize)
}
