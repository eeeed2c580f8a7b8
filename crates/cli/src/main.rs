//! casemate: users, operators, offline verify.
fn main() {}
