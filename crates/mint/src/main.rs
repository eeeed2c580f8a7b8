//! Who may: API keys, actor assertions, gateway tokens.
fn main() {}
