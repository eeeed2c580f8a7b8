//! After `install_secret_heap`, keys are nowhere in this process's readable memory. One test: the
//! heap is the whole process's.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;

use seal::secret::{SecretBytes, harden_process, install_secret_heap, secret_heap_use};
use seal::sign::SigningKey;
use seal::{Zeroize, hpke, random, xts::Xts};

/// Bytes to look for that are not themselves in memory: kept under a mask.
struct Needle {
    mask: [u8; 32],
    masked: [u8; 32],
}

impl Needle {
    fn new(secret: &[u8]) -> Self {
        let mask = random::bytes::<32>();
        let masked = std::array::from_fn(|at| secret[at] ^ mask[at]);
        Self { mask, masked }
    }

    fn is_at(&self, bytes: &[u8]) -> bool {
        bytes
            .iter()
            .zip(self.mask.iter().zip(&self.masked))
            .all(|(byte, (a, b))| byte ^ a == *b)
    }
}

/// How often the needle is in memory that can be read, and how many mappings can't be.
fn scan(needle: &Needle) -> (usize, usize) {
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let (mut hits, mut unreadable) = (0, 0);
    let mut chunk = vec![0; 1 << 20];
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        if !rest.starts_with('r') || line.ends_with("[vvar]") || line.contains("[vvar_vclock]") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let (start, end) = (
            u64::from_str_radix(start, 16).unwrap(),
            u64::from_str_radix(end, 16).unwrap(),
        );
        let mut at = start;
        while at < end {
            let want = chunk.len().min((end - at) as usize);
            match memory.read_at(&mut chunk[..want], at) {
                Ok(got) if got > 0 => {
                    hits += chunk[..got]
                        .windows(32)
                        .filter(|bytes| needle.is_at(bytes))
                        .count();
                    if got < 32 {
                        break;
                    }
                    // Overlap, so that nothing hides across two reads.
                    at += if got < want || at + got as u64 >= end {
                        got
                    } else {
                        got - 31
                    } as u64;
                }
                _ => {
                    unreadable += usize::from(line.contains("secretmem"));
                    break;
                }
            }
            chunk.fill(0);
        }
    }
    (hits, unreadable)
}

#[test]
fn keys_can_not_be_read_from_memory() {
    harden_process().unwrap();
    // Without the heap the scanner finds the key in the schedule: it looks for the right thing.
    let early_key = SecretBytes::<64>::random();
    let early = Xts::new(early_key.expose()).unwrap();
    let needle = Needle::new(&early_key.expose()[..32]);
    drop(early_key);
    assert!(
        scan(&needle).0 >= 1,
        "an XTS key schedule starts with the key"
    );

    install_secret_heap(1 << 20).unwrap();
    drop(early); // From before: neither a crash nor the arena's.
    assert_eq!(secret_heap_use().unwrap().used_bytes, 0);
    assert!(install_secret_heap(1 << 20).is_err(), "once only");

    // The scanner finds what lies open.
    let mut open = Box::new(random::bytes::<32>());
    let needle = Needle::new(&*open);
    let (hits, unreadable) = scan(&needle);
    assert!(hits >= 1, "the scanner is blind");
    assert_eq!(unreadable, 1, "the arena can be read");
    open.zeroize();

    // XTS: both halves, while ciphers made from the key are in use.
    let key = SecretBytes::<64>::random();
    let halves = key.expose().as_chunks::<32>().0;
    let needles = [Needle::new(&halves[0]), Needle::new(&halves[1])];
    let xts = Xts::new(key.expose()).unwrap();
    let clone = xts.clone();
    let mut data = vec![0; 8192];
    xts.encrypt(1, &mut data);
    clone.decrypt(1, &mut data);
    for needle in &needles {
        assert_eq!(scan(needle).0, 0, "an XTS key lies open");
    }
    drop(key);
    clone.encrypt(1, &mut data);
    for needle in &needles {
        assert_eq!(scan(needle).0, 0, "an XTS key lies open");
    }

    // HPKE: what is opened as a secret goes from the message to secret memory.
    let secret_key = hpke::SecretKey::generate();
    let mut released = SecretBytes::<64>::random();
    let needle = Needle::new(&released.expose()[..32]);
    let message = hpke::seal(&secret_key.public(), b"info", b"aad", released.expose());
    released.zeroize();
    let opened = hpke::open_secret::<64>(&secret_key, b"info", b"aad", &message).unwrap();
    assert!(needle.is_at(&opened.expose()[..32]));
    assert_eq!(scan(&needle).0, 0, "an opened secret lies open");

    // Ed25519.
    let seed = SecretBytes::<32>::random();
    let needle = Needle::new(seed.expose());
    let signer = SigningKey::from_seed(seed.expose());
    signer
        .public()
        .verify_raw(b"m", &signer.sign_raw(b"m"))
        .unwrap();
    assert_eq!(scan(&needle).0, 0, "a signing key lies open");

    // Threads come and go; all is given back.
    let before = secret_heap_use().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let xts = xts.clone();
            scope.spawn(move || {
                for sector in 0..50 {
                    xts.encrypt(sector, &mut vec![0; 4096]);
                    let key = hpke::SecretKey::generate();
                    let message = hpke::seal(&key.public(), b"", b"", b"x");
                    assert_eq!(*hpke::open(&key, b"", b"", &message).unwrap(), b"x");
                }
            });
        }
    });
    let after = secret_heap_use().unwrap();
    assert!(
        after.used_bytes <= before.used_bytes + 16 * 1024,
        "{before:?} {after:?}"
    );
    assert!(after.peak_bytes < after.total_bytes / 2, "{after:?}");
    println!("{after:?}");
    drop((xts, clone, opened, signer));
    assert!(secret_heap_use().unwrap().used_bytes < after.used_bytes);
}
