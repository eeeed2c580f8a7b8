//! Random bytes, fit for keys.

/// Fills `out` with random bytes.
///
/// # Panics
/// If the kernel has no entropy to give; nothing could be kept secret then.
pub fn fill(out: &mut [u8]) {
    aws_lc_rs::rand::fill(out).expect("AWS-LC aborts by itself before it returns bad randomness");
}

/// `N` random bytes.
#[must_use]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    fill(&mut out);
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ() {
        assert_ne!(super::bytes::<32>(), super::bytes::<32>());
        super::fill(&mut []);
    }
}
