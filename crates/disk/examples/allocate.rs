//! A worker behind the sandbox that allocates and frees much, as one does under a flood. Without
//! `prepared` it is one that the process was not made ready for.

use disk::sandbox;

/// Less than what glibc maps for itself, bytes; together less than one of its heaps.
const PIECE_BYTES: usize = 100 << 10;
const PIECES: usize = 200;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("prepared") {
        sandbox::prepare();
    }
    let worker = std::thread::spawn(|| {
        sandbox::enter().expect("a kernel with Landlock and seccomp");
        for _ in 0..3 {
            let all: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; PIECE_BYTES]).collect();
            drop(std::hint::black_box(all));
        }
    });
    assert!(worker.join().is_ok());
}
