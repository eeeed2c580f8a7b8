//! Files (contract §3.2). The work is done on the blocking pool; paths are resolved inside the
//! workspace's root by [`FsRoot`].

mod glob;
mod list;
mod remove;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use serde::Deserialize;
use serde_json::json;

use super::Service;
use super::reply::{self, Failure, Reply};
use super::request::{self, Query};
use crate::clock;
use crate::fsroot::FsRoot;
use crate::limits::{
    READ_MAX_BYTES, STREAM_QUEUE_CHUNKS, WRITE_BODY_MAX_BYTES, WRITE_BODY_MEMORY_DIVISOR,
};

/// How many bytes of write bodies this machine holds at a time, and the largest of one.
pub(super) fn write_max_bytes(memory_bytes: u64) -> usize {
    let share = usize::try_from(memory_bytes / WRITE_BODY_MEMORY_DIVISOR).unwrap_or(usize::MAX);
    share.min(WRITE_BODY_MAX_BYTES)
}

pub(super) async fn list(service: &Service, request: &Request<Incoming>) -> Reply {
    let options = list::Options::of(&Query::of(request), false)?;
    let root = Arc::clone(&service.root);
    let cancel = Cancel::default();
    let seen = cancel.flag();
    let body = blocking(move || list::list(&root, &options, &seen)).await?;
    drop(cancel);
    reply::json(200, &body)
}

pub(super) fn stream(service: &Service, request: &Request<Incoming>) -> Reply {
    let options = list::Options::of(&Query::of(request), true)?;
    let root = Arc::clone(&service.root);
    let walk = list::Walk::open(&root, options)?;
    let (sender, response) = reply::stream("application/x-ndjson", STREAM_QUEUE_CHUNKS);
    tokio::task::spawn_blocking(move || walk.stream(&sender));
    Ok(response)
}

pub(super) async fn read(service: &Service, request: &Request<Incoming>) -> Reply {
    let query = Query::of(request);
    let path = path_of(query.text("path"))?;
    let (start, end) = (query.number("start_line")?, query.number("end_line")?);
    if start == Some(0) || end.is_some_and(|end| end < start.unwrap_or(1)) {
        return Err(Failure::invalid(
            "start_line counts from 1, and end_line is not before it",
        ));
    }
    let numbered = query.flag("with_line_numbers", false)?;
    let root = Arc::clone(&service.root);
    let body = blocking(move || {
        let file = open_regular(&root, &path)?;
        let size = file.metadata().map_err(|e| Failure::file(&e, &path))?.len();
        let range = start.is_some() || end.is_some();
        if !range && size > READ_MAX_BYTES {
            return Err(read_too_large());
        }
        let (from, to) = (start.unwrap_or(1), end.unwrap_or(u64::MAX));
        let (content, lines) = read_lines(file, from, to, numbered, &path)?;
        let mut body = json!({
            "success": true,
            "path": path,
            "content": content,
            "size": size,
            "lines": lines,
            "extension": extension(&path),
        });
        if range {
            body["start_line"] = from.into();
            body["end_line"] = to.min(lines).into();
        }
        Ok(body)
    })
    .await?;
    reply::json(200, &body)
}

pub(super) async fn stat(service: &Service, request: &Request<Incoming>) -> Reply {
    let path = path_of(Query::of(request).text("path"))?;
    let root = Arc::clone(&service.root);
    let body = blocking(move || {
        let failed = |e: io::Error| Failure::file(&e, &path);
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let fd = root.open(&path, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?;
        let name = path.trim_end_matches('/').rsplit('/').next();
        let name = name.filter(|name| !name.is_empty()).unwrap_or("/");
        let mut body = json!({
            "success": true,
            "path": path,
            "name": name,
            "type": type_of(&stat),
            "size": stat.st_size,
            "modified": modified(&stat),
            "permissions": format!("{:04o}", stat.st_mode & 0o7777),
            "is_code": is_code(name),
        });
        if let Some(extension) = extension(name) {
            body["extension"] = extension.into();
        }
        if FileType::from_raw_mode(stat.st_mode).is_symlink() {
            let target = rustix::fs::readlinkat(&fd, c"", Vec::new());
            let target = target.map_err(|e| failed(e.into()))?;
            body["symlink_target"] = target.to_string_lossy().into();
        }
        Ok(body)
    })
    .await?;
    reply::json(200, &body)
}

/// The body of `write`.
#[derive(Deserialize)]
struct WriteBody<'a> {
    #[serde(borrow)]
    path: Option<std::borrow::Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    create_dirs: Option<bool>,
    #[serde(default)]
    append: Option<bool>,
    #[serde(default)]
    mode: Option<String>,
}

