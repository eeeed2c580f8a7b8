//! What the cipher does on one core: `cargo run --release -p casemate-disk --example cipher`.

const RUNS: usize = 5;

fn main() {
    let mut rates: Vec<f64> = (0..RUNS)
        .map(|_| disk::bench::cipher_gb_per_s(1.0))
        .collect();
    rates.sort_by(f64::total_cmp);
    println!(
        "bench disk cipher_gb_per_s_per_core {:.2} GB/s",
        rates[RUNS / 2]
    );
}
