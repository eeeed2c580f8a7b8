//! Listings: a depth-first walk by descriptors that never follows a symlink and ends at its
//! bounds (entries, depth, entries looked at, content, time).

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use bytes::Bytes;
use rustix::fs::{Dir, FileType, Mode, OFlags, Stat};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc;

use super::glob::Patterns;
use super::{extension, is_code, modified, path_of, stat_at, type_of};
use crate::fsroot::FsRoot;
use crate::http::reply::Failure;
use crate::http::request::Query;
use crate::limits::{
    LIST_CONTENT_MAX_BYTES, LIST_DEPTH_DEFAULT, LIST_DEPTH_MAX, LIST_ENTRIES_MAX, LIST_TIMEOUT,
    LIST_VISITED_MAX,
};

/// What to list, and what of it to show.
pub(super) struct Options {
    path: String,
    nested: bool,
    flatten: bool,
    light: bool,
    hash: bool,
    content: bool,
    extensions: bool,
    code_only: bool,
    gitignore: bool,
    depth_max: usize,
    path_filter: Option<String>,
    include_ext: Vec<String>,
    ignore: Patterns,
    content_budget_bytes: u64,
}

/// One entry, as the contract has it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Entry {
    name: String,
    path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    modified: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extension: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    children: Option<Vec<Entry>>,
}

/// The body of a listing.
#[derive(Serialize)]
pub(super) struct Listing {
    success: bool,
    path: String,
    entries: Vec<Entry>,
    count: usize,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

impl Options {
    /// Reads the query; `stream` forces `nested` and `flatten`.
    pub(super) fn of(query: &Query, stream: bool) -> Result<Self, Failure> {
        let dotted = |ext: &str| format!(".{}", ext.trim_start_matches('.').to_ascii_lowercase());
        let number = |name, default: u64, max| {
            Ok::<_, Failure>(query.number(name)?.unwrap_or(default).min(max))
        };
        let depth = number(
            "max_depth",
            LIST_DEPTH_DEFAULT as u64,
            LIST_DEPTH_MAX as u64,
        )?;
        let filter = query.text("path_filter").filter(|text| !text.is_empty());
        Ok(Self {
            path: path_of(
                query
                    .text("path")
                    .filter(|path| !path.is_empty())
                    .or(Some("/")),
            )?,
            nested: query.flag("nested", false)? || stream,
            flatten: query.flag("flatten", false)? || stream,
            light: query.flag("light", false)?,
            hash: query.flag("include_hash", false)?,
            content: query.flag("include_content", false)?,
            extensions: query.flag("include_extensions", false)?,
            code_only: query.flag("code_files_only", false)?,
            gitignore: query.flag("use_gitignore", true)?,
            depth_max: usize::try_from(depth).unwrap_or(LIST_DEPTH_MAX),
            path_filter: filter.map(str::to_lowercase),
            include_ext: query.words("include_ext").map(dotted).collect(),
            ignore: Patterns::of_words(query.words("ignore_patterns")),
            content_budget_bytes: number(
                "max_content_budget",
                LIST_CONTENT_MAX_BYTES,
                LIST_CONTENT_MAX_BYTES,
            )?,
        })
    }
}

/// The whole listing at once.
pub(super) fn list(
    root: &FsRoot,
    options: &Options,
    cancelled: &AtomicBool,
) -> Result<Listing, Failure> {
    let mut flat = Vec::new();
    let top = open_top(root, options)?;
    let mut walker = Walker::new(options, cancelled);
    let mut take = |entry| {
        flat.push(entry);
        true
    };
    let mut entries = walker.directory(top, &base(&options.path), 1, &mut take)?;
    if options.flatten && options.nested {
        entries = flat;
    }
    Ok(Listing {
        success: true,
        path: options.path.clone(),
        entries,
        count: walker.shown,
        truncated: walker.truncated,
    })
}

/// A listing whose directory is open, to be streamed.
pub(super) struct Walk {
    top: OwnedFd,
    options: Options,
}

impl Walk {
    pub(super) fn open(root: &FsRoot, options: Options) -> Result<Self, Failure> {
        let top = open_top(root, &options)?;
        Ok(Self { top, options })
    }

