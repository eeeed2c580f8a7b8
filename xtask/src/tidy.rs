//! What no compiler checks: crate direction, invariants and their tests, size of files, words that
//! don't belong here. `cargo xtask tidy` prints every fault; its own test runs it too.

use anyhow::{Context as _, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest source file, lines. A longer one says why in its module doc: `Size: …`.
const FILE_MAX_LINES: usize = 800;

/// Crates that any other may use, in the order of their own direction.
const VOCABULARY: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("seal", &[]),
    ("api", &["model"]),
    ("tlog", &["seal"]),
    ("service", &["model", "api", "seal"]),
    ("vmm", &["model", "api"]),
];

/// Crates of one process's own helpers, and who links them: a closed protocol's both ends.
const PARTS: &[(&str, &[&str])] = &[
    ("warden", &["jail", "net", "volumes"]),
    ("net", &["jail"]),
    ("volumes", &["jail"]),
    ("cli", &["image"]),
];

/// Root code: at most so many lines of code in the crate.
const CODE_MAX_LINES: &[(&str, usize)] = &[("warden", 2000)];

/// Crates that must do without `service`: no async runtime, no shared habits, as small as can be.
const BARE: &[&str] = &["disk", "warden", "jail", "net", "volumes", "vmm", "guest"];

/// Runs every check.
///
/// # Errors
/// All faults, a line each.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let mut faults = Vec::new();
    crates(root, &mut faults)?;
    let files = tracked(root)?;
    invariants(root, &files, &mut faults)?;
    sizes(root, &files, &mut faults)?;
    code(root, &files, &mut faults)?;
    words(root, &files, &mut faults)?;
    if !faults.is_empty() {
        bail!("{} faults:\n{}", faults.len(), faults.join("\n"));
    }
    println!("tidy: {} files, no fault", files.len());
    Ok(())
}

/// I-1: no daemon depends on another, and the vocabulary has a direction.
fn crates(root: &Path, faults: &mut Vec<String>) -> anyhow::Result<()> {
    let out = Command::new("cargo")
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(root)
        .output()
        .context("run cargo metadata")?;
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    let short = |name: &str| name.strip_prefix("casemate-").unwrap_or(name).to_owned();
    let vocabulary: BTreeMap<&str, &[&str]> = VOCABULARY.iter().copied().collect();
    for package in metadata["packages"]
        .as_array()
        .context("cargo metadata: no packages")?
    {
        let name = short(package["name"].as_str().unwrap_or_default());
        // The command line and the project's own tasks may look at anything.
        if name == "xtask" {
            continue;
        }
        for dep in package["dependencies"].as_array().into_iter().flatten() {
            let Some(full) = dep["name"].as_str().filter(|n| n.starts_with("casemate-")) else {
                continue;
            };
            let dep_name = short(full);
            let dev = dep["kind"] == "dev";
            let part = PARTS
                .iter()
                .any(|(of, parts)| *of == name && parts.contains(&&*dep_name));
            // A test may start a neighbour for real.
            if dev || part {
                continue;
            }
            match vocabulary.get(name.as_str()) {
                Some(allowed) if !allowed.contains(&dep_name.as_str()) => faults.push(format!(
                    "crates/{name}: depends on {dep_name}, may only on {allowed:?}"
                )),
                None if !vocabulary.contains_key(dep_name.as_str()) => faults.push(format!(
                    "crates/{name}: depends on {dep_name}, a crate of another process: meet in api"
                )),
                _ => {}
            }
            if dep_name == "service" && BARE.contains(&name.as_str()) {
                faults.push(format!("crates/{name}: must do without service"));
            }
        }
    }
    Ok(())
}

