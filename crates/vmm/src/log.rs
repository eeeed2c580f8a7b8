//! JSON lines on stderr, for the operator. No secret and no guest text goes in unfiltered.

use serde_json::{Map, Value};

/// Writes one line.
pub fn line(level: &str, slot: u16, message: &str, detail: Option<&str>) {
    let mut m = Map::new();
    m.insert("level".into(), level.into());
    m.insert("process".into(), "vmctl".into());
    m.insert("slot".into(), slot.into());
    m.insert("message".into(), message.into());
    if let Some(d) = detail {
        m.insert("detail".into(), clean(d).into());
    }
    // A full or closed stderr must not end a VM.
    let _ = std::io::Write::write_all(
        &mut std::io::stderr(),
        format!("{}\n", Value::Object(m)).as_bytes(),
    );
}

/// `text` without control characters, cut to
/// [`GUEST_TEXT_MAX_CHARS`](crate::limits::GUEST_TEXT_MAX_CHARS).
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(crate::limits::GUEST_TEXT_MAX_CHARS)
        .collect()
}
