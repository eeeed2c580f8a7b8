//! `casemate ws archive …`: archives of a workspace's files.

use crate::client::Client;
use crate::ws::{print, slow, text};
use reqwest::Method;
use serde_json::{Value, json};

/// What to do with archives.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Keep a tar of a running workspace's files, encrypted under a key of its own.
    Create {
        /// Id or slug.
        workspace: String,
        /// Its version; by default the next number.
        #[arg(long)]
        version: Option<String>,
        /// A path that it holds; everything on the workspace's disk and image without any.
        #[arg(long = "path")]
        paths: Vec<String>,
        /// A path that it leaves out.
        #[arg(long)]
        exclude: Vec<String>,
    },
    /// List archives, the oldest first.
    Ls {
        /// Id or slug.
        workspace: String,
    },
    /// Put back its files, each in the place of the one that is there.
    Restore {
        /// Id or slug.
        workspace: String,
        /// The archive's version.
        version: String,
    },
    /// Delete one, or all.
    Rm {
        /// Id or slug.
        workspace: String,
        /// Its version.
        #[arg(required_unless_present = "all")]
        version: Option<String>,
        /// All of them.
        #[arg(long, conflicts_with = "version")]
        all: bool,
    },
}

/// Does it.
///
/// # Errors
/// [`crate::client::ApiError`].
pub async fn run(client: &Client, command: Command, as_json: bool) -> anyhow::Result<()> {
    let of = |workspace: &str| format!("/workspace/{workspace}/archives");
    match command {
        Command::Create {
            workspace,
            version,
            paths,
            exclude,
        } => {
            let body =
                json!({ "version": version, "vm_paths": paths, "exclude_vm_paths": exclude });
            let path = of(&workspace);
            let made = slow("archiving", client.post(&path, &body)).await?;
            print(as_json, &made["archive"], |a| {
                let number = |name: &str| a[name].as_u64().unwrap_or(0);
                let skipped = match number("skipped") {
                    0 => String::new(),
                    n => format!("; {n} could not be read"),
                };
                format!(
                    "{workspace} has archive {}: {} entries, {} bytes{skipped}",
                    text(a, "version"),
                    number("entries"),
                    number("size"),
                )
            });
        }
        Command::Ls { workspace } => {
            let list = client.get(&of(&workspace)).await?;
            print(as_json, &list["archives"], |list| {
                let head = format!(
                    "{:<24} {:<26} {:>14} {}",
                    "VERSION", "CREATED", "BYTES", "PATHS"
                );
                let all = list.as_array().into_iter().flatten();
                all.fold(head, |out, a| out + "\n" + &row(a))
            });
        }
        Command::Restore { workspace, version } => {
            let path = format!("{}/{version}/restore", of(&workspace));
            let done = slow("putting files back", client.post(&path, &json!({}))).await?;
            print(as_json, &done, |a| {
                let number = |name: &str| a["restored"][name].as_u64().unwrap_or(0);
                let (entries, skipped) = (number("entries"), number("skipped"));
                format!("{workspace} has {entries} entries back; {skipped} could not be")
            });
        }
        Command::Rm {
            workspace, version, ..
        } => {
            let path = match version {
                Some(version) => format!("{}/{version}", of(&workspace)),
                None => of(&workspace),
            };
            let answer = client.control(Method::DELETE, &path, None).await?;
            print(as_json, &answer, |a| {
                let later = a["accepted"] == true;
                let word = if later { "being deleted" } else { "deleted" };
                word.to_owned()
            });
        }
    }
    Ok(())
}

fn row(a: &Value) -> String {
    let paths = a["vm_paths"].as_array().into_iter().flatten();
    let paths: Vec<&str> = paths.filter_map(Value::as_str).collect();
    format!(
        "{:<24} {:<26} {:>14} {}",
        text(a, "version"),
        text(a, "created_at"),
        a["size"].as_u64().unwrap_or(0),
        paths.join(" ")
    )
}
