//! Merkle tiles, checkpoints, proofs and their verification. Must never do IO.
