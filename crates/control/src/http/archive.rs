//! Archives of a workspace's files.

use super::fields::Fields;
use super::{Answer, Call, view};
use crate::app::{App, archive as app_archive};
use crate::op::Op;
use app_archive::Wanted;
use model::limits::{ARCHIVE_PATHS_MAX, ARCHIVE_PATHS_MAX_BYTES, ARCHIVE_VERSION_MAX_CHARS};
use serde_json::{Value, json};
use std::sync::Arc;

/// The one format.
pub const FORMAT: &str = "tar";

/// `POST /workspace/{ws}/archives`
pub async fn create(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let wanted = wanted(&call.body)?;
    let archive = app_archive::archive_make(&app, &op, call.ws(), &wanted).await?;
    Ok(Answer {
        status: 201,
        ..Answer::ok(json!({ "archive": view::archive(&archive) }))
    })
}

/// `GET /workspace/{ws}/archives`
pub async fn list(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let all = app_archive::archive_list(&app, &op, call.ws()).await?;
    let all: Vec<Value> = all.iter().map(view::archive).collect();
    Ok(Answer::ok(json!({ "archives": all })))
}

/// `GET /workspace/{ws}/archives/{version}`: the description itself is the body.
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let archive = app_archive::archive_get(&app, &op, call.ws(), version_of(&call)).await?;
    Ok(Answer::ok(view::archive(&archive)))
}

/// `DELETE /workspace/{ws}/archives/{version}`. Without its record an archive is nothing, so that it is
/// removed whatever `delete_file` says.
pub async fn delete(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let version = Some(version_of(&call));
    let gone = app_archive::archive_delete(&app, &op, call.ws(), version).await?;
    Ok(deleted(gone))
}

/// `DELETE /workspace/{ws}/archives`
pub async fn delete_all(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let gone = app_archive::archive_delete(&app, &op, call.ws(), None).await?;
    Ok(deleted(gone))
}

/// `POST /workspace/{ws}/archives/{version}/restore`, ours.
pub async fn restore(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let version = version_of(&call);
    let (archive, tar) = app_archive::archive_restore(&app, &op, call.ws(), version).await?;
    Ok(Answer::ok(json!({
        "archive": view::archive(&archive),
        "restored": { "entries": tar.entries, "skipped": tar.skipped },
    })))
}

fn deleted(gone: bool) -> Answer {
    Answer::ok(if gone {
        json!({})
    } else {
        json!({ "accepted": true })
    })
}

fn version_of(call: &Call) -> &str {
    call.params.get("version").map_or("", String::as_str)
}

fn wanted(body: &Fields) -> api::Result<Wanted> {
    if let Some(format) = body.text("format")?
        && format != FORMAT
    {
        return Err(body.wrong("format", "must be tar"));
    }
    let version = version(body)?;
    let mut paths = paths(body, "vm_paths")?;
    let exclude = self::paths(body, "exclude_vm_paths")?;
    if paths.is_empty() {
        paths.push("/".into());
    }
    let bytes: usize = paths.iter().chain(&exclude).map(String::len).sum();
    if bytes > ARCHIVE_PATHS_MAX_BYTES {
        let why = format!(
            "must be, with exclude_vm_paths, at most {ARCHIVE_PATHS_MAX_BYTES} bytes, not {bytes}"
        );
        return Err(body.wrong("vm_paths", &why));
    }
    Ok(Wanted {
        version,
        paths,
        exclude,
    })
}

/// A text that can stand in a path, or a whole number.
fn version(body: &Fields) -> api::Result<Option<String>> {
    let version = match body.get("version") {
        None => return Ok(None),
        Some(Value::Number(n)) => n.as_u64().map(|n| n.to_string()),
        Some(Value::String(s)) => Some(s.clone()),
        Some(_) => None,
    };
    let plain = |s: &String| {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let begins = s.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        begins && s.len() <= ARCHIVE_VERSION_MAX_CHARS && s.bytes().all(is_plain)
    };
    version.filter(plain).map(Some).ok_or_else(|| {
        let why = format!(
            "must be a whole number, or 1 to {ARCHIVE_VERSION_MAX_CHARS} letters, digits, -, _ and ., \
             beginning with a letter or digit"
        );
        body.wrong("version", &why)
    })
}

/// Absolute paths without `.` and `..`.
fn paths(body: &Fields, name: &str) -> api::Result<Vec<String>> {
    let values = body.array(name, ARCHIVE_PATHS_MAX)?.unwrap_or_default();
    let path = |(n, value): (usize, &Value)| {
        let text = value.as_str().filter(|text| {
            let part = |part: &str| part != "." && part != "..";
            text.starts_with('/')
                && text.len() <= 4_095
                && !text.chars().any(char::is_control)
                && text.split('/').all(part)
        });
        text.map(str::to_owned).ok_or_else(|| {
            let why = "must be an absolute path of at most 4095 bytes, without . and ..";
            body.wrong(&format!("{name}[{n}]"), why)
        })
    };
    values.iter().enumerate().map(path).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn read(body: &Value) -> api::Result<Wanted> {
        wanted(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn a_wish_without_fields_is_everything_and_errors_name_the_field() {
        let all = read(&json!({})).unwrap();
        assert_eq!((all.version, all.paths), (None, vec!["/".to_owned()]));
        let body = json!({ "version": 7, "format": "tar", "vm_paths": ["/a/", "/b"],
            "exclude_vm_paths": ["/a/c"] });
        let some = read(&body).unwrap();
        assert_eq!(some.version.as_deref(), Some("7"));
        assert_eq!((some.paths.len(), some.exclude.len()), (2, 1));
        let long = "x".repeat(65);
        let many = vec!["/x"; ARCHIVE_PATHS_MAX + 1];
        let large = vec![format!("/{}", "y".repeat(4_000)); 5];
        for (field, value) in [
            ("format", json!("zip")),
            ("format", json!(1)),
            ("version", json!("")),
            ("version", json!(-1)),
            ("version", json!(1.5)),
            ("version", json!("a/b")),
            ("version", json!("..")),
            ("version", json!(long)),
            ("version", json!(["a"])),
            ("vm_paths", json!("/x")),
            ("vm_paths", json!(many)),
            ("vm_paths", json!(large)),
            ("vm_paths[1]", json!(["/x", "y"])),
            ("vm_paths[0]", json!(["/x/../y"])),
            ("vm_paths[0]", json!(["/x\u{0}"])),
            ("exclude_vm_paths[0]", json!([7])),
        ] {
            let name = field.split('[').next().unwrap();
            let refused = read(&json!({ name: value })).unwrap_err();
            assert_eq!(refused.code, api::ErrorCode::ValidationError);
            let names = refused.message.starts_with(&format!("{field}: "));
            assert!(names, "{field}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_can_stand_in_a_url(text in "\\PC{0,70}") {
            let body = json!({ "version": text });
            if let Ok(Wanted { version: Some(version), .. }) = read(&body) {
                prop_assert!(version.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)));
                prop_assert!(!version.starts_with('.'));
            }
            let _ = read(&json!({ "vm_paths": [text.clone()], "exclude_vm_paths": [text] }));
        }
    }
}