pub(super) async fn write(service: &Service, request: Request<Incoming>) -> Reply {
    let declared = hyper::body::Body::size_hint(request.body());
    let room = &service.write_room;
    let max_bytes = service.write_max_bytes;
    // An unknown length may become the longest.
    let need_bytes = declared.exact().unwrap_or(max_bytes as u64);
    if need_bytes > max_bytes as u64 {
        let what = format!("a write may have {max_bytes} bytes on this machine; append in parts");
        return Err(Failure::too_large(what));
    }
    let permits = u32::try_from(need_bytes).unwrap_or(u32::MAX);
    let Ok(permit) = Arc::clone(room).acquire_many_owned(permits).await else {
        return Err(Failure::new(
            503,
            "unavailable",
            "the workspace is shutting down",
        ));
    };
    let bytes = request::body(request.into_body(), max_bytes).await?;
    let root = Arc::clone(&service.root);
    let body = blocking(move || {
        let _permit = permit;
        write_file(&root, &request::parse_json(&bytes)?)
    })
    .await?;
    reply::json(201, &body)
}

pub(super) async fn mkdir(service: &Service, request: Request<Incoming>) -> Reply {
    #[derive(Deserialize)]
    struct Body {
        path: Option<String>,
        mode: Option<String>,
    }
    let body: Body = request::body_json(request).await?;
    let path = path_of(body.path.as_deref())?;
    let mode = mode_of(body.mode.as_deref(), 0o755)?;
    let root = Arc::clone(&service.root);
    let body = blocking(move || {
        root.create_dir_all(&path, mode)
            .map_err(|e| Failure::file(&e, &path))?;
        Ok(json!({"success": true, "path": path}))
    })
    .await?;
    reply::json(201, &body)
}

pub(super) async fn delete(service: &Service, request: Request<Incoming>) -> Reply {
    #[derive(Deserialize)]
    struct Body {
        path: Option<String>,
    }
    let in_query = Query::of(&request).text("path").map(str::to_owned);
    let body: Body = request::body_json(request).await?;
    let path = path_of(body.path.or(in_query).as_deref())?;
    let root = Arc::clone(&service.root);
    let body = blocking(move || {
        remove::remove(&root, &path)?;
        Ok(json!({"success": true, "path": path}))
    })
    .await?;
    reply::json(200, &body)
}

fn write_file(root: &FsRoot, body: &WriteBody<'_>) -> Result<serde_json::Value, Failure> {
    let path = path_of(body.path.as_deref())?;
    let failed = |e: io::Error| Failure::file(&e, &path);
    let content = body.content.as_deref();
    let content = content
        .ok_or_else(|| Failure::bad_request("content is missing"))?
        .as_bytes();
    let mode = mode_of(body.mode.as_deref(), 0o644)?;
    if body.create_dirs.unwrap_or(false) {
        let parent = path
            .trim_end_matches('/')
            .rsplit_once('/')
            .map_or("", |(parent, _)| parent);
        let parent = if parent.is_empty() { "/" } else { parent };
        root.create_dir_all(parent, Mode::from_raw_mode(0o755))
            .map_err(failed)?;
    }
    if body.append.unwrap_or(false) {
        // O_NONBLOCK: a FIFO must not hold the thread; it is refused below.
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK;
        let fd = root.open(&path, flags, mode).map_err(failed)?;
        let mut file = regular(File::from(fd), &path)?;
        file.write_all(content).map_err(failed)?;
    } else {
        let mut staged = root.stage(&path, mode).map_err(failed)?;
        staged.file.write_all(content).map_err(failed)?;
        staged.commit().map_err(failed)?;
    }
    Ok(json!({"success": true, "path": path, "size": content.len()}))
}