/// The invariants that ARCHITECTURE.md states, and the tests named after them, are the same set.
fn invariants(root: &Path, files: &[PathBuf], faults: &mut Vec<String>) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md"))?;
    let stated: BTreeSet<u32> = text
        .lines()
        .filter_map(|l| l.strip_prefix("- **I-")?.split("**").next()?.parse().ok())
        .collect();
    let mut tested = BTreeSet::new();
    for file in files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| e == "rs"))
    {
        let source = std::fs::read_to_string(root.join(file))?;
        for line in source.lines() {
            let Some(rest) = line.trim_start().split("fn i").nth(1) else {
                continue;
            };
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            if rest[digits.len()..].starts_with('_')
                && let Ok(n) = digits.parse::<u32>()
            {
                tested.insert(n);
            }
        }
    }
    for n in stated.difference(&tested) {
        faults.push(format!(
            "ARCHITECTURE.md states I-{n}; no test is named i{n}_…"
        ));
    }
    for n in tested.difference(&stated) {
        faults.push(format!(
            "a test is named i{n}_…; ARCHITECTURE.md states no I-{n}"
        ));
    }
    Ok(())
}

fn sizes(root: &Path, files: &[PathBuf], faults: &mut Vec<String>) -> anyhow::Result<()> {
    for file in files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| e == "rs"))
    {
        let text = std::fs::read_to_string(root.join(file))?;
        let lines = text.lines().count();
        if lines > FILE_MAX_LINES && !text.lines().any(|l| l.starts_with("//! Size: ")) {
            faults.push(format!(
                "{}: {lines} lines, at most {FILE_MAX_LINES}",
                file.display()
            ));
        }
        if !text.starts_with("//!") && !text.starts_with("#!") {
            faults.push(format!("{}: no module doc", file.display()));
        }
    }
    Ok(())
}

/// What runs as root is as little as was promised: lines without tests, comments and blanks.
fn code(root: &Path, files: &[PathBuf], faults: &mut Vec<String>) -> anyhow::Result<()> {
    for (name, max) in CODE_MAX_LINES {
        let dir = Path::new("crates").join(name).join("src");
        let mut lines = 0;
        for file in files.iter().filter(|f| f.starts_with(&dir)) {
            lines += code_lines(&std::fs::read_to_string(root.join(file))?);
        }
        if lines > *max {
            faults.push(format!(
                "crates/{name}: {lines} lines of code, at most {max}"
            ));
        }
    }
    Ok(())
}

fn code_lines(text: &str) -> usize {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or("");
    let is_code = |l: &&str| !l.is_empty() && !l.starts_with("//");
    text.lines().map(str::trim).filter(is_code).count()
}

/// Hosts of registries, private paths and unfinished work don't belong in the tree.
fn words(root: &Path, files: &[PathBuf], faults: &mut Vec<String>) -> anyhow::Result<()> {
    // Written so that this file does not hold them.
    let banned = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("deb.debian", ".org"),
        concat!("registry.npmjs", ".org"),
        concat!("crates", ".io/api"),
        concat!("/wo", "rk/"),
        concat!("unimplemented", "!("),
        concat!("todo", "!("),
    ];
    for file in files {
        if file
            .file_name()
            .is_some_and(|n| n == "Cargo.lock" || n == "package-lock.json")
        {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            for word in banned.iter().filter(|w| line.contains(*w)) {
                faults.push(format!("{}:{}: {word}", file.display(), number + 1));
            }
        }
    }
    Ok(())
}

/// Files that git tracks, or would.
fn tracked(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let out = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ])
        .current_dir(root)
        .output()
        .context("run git ls-files")?;
    Ok(String::from_utf8(out.stdout)?
        .split('\0')
        .filter(|f| !f.is_empty() && root.join(f).is_file())
        .map(PathBuf::from)
        .collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn i1_no_daemon_depends_on_another() {
        let mut faults = Vec::new();
        crates(&root(), &mut faults).unwrap();
        assert_eq!(faults, Vec::<String>::new());
    }

    #[test]
    fn code_is_what_is_no_test_comment_or_blank() {
        let text = "//! Doc.\n\nuse a;\n/// Doc.\nfn f() {} // why\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(code_lines(text), 2);
    }

    #[test]
    fn the_tree_is_tidy() {
        run(&root()).unwrap();
    }
}