    /// Sends NDJSON, waiting for the reader; ends when it goes away.
    pub(super) fn stream(self, sender: &mpsc::Sender<Bytes>) {
        let send = |value: &dyn erased::Line| {
            let mut line = value.line();
            line.push(b'\n');
            sender.blocking_send(line.into()).is_ok()
        };
        let Self { top, options } = self;
        if !send(&json!({"event": "start", "path": options.path})) {
            return;
        }
        let never = AtomicBool::new(false);
        let mut walker = Walker::new(&options, &never);
        let walked = walker.directory(top, &base(&options.path), 1, &mut |entry| send(&entry));
        let mut done = json!({"event": "done", "count": walker.shown});
        if walker.truncated || walked.is_err() {
            done["truncated"] = true.into();
        }
        send(&done);
    }
}

/// One line of NDJSON.
mod erased {
    pub(super) trait Line {
        fn line(&self) -> Vec<u8>;
    }

    impl<T: serde::Serialize> Line for T {
        fn line(&self) -> Vec<u8> {
            serde_json::to_vec(self).unwrap_or_default()
        }
    }
}

struct Walker<'a> {
    options: &'a Options,
    cancelled: &'a AtomicBool,
    deadline: Instant,
    shown: usize,
    visited: usize,
    content_left_bytes: u64,
    truncated: bool,
    /// Ignore files of the directories we are in, with the length of each one's path.
    gitignores: Vec<(usize, Patterns)>,
    base_len: usize,
}

impl<'a> Walker<'a> {
    fn new(options: &'a Options, cancelled: &'a AtomicBool) -> Self {
        Self {
            options,
            cancelled,
            deadline: Instant::now() + LIST_TIMEOUT,
            shown: 0,
            visited: 0,
            content_left_bytes: options.content_budget_bytes,
            truncated: false,
            gitignores: Vec::new(),
            base_len: base(&options.path).len(),
        }
    }

    /// The entries of one directory, sorted by name. With `flatten`, each goes to `take` instead,
    /// which says whether to go on.
    fn directory(
        &mut self,
        directory: OwnedFd,
        path: &str,
        depth: usize,
        take: &mut dyn FnMut(Entry) -> bool,
    ) -> Result<Vec<Entry>, Failure> {
        let options = self.options;
        let mut names = self.names(&directory, path)?;
        names.sort_unstable();
        let pushed = options.gitignore && self.gitignore_push(&directory, path);
        let mut entries = Vec::new();
        for name in names {
            if self.full()? {
                break;
            }
            let Ok(stat) = stat_at(&directory, name.as_c_str()) else {
                continue; // It went away.
            };
            let text = name.to_string_lossy();
            let child_path = format!("{path}/{text}");
            let is_dir = FileType::from_raw_mode(stat.st_mode).is_dir();
            if self.ignored(&child_path, &text, is_dir) {
                continue;
            }
            let mut entry = None;
            if self.wanted(&child_path, &text, is_dir) {
                self.shown += 1;
                entry = Some(self.entry(&directory, &name, &text, &child_path, &stat));
            }
            let descend = is_dir && options.nested && depth < options.depth_max;
            if options.flatten && options.nested {
                if let Some(entry) = entry.take()
                    && !take(entry)
                {
                    self.cancelled_by_reader();
                    break;
                }
                if descend && let Ok(inner) = open_directory(&directory, &name) {
                    self.directory(inner, &child_path, depth + 1, take)?;
                }
                continue;
            }
            let mut children = None;
            if descend && let Ok(inner) = open_directory(&directory, &name) {
                children = Some(self.directory(inner, &child_path, depth + 1, take)?);
            }
            match entry {
                Some(entry) => entries.push(Entry { children, ..entry }),
                // A directory that is filtered out still shows what is wanted in it.
                None => entries.extend(children.unwrap_or_default()),
            }
        }
        if pushed {
            self.gitignores.pop();
        }
        Ok(entries)
    }