/// Lines `from..=to` (counted from 1) of a file, and how many lines it has. Bytes that are not
/// UTF-8 are replaced.
fn read_lines(
    file: File,
    from: u64,
    to: u64,
    numbered: bool,
    path: &str,
) -> Result<(String, u64), Failure> {
    let mut reader = BufReader::with_capacity(64 << 10, file);
    let (mut content, mut line, mut number) = (Vec::new(), Vec::new(), 0);
    loop {
        line.clear();
        let mut bounded = (&mut reader).take(READ_MAX_BYTES + 1);
        let read = bounded.read_until(b'\n', &mut line);
        if read.map_err(|e| Failure::file(&e, path))? == 0 {
            break;
        }
        if line.len() as u64 > READ_MAX_BYTES {
            return Err(read_too_large());
        }
        number += 1;
        if !(from..=to).contains(&number) {
            continue;
        }
        if numbered {
            content.extend_from_slice(format!("{number:6}\t").as_bytes());
        }
        content.extend_from_slice(&line);
        if content.len() as u64 > READ_MAX_BYTES {
            return Err(read_too_large());
        }
    }
    let content = String::from_utf8(content)
        .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
    Ok((content, number))
}

fn read_too_large() -> Failure {
    Failure::too_large(format!(
        "a read returns at most {READ_MAX_BYTES} bytes; ask for a range with start_line and end_line"
    ))
}

fn open_regular(root: &FsRoot, path: &str) -> Result<File, Failure> {
    let fd = root
        .open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())
        .map_err(|e| Failure::file(&e, path))?;
    regular(File::from(fd), path)
}

/// Refuses what is no regular file: a directory, or a device that could block forever.
fn regular(file: File, path: &str) -> Result<File, Failure> {
    let kind = file
        .metadata()
        .map_err(|e| Failure::file(&e, path))?
        .file_type();
    if kind.is_file() {
        Ok(file)
    } else {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "no regular file"
        };
        Err(Failure::bad_request(format!("{path} is {what}")))
    }
}

fn path_of(path: Option<&str>) -> Result<String, Failure> {
    let path = path.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| Failure::bad_request("path is missing"))?;
    let path = crate::fsroot::check_path(path).map_err(Failure::bad_request)?;
    Ok(path.to_owned())
}

fn mode_of(mode: Option<&str>, default: u32) -> Result<Mode, Failure> {
    let Some(text) = mode.filter(|text| !text.is_empty()) else {
        return Ok(Mode::from_raw_mode(default));
    };
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = digits.len() <= 5 && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
    match u32::from_str_radix(digits, 8) {
        Ok(mode @ 0..=0o7777) if octal => Ok(Mode::from_raw_mode(mode)),
        _ => Err(Failure::invalid("mode must be octal, such as '0644'")),
    }
}

fn type_of(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        _ => "file",
    }
}

fn modified(stat: &Stat) -> String {
    let ms = stat.st_mtime.saturating_mul(1000);
    clock::iso(u64::try_from(ms).unwrap_or(0) + u64::from(stat.st_mtime_nsec as u32) / 1_000_000)
}

/// `.go` of `main.go`; nothing of `.bashrc` or `Makefile`.
fn extension(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    let at = name
        .rfind('.')
        .filter(|at| *at > 0 && at + 1 < name.len())?;
    Some(&name[at..])
}

fn is_code(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "Makefile",
        "Dockerfile",
        "Rakefile",
        "Gemfile",
        "CMakeLists.txt",
    ];
    const EXTENSIONS: &[&str] = &[
        ".astro", ".bash", ".c", ".cc", ".clj", ".cpp", ".cs", ".css", ".cxx", ".dart", ".elm",
        ".erl", ".ex", ".exs", ".fish", ".fs", ".go", ".gql", ".graphql", ".h", ".hpp", ".hs",
        ".html", ".java", ".jl", ".js", ".json", ".jsx", ".kt", ".kts", ".less", ".lua", ".m",
        ".mjs", ".cjs", ".ml", ".mm", ".nim", ".php", ".pl", ".proto", ".ps1", ".py", ".r", ".rb",
        ".rs", ".sass", ".scala", ".scss", ".sh", ".sol", ".sql", ".svelte", ".swift", ".tf",
        ".toml", ".ts", ".tsx", ".vue", ".xml", ".yaml", ".yml", ".zig", ".zsh",
    ];
    let known = |extension: &str| EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str());
    NAMES.contains(&name) || extension(name).is_some_and(known)
}

/// Runs file work where it may block; a panic there is this request's 500.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| {
        Err(Failure::new(
            500,
            "internal_error",
            "the agent failed; try again",
        ))
    })
}

/// Tells blocking work that nobody waits for it any more.
#[derive(Default)]
struct Cancel(Arc<std::sync::atomic::AtomicBool>);

impl Cancel {
    fn flag(&self) -> Arc<std::sync::atomic::AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// `lstat` of `name` in `directory`.
fn stat_at(directory: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<Stat> {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
}
