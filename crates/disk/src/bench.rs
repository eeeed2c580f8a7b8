//! What the cipher does on this machine.

use std::time::{Duration, Instant};

use seal::xts::Xts;

use crate::limits::{REQUEST_MAX_BYTES, SECTOR_BYTES};
use crate::luks2::VolumeKey;

/// Encrypts sectors of 4 KiB in requests of the largest size on one core for about `seconds`, and answers
/// GB/s (10^9 bytes).
///
/// # Panics
/// If `seconds` is negative or not a number.
#[must_use]
pub fn cipher_gb_per_s(seconds: f64) -> f64 {
    let cipher = Xts::new(VolumeKey::random().expose()).expect("random halves differ");
    let mut data = vec![0x5a; REQUEST_MAX_BYTES];
    let (start, end) = (Instant::now(), Duration::from_secs_f64(seconds));
    let mut requests = 0u64;
    while requests == 0 || start.elapsed() < end {
        cipher.encrypt(
            requests * (REQUEST_MAX_BYTES / SECTOR_BYTES) as u64,
            &mut data,
        );
        requests += 1;
    }
    let bytes = requests as f64 * REQUEST_MAX_BYTES as f64;
    bytes / start.elapsed().as_secs_f64() / 1e9
}