    fn names(&mut self, directory: &OwnedFd, path: &str) -> Result<Vec<CString>, Failure> {
        let failed = |e: rustix::io::Errno| Failure::file(&e.into(), path);
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_owned();
            if name.as_c_str() != c"." && name.as_c_str() != c".." {
                self.visited += 1;
                if self.visited > LIST_VISITED_MAX {
                    self.truncated = true;
                    break;
                }
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Whether a bound is reached.
    fn full(&mut self) -> Result<bool, Failure> {
        if self.cancelled.load(Relaxed) || Instant::now() > self.deadline {
            return Err(Failure::new(
                504,
                "timeout",
                "the listing takes too long; narrow it",
            ));
        }
        if self.shown >= LIST_ENTRIES_MAX {
            self.truncated = true;
        }
        Ok(self.truncated)
    }

    fn cancelled_by_reader(&mut self) {
        self.truncated = true;
    }

    fn ignored(&self, path: &str, name: &str, is_dir: bool) -> bool {
        let relative = |base: usize| path.as_bytes().get(base + 1..).unwrap_or_default();
        if self.options.ignore.verdict(relative(self.base_len), is_dir) == Some(true) {
            return true;
        }
        if !self.options.gitignore {
            return false;
        }
        // What git itself never shows, where a whole tree is asked for.
        if self.options.nested && name == ".git" {
            return true;
        }
        let innermost_first = self.gitignores.iter().rev();
        let verdict = innermost_first
            .filter_map(|(base, patterns)| patterns.verdict(relative(*base), is_dir))
            .next();
        verdict == Some(true)
    }

    fn gitignore_push(&mut self, directory: &OwnedFd, path: &str) -> bool {
        let Some(text) = read_small(directory, c".gitignore", 64 << 10) else {
            return false;
        };
        let patterns = Patterns::of_gitignore(&String::from_utf8_lossy(&text));
        let some = !patterns.is_empty();
        if some {
            self.gitignores.push((path.len(), patterns));
        }
        some
    }

    fn wanted(&self, path: &str, name: &str, is_dir: bool) -> bool {
        let options = self.options;
        if let Some(filter) = &options.path_filter
            && !path.to_lowercase().contains(filter)
        {
            return false;
        }
        if !options.include_ext.is_empty() {
            let ext = extension(name).map(str::to_ascii_lowercase);
            return !is_dir && ext.is_some_and(|ext| options.include_ext.contains(&ext));
        }
        !options.code_only || (!is_dir && is_code(name))
    }

    fn entry(
        &mut self,
        directory: &OwnedFd,
        name: &CString,
        text: &str,
        path: &str,
        stat: &Stat,
    ) -> Entry {
        let options = self.options;
        let mut entry = Entry {
            name: text.to_owned(),
            path: path.to_owned(),
            kind: type_of(stat),
            ..Entry::default()
        };
        let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
        if options.extensions && is_file {
            entry.extension = extension(text).map(str::to_owned);
        }
        if options.light {
            return entry;
        }
        entry.size = Some(stat.st_size);
        entry.modified = Some(modified(stat));
        if is_file && options.hash {
            entry.hash = self.hash(directory, name);
        }
        if is_file && options.content {
            entry.content = self.content(directory, name);
        }
        entry
    }

    fn hash(&self, directory: &OwnedFd, name: &CString) -> Option<String> {
        let mut file = open_file(directory, name)?;
        let mut hash = seal::hash::Sha256::new();
        let mut chunk = vec![0; 64 << 10];
        loop {
            let len = file.read(&mut chunk).ok()?;
            if len == 0 {
                return Some(hex::encode(hash.finish()));
            }
            hash.update(&chunk[..len]);
            if Instant::now() > self.deadline || self.cancelled.load(Relaxed) {
                return None;
            }
        }
    }

    /// A text file's content, while the budget lasts.
    fn content(&mut self, directory: &OwnedFd, name: &CString) -> Option<String> {
        let bytes = read_small(directory, name, self.content_left_bytes)?;
        let text = String::from_utf8(bytes)
            .ok()
            .filter(|text| !text.contains('\0'))?;
        self.content_left_bytes -= text.len() as u64;
        Some(text)
    }
}

/// The path that children's paths begin with.
fn base(path: &str) -> String {
    path.trim_end_matches('/').to_owned()
}

fn open_top(root: &FsRoot, options: &Options) -> Result<OwnedFd, Failure> {
    root.open(
        &options.path,
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )
    .map_err(|e| Failure::file(&e, &options.path))
}

fn open_directory(directory: &OwnedFd, name: &CString) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory.as_fd(), name.as_c_str(), flags, Mode::empty())
}

/// A regular file in `directory`, not followed if a symlink.
fn open_file(directory: &OwnedFd, name: impl rustix::path::Arg) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory.as_fd(), name, flags, Mode::empty()).ok()?;
    let file = File::from(fd);
    file.metadata().ok()?.is_file().then_some(file)
}

/// A whole file, unless it is longer than `max_bytes`.
fn read_small(
    directory: &OwnedFd,
    name: impl rustix::path::Arg,
    max_bytes: u64,
) -> Option<Vec<u8>> {
    let file = open_file(directory, name)?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= max_bytes).then_some(bytes)
}
